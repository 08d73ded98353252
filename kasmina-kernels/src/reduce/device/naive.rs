//! The single-stage sum that the others are compared with.

use super::node::other_f32;
use super::{Element, start, wait_for_predecessors};
use crate::ptx;
use crate::reduce::{BLOCKS_PER_MULTIPROCESSOR, NaiveReduceParams, THREADS, WARPS};

/// One element per thread, one atomic addition per block.
///
/// # Safety
/// The elements are readable, the result writable, and nothing else writes them while the kernel
/// runs.
#[inline(always)]
pub(in crate::reduce) unsafe fn naive<E: Element>(params: &NaiveReduceParams) {
    start::<THREADS, BLOCKS_PER_MULTIPROCESSOR>();
    wait_for_predecessors();
    let thread = ptx::thread_index();
    let (warp, lane) = (thread / 32, thread % 32);
    let smem = ptx::dynamic_smem();
    let mut index = u64::from(ptx::block_index()) * u64::from(THREADS) + u64::from(thread);
    let mut sum = 0.0;
    // SAFETY: existing elements; whole warps; each warp has a place of its own, and the barrier is
    // between.
    unsafe {
        while index < params.len {
            sum += E::widen(E::load(params.data + (index << E::LOG2_SIZE)));
            index += u64::from(ptx::grid_size()) * u64::from(THREADS);
        }
        sum += other_f32::<16>(sum);
        sum += other_f32::<8>(sum);
        sum = over_eight(sum);
        if lane == 0 {
            ptx::st_shared_f32(smem + warp * 4, sum);
        }
        ptx::bar_sync::<0, THREADS>();
        if warp == 0 {
            sum = over_eight(f32::from_bits(ptx::ld_shared_u32(smem + lane % WARPS * 4)));
            if lane == 0 {
                ptx::red_add_f32(params.result, sum);
            }
        }
    }
}

/// Sum over each eight lanes.
///
/// # Safety
/// The whole warp executes it.
#[inline(always)]
unsafe fn over_eight(mut sum: f32) -> f32 {
    // SAFETY: the caller's contract.
    unsafe {
        sum += other_f32::<4>(sum);
        sum += other_f32::<2>(sum);
        sum + other_f32::<1>(sum)
    }
}
