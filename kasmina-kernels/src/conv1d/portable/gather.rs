//! The gather kernel: forward and dgrad by haloed tiles.

use super::*;
use crate::activation::Activation;
use crate::conv1d::Gather;
use crate::conv1d::unroll::unroll;
use crate::gemm::portable::device::Element;
use crate::ptx;
use crate::tile_scheduler::div;

/// A thread's results: eight rows of eight columns.
type Sums = [[f32; 8]; 8];

/// What a block works on.
struct Block {
    walk: Gather,
    /// Sequence, 0 if flat.
    batch: u32,
    group: u32,
    /// First row in the group.
    first_row: u32,
    /// First column of the tile, in positions of the walk.
    first_column: u32,
    /// Rows and depth of a group.
    rows: u32,
    depth: u32,
    /// Positions of the tensor that is gathered from.
    in_length: u32,
}

impl Block {
    #[inline(always)]
    fn new(params: &GatherParams) -> Self {
        let (shape, plan) = (&params.shape, &params.plan);
        let mut rest = ptx::block_index();
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
        Self {
            walk: if params.dgrad == 0 {
                shape.forward_gather()
            } else {
                shape.dgrad_gather(residue)
            },
            batch,
            group,
            first_row: row_tile * plan.tile.rows(),
            first_column: column_tile * plan.tile.columns(),
            rows,
            depth,
            in_length,
        }
    }

