//! The gather kernel: forward and dgrad by haloed tiles.

use super::*;
use crate::activation::Activation;
use crate::conv1d::parked::Parked;
use crate::gemm::element::Element;
use crate::ptx;
use crate::tile_scheduler::div;
use crate::unroll::unroll;

/// A thread's results: eight rows of eight columns.
type Sums = [[f32; 8]; 8];

/// What a block works on; the numbers wait in shared memory.
#[derive(Clone, Copy)]
struct Block(Parked);

impl Block {
    /// Finds out and parks it at `at`.
    ///
    /// # Safety
    /// As [`Parked::put`]; a barrier must follow.
    #[inline(always)]
    unsafe fn park(params: &GatherParams, index: u32, at: u32) {
        let (shape, plan) = (&params.shape, &params.plan);
        let mut rest = index;
        let mut take = |count: u32| {
            let quotient = div(rest, count);
            let index = rest - quotient * count;
            rest = quotient;
            index
        };
        let row_tile = take(plan.row_tiles);
        let column_tile = take(plan.column_tiles);
        let batch = if plan.flat == 0 { take(shape.batch) } else { 0 };
        let group = take(shape.groups);
        let residue = rest;
        let (rows, depth, in_length) = if params.dgrad == 0 {
            (shape.group_out(), shape.group_in(), shape.in_length)
        } else {
            (shape.group_in(), shape.group_out(), shape.out_length)
        };
        let walk =
            if params.dgrad == 0 { shape.forward_gather() } else { shape.dgrad_gather(residue) };
        // Loops that are known to run once keep the sums in place. So a walk without taps has one,
        // over a tensor without positions.
        let (taps, in_length) = if walk.taps == 0 { (1, 0) } else { (walk.taps, in_length) };
        let values = [
            walk.out_first,
            walk.out_step,
            walk.out_count,
            walk.in_first as u32,
            taps,
            walk.first_tap,
            walk.tap_stride as u32,
            batch,
            group,
            row_tile * plan.tile.rows(),
            column_tile * plan.tile.columns(),
            rows,
            depth,
            in_length,
            walk.in_step,
            walk.tap_step,
        ];
        // SAFETY: the caller's contract.
        unsafe { Parked::put(at, values) };
    }

    #[inline(always)]
    fn out_first(self) -> u32 {
        self.0.get(0)
    }
    #[inline(always)]
    fn out_step(self) -> u32 {
        self.0.get(1)
    }
    #[inline(always)]
    fn out_count(self) -> u32 {
        self.0.get(2)
    }
    #[inline(always)]
    fn in_first(self) -> u32 {
        self.0.get(3)
    }
    /// Taps of the walk, at least 1.
    #[inline(always)]
    fn taps(self) -> u32 {
        self.0.get(4)
    }
    #[inline(always)]
    fn first_tap(self) -> u32 {
        self.0.get(5)
    }
    #[inline(always)]
    fn tap_stride(self) -> u32 {
        self.0.get(6)
    }
    /// Sequence, 0 if flat.
    #[inline(always)]
    fn batch(self) -> u32 {
        self.0.get(7)
    }
    #[inline(always)]
    fn group(self) -> u32 {
        self.0.get(8)
    }
    /// First row in the group.
    #[inline(always)]
    fn first_row(self) -> u32 {
        self.0.get(9)
    }
    /// First column of the tile, in positions of the walk.
    #[inline(always)]
    fn first_column(self) -> u32 {
        self.0.get(10)
    }
    /// Rows of a group.
    #[inline(always)]
    fn rows(self) -> u32 {
        self.0.get(11)
    }
    /// Depth of a group.
    #[inline(always)]
    fn depth(self) -> u32 {
        self.0.get(12)
    }
    /// Positions of the tensor that is gathered from, 0 for a walk without taps.
    #[inline(always)]
    fn in_length(self) -> u32 {
        self.0.get(13)
    }
    #[inline(always)]
    fn in_step(self) -> u32 {
        self.0.get(14)
    }
    #[inline(always)]
    fn tap_step(self) -> u32 {
        self.0.get(15)
    }

    /// Sequence and position in the walk of a column of the tile, if there is one.
    #[inline(always)]
    fn column(self, params: &GatherParams, column: u32) -> Option<(u32, u32)> {
        let at = self.first_column() + column;
        let count = self.out_count();
        if params.plan.flat == 0 {
            return (at < count).then_some((self.batch(), at));
        }
        let batch = div(at, count);
        (batch < params.shape.batch).then_some((batch, at - batch * count))
    }
}

