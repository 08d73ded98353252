//! f32 as a sum of three bf16 parts, which is what lets tensor cores multiply it.
//!
//! `x = x₀ + x₁ + x₂`, each part the bf16 nearest to what the parts before leave over. bf16 has the
//! exponents of f32 and 8 significant bits, so three parts hold all 24 and the sum is exact while
//! no part underflows, that is for |x| ≥ 2⁻¹¹⁰ and for 0. Below, the sum misses x by at most 2⁻¹³⁴.
//!
//! As |x₁| ≤ 2⁻⁸·|x| and |x₂| ≤ 2⁻¹⁷·|x|, the six products of `x·w` whose part numbers add up to at
//! most 2 leave out at most 2⁻²⁴·|x·w|, what one f32 multiplication may, and 2⁻²⁸·|x·w| on average;
//! the three that add up to at most 1 leave out at most 2⁻¹⁵·|x·w|. (A little more where |x| is
//! above the largest bf16, whose first part is cut off.)
//!
//! What parts cannot express is found while they are made, and [`needs_repair`] tells when the
//! product has to be computed without them: with infinities and NaN, whose products with the low
//! parts would be NaN where those are 0, and where elements that underflow meet large ones.

/// Parts of an f32.
pub const PARTS: usize = 3;

/// Some element is infinite or NaN.
pub const NOT_FINITE: u32 = 1;
/// Some element differs from the sum of its parts.
pub const INEXACT: u32 = 2;
/// Some element is 2¹⁶ or more in magnitude.
pub const LARGE: u32 = 4;
/// Some element is 2⁶³ or more in magnitude.
pub const HUGE: u32 = 8;
/// How far the findings of W are shifted to stand beside those of X.
pub const W_SHIFT: u32 = 4;

/// Bits of 2¹⁶, of 2⁶³ and of infinity.
const LARGE_BITS: u32 = 0x4780_0000;
const HUGE_BITS: u32 = 0x5F00_0000;
const INFINITY_BITS: u32 = 0x7F80_0000;

/// The upper half of the bits of the bf16 nearest to `x`, ties to even, in place; a finite `x`
/// beyond the largest bf16 gives that one.
#[inline(always)]
const fn nearest(x: f32) -> u32 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7FFF + (bits >> 16 & 1));
    // A carry into the exponent of infinity: cut off instead, so that the next part has the rest.
    let bits = if rounded & INFINITY_BITS == INFINITY_BITS { bits } else { rounded };
    bits & 0xFFFF_0000
}

/// The parts of `x` as bf16, the largest first, and what the sum of them misses. Of an infinity or
/// a NaN all are 0, and what is missed is not.
#[must_use]
#[inline(always)]
pub const fn split(x: f32) -> ([u16; PARTS], f32) {
    let x = if x.to_bits() & INFINITY_BITS == INFINITY_BITS { 0.0 } else { x };
    let first = nearest(x);
    let rest = x - f32::from_bits(first);
    let second = nearest(rest);
    let rest = rest - f32::from_bits(second);
    let third = nearest(rest);
    let missed = rest - f32::from_bits(third);
    ([(first >> 16) as u16, (second >> 16) as u16, (third >> 16) as u16], missed)
}

/// What was noticed about a matrix's elements.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Findings {
    /// The largest magnitude, as bits.
    largest: u32,
    /// Not 0 if an element misses something.
    missed: u32,
}

impl Findings {
    /// Of no elements.
    pub const NONE: Self = Self { largest: 0, missed: 0 };

    /// These and those of element `x`, whose parts miss `missed`.
    #[must_use]
    #[inline(always)]
    pub const fn with(self, x: f32, missed: f32) -> Self {
        let magnitude = x.to_bits() & 0x7FFF_FFFF;
        let largest = if magnitude > self.largest { magnitude } else { self.largest };
        Self { largest, missed: self.missed | missed.to_bits() }
    }

    /// As bits: [`NOT_FINITE`], [`INEXACT`], [`LARGE`], [`HUGE`].
    #[must_use]
    #[inline(always)]
    pub const fn bits(self) -> u32 {
        let mut bits = 0;
        if self.largest >= INFINITY_BITS {
            bits |= NOT_FINITE;
        }
        if self.missed != 0 {
            bits |= INEXACT;
        }
        if self.largest >= LARGE_BITS {
            bits |= LARGE;
        }
        if self.largest >= HUGE_BITS {
            bits |= HUGE;
        }
        bits
    }
}

