//! Barriers among the threads of a block.

use core::arch::asm;

/// `bar.sync ID, THREADS`: waits until `THREADS` threads have arrived at barrier `ID`, and orders
/// their shared-memory accesses.
///
/// Both are immediates: a run-time id would make ptxas reserve all sixteen barriers.
///
/// # Safety
/// Every thread of each participating warp executes it, and exactly `THREADS` threads use barrier
/// `ID` at a time.
#[inline(always)]
pub unsafe fn bar_sync<const ID: u32, const THREADS: u32>() {
    // SAFETY: the caller's contract. The memory clobber (no `nomem`) keeps accesses on their side.
    unsafe {
        asm!("bar.sync {id}, {threads};", id = const ID, threads = const THREADS, options(nostack));
    }
}

/// `bar.sync 0`: waits for the whole block, and orders its shared-memory accesses.
///
/// # Safety
/// Every thread of the block executes it.
#[inline(always)]
pub unsafe fn bar_sync_all() {
    // SAFETY: the caller's contract.
    unsafe { asm!("bar.sync 0;", options(nostack)) }
}

/// `bar.warp.sync`: waits for the whole warp, and orders its memory accesses.
///
/// # Safety
/// Every lane of the warp executes it.
#[inline(always)]
pub unsafe fn bar_warp_sync() {
    // SAFETY: the caller's contract.
    unsafe { asm!("bar.warp.sync 0xffffffff;", options(nostack)) }
}
