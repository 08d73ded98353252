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

/// Loads 32 bits. Not through the read-only path, for the reason given at [`ld_global_u16`].
///
/// # Safety
/// `address` is a global address of 4 readable bytes, 4-aligned, that nothing writes meanwhile.
#[must_use]
#[inline(always)]
pub unsafe fn ld_global_u32(address: u64) -> u32 {
    let value: u32;
    // SAFETY: the caller's contract.
    unsafe {
        asm!("ld.global.u32 {}, [{}];", out(reg32) value, in(reg64) address,
             options(readonly, nostack, preserves_flags));
    }
    value
}

/// Loads 16 bytes. Not through the read-only path, for the reason given at [`ld_global_u16`].
///
/// # Safety
/// `address` is a global address of 16 readable bytes, 16-aligned, that nothing writes meanwhile.
#[must_use]
#[inline(always)]
pub unsafe fn ld_global_v4_u32(address: u64) -> [u32; 4] {
    let (a, b, c, d): (u32, u32, u32, u32);
    // SAFETY: the caller's contract.
    unsafe {
        asm!("ld.global.v4.u32 {{{}, {}, {}, {}}}, [{}];", out(reg32) a, out(reg32) b,
             out(reg32) c, out(reg32) d, in(reg64) address, options(readonly, nostack));
    }
    [a, b, c, d]
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
