//! Exchange and order between the lanes of a warp.

use core::arch::asm;

/// `value` of the lane whose number differs from this one's in the bits of `MASK`.
///
/// # Safety
/// The whole warp executes it.
#[must_use]
#[inline(always)]
pub unsafe fn shfl_sync_bfly<const MASK: u32>(value: u32) -> u32 {
    let other: u32;
    // SAFETY: the caller's contract.
    unsafe {
        asm!("shfl.sync.bfly.b32 {}, {}, {mask}, 0x1f, 0xffffffff;", out(reg32) other,
             in(reg32) value, mask = const MASK, options(nomem, nostack));
    }
    other
}

/// `bar.warp.sync`: waits for the whole warp, and orders its shared-memory accesses.
///
/// # Safety
/// The whole warp executes it.
#[inline(always)]
pub unsafe fn bar_warp_sync() {
    // SAFETY: the caller's contract.
    unsafe { asm!("bar.warp.sync 0xffffffff;", options(nostack)) }
}
