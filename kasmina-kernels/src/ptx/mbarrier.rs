//! Asynchronous barriers in shared memory.
//!
//! No `.acquire.cluster` or `.release.cluster` anywhere: ptxas turns them into MEMBAR.ALL.GPU and
//! CCTL.IVALL on every stage. The default semantics (release and acquire at CTA scope) are what
//! TMA and wgmma need.

use core::arch::asm;

/// Initialises the barrier for `count` arrivals a phase.
///
/// # Safety
/// `barrier` is 8-aligned, inside the block's shared memory, and no thread uses it before
/// `fence_mbarrier_init` and a block barrier.
#[inline(always)]
pub unsafe fn mbarrier_init(barrier: u32, count: u32) {
    // SAFETY: the caller's contract.
    unsafe {
        asm!("mbarrier.init.shared::cta.b64 [{}], {};", in(reg32) barrier, in(reg32) count,
             options(nostack));
    }
}

/// Arrives once.
///
/// # Safety
/// `barrier` is an initialised barrier of this block.
#[inline(always)]
pub unsafe fn mbarrier_arrive(barrier: u32) {
    // SAFETY: the caller's contract.
    unsafe {
        asm!("mbarrier.arrive.shared::cta.b64 _, [{}];", in(reg32) barrier, options(nostack));
    }
}

/// Arrives once and makes the phase wait for `bytes` more bytes of asynchronous copies.
///
/// # Safety
/// `barrier` is an initialised barrier of this block, and copies of exactly `bytes` bytes in all
/// are issued on it for this phase.
#[inline(always)]
pub unsafe fn mbarrier_arrive_expect_tx(barrier: u32, bytes: u32) {
    // SAFETY: the caller's contract.
    unsafe {
        asm!("mbarrier.arrive.expect_tx.shared::cta.b64 _, [{}], {};",
             in(reg32) barrier, in(reg32) bytes, options(nostack));
    }
}

/// Waits for a bounded time; true once the phase of `parity` has completed.
///
/// # Safety
/// `barrier` is an initialised barrier of this block.
#[must_use]
#[inline(always)]
pub unsafe fn mbarrier_try_wait_parity(barrier: u32, parity: u32) -> bool {
    let done: u32;
    // SAFETY: the caller's contract.
    unsafe {
        asm!("{{",
             ".reg .pred p;",
             "mbarrier.try_wait.parity.shared::cta.b64 p, [{}], {};",
             "selp.u32 {}, 1, 0, p;",
             "}}",
             in(reg32) barrier, in(reg32) parity, out(reg32) done, options(nostack));
    }
    done != 0
}
