//! The gradients of filter and bias: partial sums over splits of batch × length, then their totals.

use super::*;
use crate::conv1d::parked::Parked;
use crate::gemm::element::Element;
use crate::ptx;
use crate::tile_scheduler::div;
use crate::unroll::unroll;

/// A thread's sums: eight output channels of eight pairs of input channel and tap.
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
    unsafe fn park(params: &WgradParams, at: u32) {
        let (shape, plan) = (&params.shape, &params.plan);
        let mut rest = ptx::block_index();
        let mut take = |count: u32| {
            let quotient = div(rest, count);
            let index = rest - quotient * count;
            rest = quotient;
            index
        };
        let first_row = take(plan.row_tiles) * plan.tile.rows();
        let first_channel = take(plan.channel_tiles) * plan.channels;
        let first_tap = take(plan.tap_tiles) * plan.taps;
        let group = take(shape.groups);
        let left = (shape.group_in() - first_channel, shape.kernel_size - first_tap);
        let channels = if left.0 < plan.channels { left.0 } else { plan.channels };
        let taps = if left.1 < plan.taps { left.1 } else { plan.taps };
        let values = [group, rest, first_row, first_channel, channels, first_tap, taps];
        // SAFETY: the caller's contract.
        unsafe { Parked::put(at, values) };
    }

    #[inline(always)]
    fn group(self) -> u32 {
        self.0.get(0)
    }
    #[inline(always)]
    fn split(self) -> u32 {
        self.0.get(1)
    }
    /// First output channel in the group.
    #[inline(always)]
    fn first_row(self) -> u32 {
        self.0.get(2)
    }
    /// First input channel in the group.
    #[inline(always)]
    fn first_channel(self) -> u32 {
        self.0.get(3)
    }
    /// How many of them there are.
    #[inline(always)]
    fn channels(self) -> u32 {
        self.0.get(4)
    }
    #[inline(always)]
    fn first_tap(self) -> u32 {
        self.0.get(5)
    }
    /// How many of them there are.
    #[inline(always)]
    fn taps(self) -> u32 {
        self.0.get(6)
    }
}

/// Sequence and output position of place `at` in stage `stage`, if there is one.
#[inline(always)]
fn place(params: &WgradParams, stage: u32, at: u32) -> Option<(u32, u32)> {
    let (shape, plan) = (&params.shape, &params.plan);
    if plan.flat == 0 {
        let (batch, position) = first_of(params, stage);
        let position = position + at;
        return (position < shape.out_length).then_some((batch, position));
    }
    let number = (stage << plan.log2_depth) + at;
    let length = ptx::opaque_u32(shape.out_length);
    let batch = div(number, length);
    (batch < shape.batch).then_some((batch, number - batch * length))
}

/// Sequence and first output position of a stage that is not flat.
#[inline(always)]
fn first_of(params: &WgradParams, stage: u32) -> (u32, u32) {
    let plan = &params.plan;
    let length = ptx::opaque_u32(params.shape.out_length);
    let per_row = (length + ((1 << plan.log2_depth) - 1)) >> plan.log2_depth;
    let batch = div(stage, per_row);
    (batch, (stage - batch * per_row) << plan.log2_depth)
}

