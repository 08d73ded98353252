//! Arithmetic that plain Rust would compile to something else.

use core::arch::asm;

/// `a·b + c`, rounded once.
#[must_use]
#[inline(always)]
pub fn fma_rn_f32(a: f32, b: f32, c: f32) -> f32 {
    let d: f32;
    // SAFETY: arithmetic on registers.
    unsafe {
        asm!("fma.rn.f32 {}, {}, {}, {};", out(reg32) d, in(reg32) a, in(reg32) b, in(reg32) c,
             options(pure, nomem, nostack, preserves_flags));
    }
    d
}

/// As [`fma_rn_f32`], in f64.
#[must_use]
#[inline(always)]
pub fn fma_rn_f64(a: f64, b: f64, c: f64) -> f64 {
    let d: f64;
    // SAFETY: arithmetic on registers.
    unsafe {
        asm!("fma.rn.f64 {}, {}, {}, {};", out(reg64) d, in(reg64) a, in(reg64) b, in(reg64) c,
             options(pure, nomem, nostack, preserves_flags));
    }
    d
}

/// The larger of the two; NaN if either is.
#[must_use]
#[inline(always)]
pub fn max_nan_f32(a: f32, b: f32) -> f32 {
    let d: f32;
    // SAFETY: arithmetic on registers.
    unsafe {
        asm!("max.NaN.f32 {}, {}, {};", out(reg32) d, in(reg32) a, in(reg32) b,
             options(pure, nomem, nostack, preserves_flags));
    }
    d
}

/// `count + 1` if `|x| < bound`, else `count`; also if either is NaN. Two instructions, where a
/// comparison, a choice and an addition would be three or four.
#[must_use]
#[inline(always)]
pub fn count_if_below_f32(count: f32, x: f32, bound: f32) -> f32 {
    let mut count = count;
    // SAFETY: arithmetic on registers.
    unsafe {
        asm!("{{", ".reg .pred below;", ".reg .f32 magnitude;", "abs.f32 magnitude, {x};",
             "setp.lt.f32 below, magnitude, {bound};", "@below add.rn.f32 {count}, {count}, 0f3F800000;",
             "}}", x = in(reg32) x, bound = in(reg32) bound, count = inout(reg32) count,
             options(pure, nomem, nostack, preserves_flags));
    }
    count
}

/// `2^x` to within 2 ulp.
#[must_use]
#[inline(always)]
pub fn ex2_approx_f32(x: f32) -> f32 {
    let d: f32;
    // SAFETY: arithmetic on registers.
    unsafe {
        asm!("ex2.approx.ftz.f32 {}, {};", out(reg32) d, in(reg32) x,
             options(pure, nomem, nostack, preserves_flags));
    }
    d
}

/// `1/x` to within 1 ulp.
#[must_use]
#[inline(always)]
pub fn rcp_approx_f32(x: f32) -> f32 {
    let d: f32;
    // SAFETY: arithmetic on registers.
    unsafe {
        asm!("rcp.approx.ftz.f32 {}, {};", out(reg32) d, in(reg32) x,
             options(pure, nomem, nostack, preserves_flags));
    }
    d
}