/// Depth of a stage.
#[inline(always)]
fn depth_of(params: &GatherParams) -> u32 {
    1 << ptx::opaque_u32(params.plan.log2_depth)
}

/// Where a stage starts.
#[derive(Clone, Copy)]
struct Stage {
    /// First input channel in the group.
    channel: u32,
    /// First tap of the walk.
    tap: u32,
    /// Channels and taps that exist, of those that the plan provides for.
    channels: u32,
    taps: u32,
}

/// Loads the positions of a stage, with their halo, as f32.
///
/// # Safety
/// The tensor is readable, and no thread reads the stage before the next barrier.
#[inline(always)]
unsafe fn load_input<E: Element>(params: &GatherParams, block: Block, stage: Stage, smem: u32) {
    let (input, flat) = (params.input.opaque(), params.plan.flat);
    let (span, depth) = (ptx::opaque_u32(params.plan.span), depth_of(params));
    let size = u64::from(E::SIZE);
    let channel = u64::from(block.group() * block.depth() + stage.channel);
    let from_tap = block.in_first().wrapping_add(stage.tap * block.tap_step());
    let (in_step, in_length) = (block.in_step(), block.in_length());
    // Of a tile that is not flat.
    let first = from_tap.wrapping_add(block.first_column() * in_step);
    let batch = block.batch();
    let by_vector = input.channel == 1
        && (input.address | (input.batch * size) | (input.position * size) | (channel * size)) % 16
            == 0;
    let mut entry = ptx::opaque_u32(ptx::thread_index());
    while entry < span {
        let (batch, position, exists) = if flat == 0 {
            (batch, first.wrapping_add(entry), true)
        } else {
            let (batch, q) = block.column(params, entry).unwrap_or((u32::MAX, 0));
            let position = from_tap.wrapping_add(q * in_step);
            (batch, position, batch != u32::MAX)
        };
        // As unsigned, a position before the first is beyond the last.
        let exists = exists && position < in_length;
        let element = u64::from(batch) * input.batch
            + channel * input.channel
            + u64::from(position) * input.position;
        let address = input.address.wrapping_add(element.wrapping_mul(size));
        let mut first = 0;
        while first < depth {
            ptx::nounroll();
            let mut values = [0.0; 8];
            if exists && by_vector && first + 8 <= stage.channels {
                let at = address + u64::from(first) * size;
                // SAFETY: eight channels of an existing position; 16-aligned, as `by_vector` says
                // and eight elements are one or two times 16 bytes.
                let (low, high) = unsafe {
                    let low = ptx::ld_global_nc_v4_u32(at);
                    (low, if E::SIZE == 4 { ptx::ld_global_nc_v4_u32(at + 16) } else { low })
                };
                unroll!(i: usize in [0 1 2 3 4 5 6 7] {
                    values[i] = if E::SIZE == 4 {
                        E::widen(if i < 4 { low[i % 4] } else { high[i % 4] })
                    } else {
                        E::widen((low[i / 2] >> (i % 2 * 16)) & 0xFFFF)
                    };
                });
            } else {
                let mut bits = [0; 8];
                unroll!(i: u32 in [0 1 2 3 4 5 6 7] {
                    if exists && first + i < stage.channels {
                        let at = address + u64::from(first + i) * input.channel * size;
                        // SAFETY: an existing channel of an existing position.
                        bits[i as usize] = unsafe { E::load(at) };
                    }
                });
                unroll!(i: usize in [0 1 2 3 4 5 6 7] {
                    values[i] = E::widen(bits[i]);
                });
            }
            unroll!(i: u32 in [0 1 2 3 4 5 6 7] {
                if first + i < depth {
                    let at = smem + ((first + i) * span + entry) * 4;
                    // SAFETY: inside the stage, a place of this thread's own.
                    unsafe { ptx::st_shared_f32(at, values[i as usize]) };
                }
            });
            first += 8;
        }
        entry += THREADS;
    }
}

