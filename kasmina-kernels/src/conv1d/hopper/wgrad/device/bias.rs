//! The bias's gradient: what two warps add up of dz as it passes through the stages.

use super::super::{BIAS_SLOT, Split, Walk};
use crate::gemm::hopper::Tile;
use crate::gemm::hopper::device::{Block, Element};
use crate::pipeline::RingPosition;
use crate::ptx;
use crate::smem_layout::Major;
use crate::tile_scheduler::div;

/// Eight 16-bit elements added to eight sums.
#[inline(always)]
fn add<E: Element>(sums: [f32; 8], elements: [f32; 4]) -> [f32; 8] {
    let [(a, b), (c, d), (e, f), (g, h)] = elements.map(|pair| E::widen_pair(pair.to_bits()));
    [
        sums[0] + a,
        sums[1] + b,
        sums[2] + c,
        sums[3] + d,
        sums[4] + e,
        sums[5] + f,
        sums[6] + g,
        sums[7] + h,
    ]
}

/// The value of eight sums in a fixed order.
#[inline(always)]
fn total(s: [f32; 8]) -> f32 {
    ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]))
}

/// Releases every stage together with the consumers, and adds up the rows of dz that are this
/// tile's to add.
///
/// K-major, a thread adds a row of 64 positions, or two of 128 rows. MN-major, it adds eight
/// channels at every eighth position of its warp's slab, or, of one slab, of its warp's half.
///
/// # Safety
/// The whole of warps 1 and 2 call it; `bias_partials` is [`WgradParams::bias_partials`].
#[inline(always)]
pub(in crate::conv1d::hopper::wgrad) unsafe fn sum_rows<E: Element>(
    block: Block,
    tile: Tile,
    dz_major: Major,
    split: Split,
    walk: Walk,
    bias_partials: u64,
) {
    let thread = ptx::thread_index() - 32;
    let (warp, lane) = (thread / 32, thread % 32);
    let mut ring = RingPosition::START;
    let mut part = ptx::block_index();
    while part < split.num_parts() {
        let (mut step, end) = split.range(part);
        while step < end {
            let segment = split.segment(part, step, end);
            step = segment.next;
            let wanted = bias_partials != 0;
            // Of the tiles of a row, which load the same rows of dz, each sums every so many steps.
            let column = walk.place(segment.tile).column;
            let mut turn = segment.first - div(segment.first, walk.tiles_n) * walk.tiles_n;
            let (mut near, mut far) = ([0.0f32; 8], [0.0f32; 8]);
            let mut left = segment.count;
            while left > 0 {
                let stage = block.x_stage(ring.stage);
                // SAFETY: the stage has landed and stays until this warp has released it.
                unsafe {
                    block.ring.wait_full(ring);
                    if wanted && turn == column {
                        let mut index = 0;
                        while index < 8 {
                            match dz_major {
                                Major::K => {
                                    let chunk = thread * 128 + (index ^ (thread % 8)) * 16;
                                    let row = ptx::ld_shared_v4_f32(stage + chunk);
                                    near = add::<E>(near, row);
                                    if tile.block_m == 128 {
                                        let row = ptx::ld_shared_v4_f32(stage + 8192 + chunk);
                                        far = add::<E>(far, row);
                                    }
                                }
                                Major::MN => {
                                    let first = stage
                                        + if tile.block_m == 128 {
                                            warp * 8192
                                        } else {
                                            warp * 4096
                                        };
                                    let k = 4 * index + lane / 8;
                                    let chunk = k * 128 + ((lane % 8) ^ (k % 8)) * 16;
                                    near = add::<E>(near, ptx::ld_shared_v4_f32(first + chunk));
                                    if tile.block_m == 128 {
                                        let half = first + 4096 + chunk;
                                        far = add::<E>(far, ptx::ld_shared_v4_f32(half));
                                    }
                                }
                            }
                            index += 1;
                        }
                    }
                    ptx::bar_warp_sync();
                    if lane == 0 {
                        ptx::mbarrier_arrive(block.ring.empty(ring.stage));
                    }
                }
                ring = ring.next(tile.num_stages);
                left -= 1;
                turn += 1;
                if turn == walk.tiles_n {
                    turn = 0;
                }
            }
            if wanted {
                let slot = bias_partials + segment.slot as u64 * (BIAS_SLOT as u64 * 4);
                // SAFETY: 128 sums of this segment's slot, each written by one thread.
                unsafe {
                    match dz_major {
                        Major::K => {
                            let address = slot + thread as u64 * 4;
                            ptx::st_global_u32(address, total(near).to_bits());
                            ptx::st_global_u32(address + 256, total(far).to_bits());
                        }
                        Major::MN => {
                            let sums = across_positions(near, far);
                            if lane < 8 {
                                let address = slot + (warp * 64 + lane * 8) as u64 * 4;
                                let bits = sums.map(f32::to_bits);
                                let [a, b, c, d, e, f, g, h] = bits;
                                ptx::st_global_v4_u32(address, [a, b, c, d]);
                                ptx::st_global_v4_u32(address + 16, [e, f, g, h]);
                            }
                        }
                    }
                }
            }
        }
        part += ptx::grid_size();
    }
}

/// The sums of the four lanes that hold the same channels.
///
/// # Safety
/// The whole warp calls it.
#[inline(always)]
pub(in crate::conv1d::hopper) unsafe fn across_positions(
    near: [f32; 8],
    far: [f32; 8],
) -> [f32; 8] {
    let mut sums = near;
    let mut channel = 0;
    while channel < 8 {
        let mut sum = near[channel] + far[channel];
        // SAFETY: the whole warp, by the caller's contract.
        unsafe {
            sum += f32::from_bits(ptx::shfl_sync_bfly::<8>(sum.to_bits()));
            sum += f32::from_bits(ptx::shfl_sync_bfly::<16>(sum.to_bits()));
        }
        sums[channel] = sum;
        channel += 1;
    }
    sums
}
