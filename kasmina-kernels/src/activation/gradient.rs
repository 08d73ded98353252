//! Derivatives of the activations, for the backward pass.

use super::{Activation, GELU_TANH_CUBIC, GELU_TANH_SCALE};
#[cfg(any(test, target_arch = "nvptx64"))]
use super::{GELU_LOGIT, GELU_T_MAX, SIGMOID_TERMS};
use crate::elementary::{erf, exp, fused_multiply_add};

impl Activation {
    /// Whether the gradient follows from the pre-activation `z` alone. That of ReLU also follows
    /// from the output, which is positive where `z` is, and that of no activation from nothing.
    #[must_use]
    pub const fn needs_pre_activation(self) -> bool {
        !matches!(self, Self::None | Self::Relu)
    }

    /// The derivative at the pre-activation `z`, in f32, to within 1e-6. ReLU's is 0 at 0. At ±∞
    /// it is the limit, 0 or 1. NaN gives NaN, but 1 with [`Activation::None`] and ReLU.
    #[must_use]
    pub fn derivative(self, z: f32) -> f32 {
        self.derivative_by::<InF32>(z)
    }

    /// `dy · act'(z)`: the gradient before the activation from the one behind it. For ReLU the
    /// output may stand in for `z`; where it is not positive the result is 0 whatever `dy` is.
    #[must_use]
    #[inline(always)]
    pub fn gradient(self, z: f32, dy: f32) -> f32 {
        self.gradient_by::<InF32>(z, dy)
    }

    /// As [`gradient`](Self::gradient), with a derivative that errs by up to 2e-4, which is below
    /// half the roundoff of the 16-bit types, in a third of the instructions.
    #[cfg(any(test, target_arch = "nvptx64"))]
    #[must_use]
    #[inline(always)]
    pub fn gradient_for_16_bits(self, z: f32, dy: f32) -> f32 {
        self.gradient_by::<Approximate>(z, dy)
    }

    #[inline(always)]
    fn gradient_by<P: Parts>(self, z: f32, dy: f32) -> f32 {
        match self {
            Self::None => dy,
            // Not a product, as an infinite `dy` times 0 would be NaN.
            Self::Relu => {
                if z <= 0.0 {
                    0.0
                } else {
                    dy
                }
            }
            _ => dy * self.derivative_by::<P>(z),
        }
    }

    #[inline(always)]
    fn derivative_by<P: Parts>(self, z: f32) -> f32 {
        match self {
            Self::None => 1.0,
            Self::Relu => {
                if z <= 0.0 {
                    0.0
                } else {
                    1.0
                }
            }
            // (z·Φ(z))' = Φ(z) + z·φ(z)
            Self::Gelu => {
                let z = held(z, 15.0);
                let density = INV_SQRT_TAU * P::exp(-0.5 * z * z);
                fused_multiply_add(z, density, P::gaussian(z))
            }
            // With s = σ(v): (z·s)' = s + z·s·(1 − s)·v'
            Self::GeluTanh => {
                const SCALE: f32 = 2.0 * GELU_TANH_SCALE;
                let z = held(z, 10.0);
                let squared = z * z;
                let v = z * fused_multiply_add(SCALE * GELU_TANH_CUBIC, squared, SCALE);
                let slope = fused_multiply_add(3.0 * SCALE * GELU_TANH_CUBIC, squared, SCALE);
                let (s, rest) = sigmoid::<P>(v);
                s * fused_multiply_add(z * slope, rest, 1.0)
            }
            Self::Silu => {
                let z = held(z, 80.0);
                let (s, rest) = sigmoid::<P>(z);
                s * fused_multiply_add(z, rest, 1.0)
            }
        }
    }
}

/// 1/√(2π)
const INV_SQRT_TAU: f32 = 0.398_942_3;

/// What the smooth derivatives are made of, in one accuracy or another.
trait Parts {
    /// `eˣ`
    fn exp(x: f32) -> f32;
    /// `1/x`
    fn reciprocal(x: f32) -> f32;
    /// `Φ(x)`
    fn gaussian(x: f32) -> f32;
}

/// To a few ulp of f32.
struct InF32;

impl Parts for InF32 {
    #[inline(always)]
    fn exp(x: f32) -> f32 {
        exp(x)
    }

    #[inline(always)]
    fn reciprocal(x: f32) -> f32 {
        1.0 / x
    }

    #[inline(always)]
    fn gaussian(x: f32) -> f32 {
        0.5 * (1.0 + erf(x * core::f32::consts::FRAC_1_SQRT_2))
    }
}

/// By the approximate instructions of the device.
#[cfg(any(test, target_arch = "nvptx64"))]
struct Approximate;

#[cfg(any(test, target_arch = "nvptx64"))]
impl Parts for Approximate {
    #[inline(always)]
    fn exp(x: f32) -> f32 {
        let x = core::f32::consts::LOG2_E * x;
        #[cfg(target_arch = "nvptx64")]
        return crate::ptx::ex2_approx_f32(x);
        #[cfg(not(target_arch = "nvptx64"))]
        return libm::exp2f(x);
    }

    #[inline(always)]
    fn reciprocal(x: f32) -> f32 {
        #[cfg(target_arch = "nvptx64")]
        return crate::ptx::rcp_approx_f32(x);
        #[cfg(not(target_arch = "nvptx64"))]
        return 1.0 / x;
    }

