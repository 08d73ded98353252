//! Conversions between f32 and the 16-bit types.

use core::arch::asm;

/// Two f32 as packed bf16, `low` in the lower half; round to nearest even.
#[must_use]
#[inline(always)]
pub fn cvt_rn_bf16x2_f32(high: f32, low: f32) -> u32 {
    let d: u32;
    // SAFETY: arithmetic on registers.
    unsafe {
        asm!("cvt.rn.bf16x2.f32 {}, {}, {};", out(reg32) d, in(reg32) high, in(reg32) low,
             options(pure, nomem, nostack, preserves_flags));
    }
    d
}

/// Two f32 as packed f16, `low` in the lower half; round to nearest even.
#[must_use]
#[inline(always)]
pub fn cvt_rn_f16x2_f32(high: f32, low: f32) -> u32 {
    let d: u32;
    // SAFETY: arithmetic on registers.
    unsafe {
        asm!("cvt.rn.f16x2.f32 {}, {}, {};", out(reg32) d, in(reg32) high, in(reg32) low,
             options(pure, nomem, nostack, preserves_flags));
    }
    d
}

/// f16, as its bits, to f32; exact.
///
/// Not `pure`, for the reason given at [`cvt_f32_bf16`].
#[must_use]
#[inline(always)]
pub fn cvt_f32_f16(bits: u16) -> f32 {
    let d: f32;
    // SAFETY: arithmetic on registers.
    unsafe {
        asm!("cvt.f32.f16 {}, {};", out(reg32) d, in(reg16) bits,
             options(nomem, nostack, preserves_flags));
    }
    d
}

/// bf16, as its bits, to f32; exact.
///
/// Not `pure`, so that it stays where it is written: hoisted to the load it widens, it would wait
/// for it there.
#[must_use]
#[inline(always)]
pub fn cvt_f32_bf16(bits: u16) -> f32 {
    let d: f32;
    // SAFETY: arithmetic on registers.
    unsafe {
        asm!("{{", ".reg .b16 zero;", "mov.b16 zero, 0;", "mov.b32 {}, {{zero, {}}};", "}}",
             out(reg32) d, in(reg16) bits, options(nomem, nostack, preserves_flags));
    }
    d
}