/// Loads the taps of a stage as f32, as `[depth][taps][rows + ROW_PAD]`.
///
/// # Safety
/// The filter is readable, and no thread reads the stage before the next barrier.
#[inline(always)]
unsafe fn load_filter<E: Element>(params: &GatherParams, block: Block, stage: Stage, smem: u32) {
    let filter = params.filter.opaque();
    let log2_depth = ptx::opaque_u32(params.plan.log2_depth);
    let log2_rows = ptx::opaque_u32(params.plan.tile.log2_rows());
    let (rows, stage_taps) = (1 << log2_rows, ptx::opaque_u32(params.plan.taps));
    // Rows are output channels forward and input channels backward.
    let (row_stride, depth_stride) =
        if params.dgrad == 0 { (filter.out, filter.input) } else { (filter.input, filter.out) };
    let first = u64::from(block.group() * params.shape.group_out()) * filter.out
        + u64::from(block.first_row()) * row_stride
        + u64::from(stage.channel) * depth_stride;
    let total = stage.taps << (log2_depth + log2_rows);
    let (first_tap, tap_stride) = (block.first_tap(), block.tap_stride());
    // Rows that exist. Zeros where there are no positions, for an infinite tap times zero is NaN.
    let rows_left = if block.in_length() == 0 { 0 } else { block.rows() - block.first_row() };
    let mut index = ptx::opaque_u32(ptx::thread_index());
    while index < total {
        ptx::nounroll();
        let mut values = [0.0; 4];
        let mut at = [0; 4];
        unroll!(i: u32 in [0 1 2 3] {
            let index = index + i * THREADS;
            // Neighbouring threads along whichever axis is the more contiguous.
            let (row, channel) = if params.dgrad == 0 {
                let channel = index & ((1 << log2_depth) - 1);
                ((index >> log2_depth) & (rows - 1), channel)
            } else {
                (index & (rows - 1), (index >> log2_rows) & ((1 << log2_depth) - 1))
            };
            let tap = index >> (log2_depth + log2_rows);
            let filter_tap =
                first_tap.wrapping_add((stage.tap + tap).wrapping_mul(tap_stride));
            at[i as usize] = smem + ((channel * stage_taps + tap) * (rows + ROW_PAD) + row) * 4;
            if index < total && row < rows_left && channel < stage.channels {
                let element = first
                    + u64::from(row) * row_stride
                    + u64::from(channel) * depth_stride
                    + u64::from(filter_tap) * filter.tap;
                // SAFETY: an existing tap of an existing pair of channels.
                let bits = unsafe { E::load(filter.address + element * u64::from(E::SIZE)) };
                values[i as usize] = E::widen(bits);
            }
        });
        unroll!(i: u32 in [0 1 2 3] {
            if index + i * THREADS < total {
                // SAFETY: inside the stage, a place of this thread's own.
                unsafe { ptx::st_shared_f32(at[i as usize], values[i as usize]) };
            }
        });
        index += 4 * THREADS;
    }
}

/// Adds the products of one tap of one channel: `x` is the address of the thread's first column,
/// `step` the bytes from one to the next, `w` the address of its first row.
///
/// # Safety
/// Both stages are written, and a barrier has passed since.
#[inline(always)]
unsafe fn multiply(sums: &mut Sums, x: u32, step: u32, w: u32) {
    let mut columns = [0.0; 8];
    unroll!(j: u32 in [0 1 2 3 4 5 6 7] {
        // SAFETY: inside the stage.
        columns[j as usize] = unsafe { ptx::ld_shared_f32(x + j * step) };
    });
    // SAFETY: inside the stage; rows are a multiple of 4, and so are the pads.
    let rows = unsafe { [ptx::ld_shared_v4_f32(w), ptx::ld_shared_v4_f32(w + 16)] };
    unroll!(i: usize in [0 1 2 3 4 5 6 7] {
        unroll!(j: usize in [0 1 2 3 4 5 6 7] {
            sums[i][j] = ptx::fma_rn_f32(rows[i / 4][i % 4], columns[j], sums[i][j]);
        });
    });
}