/// Loads the positions of x that a stage meets, with their halo, as `[channels][pitch]`.
///
/// # Safety
/// The tensor is readable, and no thread reads the stage before the next barrier.
#[inline(always)]
unsafe fn load_x<E: Element>(params: &WgradParams, block: Block, stage: u32, smem: u32) {
    let (shape, x) = (&params.shape, params.x.opaque());
    let (span, pitch) = (ptx::opaque_u32(params.plan.span), ptx::opaque_u32(params.plan.pitch));
    let flat = params.plan.flat;
    let (stride, in_length) = (ptx::opaque_u32(shape.stride), ptx::opaque_u32(shape.in_length));
    let along_channels = x.channel == 1;
    let (fast, slow) =
        if along_channels { (block.channels(), span) } else { (span, block.channels()) };
    let first_channel = block.group() * shape.group_in() + block.first_channel();
    let tap_offset = (block.first_tap() * shape.dilation).wrapping_sub(shape.padding_left);
    let (batch, position) = if flat == 0 { first_of(params, stage) } else { (0, 0) };
    let first = tap_offset.wrapping_add(position * stride);
    let (skip_slow, skip_fast) = (div(THREADS, fast), THREADS - div(THREADS, fast) * fast);
    let thread = ptx::opaque_u32(ptx::thread_index());
    let mut s = div(thread, fast);
    let mut f = thread - s * fast;
    while s < slow {
        ptx::nounroll();
        let mut bits = [0; 4];
        let mut at = [u32::MAX; 4];
        unroll!(i: usize in [0 1 2 3] {
            if s < slow {
                let (channel, entry) = if along_channels { (f, s) } else { (s, f) };
                let (batch, from) = if flat == 0 {
                    (batch, first.wrapping_add(entry))
                } else {
                    match place(params, stage, entry) {
                        Some((batch, l)) => (batch, tap_offset.wrapping_add(l * stride)),
                        None => (0, u32::MAX),
                    }
                };
                // As unsigned, a position before the first is beyond the last.
                if from < in_length {
                    let element = u64::from(batch) * x.batch
                        + u64::from(first_channel + channel) * x.channel
                        + u64::from(from) * x.position;
                    // SAFETY: an existing position of an existing channel.
                    bits[i] = unsafe { E::load(x.address + element * u64::from(E::SIZE)) };
                }
                at[i] = smem + (channel * pitch + entry) * 4;
                s += skip_slow;
                f += skip_fast;
                if f >= fast {
                    f -= fast;
                    s += 1;
                }
            }
        });
        unroll!(i: usize in [0 1 2 3] {
            if at[i] != u32::MAX {
                // SAFETY: inside the stage, a place of this thread's own.
                unsafe { ptx::st_shared_f32(at[i], E::widen(bits[i])) };
            }
        });
    }
}

/// Loads the stage of dz as `[positions][rows + ROW_PAD]`.
///
/// # Safety
/// The tensor is readable, and no thread reads the stage before the next barrier.
#[inline(always)]
unsafe fn load_dz<E: Element>(params: &WgradParams, block: Block, stage: u32, smem: u32) {
    let (shape, dz) = (&params.shape, params.dz.opaque());
    let log2_rows = ptx::opaque_u32(params.plan.tile.log2_rows());
    let log2_depth = ptx::opaque_u32(params.plan.log2_depth);
    let rows = 1 << log2_rows;
    let total = 1 << (log2_rows + log2_depth);
    // Rows that exist.
    let rows_left = shape.group_out() - block.first_row();
    let first_channel = block.group() * shape.group_out() + block.first_row();
    let mut index = ptx::opaque_u32(ptx::thread_index());
    while index < total {
        ptx::nounroll();
        let mut bits = [0; 4];
        let mut at = [0; 4];
        unroll!(i: u32 in [0 1 2 3] {
            let index = index + i * THREADS;
            let (row, entry) = if dz.channel == 1 {
                (index & (rows - 1), index >> log2_rows)
            } else {
                (index >> log2_depth, index & ((1 << log2_depth) - 1))
            };
            at[i as usize] = smem + (entry * (rows + ROW_PAD) + row) * 4;
            if index < total
                && row < rows_left
                && let Some((batch, position)) = place(params, stage, entry)
            {
                let element = u64::from(batch) * dz.batch
                    + u64::from(first_channel + row) * dz.channel
                    + u64::from(position) * dz.position;
                // SAFETY: an existing position of an existing channel.
                bits[i as usize] = unsafe { E::load(dz.address + element * u64::from(E::SIZE)) };
            }
        });
        unroll!(i: u32 in [0 1 2 3] {
            if index + i * THREADS < total {
                // SAFETY: inside the stage, a place of this thread's own.
                unsafe { ptx::st_shared_f32(at[i as usize], E::widen(bits[i as usize])) };
            }
        });
        index += 4 * THREADS;
    }
}

