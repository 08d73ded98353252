//! Passes computed once more, where parts could not express an operand.

use super::gather::{mark, tile};
use super::wgrad::{finish, wgrad};
use super::{RepairParams, RepairWgradFinalParams, RepairWgradParams, THREADS};
use crate::gemm::element::Element;
use crate::gemm::parts::words_need_repair;
use crate::ptx;

/// All tiles, if parts could not express an operand.
///
/// # Safety
/// As [`gather`](super::gather::gather) with a grid of any size, and there are `num_findings` readable words of findings,
/// which nothing writes while the kernel runs.
#[inline(always)]
pub(super) unsafe fn repair<E: Element>(params: &RepairParams) {
    mark();
    // SAFETY: the whole block; then the caller's contract. The loop depends on the block alone, and
    // the barrier keeps what is parked for a tile until all threads have stored theirs.
    unsafe {
        if !words_need_repair(params.findings, params.num_findings, THREADS) {
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

/// Partial sums of the filter's gradient, likewise, with the plan's grid.
///
/// # Safety
/// As [`wgrad`], and of the findings as [`repair`].
#[inline(always)]
pub(super) unsafe fn repair_wgrad<E: Element>(params: &RepairWgradParams) {
    mark();
    // SAFETY: the whole block; then the caller's contract.
    unsafe {
        if words_need_repair(params.findings, params.num_findings, THREADS) {
            wgrad::<E>(&params.wgrad);
        }
    }
}

/// Their totals, likewise.
///
/// # Safety
/// As [`finish`], and of the findings as [`repair`].
#[inline(always)]
pub(super) unsafe fn repair_wgrad_final<E: Element>(params: &RepairWgradFinalParams) {
    // SAFETY: the whole block; then the caller's contract.
    unsafe {
        if words_need_repair(params.findings, params.num_findings, THREADS) {
            finish::<E>(&params.sum);
        }
    }
}