/// Adds the products of a stage.
///
/// # Safety
/// As [`multiply`].
#[inline(always)]
unsafe fn multiply_stage<const UNIT: bool>(
    sums: &mut Sums,
    plan: &GatherPlan,
    stage: Stage,
    [x, tap_bytes, step]: [u32; 3],
    w: u32,
) {
    let row_bytes = (ptx::opaque_u32(plan.tile.rows()) + ROW_PAD) * 4;
    let (span, taps) = (ptx::opaque_u32(plan.span), ptx::opaque_u32(plan.taps));
    let mut channel = 0;
    loop {
        ptx::nounroll();
        let mut x = x + channel * span * 4;
        let mut w = w + channel * taps * row_bytes;
        let mut tap = 0;
        loop {
            ptx::nounroll();
            // A constant step becomes the immediates of the loads.
            let step = if UNIT { 128 } else { step };
            // SAFETY: the caller's contract.
            unsafe { multiply(sums, x, step, w) };
            x += tap_bytes;
            w += row_bytes;
            tap += 1;
            if tap >= stage.taps {
                break;
            }
        }
        channel += 1;
        if channel >= stage.channels {
            break;
        }
    }
}

/// The activation of eight results, chosen once for all of them, and their bits once rounded.
#[inline(always)]
pub(in crate::conv1d) fn finish<E: Element>(activation: Activation, values: [f32; 8]) -> [u32; 8] {
    let mut bits = [0; 8];
    macro_rules! each {
        ($($variant:ident)+) => {
            match activation {
                $(Activation::$variant => {
                    unroll!(i: usize in [0 1 2 3 4 5 6 7] {
                        bits[i] = E::round(Activation::$variant.apply(values[i]));
                    });
                })+
            }
        };
    }
    each!(None Relu Gelu GeluTanh Silu);
    bits
}

/// Bias, activation, rounding and the stores of a thread's results.
///
/// Half of them at a time go through shared memory, at places of the thread's own, so that one
/// loop, which is not unrolled, holds the code that follows.
///
/// # Safety
/// The output is writable, the bias 0 or readable; a barrier has passed since shared memory was
/// last read.
#[inline(always)]
unsafe fn store<E: Element>(params: &GatherParams, block: Block, sums: &Sums, smem: u32) {
    let output = params.output.opaque();
    let size = u64::from(E::SIZE);
    let thread = ptx::opaque_u32(ptx::thread_index());
    let (first, column) = params.plan.tile.thread(thread);
    let row = block.first_row() + first;
    let rows = block.rows().saturating_sub(row);
    let channel = u64::from(block.group() * block.rows() + row);
    let own = smem + thread * 4;
    let mut bias = [0.0; 8];
    unroll!(i: u32 in [0 1 2 3 4 5 6 7] {
        if params.bias != 0 && i < rows {
            let address = params.bias + (channel + u64::from(i)) * size;
            // SAFETY: an existing channel.
            bias[i as usize] = E::widen(unsafe { E::load(address) });
        }
    });
    let activation = Activation::from_code(params.activation);
    let mut half = 0;
    while half < 2 {
        ptx::nounroll();
        macro_rules! put {
            ($from:literal) => {
                unroll!(j: u32 in [0 1 2 3] {
                    unroll!(i: u32 in [0 1 2 3 4 5 6 7] {
                        // SAFETY: below 32 · 256 values, a place of this thread's own.
                        unsafe {
                            ptx::st_shared_f32(
                                own + (j * 8 + i) * THREADS * 4,
                                sums[i as usize][$from + j as usize],
                            );
                        }
                    });
                });
            };
        }
        if half == 0 {
            put!(0);
        } else {
            put!(4);
        }
        let mut j = 0;
        while j < 4 {
            ptx::nounroll();
            let mut values = [0.0; 8];
            unroll!(i: u32 in [0 1 2 3 4 5 6 7] {
                // SAFETY: written by this thread above.
                values[i as usize] = unsafe {
                    ptx::ld_shared_f32(own + (j * 8 + i) * THREADS * 4)
                } + bias[i as usize];
            });
            let bits = finish::<E>(activation, values);
            if let Some((batch, q)) = block.column(params, column + (half * 4 + j) * 32) {
                let position = block.out_first() + q * block.out_step();
                let element = u64::from(batch) * output.batch
                    + channel * output.channel
                    + u64::from(position) * output.position;
                // SAFETY: an existing position; `store_channels` keeps to existing channels.
                unsafe {
                    let address = output.address + element * size;
                    store_channels::<E>(address, output.channel * size, bits, rows);
                }
            }
            j += 1;
        }
        half += 1;
    }
}