/// The findings about elements that are split on the device two at a time, where the first part is
/// rounded to nearest without exception: from the largest magnitudes of first parts, two packed
/// bf16, and from what first and second parts leave over, all bits of all elements together.
///
/// As [`Findings::bits`], but the magnitudes are rounded to bf16 first; and what two parts leave over
/// is a bf16 unless its lower half has bits.
#[must_use]
#[inline(always)]
pub const fn packed_findings(largest: u32, left_over: u32) -> u32 {
    let (low, high) = (largest << 16, largest & 0xFFFF_0000);
    let largest = if low > high { low } else { high };
    Findings { largest, missed: left_over & 0xFFFF }.bits()
}

/// Whether a product has to be computed without parts, from the findings of X and, shifted by
/// [`W_SHIFT`], of W.
///
/// Where it need not, elements that underflow change a product by less than 2⁻¹³⁴·2¹⁶ = 2⁻¹¹⁸, and
/// no product overflows: one that does would leave infinities of both signs in its parts.
#[must_use]
#[inline(always)]
pub const fn needs_repair(findings: u32) -> bool {
    let (x, w) = (findings, findings >> W_SHIFT);
    (x | w) & (NOT_FINITE | HUGE) != 0
        || x & INEXACT != 0 && w & LARGE != 0
        || w & INEXACT != 0 && x & LARGE != 0
}

#[cfg(target_arch = "nvptx64")]
mod device {
    use super::{W_SHIFT, needs_repair};
    use crate::ptx;

    /// Whether a product has to be computed without parts, from `count` words of findings.
    ///
    /// # Safety
    /// Every thread of the block, of `threads`, calls it; the words are readable, and nothing
    /// writes them while the kernel runs.
    #[inline(always)]
    pub(crate) unsafe fn words_need_repair(words: u64, count: u32, threads: u32) -> bool {
        let mut findings = 0;
        let mut index = ptx::thread_index();
        while index < count {
            ptx::nounroll();
            // SAFETY: one of the words.
            findings |= unsafe { ptx::ld_global_nc_u32(words + 4 * u64::from(index)) };
            index += threads;
        }
        // SAFETY: the whole block.
        needs_repair(unsafe { of_block(findings) })
    }

