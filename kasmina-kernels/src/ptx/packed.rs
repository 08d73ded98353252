//! Pairs of 16-bit numbers in a register. For bf16 these need compute capability 9.0.

use core::arch::asm;

macro_rules! packed {
    ($type:literal $min:ident $max:ident $add:ident $count_if_below:ident) => {
        /// The smaller of each pair; the number where the other is NaN.
        #[must_use]
        #[inline(always)]
        pub fn $min(a: u32, b: u32) -> u32 {
            let d: u32;
            // SAFETY: arithmetic on registers.
            unsafe {
                asm!(concat!("min.", $type, " {}, {}, {};"), out(reg32) d, in(reg32) a,
                     in(reg32) b, options(pure, nomem, nostack, preserves_flags));
            }
            d
        }

        /// The larger of each pair; the number where the other is NaN.
        #[must_use]
        #[inline(always)]
        pub fn $max(a: u32, b: u32) -> u32 {
            let d: u32;
            // SAFETY: arithmetic on registers.
            unsafe {
                asm!(concat!("max.", $type, " {}, {}, {};"), out(reg32) d, in(reg32) a,
                     in(reg32) b, options(pure, nomem, nostack, preserves_flags));
            }
            d
        }

        /// The sums of each pair.
        #[must_use]
        #[inline(always)]
        pub fn $add(a: u32, b: u32) -> u32 {
            let d: u32;
            // SAFETY: arithmetic on registers.
            unsafe {
                asm!(concat!("add.", $type, " {}, {}, {};"), out(reg32) d, in(reg32) a,
                     in(reg32) b, options(pure, nomem, nostack, preserves_flags));
            }
            d
        }

        /// `count + 1` for each of the pair where `|x| < bound`, else `count`; also if either is
        /// NaN. Exact up to a count of 256.
        #[must_use]
        #[inline(always)]
        pub fn $count_if_below(count: u32, x: u32, bound: u32) -> u32 {
            let mut count = count;
            // SAFETY: arithmetic on registers.
            unsafe {
                asm!("{{", ".reg .b32 t;", concat!("abs.", $type, " t, {x};"),
                     concat!("set.lt.", $type, ".", $type, " t, t, {bound};"),
                     concat!("add.", $type, " {count}, {count}, t;"), "}}",
                     x = in(reg32) x, bound = in(reg32) bound, count = inout(reg32) count,
                     options(pure, nomem, nostack, preserves_flags));
            }
            count
        }
    };
}

packed!("f16x2" min_f16x2 max_f16x2 add_f16x2 count_if_below_f16x2);
packed!("bf16x2" min_bf16x2 max_bf16x2 add_bf16x2 count_if_below_bf16x2);

/// f32 to f16, as its bits; rounded up.
#[must_use]
#[inline(always)]
pub fn cvt_rp_f16_f32(value: f32) -> u16 {
    let bits: u16;
    // SAFETY: arithmetic on registers.
    unsafe {
        asm!("cvt.rp.f16.f32 {}, {};", out(reg16) bits, in(reg32) value,
             options(pure, nomem, nostack, preserves_flags));
    }
    bits
}

/// The larger magnitudes of each pair of bf16; NaN where either is.
#[must_use]
#[inline(always)]
pub fn max_nan_abs_bf16x2(largest: u32, x: u32) -> u32 {
    let d: u32;
    // SAFETY: arithmetic on registers.
    unsafe {
        asm!("{{", ".reg .b32 t;", "abs.bf16x2 t, {x};", "max.NaN.bf16x2 {d}, {largest}, t;", "}}",
             x = in(reg32) x, largest = in(reg32) largest, d = out(reg32) d,
             options(pure, nomem, nostack, preserves_flags));
    }
    d
}