/// The partial sums of a block.
///
/// # Safety
/// As the entries': the tensors are as the strides say, nothing writes them while the kernel runs,
/// the partial sums have room, and the grid is the plan's.
#[inline(always)]
pub(super) unsafe fn wgrad<E: Element>(params: &WgradParams) {
    let (shape, plan) = (&params.shape, &params.plan);
    let smem = ptx::dynamic_smem();
    // SAFETY: one thread parks, before the barrier that all threads meet.
    let block = unsafe {
        if ptx::thread_index() == 0 {
            Block::park(params, smem + PARKED);
        }
        if ptx::thread_index() < 64 {
            ptx::st_shared_f32(smem + BIAS_SUMS + ptx::thread_index() * 4, 0.0);
        }
        ptx::bar_sync::<0, THREADS>();
        Block(Parked::at(smem + PARKED))
    };
    let pairs = x_offsets(params, block);
    let mut sums: Sums = [[0.0; 8]; 8];
    let first = block.split() * plan.stages_per_split;
    let left = plan.stages - first;
    let last = first + if left < plan.stages_per_split { left } else { plan.stages_per_split };
    let mut stage = first;
    loop {
        ptx::nounroll();
        // SAFETY: a stage is written between two barriers and read between the next two; the loop
        // depends on the block alone, so all threads meet at each.
        let operand = ptx::opaque_u32(plan.channels) * plan.pitch * 4;
        let dz_smem = smem + operand.next_multiple_of(16);
        unsafe {
            ptx::bar_sync::<0, THREADS>();
            load_x::<E>(params, block, stage, smem);
            load_dz::<E>(params, block, stage, dz_smem);
            ptx::bar_sync::<0, THREADS>();
            if block.first_channel() == 0 && block.first_tap() == 0 {
                add_rows(plan, dz_smem, smem + BIAS_SUMS);
            }
        }
        let mut x_at = [0; 8];
        unroll!(j: usize in [0 1 2 3 4 5 6 7] {
            x_at[j] = smem + ((pairs[j / 2] >> (j % 2 * 16)) & 0xFFFF);
        });
        let (row, _) = plan.tile.thread(ptx::opaque_u32(ptx::thread_index()));
        let step = if plan.flat == 0 { ptx::opaque_u32(shape.stride) * 4 } else { 4 };
        let row_bytes = (ptx::opaque_u32(plan.tile.rows()) + ROW_PAD) * 4;
        let mut dz_at = dz_smem + row * 4;
        let end = dz_at + (row_bytes << plan.log2_depth);
        loop {
            ptx::nounroll();
            let mut columns = [0.0; 8];
            unroll!(j: usize in [0 1 2 3 4 5 6 7] {
                // SAFETY: inside the stage.
                columns[j] = unsafe { ptx::ld_shared_f32(x_at[j]) };
                x_at[j] += step;
            });
            // SAFETY: inside the stage; rows are a multiple of 4, and so are the pads.
            let rows = unsafe { [ptx::ld_shared_v4_f32(dz_at), ptx::ld_shared_v4_f32(dz_at + 16)] };
            unroll!(i: usize in [0 1 2 3 4 5 6 7] {
                unroll!(j: usize in [0 1 2 3 4 5 6 7] {
                    sums[i][j] = ptx::fma_rn_f32(rows[i / 4][i % 4], columns[j], sums[i][j]);
                });
            });
            dz_at += row_bytes;
            if dz_at >= end {
                break;
            }
        }
        stage += 1;
        // A split has a stage: loops that are known to run once keep the sums in place.
        if stage >= last {
            break;
        }
    }
    // SAFETY: the partial sums of this block are nobody else's.
    unsafe { store(params, block, &sums, smem + BIAS_SUMS) };
}

/// Bytes from the start of a stage to the first value of x that each of a thread's columns meets,
/// two to a word. A column that does not exist repeats the first, as its sum is not stored.
#[inline(always)]
fn x_offsets(params: &WgradParams, block: Block) -> [u32; 4] {
    let plan = &params.plan;
    let (_, first_column) = plan.tile.thread(ptx::thread_index());
    // Every tap of a flat stage is loaded by itself.
    let tap_entries = if plan.flat == 0 { params.shape.dilation } else { 0 };
    let mut pairs = [0; 4];
    unroll!(j: u32 in [0 1 2 3 4 5 6 7] {
        let column = first_column + j * 32;
        let channel = div(column, plan.taps);
        let tap = column - channel * plan.taps;
        let exists = channel < block.channels() && tap < block.taps();
        let entry = if exists { channel * plan.pitch + tap * tap_entries } else { 0 };
        // A stage is shorter than 64 KiB.
        pairs[j as usize / 2] |= (entry * 4) << (j % 2 * 16);
    });
    pairs
}

/// Adds the stage's dz, row by row, to the sums at `sums_at`.
///
/// # Safety
/// The stage is written, and a barrier has passed since; every row's sum is its thread's own.
#[inline(always)]
unsafe fn add_rows(plan: &WgradPlan, dz_smem: u32, sums_at: u32) {
    let thread = ptx::opaque_u32(ptx::thread_index());
    let rows = plan.tile.rows();
    if thread < rows {
        let at = sums_at + thread * 4;
        let mut entry = 0;
        // SAFETY: inside the stage and the sums.
        unsafe {
            let mut sum = ptx::ld_shared_f32(at);
            while entry < 1 << plan.log2_depth {
                sum += ptx::ld_shared_f32(dz_smem + (entry * (rows + ROW_PAD) + thread) * 4);
                entry += 1;
            }
            ptx::st_shared_f32(at, sum);
        }
    }
}

