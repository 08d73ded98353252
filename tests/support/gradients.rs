//! The backward pass of a linear layer in f64, and how far from it a result may be.
//!
//! # Tolerance
//! With `u` the unit roundoff of f32 and `v` that of the element type, whose smallest number is
//! `s`, an element of `dZ = dY·act'(Z)` errs by
//!
//! ```text
//! e = |dY|·(d + 2·u) + v·|dZ| + s/2
//! ```
//! where `d` bounds the error of the derivative: 1e-6 in f32, 2e-4 in the form that kernels for
//! 16-bit types use. Without an activation, and for ReLU, whose dZ is dY or 0, `e` is 0.
//!
//! A gradient is a sum `Σ dZ·f` of `c` products, with the factor `f` from W, from X, or 1. The
//! errors of dZ have signs as good as random there, so they add up as the root of their squares: six
//! times that is more than ten standard deviations, as a rounding error is at most `v` and has a
//! deviation of `v/√3`. Adding errs as in the forward pass (`linear.rs` says why), and the result
//! is rounded once, or twice where it is added to what was there:
//!
//! ```text
//! tolerance = (6·√(Σ (e·f)²) + 2·(√c + 4)·u·(Σ |dZ·f| + |before|))·(1 + v)
//!             + v·(|Σ dZ·f| if added to + |result|) + s
//! ```
//! A missing or doubled product is an error of about `Σ |dZ·f| / c`, which for bf16 and c = 1000 is
//! some three tolerances, for f16 more than ten, for f32 a hundred.

use kasmina::{Activation, DType, Tier, WeightLayout};

use super::operand::Poison;
use super::random::Random;

/// Operands of a backward pass; matrices without gaps.
pub(crate) struct Gradients<T> {
    pub(crate) m: usize,
    pub(crate) n: usize,
    pub(crate) k: usize,
    /// `[m, k]`
    pub(crate) x: Vec<T>,
    /// `[k, n]`
    w: Vec<T>,
    /// `[m, n]`
    pub(crate) dy: Vec<T>,
    /// `[m, n]`
    pub(crate) z: Vec<T>,
}

/// A reference: for each element the exact value and how far from it a result may be, but for the
/// final rounding.
pub(crate) struct Reference {
    sums: Vec<f64>,
    errors: Vec<f64>,
    magnitudes: Vec<f64>,
    /// Products in a sum.
    products: usize,
}

impl<T: Poison> Gradients<T> {
    /// Normally distributed operands.
    pub(crate) fn random([m, n, k]: [usize; 3]) -> Self {
        let mut random = Random::of(&format!("gradients {m} {n} {k} {}", T::DTYPE));
        let mut normal =
            |count| random.normal(count).into_iter().map(T::from_f32).collect::<Vec<T>>();
        let (x, w) = (normal(m * k), normal(k * n));
        let (dy, z) = (normal(m * n), normal(m * n));
        Self { m, n, k, x, w, dy, z }
    }

    /// The weight as a matrix of this layout.
    pub(crate) fn weight(&self, layout: WeightLayout) -> (Vec<T>, [usize; 2]) {
        let (rows, columns) = layout.rows_columns(self.k, self.n);
        (in_layout(&self.w, self.k, self.n, layout), [rows, columns])
    }

    /// What the forward pass gave for `z`.
    pub(crate) fn output(&self, activation: Activation) -> Vec<T> {
        self.z.iter().map(|z| T::from_f32(activation.apply(z.to_f32()))).collect()
    }

    /// dZ and how far from it a result may be.
    fn dz(&self, activation: Activation, tier: Tier) -> Vec<(f64, f64)> {
        let approximate = T::DTYPE != DType::F32 && tier != Tier::Cpu;
        let d = if approximate { 2e-4 } else { 1e-6 };
        let (u, v) = (DType::F32.unit_roundoff(), T::DTYPE.unit_roundoff());
        let of = |(dy, z): (&T, &T)| {
            let (dy, z) = (f64::from(dy.to_f32()), f64::from(z.to_f32()));
            let dz = dy * derivative(activation, z);
            let exact = matches!(activation, Activation::None | Activation::Relu);
            let error = dy.abs() * (d + 2.0 * u) + v * dz.abs() + smallest::<T>() / 2.0;
            (dz, if exact { 0.0 } else { error })
        };
        self.dy.iter().zip(&self.z).map(of).collect()
    }