    /// `σ(x·P(x²))`, the form that the epilogue of the forward pass evaluates.
    #[inline(always)]
    fn gaussian(x: f32) -> f32 {
        let squared = x * x;
        // Not `min`, which would hide NaN.
        let t = if squared > GELU_T_MAX { GELU_T_MAX } else { squared };
        let mut sum = GELU_LOGIT[SIGMOID_TERMS - 1];
        let mut term = SIGMOID_TERMS - 1;
        while term > 0 {
            term -= 1;
            sum = fused_multiply_add(sum, t, GELU_LOGIT[term]);
        }
        Self::reciprocal(1.0 + Self::exp(-(x * sum)))
    }
}

/// `σ(x)` and `1 − σ(x)`, neither by a subtraction, which would cancel. |x| is at most 88, so that
/// `e⁻ˣ` is finite.
#[inline(always)]
fn sigmoid<P: Parts>(x: f32) -> (f32, f32) {
    let power = P::exp(-x);
    let sigmoid = P::reciprocal(1.0 + power);
    (sigmoid, power * sigmoid)
}

/// `x` within ±`bound`, beyond which a derivative is 0 or 1; NaN stays NaN.
#[inline(always)]
fn held(x: f32, bound: f32) -> f32 {
    if x > bound {
        bound
    } else if x < -bound {
        -bound
    } else {
        x
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The derivative in f64, from its definition.
    fn exact(activation: Activation, z: f64) -> f64 {
        use core::f64::consts::{FRAC_1_SQRT_2, FRAC_2_PI};
        match activation {
            Activation::None => 1.0,
            Activation::Relu => f64::from(u8::from(z > 0.0)),
            Activation::Gelu => {
                let density = libm::exp(-0.5 * z * z) * 0.5 * FRAC_2_PI.sqrt();
                0.5 * libm::erfc(-z * FRAC_1_SQRT_2) + z * density
            }
            Activation::GeluTanh => {
                let scale = FRAC_2_PI.sqrt();
                let tanh = libm::tanh(scale * (z + 0.044_715 * z * z * z));
                let slope = scale * (1.0 + 3.0 * 0.044_715 * z * z);
                0.5 * (1.0 + tanh) + 0.5 * z * (1.0 - tanh * tanh) * slope
            }
            Activation::Silu => {
                let sigmoid = 1.0 / (1.0 + libm::exp(-z));
                sigmoid * (1.0 + z * (1.0 - sigmoid))
            }
        }
    }

    #[test]
    fn derivatives_are_within_1e_6_and_for_16_bits_within_2e_4_of_their_definition() {
        for activation in Activation::ALL {
            for step in -30_000..=30_000 {
                let z = step as f32 * 1e-3;
                let exact = exact(activation, f64::from(z));
                let error = (f64::from(activation.derivative(z)) - exact).abs();
                assert!(error <= 1e-6, "{activation:?}'({z}): error {error:e}");
                let error = (f64::from(activation.gradient_for_16_bits(z, 1.0)) - exact).abs();
                assert!(error <= 2e-4, "{activation:?}'({z}) for 16 bits: error {error:e}");
            }
        }
    }

    /// With h = 2⁻⁷ the rule errs by h²/6 times the third derivative, which is below 3 for all of
    /// them: 3e-5. Rounding the two values, 4 ulp of 8 at most, adds 1.3e-4 over 2h.
    #[test]
    fn derivatives_are_what_central_differences_of_the_function_give() {
        for activation in Activation::ALL {
            for step in -800..=800 {
                let (z, h) = (step as f32 * 1e-2 + 5e-3, 1.0 / 128.0);
                if activation == Activation::Relu && z.abs() <= h {
                    continue;
                }
                let difference = (activation.apply(z + h) - activation.apply(z - h)) / (2.0 * h);
                let error = (activation.derivative(z) - difference).abs();
                assert!(error <= 2e-4, "{activation:?}'({z}): error {error:e}");
            }
        }
    }

    #[test]
    fn derivatives_at_infinity_are_their_limits_and_nan_stays_nan() {
        for activation in Activation::ALL {
            let limit_below = f32::from(u8::from(activation == Activation::None));
            for far in [f32::INFINITY, 1e30] {
                assert_eq!(activation.derivative(far), 1.0, "{activation:?}");
                let below = activation.derivative(-far);
                assert!((below - limit_below).abs() <= 1e-30, "{activation:?}: {below}");
            }
            let at_nan = activation.derivative(f32::NAN);
            assert_eq!(at_nan.is_nan(), activation.needs_pre_activation(), "{activation:?}");
        }
    }

    #[test]
    fn gradient_is_dy_times_the_derivative_and_nothing_passes_a_closed_relu() {
        for activation in Activation::ALL {
            for z in [-3.0, -0.5, 0.0, 0.5, 3.0] {
                assert_eq!(activation.gradient(z, 2.5), 2.5 * activation.derivative(z));
            }
        }
        for dy in [f32::INFINITY, f32::NAN] {
            assert_eq!(Activation::Relu.gradient(0.0, dy), 0.0);
            assert_eq!(Activation::Relu.gradient_for_16_bits(-1.0, dy), 0.0);
        }
    }
}
