//! Activation functions, and the two forms in which an epilogue evaluates them.
//!
//! [`Activation::apply`] is the function itself in f32, shared by the portable and the CPU tier.
//! The tensor-core tiers, whose results are rounded to 11 or 8 significant bits, evaluate
//! [`EpilogueActivation`]: one branch-free clamp for the piecewise-linear functions and one
//! parameterised sigmoid for the smooth ones, so that the epilogue has two code paths, not five.
//!
//! The derivatives, for the backward pass, have the same two accuracies: [`Activation::gradient`]
//! and, for results of 16 bits, `Activation::gradient_for_16_bits`.

mod gradient;

use crate::elementary::{erf, exp, fused_multiply_add};
use crate::names::{displayed_by_name, parsed_by_name};

/// What is applied to `X·W + b`, element by element.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
#[repr(u32)]
pub enum Activation {
    /// `x`
    #[default]
    None,
    /// `max(x, 0)`; NaN stays NaN.
    Relu,
    /// `x·Φ(x)` with the Gaussian distribution function Φ, that is `x/2·(1 + erf(x/√2))`.
    Gelu,
    /// `x/2·(1 + tanh(√(2/π)·(x + 0.044715·x³)))`
    GeluTanh,
    /// `x·σ(x) = x / (1 + e⁻ˣ)`
    Silu,
}

impl Activation {
    /// Every activation.
    pub const ALL: [Self; 5] = [Self::None, Self::Relu, Self::Gelu, Self::GeluTanh, Self::Silu];

    /// Lower-case name, `gelu-tanh` for instance.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Relu => "relu",
            Self::Gelu => "gelu",
            Self::GeluTanh => "gelu-tanh",
            Self::Silu => "silu",
        }
    }

    /// The activation whose discriminant is `code`, the form in which it crosses to the device;
    /// an unknown code is [`Activation::None`].
    #[must_use]
    pub const fn from_code(code: u32) -> Self {
        match code {
            1 => Self::Relu,
            2 => Self::Gelu,
            3 => Self::GeluTanh,
            4 => Self::Silu,
            _ => Self::None,
        }
    }

    /// The function in f32. At −∞ the smooth ones give NaN (−∞·0), as PyTorch's do.
    #[must_use]
    pub fn apply(self, x: f32) -> f32 {
        match self {
            Self::None => x,
            // Not `max`: that would turn NaN into 0.
            Self::Relu => {
                if x < 0.0 {
                    0.0
                } else {
                    x
                }
            }
            Self::Gelu => 0.5 * x * (1.0 + erf(x * core::f32::consts::FRAC_1_SQRT_2)),
            Self::GeluTanh => {
                let inner = GELU_TANH_SCALE * (x + GELU_TANH_CUBIC * x * x * x);
                // (1 + tanh z) / 2 = 1 / (1 + e⁻²ᶻ)
                x / (1.0 + exp(-2.0 * inner))
            }
            Self::Silu => x / (1.0 + exp(-x)),
        }
    }
}

displayed_by_name!(Activation);
parsed_by_name!(Activation, "activation");

/// √(2/π)
const GELU_TANH_SCALE: f32 = 0.797_884_6;
const GELU_TANH_CUBIC: f32 = 0.044_715;

/// Number of coefficients of the sigmoid form.
const SIGMOID_TERMS: usize = 7;

/// `logit Φ(x) / x` as a polynomial in `x²`, lowest power first: weighted least squares over
/// Chebyshev nodes of |x| ≤ 5, minimax-refined.
const GELU_LOGIT: [f32; SIGMOID_TERMS] = [
    1.595_457_4,
    0.073_143_84,
    -0.000_272_958_08,
    -7.217_759e-5,
    4.515_048e-6,
    -1.216_627_8e-7,
    1.276_980_2e-9,
];
/// The largest x² for which that holds.
const GELU_T_MAX: f32 = 25.0;

/// An activation as the tensor-core epilogue evaluates it.
///
/// Piecewise linear (`smooth == 0`): `max(x, lower)`, with `lower` 0 or −∞.
///
/// Smooth: `x·σ(x·P(t))` with `t = min(x², t_max)`. Every smooth activation here has that form:
/// SiLU with `P = 1`, GELU's tanh approximation with a linear `P` (as `(1 + tanh z)/2 = σ(2z)`),
/// and GELU itself because `Φ(x) = σ(logit Φ(x))` and `logit Φ(x) / x` is a smooth even function,
/// fitted to within 1.1e-4 in `x·P` on |x| ≤ 5, a quarter of half an ulp of f16. Beyond, the
/// result differs from GELU by less than 3e-7 absolutely.
///
/// `q` holds `−log₂e · P`, so that `σ` is `1 / (1 + 2^(x·q(t)))`: two special-function
/// instructions.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct EpilogueActivation {
    /// Coefficients of `−log₂e · P`, lowest power of `t` first.
    pub q: [f32; SIGMOID_TERMS],
    /// Where `t` is held.
    pub t_max: f32,
    /// The lower bound of the piecewise-linear form.
    pub lower: f32,
    /// 1 for the sigmoid form, 0 for the piecewise-linear one.
    pub smooth: u32,
}

