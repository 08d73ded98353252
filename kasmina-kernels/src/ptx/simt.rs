//! Loads, stores and conversions of the kernels that use no tensor cores.

use core::arch::asm;

/// Stores four f32.
///
/// # Safety
/// `address` is 16-aligned and inside the block's shared memory; no other thread accesses these
/// bytes without a barrier between.
#[inline(always)]
pub unsafe fn st_shared_v4_f32(address: u32, values: [f32; 4]) {
    let [a, b, c, d] = values;
    // SAFETY: the caller's contract.
    unsafe {
        asm!("st.shared.v4.f32 [{}], {{{}, {}, {}, {}}};", in(reg32) address,
             in(reg32) a, in(reg32) b, in(reg32) c, in(reg32) d, options(nostack));
    }
}

/// Loads four f32.
///
/// # Safety
/// `address` is 16-aligned and inside the block's shared memory; no other thread writes these
/// bytes without a barrier between.
#[must_use]
#[inline(always)]
pub unsafe fn ld_shared_v4_f32(address: u32) -> [f32; 4] {
    let (a, b, c, d): (f32, f32, f32, f32);
    // SAFETY: the caller's contract.
    unsafe {
        asm!("ld.shared.v4.f32 {{{}, {}, {}, {}}}, [{}];", out(reg32) a, out(reg32) b,
             out(reg32) c, out(reg32) d, in(reg32) address, options(readonly, nostack));
    }
    [a, b, c, d]
}

/// Loads an f32.
///
/// # Safety
/// `address` is 4-aligned and inside the block's shared memory; no other thread writes it without
/// a barrier between.
#[must_use]
#[inline(always)]
pub unsafe fn ld_shared_f32(address: u32) -> f32 {
    let value: f32;
    // SAFETY: the caller's contract.
    unsafe {
        asm!("ld.shared.f32 {}, [{}];", out(reg32) value, in(reg32) address,
             options(readonly, nostack));
    }
    value
}

/// Stores 32 bits.
///
/// # Safety
/// `address` is 4-aligned and inside the block's shared memory; no other thread accesses it
/// without a barrier between.
#[inline(always)]
pub unsafe fn st_shared_u32(address: u32, value: u32) {
    // SAFETY: the caller's contract.
    unsafe {
        asm!("st.shared.u32 [{}], {};", in(reg32) address, in(reg32) value, options(nostack));
    }
}

/// Loads 32 bits.
///
/// # Safety
/// `address` is 4-aligned and inside the block's shared memory; no other thread writes it without
/// a barrier between.
#[must_use]
#[inline(always)]
pub unsafe fn ld_shared_u32(address: u32) -> u32 {
    let value: u32;
    // SAFETY: the caller's contract.
    unsafe {
        asm!("ld.shared.u32 {}, [{}];", out(reg32) value, in(reg32) address,
             options(readonly, nostack));
    }
    value
}

/// Loads 4 bytes that another thread of the block may store at the same time with
/// [`st_relaxed_cta_shared_u32`].
///
/// # Safety
/// `address` is 4-aligned and inside the block's shared memory.
#[must_use]
#[inline(always)]
pub unsafe fn ld_relaxed_cta_shared_u32(address: u32) -> u32 {
    let value: u32;
    // SAFETY: the caller's contract.
    unsafe {
        asm!("ld.relaxed.cta.shared.u32 {}, [{}];", out(reg32) value, in(reg32) address,
             options(nostack));
    }
    value
}

/// Stores 4 bytes that other threads of the block may load at the same time with
/// [`ld_relaxed_cta_shared_u32`].
///
/// # Safety
/// `address` is 4-aligned and inside the block's shared memory.
#[inline(always)]
pub unsafe fn st_relaxed_cta_shared_u32(address: u32, value: u32) {
    // SAFETY: the caller's contract.
    unsafe {
        asm!("st.relaxed.cta.shared.u32 [{}], {};", in(reg32) address, in(reg32) value,
             options(nostack));
    }
}

/// Loads 16 bytes.
///
/// # Safety
/// `address` is 16-aligned and inside the block's shared memory; no other thread writes these
/// bytes without a barrier between.
#[must_use]
#[inline(always)]
pub unsafe fn ld_shared_v4_u32(address: u32) -> [u32; 4] {
    let (a, b, c, d): (u32, u32, u32, u32);
    // SAFETY: the caller's contract.
    unsafe {
        asm!("ld.shared.v4.u32 {{{}, {}, {}, {}}}, [{}];", out(reg32) a, out(reg32) b,
             out(reg32) c, out(reg32) d, in(reg32) address, options(readonly, nostack));
    }
    [a, b, c, d]
}

/// Stores 16 bytes.
///
/// # Safety
/// `address` is 16-aligned and inside the block's shared memory; no other thread accesses these
/// bytes without a barrier between.
#[inline(always)]
pub unsafe fn st_shared_v4_u32(address: u32, values: [u32; 4]) {
    let [a, b, c, d] = values;
    // SAFETY: the caller's contract.
    unsafe {
        asm!("st.shared.v4.u32 [{}], {{{}, {}, {}, {}}};", in(reg32) address,
             in(reg32) a, in(reg32) b, in(reg32) c, in(reg32) d, options(nostack));
    }
}

/// Stores 16 bits.
///
/// # Safety
/// `address` is 2-aligned and inside the block's shared memory; no other thread accesses it
/// without a barrier between.
#[inline(always)]
pub unsafe fn st_shared_u16(address: u32, value: u16) {
    // SAFETY: the caller's contract.
    unsafe {
        asm!("st.shared.u16 [{}], {};", in(reg32) address, in(reg16) value, options(nostack));
    }
}

