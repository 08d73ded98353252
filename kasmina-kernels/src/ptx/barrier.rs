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

/// As [`bar_sync`], with the barrier and the number of threads at run time: for groups of warps that
/// have a barrier each.
///
/// # Safety
/// As [`bar_sync`]; `id` is at most 15.
#[cfg(kasmina_tier = "hopper")]
#[inline(always)]
pub unsafe fn bar_sync_of(id: u32, threads: u32) {
    // SAFETY: the caller's contract.
    unsafe {
        asm!("bar.sync {}, {};", in(reg32) id, in(reg32) threads, options(nostack));
    }
}

/// `bar.red.or.pred`: as [`bar_sync`], and tells whether any of the threads said so.
///
/// # Safety
/// As [`bar_sync`].
#[cfg(kasmina_tier = "hopper")]
#[must_use]
#[inline(always)]
pub unsafe fn bar_red_or<const ID: u32, const THREADS: u32>(said: bool) -> bool {
    let any: u32;
    // SAFETY: the caller's contract.
    unsafe {
        asm!("{{", ".reg .pred p;", "setp.ne.u32 p, {said}, 0;",
             "bar.red.or.pred p, {id}, {threads}, p;", "selp.u32 {any}, 1, 0, p;", "}}",
             said = in(reg32) u32::from(said), any = out(reg32) any,
             id = const ID, threads = const THREADS, options(nostack));
    }
    any != 0
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

/// `bar.red.or 0`: waits for the whole block, orders its shared-memory accesses, and tells every
/// thread whether `predicate` holds for any.
///
/// # Safety
/// Every thread of the block executes it.
#[must_use]
#[inline(always)]
pub unsafe fn bar_red_or_all(predicate: bool) -> bool {
    let any: u32;
    // SAFETY: the caller's contract.
    unsafe {
        asm!("{{", ".reg .pred own, any;", "setp.ne.u32 own, {}, 0;",
             "bar.red.or.pred any, 0, own;", "selp.u32 {}, 1, 0, any;", "}}",
             in(reg32) u32::from(predicate), out(reg32) any, options(nostack));
    }
    any != 0
}