    /// `dZ·Wᵀ`, `Xᵀ·dZ` in this layout, and `Σ dZ`.
    pub(crate) fn references(
        &self,
        layout: WeightLayout,
        activation: Activation,
        tier: Tier,
    ) -> [Reference; 3] {
        let (m, n, k) = (self.m, self.n, self.k);
        let dz = self.dz(activation, tier);
        let wide = |values: &[T]| -> Vec<f64> {
            values.iter().map(|value| f64::from(value.to_f32())).collect()
        };
        let (x, w) = (wide(&self.x), wide(&self.w));
        let mut dx = Reference::zeros(m * k, n);
        let mut dw = Reference::zeros(k * n, m);
        let mut db = Reference::zeros(n, m);
        for i in 0..m {
            for (j, &dz) in dz[i * n..][..n].iter().enumerate() {
                db.add(j, dz, 1.0);
            }
            for l in 0..k {
                for (j, &dz) in dz[i * n..][..n].iter().enumerate() {
                    dx.add(i * k + l, dz, w[l * n + j]);
                    dw.add(l * n + j, dz, x[i * k + l]);
                }
            }
        }
        let Reference { sums, errors, magnitudes, products } = dw;
        let [sums, errors, magnitudes] =
            [sums, errors, magnitudes].map(|values| in_layout(&values, k, n, layout));
        [dx, Reference { sums, errors, magnitudes, products }, db]
    }
}

impl Reference {
    fn zeros(len: usize, products: usize) -> Self {
        let [sums, errors, magnitudes] = [(); 3].map(|()| vec![0.0; len]);
        Self { sums, errors, magnitudes, products }
    }

    fn add(&mut self, at: usize, (dz, error): (f64, f64), factor: f64) {
        self.sums[at] += dz * factor;
        self.errors[at] += (error * factor).powi(2);
        self.magnitudes[at] += (dz * factor).abs();
    }

    /// Compares a result with the reference added to `before`, if that is given, and gives the
    /// largest error in units of its tolerance.
    pub(crate) fn compare<T: Poison>(
        &self,
        got: &[T],
        before: Option<&[T]>,
    ) -> Result<f64, String> {
        let (u, v) = (DType::F32.unit_roundoff(), T::DTYPE.unit_roundoff());
        let mut worst: f64 = 0.0;
        if got.len() != self.sums.len() {
            return Err(format!("{} elements, expected {}", got.len(), self.sums.len()));
        }
        for (i, got) in got.iter().enumerate() {
            let before = before.map(|before| f64::from(before[i].to_f32()));
            let expected = self.sums[i] + before.unwrap_or(0.0);
            let first_rounding = if before.is_some() { v * self.sums[i].abs() } else { 0.0 };
            let adding = 2.0 * ((self.products as f64).sqrt() + 4.0) * u;
            let magnitude = self.magnitudes[i] + before.unwrap_or(0.0).abs();
            let tolerance = (6.0 * self.errors[i].sqrt() + adding * magnitude) * (1.0 + v)
                + first_rounding
                + v * expected.abs()
                + smallest::<T>();
            let error = (f64::from(got.to_f32()) - expected).abs() / tolerance;
            // Not `error > 1.0`: it may be NaN.
            if error.is_nan() || error > 1.0 {
                return Err(format!(
                    "element {i}: got {got:?}, expected {expected:e}; the error is {error:e} times \
                     its tolerance"
                ));
            }
            worst = worst.max(error);
        }
        Ok(worst)
    }
}

/// `[k, n]` values in the order of a weight of this layout.
fn in_layout<V: Copy>(values: &[V], k: usize, n: usize, layout: WeightLayout) -> Vec<V> {
    match layout {
        WeightLayout::InOut => values.to_vec(),
        WeightLayout::OutIn => (0..k * n).map(|i| values[i % k * n + i / k]).collect(),
    }
}

fn smallest<T: Poison>() -> f64 {
    match T::DTYPE {
        DType::F16 => 2.0f64.powi(-24),
        _ => f64::from(f32::MIN_POSITIVE),
    }
}

/// The activation's derivative in f64, from its definition.
fn derivative(activation: Activation, z: f64) -> f64 {
    use std::f64::consts::{FRAC_1_SQRT_2, FRAC_2_PI};
    match activation {
        Activation::None => 1.0,
        Activation::Relu => f64::from(u8::from(z > 0.0)),
        Activation::Gelu => {
            let density = (-0.5 * z * z).exp() * 0.5 * FRAC_2_PI.sqrt();
            0.5 * libm::erfc(-z * FRAC_1_SQRT_2) + z * density
        }
        Activation::GeluTanh => {
            let tanh = (FRAC_2_PI.sqrt() * (z + 0.044_715 * z.powi(3))).tanh();
            let slope = FRAC_2_PI.sqrt() * (1.0 + 3.0 * 0.044_715 * z * z);
            0.5 * (1.0 + tanh) + 0.5 * z * (1.0 - tanh * tanh) * slope
        }
        Activation::Silu => {
            let sigmoid = 1.0 / (1.0 + (-z).exp());
            sigmoid * (1.0 + z * (1.0 - sigmoid))
        }
        other => panic!("{other:?} has no reference: add its derivative here"),
    }
}
