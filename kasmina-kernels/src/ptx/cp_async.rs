//! Asynchronous copies through pointers, from global to shared memory.

use core::arch::asm;

/// Starts copying 16 bytes, of which all after the first `bytes` arrive as zeros and are not read.
///
/// # Safety
/// `dst` is 16-aligned and inside the block's shared memory, and nothing accesses it until
/// [`cp_async_wait_group`] has covered the copy; `src` is 16-aligned and `bytes` bytes from it are
/// readable, at most 16.
#[inline(always)]
pub unsafe fn cp_async_cg_16(dst: u32, src: u64, bytes: u32) {
    // SAFETY: the caller's contract.
    unsafe {
        asm!("cp.async.cg.shared.global [{}], [{}], 16, {};", in(reg32) dst, in(reg64) src,
             in(reg32) bytes, options(nostack));
    }
}

/// Starts copying 4 bytes, or, if not `exists`, putting zeros there.
///
/// # Safety
/// As [`cp_async_cg_16`], with `dst` and `src` 4-aligned and 4 readable bytes, if `exists`.
#[inline(always)]
pub unsafe fn cp_async_ca_4(dst: u32, src: u64, exists: bool) {
    // SAFETY: the caller's contract.
    unsafe {
        asm!("cp.async.ca.shared.global [{}], [{}], 4, {};", in(reg32) dst, in(reg64) src,
             in(reg32) u32::from(exists) * 4, options(nostack));
    }
}

/// Closes this thread's current group of copies.
#[inline(always)]
pub fn cp_async_commit_group() {
    // SAFETY: bookkeeping of the issuing thread.
    unsafe { asm!("cp.async.commit_group;", options(nostack)) }
}

/// Waits until all but the newest `PENDING` groups of this thread have completed.
#[inline(always)]
pub fn cp_async_wait_group<const PENDING: u32>() {
    // SAFETY: waits only.
    unsafe { asm!("cp.async.wait_group {n};", n = const PENDING, options(nostack)) }
}