    /// Sequence and position in the walk of a column of the tile, if there is one.
    #[inline(always)]
    fn column(&self, params: &GatherParams, column: u32) -> Option<(u32, u32)> {
        let at = self.first_column + column;
        let count = self.walk.out_count;
        if params.plan.flat == 0 {
            return (at < count).then_some((self.batch, at));
        }
        let batch = div(at, count);
        (batch < params.shape.batch).then_some((batch, at - batch * count))
    }
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
unsafe fn load_input<E: Element>(params: &GatherParams, block: &Block, stage: Stage, smem: u32) {
    let (plan, input) = (&params.plan, &params.input);
    let walk = &block.walk;
    let size = u64::from(E::SIZE);
    let depth = 1 << plan.log2_depth;
    let channel = u64::from(block.group * block.depth + stage.channel);
    let from_tap = walk.in_first.wrapping_add((stage.tap * walk.tap_step) as i32);
    let by_vector = input.channel == 1
        && (input.address | (input.batch * size) | (input.position * size) | (channel * size)) % 16
            == 0;
    let mut entry = ptx::thread_index();
    while entry < plan.span {
        let (batch, position, exists) = if plan.flat == 0 {
            let ahead = block.first_column * walk.in_step + entry;
            (block.batch, from_tap.wrapping_add(ahead as i32) as u32, true)
        } else {
            let (batch, q) = block.column(params, entry).unwrap_or((u32::MAX, 0));
            let position = from_tap.wrapping_add((q * walk.in_step) as i32) as u32;
            (batch, position, batch != u32::MAX)
        };
        // As unsigned, a position before the first is beyond the last.
        let exists = exists && position < block.in_length;
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
                    let at = smem + ((first + i) * plan.span + entry) * 4;
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
unsafe fn load_filter<E: Element>(params: &GatherParams, block: &Block, stage: Stage, smem: u32) {
    let (plan, filter) = (&params.plan, &params.filter);
    let (log2_depth, log2_rows) = (plan.log2_depth, plan.tile.log2_rows());
    let rows = plan.tile.rows();
    // Rows are output channels forward and input channels backward.
    let (row_stride, depth_stride) =
        if params.dgrad == 0 { (filter.out, filter.input) } else { (filter.input, filter.out) };
    let first = u64::from(block.group * params.shape.group_out()) * filter.out
        + u64::from(block.first_row) * row_stride
        + u64::from(stage.channel) * depth_stride;
    let total = stage.taps << (log2_depth + log2_rows);
    let mut index = ptx::thread_index();
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
            let walk_tap = (stage.tap + tap) as i32;
            let filter_tap = block.walk.first_tap as i32 + walk_tap * block.walk.tap_stride;
            at[i as usize] = smem + ((channel * plan.taps + tap) * (rows + ROW_PAD) + row) * 4;
            if index < total && block.first_row + row < block.rows && channel < stage.channels {
                let element = first
                    + u64::from(row) * row_stride
                    + u64::from(channel) * depth_stride
                    + u64::from(filter_tap as u32) * filter.tap;
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
    let row_bytes = (plan.tile.rows() + ROW_PAD) * 4;
    let mut channel = 0;
    while channel < stage.channels {
        ptx::nounroll();
        let mut x = x + channel * plan.span * 4;
        let mut w = w + channel * plan.taps * row_bytes;
        let mut tap = 0;
        while tap < stage.taps {
            ptx::nounroll();
            // A constant step becomes the immediates of the loads.
            let step = if UNIT { 128 } else { step };
            // SAFETY: the caller's contract.
            unsafe { multiply(sums, x, step, w) };
            x += tap_bytes;
            w += row_bytes;
            tap += 1;
        }
        channel += 1;
    }
}

/// The activation of eight results, chosen once for all of them.
#[inline(always)]
pub(in crate::conv1d) fn activate(activation: Activation, values: [f32; 8]) -> [f32; 8] {
    macro_rules! each {
        ($($variant:ident)+) => {
            match activation {
                $(Activation::$variant => values.map(|v| Activation::$variant.apply(v)),)+
            }
        };
    }
    each!(None Relu Gelu GeluTanh Silu)
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
unsafe fn store<E: Element>(params: &GatherParams, block: &Block, sums: &Sums, smem: u32) {
    let output = &params.output;
    let size = u64::from(E::SIZE);
    let (first, column) = params.plan.tile.thread(ptx::thread_index());
    let row = block.first_row + first;
    let rows = block.rows.saturating_sub(row);
    let channel = u64::from(block.group * block.rows + row);
    let own = smem + ptx::thread_index() * 4;
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
            let bits = activate(activation, values).map(E::round);
            if let Some((batch, q)) = block.column(params, column + (half * 4 + j) * 32) {
                let position = block.walk.out_first + q * block.walk.out_step;
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

/// One tile of the output.
///
/// # Safety
/// As the entries': tensors and filter are as the strides say, nothing else writes them while the
/// kernel runs, and the grid is the plan's.
#[inline(always)]
pub(super) unsafe fn gather<E: Element>(params: &GatherParams) {
    // Two blocks share a multiprocessor, which leaves 128 registers a thread.
    // SAFETY: comments for `cargo xtask ptx`.
    unsafe {
        core::arch::asm!(
            "// kasmina: .maxntid {threads}, 1, 1",
            "// kasmina: .minnctapersm 2",
            threads = const THREADS,
            options(nomem, nostack, preserves_flags),
        );
    }
    let block = Block::new(params);
    let plan = &params.plan;
    let smem = ptx::dynamic_smem();
    let w_smem = smem + ((plan.span << plan.log2_depth) * 4).next_multiple_of(16);
    let (row, column) = plan.tile.thread(ptx::thread_index());
    // In a flat tile every column's position is stored next to the one before.
    let step = if plan.flat == 0 { block.walk.in_step } else { 1 };
    let x_at = smem + column * step * 4;
    let w_at = w_smem + row * 4;
    let mut sums: Sums = [[0.0; 8]; 8];
    let mut channel = 0;
    while channel < block.depth {
        ptx::nounroll();
        let mut tap = 0;
        while tap < block.walk.taps {
            ptx::nounroll();
            let left = (block.depth - channel, block.walk.taps - tap);
            let depth = 1 << plan.log2_depth;
            let stage = Stage {
                channel,
                tap,
                channels: if left.0 < depth { left.0 } else { depth },
                taps: if left.1 < plan.taps { left.1 } else { plan.taps },
            };
            // SAFETY: a stage is written between two barriers and read between the next two. The
            // loops depend on the block alone, so all threads meet at each barrier.
            unsafe {
                ptx::bar_sync::<0, THREADS>();
                load_input::<E>(params, &block, stage, smem);
                load_filter::<E>(params, &block, stage, w_smem);
                ptx::bar_sync::<0, THREADS>();
                let tap_bytes = block.walk.tap_step * 4;
                if step == 1 {
                    multiply_stage::<true>(&mut sums, plan, stage, [x_at, tap_bytes, 128], w_at);
                } else {
                    let x = [x_at, tap_bytes, step * 128];
                    multiply_stage::<false>(&mut sums, plan, stage, x, w_at);
                }
            }
            tap += plan.taps;
        }
        channel += 1 << plan.log2_depth;
    }
    // SAFETY: the barrier follows the last reads of shared memory.
    unsafe {
        ptx::bar_sync::<0, THREADS>();
        store::<E>(params, &block, &sums, smem);
    }
}