/// Loads 16 bits.
///
/// # Safety
/// `address` is 2-aligned and inside the block's shared memory; no other thread writes it without
/// a barrier between.
#[must_use]
#[inline(always)]
pub unsafe fn ld_shared_u16(address: u32) -> u16 {
    let value: u16;
    // SAFETY: the caller's contract.
    unsafe {
        asm!("ld.shared.u16 {}, [{}];", out(reg16) value, in(reg32) address,
             options(readonly, nostack));
    }
    value
}

/// Loads 16 bytes through the read-only path, where it stands: the compiler does not move it to
/// the place of use, so that a prefetch stays one.
///
/// # Safety
/// `address` is a global address of 16 readable bytes, 16-aligned, that nothing writes while the
/// kernel runs.
#[must_use]
#[inline(always)]
pub unsafe fn ld_global_nc_v4_u32(address: u64) -> [u32; 4] {
    let (a, b, c, d): (u32, u32, u32, u32);
    // SAFETY: the caller's contract.
    unsafe {
        asm!("ld.global.nc.v4.u32 {{{}, {}, {}, {}}}, [{}];", out(reg32) a, out(reg32) b,
             out(reg32) c, out(reg32) d, in(reg64) address, options(pure, readonly, nostack));
    }
    [a, b, c, d]
}

/// Loads 8 bytes through the read-only path.
///
/// # Safety
/// `address` is a global address of 8 readable bytes, 8-aligned, that nothing writes while the
/// kernel runs.
#[must_use]
#[inline(always)]
pub unsafe fn ld_global_nc_v2_u32(address: u64) -> [u32; 2] {
    let (a, b): (u32, u32);
    // SAFETY: the caller's contract.
    unsafe {
        asm!("ld.global.nc.v2.u32 {{{}, {}}}, [{}];", out(reg32) a, out(reg32) b,
             in(reg64) address, options(pure, readonly, nostack));
    }
    [a, b]
}

/// Loads 32 bits through the read-only path.
///
/// # Safety
/// `address` is a global address of 4 readable bytes, 4-aligned, that nothing writes while the
/// kernel runs.
#[must_use]
#[inline(always)]
pub unsafe fn ld_global_nc_u32(address: u64) -> u32 {
    let value: u32;
    // SAFETY: the caller's contract.
    unsafe {
        asm!("ld.global.nc.u32 {}, [{}];", out(reg32) value, in(reg64) address,
             options(pure, readonly, nostack));
    }
    value
}

/// Stores 16 bytes.
///
/// # Safety
/// `address` is a global address of 16 writable bytes, 16-aligned, that no other thread accesses
/// while the kernel runs.
#[inline(always)]
pub unsafe fn st_global_v4_u32(address: u64, values: [u32; 4]) {
    let [a, b, c, d] = values;
    // SAFETY: the caller's contract.
    unsafe {
        asm!("st.global.v4.u32 [{}], {{{}, {}, {}, {}}};", in(reg64) address,
             in(reg32) a, in(reg32) b, in(reg32) c, in(reg32) d, options(nostack));
    }
}

/// Stores 8 bytes.
///
/// # Safety
/// `address` is a global address of 8 writable bytes, 8-aligned, that no other thread accesses
/// while the kernel runs.
#[inline(always)]
pub unsafe fn st_global_v2_u32(address: u64, values: [u32; 2]) {
    let [a, b] = values;
    // SAFETY: the caller's contract.
    unsafe {
        asm!("st.global.v2.u32 [{}], {{{}, {}}};", in(reg64) address, in(reg32) a, in(reg32) b,
             options(nostack));
    }
}

/// Stores 32 bits.
///
/// # Safety
/// `address` is a global address of 4 writable bytes, 4-aligned, that no other thread accesses
/// while the kernel runs.
#[inline(always)]
pub unsafe fn st_global_u32(address: u64, value: u32) {
    // SAFETY: the caller's contract.
    unsafe {
        asm!("st.global.u32 [{}], {};", in(reg64) address, in(reg32) value, options(nostack));
    }
}

/// Stores 16 bits.
///
/// # Safety
/// `address` is a global address of 2 writable bytes, 2-aligned, that no other thread accesses
/// while the kernel runs.
#[inline(always)]
pub unsafe fn st_global_u16(address: u64, value: u16) {
    // SAFETY: the caller's contract.
    unsafe {
        asm!("st.global.u16 [{}], {};", in(reg64) address, in(reg16) value, options(nostack));
    }
}

/// f32 to f16, as its bits; round to nearest even.
#[must_use]
#[inline(always)]
pub fn cvt_rn_f16_f32(value: f32) -> u16 {
    let bits: u16;
    // SAFETY: arithmetic on registers.
    unsafe {
        asm!("cvt.rn.f16.f32 {}, {};", out(reg16) bits, in(reg32) value,
             options(pure, nomem, nostack, preserves_flags));
    }
    bits
}

/// The value, as if it came from outside: the compiler cannot take it apart, nor keep the parts of
/// which it was made in registers of their own.
#[must_use]
#[inline(always)]
pub fn opaque_u64(value: u64) -> u64 {
    let mut value = value;
    // SAFETY: an empty instruction.
    unsafe { asm!("// {}", inout(reg64) value, options(nomem, nostack, preserves_flags)) }
    value
}

/// As [`opaque_u64`], for 32 bits.
#[must_use]
#[inline(always)]
pub fn opaque_u32(value: u32) -> u32 {
    let mut value = value;
    // SAFETY: an empty instruction.
    unsafe { asm!("// {}", inout(reg32) value, options(nomem, nostack, preserves_flags)) }
    value
}