    /// The findings of all threads of the block.
    ///
    /// # Safety
    /// Every thread of the block calls it.
    #[inline(always)]
    pub(crate) unsafe fn of_block(findings: u32) -> u32 {
        let mut all = 0;
        let mut bit = 0;
        while bit < 2 * W_SHIFT {
            // SAFETY: every thread of the block, by the caller's contract.
            if unsafe { ptx::bar_red_or_all(findings >> bit & 1 != 0) } {
                all |= 1 << bit;
            }
            bit += 1;
        }
        all
    }
}
#[cfg(target_arch = "nvptx64")]
pub(crate) use device::{of_block, words_need_repair};

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(parts: [u16; PARTS]) -> f64 {
        parts.iter().map(|&part| f64::from(f32::from_bits(u32::from(part) << 16))).sum()
    }

    /// Every exponent with fractions of all kinds, both signs.
    fn samples() -> impl Iterator<Item = f32> {
        let fractions =
            (0..23).flat_map(|bit| [1u32 << bit, (2 << bit) - 1, 0x7F_FFFF >> bit << bit]);
        let fractions: std::vec::Vec<u32> = fractions
            .chain((0..200u32).map(|i| i.wrapping_mul(0x9E37_79B9) >> 9))
            .chain([0, 0x7F_8000, 0x7F_7FFF, 0x00_8000, 0x00_FFFF])
            .map(|fraction| fraction & 0x7F_FFFF)
            .collect();
        (0..255u32).flat_map(move |exponent| {
            let of = move |fraction: u32| f32::from_bits(exponent << 23 | fraction);
            fractions.clone().into_iter().flat_map(move |f| [of(f), -of(f)])
        })
    }

    #[test]
    fn three_parts_are_the_number_itself_from_two_to_the_minus_110_to_the_largest() {
        for x in samples().filter(|x| x.abs() >= 2.0f32.powi(-110) || *x == 0.0) {
            let (parts, missed) = split(x);
            assert_eq!(sum(parts), f64::from(x), "{x:e}");
            assert_eq!(missed.to_bits(), 0, "{x:e}");
        }
    }

    #[test]
    fn parts_of_tiny_numbers_miss_at_most_two_to_the_minus_134_and_say_so() {
        for x in samples().filter(|x| x.abs() < 2.0f32.powi(-110)) {
            let (parts, missed) = split(x);
            let error = f64::from(x) - sum(parts);
            assert!(error.abs() <= 2.0f64.powi(-134), "{x:e}: {error:e}");
            assert_eq!(f64::from(missed), error, "{x:e}");
        }
    }

    #[test]
    fn each_part_is_small_beside_the_one_before() {
        // Beyond the largest bf16 the first part is cut off, and the second twice as large.
        let largest = f32::from_bits(0x7F7F_0000);
        for x in samples().filter(|x| x.abs() >= 2.0f32.powi(-100) && x.abs() <= largest) {
            let ([_, second, third], _) = split(x);
            let part = |bits| f64::from(f32::from_bits(u32::from(bits) << 16)).abs();
            let x = f64::from(x).abs();
            assert!(part(second) <= x * 2.0f64.powi(-8), "{x:e}");
            assert!(part(third) <= x * 2.0f64.powi(-17), "{x:e}");
        }
    }

    #[test]
    fn infinities_and_nan_have_no_parts_and_are_found() {
        for x in
            [f32::INFINITY, f32::NEG_INFINITY, f32::NAN, -f32::NAN, f32::from_bits(0x7F80_0001)]
        {
            let (parts, missed) = split(x);
            assert_eq!(parts, [0; PARTS]);
            let findings = Findings::NONE.with(1.0, 0.0).with(x, missed).bits();
            assert!(needs_repair(findings) && needs_repair(findings << W_SHIFT));
        }
        let largest = Findings::NONE.with(f32::MAX, split(f32::MAX).1).bits();
        assert_eq!(largest, LARGE | HUGE);
        assert!(needs_repair(largest) && needs_repair(largest << W_SHIFT));
        let below = f32::from_bits(HUGE_BITS - 1);
        let below = Findings::NONE.with(below, split(below).1).bits();
        assert!(!needs_repair(below | below << W_SHIFT));
    }

    #[test]
    fn packed_findings_are_those_of_the_elements_rounded_to_bf16() {
        // As `split_pair` of the direct kernels: parts rounded to nearest, infinity included.
        let rounded = |x: f32| {
            let bits = x.to_bits();
            let bits = bits.wrapping_add(0x7FFF + (bits >> 16 & 1)) & 0xFFFF_0000;
            f32::from_bits(if x.is_nan() { 0x7FFF_0000 } else { bits })
        };
        let packed = |x: f32| {
            let first = rounded(x);
            let rest = x - first;
            let rest = rest - rounded(rest);
            let largest = first.to_bits() >> 16 & 0x7FFF;
            (
                packed_findings(largest, rest.to_bits()),
                packed_findings(largest << 16, rest.to_bits()),
            )
        };
        for x in samples().filter(|x| x.abs() < f32::from_bits(HUGE_BITS - 0x8000)) {
            let (low, high) = packed(x);
            let near_large = (65_280.0..65_536.0).contains(&x.abs());
            let expected = Findings::NONE.with(x, split(x).1).bits();
            assert_eq!(low & !LARGE | expected & LARGE, expected, "{x:e}");
            assert!(low & LARGE == expected & LARGE || near_large, "{x:e}");
            assert_eq!(low, high);
        }
        for x in [f32::INFINITY, f32::NEG_INFINITY, f32::NAN] {
            assert_eq!(packed(x).0 & NOT_FINITE, NOT_FINITE);
        }
        for x in [f32::MAX, -f32::MAX, f32::from_bits(HUGE_BITS)] {
            assert_eq!(packed(x).0 & HUGE, HUGE);
        }
    }

    #[test]
    fn numbers_that_underflow_matter_only_beside_large_ones() {
        let findings = |x: f32| Findings::NONE.with(x, split(x).1).bits();
        let (tiny, one, large) = (findings(1.234_567e-38), findings(1.0), findings(-65536.0));
        assert_eq!((tiny, one, large), (INEXACT, 0, LARGE));
        assert!(!needs_repair(tiny | one << W_SHIFT) && !needs_repair(tiny | tiny << W_SHIFT));
        assert!(needs_repair(tiny | large << W_SHIFT) && needs_repair(large | tiny << W_SHIFT));
        assert_eq!(findings(65535.99), 0);
    }
}
