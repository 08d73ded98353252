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

/// Asks for `bytes` bytes to be brought into the L2 cache. Whoever writes them later writes them
/// there, so this may come before a wait for the writer.
///
/// # Safety
/// `address` is a global address of that many bytes; both are multiples of 16.
#[cfg(kasmina_tier = "hopper")]
#[inline(always)]
pub unsafe fn cp_async_bulk_prefetch_l2(address: u64, bytes: u32) {
    // SAFETY: the caller's contract.
    unsafe {
        asm!("cp.async.bulk.prefetch.L2.global [{}], {};", in(reg64) address, in(reg32) bytes,
             options(nostack, preserves_flags));
    }
}

/// Asks for the line that holds an address to be brought into the L2 cache. It goes the way of loads,
/// so the multiprocessor knows where the page is from then on. It may come before a wait for the
/// writer, as above.
///
/// # Safety
/// `address` is a global address.
#[cfg(kasmina_tier = "hopper")]
#[inline(always)]
pub unsafe fn prefetch_global_l2(address: u64) {
    // SAFETY: the caller's contract.
    unsafe {
        asm!("prefetch.global.L2 [{}];", in(reg64) address, options(nostack, preserves_flags));
    }
}

/// As [`ld_global_v4_u32`] if `exists`, else zeros. Not a branch, so that several of these are
/// under way together.
///
/// # Safety
/// As [`ld_global_v4_u32`] if `exists`.
#[must_use]
#[inline(always)]
pub unsafe fn ld_global_v4_u32_if(address: u64, exists: bool) -> [u32; 4] {
    let (mut a, mut b, mut c, mut d) = (0u32, 0u32, 0u32, 0u32);
    // SAFETY: the caller's contract.
    unsafe {
        asm!("{{", ".reg .pred exists;", "setp.ne.u32 exists, {exists}, 0;",
             "@exists ld.global.v4.u32 {{{a}, {b}, {c}, {d}}}, [{address}];", "}}",
             exists = in(reg32) u32::from(exists), a = inout(reg32) a, b = inout(reg32) b,
             c = inout(reg32) c, d = inout(reg32) d, address = in(reg64) address,
             options(readonly, nostack));
    }
    [a, b, c, d]
}