impl EpilogueActivation {
    /// The form that evaluates `activation`.
    #[must_use]
    pub fn new(activation: Activation) -> Self {
        let (p, t_max): ([f32; SIGMOID_TERMS], f32) = match activation {
            Activation::None | Activation::Relu => ([0.0; SIGMOID_TERMS], 0.0),
            Activation::Silu => ([1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0], 0.0),
            Activation::GeluTanh => {
                let scale = 2.0 * GELU_TANH_SCALE;
                ([scale, scale * GELU_TANH_CUBIC, 0.0, 0.0, 0.0, 0.0, 0.0], 64.0)
            }
            Activation::Gelu => (GELU_LOGIT, GELU_T_MAX),
        };
        Self {
            q: p.map(|c| -core::f32::consts::LOG2_E * c),
            t_max,
            lower: if activation == Activation::Relu { 0.0 } else { f32::NEG_INFINITY },
            smooth: u32::from(!matches!(activation, Activation::None | Activation::Relu)),
        }
    }

    /// The exponent `x·q(t)` of the smooth form, which the device and the test below share.
    #[must_use]
    #[inline(always)]
    pub fn sigmoid_exponent(&self, x: f32) -> f32 {
        let squared = x * x;
        // Not `min`: x may be NaN, which must reach the product below and only there.
        let t = if squared < self.t_max { squared } else { self.t_max };
        let mut sum = self.q[SIGMOID_TERMS - 1];
        let mut term = SIGMOID_TERMS - 1;
        while term > 0 {
            term -= 1;
            sum = fused_multiply_add(sum, t, self.q[term]);
        }
        x * sum
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn evaluate(form: &EpilogueActivation, x: f32) -> f32 {
        if form.smooth == 0 {
            if x < form.lower { form.lower } else { x }
        } else {
            x / (1.0 + libm::exp2f(form.sigmoid_exponent(x)))
        }
    }

    #[test]
    fn epilogue_form_is_within_a_quarter_of_half_an_f16_ulp_up_to_five() {
        for activation in Activation::ALL {
            let form = EpilogueActivation::new(activation);
            for step in -5000..=5000 {
                let x = step as f32 * 1e-3;
                // `apply` loses relative accuracy where 1 + erf cancels, so compare in f64.
                let exact = match activation {
                    Activation::Gelu => {
                        0.5 * f64::from(x)
                            * libm::erfc(-f64::from(x) * core::f64::consts::FRAC_1_SQRT_2)
                    }
                    Activation::GeluTanh => {
                        let x = f64::from(x);
                        let z = (2.0 / core::f64::consts::PI).sqrt() * (x + 0.044_715 * x * x * x);
                        x / (1.0 + libm::exp(-2.0 * z))
                    }
                    _ => f64::from(activation.apply(x)),
                };
                let error = (f64::from(evaluate(&form, x)) - exact).abs();
                assert!(error <= 1.3e-4 * exact.abs(), "{activation:?}({x}): error {error:e}");
            }
        }
    }

    #[test]
    fn epilogue_form_of_gelu_has_a_small_absolute_error_beyond_five() {
        let form = EpilogueActivation::new(Activation::Gelu);
        for step in 5000..20_000 {
            for x in [step as f32 * 1e-3, -step as f32 * 1e-3] {
                let error = (evaluate(&form, x) - Activation::Gelu.apply(x)).abs();
                assert!(error <= 4e-7 + x.abs() * 2.0 * f32::EPSILON, "{x}: error {error:e}");
            }
        }
    }

    #[test]
    fn both_forms_propagate_nan_and_infinities_alike() {
        for activation in Activation::ALL {
            let form = EpilogueActivation::new(activation);
            assert!(activation.apply(f32::NAN).is_nan());
            assert!(evaluate(&form, f32::NAN).is_nan());
            assert_eq!(activation.apply(f32::INFINITY), f32::INFINITY);
            assert_eq!(evaluate(&form, f32::INFINITY), f32::INFINITY);
            let (exact, form) =
                (activation.apply(f32::NEG_INFINITY), evaluate(&form, f32::NEG_INFINITY));
            assert!(exact == form || (exact.is_nan() && form.is_nan()), "{activation:?}");
        }
    }

    #[test]
    fn codes_name_the_same_activation_on_both_sides() {
        for activation in Activation::ALL {
            assert_eq!(Activation::from_code(activation as u32), activation);
        }
    }
}
