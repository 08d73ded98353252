//! The gradients of filter and bias: partial sums over splits of batch × length, then their totals.

use super::*;
use crate::conv1d::unroll::unroll;
use crate::gemm::portable::device::Element;
use crate::ptx;
use crate::tile_scheduler::div;

/// A thread's sums: eight output channels of eight pairs of input channel and tap.
type Sums = [[f32; 8]; 8];

/// What a block works on.
struct Block {
    group: u32,
    split: u32,
    /// First output channel in the group.
    first_row: u32,
    /// First input channel in the group, and how many exist.
    first_channel: u32,
    channels: u32,
    /// First tap, and how many exist.
    first_tap: u32,
    taps: u32,
}

impl Block {
    #[inline(always)]
    fn new(params: &WgradParams) -> Self {
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
        Self {
            group,
            split: rest,
            first_row,
            first_channel,
            channels: if left.0 < plan.channels { left.0 } else { plan.channels },
            first_tap,
            taps: if left.1 < plan.taps { left.1 } else { plan.taps },
        }
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
    let batch = div(number, shape.out_length);
    (batch < shape.batch).then_some((batch, number - batch * shape.out_length))
}

/// Sequence and first output position of a stage that is not flat.
#[inline(always)]
fn first_of(params: &WgradParams, stage: u32) -> (u32, u32) {
    let plan = &params.plan;
    let per_row = (params.shape.out_length + ((1 << plan.log2_depth) - 1)) >> plan.log2_depth;
    let batch = div(stage, per_row);
    (batch, (stage - batch * per_row) << plan.log2_depth)
}

/// Loads the positions of x that a stage meets, with their halo, as `[channels][pitch]`.
///
/// # Safety
/// The tensor is readable, and no thread reads the stage before the next barrier.
#[inline(always)]
unsafe fn load_x<E: Element>(params: &WgradParams, block: &Block, stage: u32, smem: u32) {
    let (shape, plan, x) = (&params.shape, &params.plan, &params.x);
    let along_channels = x.channel == 1;
    let (fast, slow) =
        if along_channels { (block.channels, plan.span) } else { (plan.span, block.channels) };
    let first_channel = block.group * shape.group_in() + block.first_channel;
    let tap_offset = (block.first_tap * shape.dilation).wrapping_sub(shape.padding_left);
    let (batch, position) = if plan.flat == 0 { first_of(params, stage) } else { (0, 0) };
    let first = tap_offset.wrapping_add(position * shape.stride);
    let (skip_slow, skip_fast) = (div(THREADS, fast), THREADS - div(THREADS, fast) * fast);
    let mut s = div(ptx::thread_index(), fast);
    let mut f = ptx::thread_index() - s * fast;
    while s < slow {
        ptx::nounroll();
        let mut bits = [0; 4];
        let mut at = [u32::MAX; 4];
        unroll!(i: usize in [0 1 2 3] {
            if s < slow {
                let (channel, entry) = if along_channels { (f, s) } else { (s, f) };
                let (batch, from) = if plan.flat == 0 {
                    (batch, first.wrapping_add(entry))
                } else {
                    match place(params, stage, entry) {
                        Some((batch, l)) => (batch, tap_offset.wrapping_add(l * shape.stride)),
                        None => (0, u32::MAX),
                    }
                };
                // As unsigned, a position before the first is beyond the last.
                if from < shape.in_length {
                    let element = u64::from(batch) * x.batch
                        + u64::from(first_channel + channel) * x.channel
                        + u64::from(from) * x.position;
                    // SAFETY: an existing position of an existing channel.
                    bits[i] = unsafe { E::load(x.address + element * u64::from(E::SIZE)) };
                }
                at[i] = smem + (channel * plan.pitch + entry) * 4;
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
unsafe fn load_dz<E: Element>(params: &WgradParams, block: &Block, stage: u32, smem: u32) {
    let (shape, plan, dz) = (&params.shape, &params.plan, &params.dz);
    let rows = plan.tile.rows();
    let (log2_rows, log2_depth) = (plan.tile.log2_rows(), plan.log2_depth);
    let total = 1 << (log2_rows + log2_depth);
    let mut index = ptx::thread_index();
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
                && block.first_row + row < shape.group_out()
                && let Some((batch, position)) = place(params, stage, entry)
            {
                let channel = block.group * shape.group_out() + block.first_row + row;
                let element = u64::from(batch) * dz.batch
                    + u64::from(channel) * dz.channel
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
    let (shape, plan) = (&params.shape, &params.plan);
    let block = Block::new(params);
    let smem = ptx::dynamic_smem();
    let dz_smem = smem + (plan.channels * plan.pitch * 4).next_multiple_of(16);
    let (row, first_column) = plan.tile.thread(ptx::thread_index());
    // Pair of channel and tap → bytes in the stage of x; a pair that does not exist repeats the
    // first, as its sum is not stored.
    let tap_entries = if plan.flat == 0 { shape.dilation } else { 0 };
    let mut x_at = [0; 8];
    unroll!(j: u32 in [0 1 2 3 4 5 6 7] {
        let column = first_column + j * 32;
        let channel = div(column, plan.taps);
        let tap = column - channel * plan.taps;
        let exists = channel < block.channels && tap < block.taps;
        let entry = if exists { channel * plan.pitch + tap * tap_entries } else { 0 };
        x_at[j as usize] = smem + entry * 4;
    });
    let step = if plan.flat == 0 { shape.stride * 4 } else { 4 };
    let row_bytes = (plan.tile.rows() + ROW_PAD) * 4;
    let sums_bias = block.first_channel == 0 && block.first_tap == 0;
    let mut sums: Sums = [[0.0; 8]; 8];
    let mut bias = [0.0; 8];
    let first = block.split * plan.stages_per_split;
    let left = plan.stages - first;
    let last = first + if left < plan.stages_per_split { left } else { plan.stages_per_split };
    let mut stage = first;
    while stage < last {
        ptx::nounroll();
        // SAFETY: a stage is written between two barriers and read between the next two; the loop
        // depends on the block alone, so all threads meet at each.
        unsafe {
            ptx::bar_sync::<0, THREADS>();
            load_x::<E>(params, &block, stage, smem);
            load_dz::<E>(params, &block, stage, dz_smem);
            ptx::bar_sync::<0, THREADS>();
        }
        let mut at = 0;
        let mut dz_at = dz_smem + row * 4;
        let end = dz_at + (row_bytes << plan.log2_depth);
        while dz_at < end {
            ptx::nounroll();
            let mut columns = [0.0; 8];
            unroll!(j: usize in [0 1 2 3 4 5 6 7] {
                // SAFETY: inside the stage.
                columns[j] = unsafe { ptx::ld_shared_f32(x_at[j] + at) };
            });
            // SAFETY: inside the stage; rows are a multiple of 4, and so are the pads.
            let rows = unsafe { [ptx::ld_shared_v4_f32(dz_at), ptx::ld_shared_v4_f32(dz_at + 16)] };
            unroll!(i: usize in [0 1 2 3 4 5 6 7] {
                unroll!(j: usize in [0 1 2 3 4 5 6 7] {
                    sums[i][j] = ptx::fma_rn_f32(rows[i / 4][i % 4], columns[j], sums[i][j]);
                });
            });
            if sums_bias {
                unroll!(i: usize in [0 1 2 3 4 5 6 7] {
                    bias[i] += rows[i / 4][i % 4];
                });
            }
            at += step;
            dz_at += row_bytes;
        }
        stage += 1;
    }

    let split = u64::from(block.split) * (shape.filter_elements() + u64::from(shape.out_channels));
    let partials = params.partials + split * 4;
    unroll!(i: u32 in [0 1 2 3 4 5 6 7] {
        let row = block.first_row + row + i;
        if row < shape.group_out() {
            let out = u64::from(block.group * shape.group_out() + row);
            unroll!(j: u32 in [0 1 2 3 4 5 6 7] {
                let column = first_column + j * 32;
                let channel = div(column, plan.taps);
                let tap = column - channel * plan.taps;
                if channel < block.channels && tap < block.taps {
                    let channel = block.first_channel + channel;
                    let element = (out * u64::from(shape.group_in()) + u64::from(channel))
                        * u64::from(shape.kernel_size)
                        + u64::from(block.first_tap + tap);
                    let sum = sums[i as usize][j as usize].to_bits();
                    // SAFETY: a partial sum that no other thread writes.
                    unsafe { ptx::st_global_u32(partials + element * 4, sum) };
                }
            });
            if sums_bias && first_column == 0 {
                let at = partials + (shape.filter_elements() + out) * 4;
                // SAFETY: as above; one thread has this row and the first column.
                unsafe { ptx::st_global_u32(at, bias[i as usize].to_bits()) };
            }
        }
    });
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
