//! Communication with the host through its pinned memory, which both sides read and write while a
//! kernel runs. Nothing here goes through the read-only path or trusts the L1 cache.

use core::arch::asm;

/// Loads 64 bits; what its writer wrote before its release is visible afterwards.
///
/// # Safety
/// `address` is a global address of 8 readable bytes, 8-aligned, that others write only as wholes.
#[must_use]
#[inline(always)]
pub unsafe fn ld_acquire_sys_u64(address: u64) -> u64 {
    let value: u64;
    // SAFETY: the caller's contract. The memory clobber keeps accesses on their side.
    unsafe {
        asm!("ld.acquire.sys.global.u64 {}, [{}];", out(reg64) value, in(reg64) address,
             options(nostack));
    }
    value
}

/// Loads two neighbouring words of 64 bits, each as [`ld_acquire_sys_u64`] does, in no order.
///
/// # Safety
/// `address` is a global address of 16 readable bytes, 16-aligned, whose halves others write only
/// as wholes.
#[must_use]
#[inline(always)]
pub unsafe fn ld_acquire_sys_v2_u64(address: u64) -> [u64; 2] {
    let (a, b): (u64, u64);
    // SAFETY: the caller's contract. The memory clobber keeps accesses on their side.
    unsafe {
        asm!("ld.acquire.sys.global.v2.u64 {{{}, {}}}, [{}];", out(reg64) a, out(reg64) b,
             in(reg64) address, options(nostack));
    }
    [a, b]
}

/// Stores 64 bits after everything that this thread, and threads it has met at a barrier, wrote.
///
/// # Safety
/// `address` is a global address of 8 writable bytes, 8-aligned.
#[inline(always)]
pub unsafe fn st_release_sys_u64(address: u64, value: u64) {
    // SAFETY: the caller's contract. The memory clobber keeps accesses on their side.
    unsafe {
        asm!("st.release.sys.global.u64 [{}], {};", in(reg64) address, in(reg64) value,
             options(nostack));
    }
}

/// Stores 64 bits as one, in no order with other memory.
///
/// # Safety
/// `address` is a global address of 8 writable bytes, 8-aligned.
#[inline(always)]
pub unsafe fn st_relaxed_sys_u64(address: u64, value: u64) {
    // SAFETY: the caller's contract.
    unsafe {
        asm!("st.relaxed.sys.global.u64 [{}], {};", in(reg64) address, in(reg64) value,
             options(nostack));
    }
}

/// Loads 16 bytes that the host or another grid may have written, past the L1 cache.
///
/// # Safety
/// `address` is a global address of 16 readable bytes, 16-aligned, and their writer's release has
/// been acquired.
#[must_use]
#[inline(always)]
pub unsafe fn ld_relaxed_sys_v4_u32(address: u64) -> [u32; 4] {
    let (a, b, c, d): (u32, u32, u32, u32);
    // SAFETY: the caller's contract.
    unsafe {
        asm!("ld.relaxed.sys.global.v4.u32 {{{}, {}, {}, {}}}, [{}];", out(reg32) a, out(reg32) b,
             out(reg32) c, out(reg32) d, in(reg64) address, options(readonly, nostack));
    }
    [a, b, c, d]
}

/// Loads 32 bits, as [`ld_relaxed_sys_v4_u32`].
///
/// # Safety
/// `address` is a global address of 4 readable bytes, 4-aligned, and their writer's release has
/// been acquired.
#[must_use]
#[inline(always)]
pub unsafe fn ld_relaxed_sys_u32(address: u64) -> u32 {
    let value: u32;
    // SAFETY: the caller's contract.
    unsafe {
        asm!("ld.relaxed.sys.global.u32 {}, [{}];", out(reg32) value, in(reg64) address,
             options(readonly, nostack));
    }
    value
}

/// Loads 16 bits, as [`ld_relaxed_sys_v4_u32`].
///
/// # Safety
/// `address` is a global address of 2 readable bytes, 2-aligned, and their writer's release has
/// been acquired.
#[must_use]
#[inline(always)]
pub unsafe fn ld_relaxed_sys_u16(address: u64) -> u16 {
    let value: u16;
    // SAFETY: the caller's contract.
    unsafe {
        asm!("ld.relaxed.sys.global.u16 {}, [{}];", out(reg16) value, in(reg64) address,
             options(readonly, nostack));
    }
    value
}

/// Stores 16 bytes for others to find, each of the four words as one, in no order with other memory.
///
/// # Safety
/// `address` is a global address of 16 writable bytes, 16-aligned.
#[inline(always)]
pub unsafe fn st_relaxed_sys_v4_u32(address: u64, values: [u32; 4]) {
    let [a, b, c, d] = values;
    // SAFETY: the caller's contract.
    unsafe {
        asm!("st.relaxed.sys.global.v4.u32 [{}], {{{}, {}, {}, {}}};", in(reg64) address,
             in(reg32) a, in(reg32) b, in(reg32) c, in(reg32) d, options(nostack));
    }
}

/// Stores 32 bits, as [`st_relaxed_sys_v4_u32`].
///
/// # Safety
/// `address` is a global address of 4 writable bytes, 4-aligned.
#[inline(always)]
pub unsafe fn st_relaxed_sys_u32(address: u64, value: u32) {
    // SAFETY: the caller's contract.
    unsafe {
        asm!("st.relaxed.sys.global.u32 [{}], {};", in(reg64) address, in(reg32) value,
             options(nostack));
    }
}

/// Stores 16 bits, as [`st_relaxed_sys_v4_u32`].
///
/// # Safety
/// `address` is a global address of 2 writable bytes, 2-aligned.
#[inline(always)]
pub unsafe fn st_relaxed_sys_u16(address: u64, value: u16) {
    // SAFETY: the caller's contract.
    unsafe {
        asm!("st.relaxed.sys.global.u16 [{}], {};", in(reg64) address, in(reg16) value,
             options(nostack));
    }
}

/// Adds to a counter of the grid and returns what it was, in no order with other memory.
///
/// # Safety
/// `address` is a global address in device memory of 8 writable bytes, 8-aligned, that other
/// threads access only by atomics.
#[must_use]
#[inline(always)]
pub unsafe fn atom_add_relaxed_gpu_u64(address: u64, value: u64) -> u64 {
    let before: u64;
    // SAFETY: the caller's contract.
    unsafe {
        asm!("atom.relaxed.gpu.global.add.u64 {}, [{}], {};", out(reg64) before,
             in(reg64) address, in(reg64) value, options(nostack));
    }
    before
}

/// Nanoseconds of a clock that all multiprocessors share. It ticks coarsely, about once per
/// microsecond on an H200.
#[must_use]
#[inline(always)]
pub fn globaltimer() -> u64 {
    let value: u64;
    // SAFETY: reads a special register; not pure, so that every call reads it anew.
    unsafe {
        asm!("mov.u64 {}, %globaltimer;", out(reg64) value, options(nomem, nostack));
    }
    value
}
