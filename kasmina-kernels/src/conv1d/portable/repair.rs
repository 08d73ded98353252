//! The gather kernel's tiles once more, where parts could not express an operand.

use super::gather::{mark, tile};
use super::{RepairParams, THREADS};
use crate::gemm::element::Element;
use crate::gemm::parts::{needs_repair, of_block};
use crate::ptx;

/// All tiles, if parts could not express an operand.
///
/// # Safety
/// As [`gather`](super::gather::gather) with a grid of any size, and there are `num_findings` readable words of findings,
/// which nothing writes while the kernel runs.
#[inline(always)]
pub(super) unsafe fn repair<E: Element>(params: &RepairParams) {
    mark();
    let mut findings = 0;
    let mut index = ptx::thread_index();
    while index < params.num_findings {
        ptx::nounroll();
        // SAFETY: one of the words.
        findings |= unsafe { ptx::ld_global_nc_u32(params.findings + 4 * u64::from(index)) };
        index += THREADS;
    }
    // SAFETY: the whole block; then the caller's contract. The loop depends on the block alone, and
    // the barrier keeps what is parked for a tile until all threads have stored theirs.
    unsafe {
        if !needs_repair(of_block(findings)) {
            return;
        }
        let mut index = ptx::block_index();
        while index < params.blocks {
            ptx::nounroll();
            tile::<E>(&params.gather, index);
            ptx::bar_sync::<0, THREADS>();
            index += ptx::grid_size();
        }
    }
}
