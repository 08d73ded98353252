//! Exponential and error function in f32, in arithmetic alone.
//!
//! libm's versions look constants up in a table and raise floating-point exceptions through a
//! volatile read; on the device both end in local memory. These have neither, and are one
//! definition for host and device.

/// `eˣ`, to within 2 ulp; infinity above the range, 0 below it, NaN for NaN.
#[must_use]
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    // Beyond these the result is infinity and 0 already. Not `clamp`: NaN must pass.
    let x = if x > 89.0 { 89.0 } else { x };
    let x = if x < -104.0 { -104.0 } else { x };
    // Adding 1.5·2²³ rounds to an integer, which then stands in the low bits.
    const ROUNDER: f32 = 12_582_912.0;
    let rounded = fused_multiply_add(x, core::f32::consts::LOG2_E, ROUNDER);
    let n = rounded - ROUNDER;
    let power = (rounded.to_bits() as i32).wrapping_sub(ROUNDER.to_bits() as i32);
    // ln 2 in two parts, the first with so few bits that its product with n is exact.
    let r = fused_multiply_add(n, -0.693_145_75, x);
    let r = fused_multiply_add(n, -1.428_606_8e-6, r);
    // e^r on |r| ≤ ln 2 / 2.
    let sum = horner(
        [1.378_059_4e-3, 8.373_124_5e-3, 4.166_953_6e-2, 1.666_647_2e-1, 4.999_998_5e-1, 1.0, 1.0],
        r,
    );
    // In two steps, as 2ⁿ may be out of range where eˣ is not.
    let half = power >> 1;
    sum * power_of_two(half) * power_of_two(power.wrapping_sub(half))
}

/// `erf(x)`, to within 2 ulp; ±1 at ±∞, NaN for NaN.
#[must_use]
#[inline(always)]
pub fn erf(x: f32) -> f32 {
    let magnitude = x.abs();
    let squared = x * x;
    if magnitude > 0.927_734_4 {
        // 1 − e^p(|x|) with p fitted to ln(1 − erf).
        let odd = horner([-1.728_534_7e-5, 3.831_979_7e-4], magnitude);
        let even = horner([-3.883_964_4e-3, 2.425_462_2e-2], magnitude);
        let upper = fused_multiply_add(odd, squared, even);
        let p = horner([upper, -1.067_778_8e-1, -6.348_465e-1, -1.287_175_1e-1], magnitude);
        let p = fused_multiply_add(p, magnitude, -magnitude);
        (1.0 - exp(p)).copysign(x)
    } else {
        let p = horner(
            [
                -5.967_617e-4,
                4.991_194e-3,
                -2.676_813_5e-2,
                1.128_199_3e-1,
                -3.761_253_4e-1,
                1.283_791_7e-1,
            ],
            squared,
        );
        fused_multiply_add(p, x, x)
    }
}

/// The polynomial with these coefficients, highest power first.
#[inline(always)]
fn horner<const N: usize>(coefficients: [f32; N], x: f32) -> f32 {
    let mut sum = coefficients[0];
    let mut power = 1;
    while power < N {
        sum = fused_multiply_add(sum, x, coefficients[power]);
        power += 1;
    }
    sum
}

/// `2ⁿ` for −126 ≤ n ≤ 127.
#[inline(always)]
const fn power_of_two(n: i32) -> f32 {
    f32::from_bits((n.wrapping_add(127) as u32) << 23)
}

/// `a·b + c`: rounded once on the device. On the host twice, as without knowing the CPU it would
/// be a function call.
#[inline(always)]
pub(crate) fn fused_multiply_add(a: f32, b: f32, c: f32) -> f32 {
    #[cfg(target_arch = "nvptx64")]
    return crate::ptx::fma_rn_f32(a, b, c);
    #[cfg(not(target_arch = "nvptx64"))]
    return a * b + c;
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The distance of `got` from `exact` in units of `exact`'s last place.
    fn ulps(got: f32, exact: f64) -> f64 {
        let rounded = (exact as f32).abs().max(f32::MIN_POSITIVE);
        let ulp = f32::from_bits(rounded.to_bits() + 1) - rounded;
        (f64::from(got) - exact).abs() / f64::from(ulp)
    }

    #[test]
    fn exp_is_within_two_ulp_over_its_range() {
        for step in -104_000..=88_700 {
            let x = step as f32 * 1e-3;
            assert!(ulps(exp(x), libm::exp(f64::from(x))) <= 2.0, "{x}: {:e}", exp(x));
        }
    }

    #[test]
    fn exp_saturates_and_propagates_nan() {
        for x in [88.73, 89.0, 1e30, f32::INFINITY] {
            assert_eq!(exp(x), f32::INFINITY, "{x}");
        }
        for x in [-104.0, -1e30, f32::NEG_INFINITY] {
            assert_eq!(exp(x), 0.0, "{x}");
        }
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn erf_is_within_two_ulp_over_its_range() {
        for step in -60_000..=60_000 {
            let x = step as f32 * 1e-4;
            assert!(ulps(erf(x), libm::erf(f64::from(x))) <= 2.0, "{x}: {:e}", erf(x));
        }
    }

    #[test]
    fn erf_saturates_and_propagates_nan() {
        for x in [5.0, 1e30, f32::INFINITY] {
            assert_eq!(erf(x), 1.0);
            assert_eq!(erf(-x), -1.0);
        }
        assert!(erf(f32::NAN).is_nan());
    }
}
