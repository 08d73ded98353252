//! Global memory.

use core::arch::asm;

/// Loads 16 bits through the read-only path.
///
/// # Safety
/// `address` is a global address of 2 readable bytes, 2-aligned, that nothing writes while the
/// kernel runs.
#[must_use]
#[inline(always)]
pub unsafe fn ld_global_nc_u16(address: u64) -> u16 {
    let value: u16;
    // SAFETY: the caller's contract.
    unsafe {
        asm!("ld.global.nc.u16 {}, [{}];", out(reg16) value, in(reg64) address,
             options(pure, readonly, nostack, preserves_flags));
    }
    value
}