/// Stores the first `count` of eight channels of one position.
///
/// # Safety
/// They exist and are writable.
#[inline(always)]
pub(in crate::conv1d) unsafe fn store_channels<E: Element>(
    address: u64,
    stride: u64,
    bits: [u32; 8],
    count: u32,
) {
    if stride == u64::from(E::SIZE) && count >= 8 && address % 16 == 0 {
        let [a, b, c, d, e, f, g, h] = bits;
        // SAFETY: eight neighbouring elements, 16-aligned.
        unsafe {
            if E::SIZE == 4 {
                ptx::st_global_v4_u32(address, [a, b, c, d]);
                ptx::st_global_v4_u32(address + 16, [e, f, g, h]);
            } else {
                let pairs = [a | (b << 16), c | (d << 16), e | (f << 16), g | (h << 16)];
                ptx::st_global_v4_u32(address, pairs);
            }
        }
        return;
    }
    unroll!(i: u32 in [0 1 2 3 4 5 6 7] {
        if i < count {
            // SAFETY: an existing channel.
            unsafe { E::store(address + u64::from(i) * stride, bits[i as usize]) };
        }
    });
}

/// Two blocks share a multiprocessor, which leaves 128 registers a thread.
#[inline(always)]
pub(super) fn mark() {
    // SAFETY: comments for `cargo xtask ptx`.
    unsafe {
        core::arch::asm!(
            "// kasmina: .maxntid {threads}, 1, 1",
            "// kasmina: .minnctapersm 2",
            threads = const THREADS,
            options(nomem, nostack, preserves_flags),
        );
    }
}

/// One tile of the output.
///
/// # Safety
/// As the entries': tensors and filter are as the strides say, nothing else writes them while the
/// kernel runs, and the grid is the plan's.
#[inline(always)]
pub(super) unsafe fn gather<E: Element>(params: &GatherParams) {
    mark();
    // SAFETY: the caller's contract.
    unsafe { tile::<E>(params, ptx::block_index()) };
}

/// The tile with this number.
///
/// # Safety
/// As [`gather`]; the whole block calls it, and no thread is still at another tile.
#[inline(always)]
pub(super) unsafe fn tile<E: Element>(params: &GatherParams, index: u32) {
    let plan = &params.plan;
    let smem = ptx::dynamic_smem();
    // SAFETY: one thread parks, before the barrier that all threads meet.
    let block = unsafe {
        if ptx::thread_index() == 0 {
            Block::park(params, index, smem + PARKED);
        }
        ptx::bar_sync::<0, THREADS>();
        Block(Parked::at(smem + PARKED))
    };
    let mut sums: Sums = [[0.0; 8]; 8];
    let (mut channel, mut tap) = (0, 0);
    loop {
        ptx::nounroll();
        let left = (block.depth() - channel, block.taps() - tap);
        let depth = depth_of(params);
        let stage = Stage {
            channel,
            tap,
            channels: if left.0 < depth { left.0 } else { depth },
            taps: if left.1 < plan.taps { left.1 } else { plan.taps },
        };
        // SAFETY: a stage is written between two barriers and read between the next two. The
        // loops depend on the block alone, so all threads meet at each barrier.
        unsafe {
            let w_smem = smem + (ptx::opaque_u32(plan.span) * depth * 4).next_multiple_of(16);
            ptx::bar_sync::<0, THREADS>();
            load_input::<E>(params, block, stage, smem);
            load_filter::<E>(params, block, stage, w_smem);
            ptx::bar_sync::<0, THREADS>();
            let (row, column) = plan.tile.thread(ptx::opaque_u32(ptx::thread_index()));
            let w_at = w_smem + row * 4;
            // In a flat tile every column's position is stored next to the one before.
            let step = if plan.flat == 0 { block.in_step() } else { 1 };
            let x_at = smem + column * step * 4;
            let tap_bytes = block.tap_step() * 4;
            if step == 1 {
                multiply_stage::<true>(&mut sums, plan, stage, [x_at, tap_bytes, 128], w_at);
            } else {
                let x = [x_at, tap_bytes, step * 128];
                multiply_stage::<false>(&mut sums, plan, stage, x, w_at);
            }
        }
        tap += plan.taps;
        if tap >= block.taps() {
            tap = 0;
            channel += depth_of(params);
        }
        if channel >= block.depth() {
            break;
        }
    }
    // SAFETY: the barrier follows the last reads of the stages; what is parked lies behind the
    // 32 KiB that results go through.
    unsafe {
        ptx::bar_sync::<0, THREADS>();
        store::<E>(params, block, &sums, smem);
    }
}