/// Stores the partial sums of a block, and those of the bias where they are its.
///
/// # Safety
/// The partial sums have room for this split.
#[inline(always)]
unsafe fn store(params: &WgradParams, block: Block, sums: &Sums, bias_sums: u32) {
    let (shape, plan) = (&params.shape, &params.plan);
    let thread = ptx::opaque_u32(ptx::thread_index());
    let (row, first_column) = plan.tile.thread(thread);
    let split =
        u64::from(block.split()) * (shape.filter_elements() + u64::from(shape.out_channels));
    let partials = params.partials + split * 4;
    let row = block.first_row() + row;
    let out = u64::from(block.group() * shape.group_out() + row);
    unroll!(j: u32 in [0 1 2 3 4 5 6 7] {
        let column = first_column + j * 32;
        let channel = div(column, plan.taps);
        let tap = column - channel * plan.taps;
        if channel < block.channels() && tap < block.taps() {
            let channel = block.first_channel() + channel;
            let element = (out * u64::from(shape.group_in()) + u64::from(channel))
                * u64::from(shape.kernel_size)
                + u64::from(block.first_tap() + tap);
            let row_elements = u64::from(shape.group_in()) * u64::from(shape.kernel_size);
            unroll!(i: u32 in [0 1 2 3 4 5 6 7] {
                if row + i < shape.group_out() {
                    let at = partials + (element + u64::from(i) * row_elements) * 4;
                    let sum = sums[i as usize][j as usize].to_bits();
                    // SAFETY: a partial sum that no other thread writes.
                    unsafe { ptx::st_global_u32(at, sum) };
                }
            });
        }
    });
    if block.first_channel() == 0
        && block.first_tap() == 0
        && thread < plan.tile.rows()
        && block.first_row() + thread < shape.group_out()
    {
        let out = u64::from(block.group() * shape.group_out() + block.first_row() + thread);
        let at = partials + (shape.filter_elements() + out) * 4;
        // SAFETY: as above; the sum is this thread's own.
        unsafe { ptx::st_global_u32(at, ptx::ld_shared_f32(bias_sums + thread * 4).to_bits()) };
    }
}

/// One sum over the splits, in their order.
///
/// # Safety
/// As the entries': the partial sums are written, the gradients writable.
#[inline(always)]
pub(super) unsafe fn finish<E: Element>(params: &WgradFinalParams) {
    let index = u64::from(ptx::block_index()) * u64::from(THREADS) + u64::from(ptx::thread_index());
    let per_split = params.filter_elements + u64::from(params.out_channels);
    let is_filter = index < params.filter_elements;
    let base = if is_filter { params.dw.address } else { params.db };
    if index >= per_split || base == 0 {
        return;
    }
    let mut at = params.partials + index * 4;
    let mut sum = 0.0;
    let mut split = 0;
    while split < params.splits {
        ptx::nounroll();
        let mut values = [0.0; 8];
        unroll!(i: u32 in [0 1 2 3 4 5 6 7] {
            if split + i < params.splits {
                // SAFETY: a partial sum of an existing split.
                let bits = unsafe { ptx::ld_global_nc_u32(at + u64::from(i) * per_split * 4) };
                values[i as usize] = f32::from_bits(bits);
            }
        });
        unroll!(i: usize in [0 1 2 3 4 5 6 7] {
            sum += values[i];
        });
        at += 8 * per_split * 4;
        split += 8;
    }
    let element = if is_filter {
        let pair = index.checked_div(u64::from(params.kernel_size)).unwrap_or(0);
        let tap = index - pair * u64::from(params.kernel_size);
        let out = pair.checked_div(u64::from(params.group_in)).unwrap_or(0);
        let input = pair - out * u64::from(params.group_in);
        out * params.dw.out + input * params.dw.input + tap * params.dw.tap
    } else {
        index - params.filter_elements
    };
    let address = base + element * u64::from(E::SIZE);
    // SAFETY: an existing element of the gradient, of this thread's own.
    unsafe {
        if params.accumulate != 0 {
            // Not through the read-only path, as this kernel writes there.
            let before = if E::SIZE == 4 {
                ptx::ld_global_u32(address)
            } else {
                u32::from(ptx::ld_global_u16(address))
            };
            sum += E::widen(before);
        }
        E::store(address, E::round(sum));
    }
}
