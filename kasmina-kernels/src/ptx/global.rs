//! Global memory.

use core::arch::asm;

/// Loads 16 bits.
///
/// Not through the read-only path: a grid that overlaps its predecessor may read, after its wait,
/// what that one has written while it ran.
///
/// # Safety
/// `address` is a global address of 2 readable bytes, 2-aligned, that nothing writes meanwhile.
#[must_use]
#[inline(always)]
pub unsafe fn ld_global_u16(address: u64) -> u16 {
    let value: u16;
    // SAFETY: the caller's contract.
    unsafe {
        asm!("ld.global.u16 {}, [{}];", out(reg16) value, in(reg64) address,
             options(readonly, nostack, preserves_flags));
    }
    value
}

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
