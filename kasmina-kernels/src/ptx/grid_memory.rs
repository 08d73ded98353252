//! Communication between the blocks of a grid through global memory.

use core::arch::asm;

/// Adds to a counter and returns what it was. Writes of this thread before it are visible to
/// whoever sees the sum, and writes before the additions that this one sees are visible to this
/// thread, on the whole GPU.
///
/// # Safety
/// `address` is a global address of 4 writable bytes, 4-aligned, that other threads access only
/// by atomics while the kernel runs.
#[inline(always)]
pub unsafe fn atom_add_acq_rel_gpu_u32(address: u64, value: u32) -> u32 {
    let before: u32;
    // SAFETY: the caller's contract. The memory clobber keeps accesses on their side.
    unsafe {
        asm!("atom.acq_rel.gpu.global.add.u32 {}, [{}], {};", out(reg32) before,
             in(reg64) address, in(reg32) value, options(nostack));
    }
    before
}

/// Adds to an f32, in no order with anything.
///
/// # Safety
/// `address` is a global address of 4 writable bytes, 4-aligned, that other threads access only
/// by atomics while the kernel runs.
#[inline(always)]
pub unsafe fn red_add_f32(address: u64, value: f32) {
    // SAFETY: the caller's contract.
    unsafe {
        asm!("red.global.add.f32 [{}], {};", in(reg64) address, in(reg32) value, options(nostack));
    }
}

/// Loads 16 bytes that another block may have written, past the L1 cache.
///
/// # Safety
/// `address` is a global address of 16 readable bytes, 16-aligned, and their writer's release has
/// been acquired.
#[must_use]
#[inline(always)]
pub unsafe fn ld_relaxed_gpu_v4_u32(address: u64) -> [u32; 4] {
    let (a, b, c, d): (u32, u32, u32, u32);
    // SAFETY: the caller's contract.
    unsafe {
        asm!("ld.relaxed.gpu.global.v4.u32 {{{}, {}, {}, {}}}, [{}];", out(reg32) a, out(reg32) b,
             out(reg32) c, out(reg32) d, in(reg64) address, options(readonly, nostack));
    }
    [a, b, c, d]
}

/// As [`ld_relaxed_gpu_v4_u32`] if `exists`, else zeros. Not a branch, so that several of these are
/// under way together.
///
/// # Safety
/// As [`ld_relaxed_gpu_v4_u32`] if `exists`.
#[cfg(kasmina_tier = "hopper")]
#[must_use]
#[inline(always)]
pub unsafe fn ld_relaxed_gpu_v4_u32_if(address: u64, exists: bool) -> [u32; 4] {
    let (mut a, mut b, mut c, mut d) = (0u32, 0u32, 0u32, 0u32);
    // SAFETY: the caller's contract.
    unsafe {
        asm!("{{", ".reg .pred exists;", "setp.ne.u32 exists, {exists}, 0;",
             "@exists ld.relaxed.gpu.global.v4.u32 {{{a}, {b}, {c}, {d}}}, [{address}];", "}}",
             exists = in(reg32) u32::from(exists), a = inout(reg32) a, b = inout(reg32) b,
             c = inout(reg32) c, d = inout(reg32) d, address = in(reg64) address,
             options(readonly, nostack));
    }
    [a, b, c, d]
}

/// Adds to a counter and returns what it was, in no order with anything else.
///
/// # Safety
/// `address` is a global address of 4 writable bytes, 4-aligned, that other threads access only
/// by atomics while the kernel runs.
#[inline(always)]
pub unsafe fn atom_add_relaxed_gpu_u32(address: u64, value: u32) -> u32 {
    let before: u32;
    // SAFETY: the caller's contract.
    unsafe {
        asm!("atom.relaxed.gpu.global.add.u32 {}, [{}], {};", out(reg32) before,
             in(reg64) address, in(reg32) value, options(nostack));
    }
    before
}

/// Loads two words, each as a whole, that other blocks may be writing with
/// [`st_relaxed_gpu_v2_u64`].
///
/// # Safety
/// `address` is a global address of 16 readable bytes, 16-aligned, that other threads access only
/// by relaxed loads and stores of words while the kernel runs.
#[must_use]
#[inline(always)]
pub unsafe fn ld_relaxed_gpu_v2_u64(address: u64) -> [u64; 2] {
    let (a, b): (u64, u64);
    // SAFETY: the caller's contract. Not `readonly`: a repeated load must not be left out.
    unsafe {
        asm!("ld.relaxed.gpu.global.v2.u64 {{{}, {}}}, [{}];", out(reg64) a, out(reg64) b,
             in(reg64) address, options(nostack, preserves_flags));
    }
    [a, b]
}

/// Stores two words, each as a whole, that other blocks may be reading.
///
/// # Safety
/// As [`ld_relaxed_gpu_v2_u64`], of 16 writable bytes.
#[inline(always)]
pub unsafe fn st_relaxed_gpu_v2_u64(address: u64, [a, b]: [u64; 2]) {
    // SAFETY: the caller's contract.
    unsafe {
        asm!("st.relaxed.gpu.global.v2.u64 [{}], {{{}, {}}};", in(reg64) address, in(reg64) a,
             in(reg64) b, options(nostack, preserves_flags));
    }
}
