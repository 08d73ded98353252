//! The forward pass of a linear layer in f64, and how far from it a result may be.
//!
//! # Tolerance
//! Let `S = Σ x·w + b`, `A = Σ |x·w| + |b|`, and `u` the unit roundoff of f32, in which all tiers
//! add (products of 16-bit types are exact in f32; for f32 they are fused or rounded once more).
//! Every addition errs by at most `u` times a partial sum, which is at most `A`, with signs as
//! good as random, so k of them err by about `√k·u·A`. Tensor cores truncate instead of rounding,
//! with twice the error and one sign, but once per 16 products, and partial sums of random
//! products grow with the root of their number: that stays below the same bound. Twice it, and
//! four roundings more for the bias and for small k:
//!
//! ```text
//! sum = 2·(√k + 4)·u·A
//! ```
//!
//! No activation has a slope above 1.13, and evaluating one in f32 errs by a few `u` of its
//! argument. The Hopper epilogue approximates the smooth ones to within 1.3e-4 of the result, or
//! 4e-7 absolutely, which is below half of the roundoff of the 16-bit types; for f32 it does not.
//! f32 in bf16 parts leaves out at most `u·A`, and tensor cores add only 32 k at a time. Then the
//! result is rounded once to a type of unit roundoff `v` whose smallest number is `s`:
//!
//! ```text
//! tolerance = (1.13·sum + 8·u·|S| + approximation)·(1 + v) + v·|act(S)| + s/2
//! ```
//!
//! A missing or doubled product is an error of about `A/k`: for k = 1000 more than a hundred times
//! the first term.

use kasmina::{Activation, DType, Tier, WeightLayout};

use super::activation::apply;
use super::poison::Poison;
use super::random::Random;

/// Operands with the sums that the exact result follows from.
pub(crate) struct Linear<T> {
    pub(crate) m: usize,
    pub(crate) n: usize,
    pub(crate) k: usize,
    pub(crate) x: Vec<T>,
    /// `[k, n]`.
    w: Vec<T>,
    pub(crate) bias: Vec<T>,
    /// `Σ x·w`
    sums: Vec<f64>,
    /// `Σ |x·w|`
    magnitudes: Vec<f64>,
}

impl<T: Poison> Linear<T> {
    /// Normally distributed operands.
    pub(crate) fn random([m, n, k]: [usize; 3]) -> Self {
        let mut random = Random::of(&format!("{m} {n} {k} {}", T::DTYPE));
        let mut normal =
            |count| random.normal(count).into_iter().map(T::from_f32).collect::<Vec<T>>();
        Self::new([m, n, k], normal(m * k), normal(k * n), normal(n))
    }

    /// Normally distributed operands, some of them NaN or infinite.
    pub(crate) fn with_non_finite_values(shape: [usize; 3]) -> Self {
        let Self { m, n, k, mut x, mut w, mut bias, .. } = Self::random(shape);
        let mut random = Random::of(&format!("non-finite {shape:?} {}", T::DTYPE));
        let special = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.0].map(T::from_f32);
        for values in [&mut x, &mut w] {
            // Few enough that most results are finite.
            for i in 0..(values.len() / (20 * k)).max(2) {
                let position = random.below(values.len());
                values[position] = special[i % special.len()];
            }
        }
        bias[random.below(n)] = special[1];
        Self::new([m, n, k], x, w, bias)
    }

    fn new([m, n, k]: [usize; 3], x: Vec<T>, w: Vec<T>, bias: Vec<T>) -> Self {
        let wide = |values: &[T]| -> Vec<f64> {
            values.iter().map(|value| f64::from(value.to_f32())).collect()
        };
        let (wide_x, wide_w) = (wide(&x), wide(&w));
        let mut sums = vec![0.0; m * n];
        let mut magnitudes = vec![0.0; m * n];
        for (i, (sums, magnitudes)) in sums.chunks_mut(n).zip(magnitudes.chunks_mut(n)).enumerate()
        {
            for (x, w) in wide_x[i * k..][..k].iter().zip(wide_w.chunks(n)) {
                for ((sum, magnitude), w) in sums.iter_mut().zip(&mut *magnitudes).zip(w) {
                    *sum += x * w;
                    *magnitude += (x * w).abs();
                }
            }
        }
        Self { m, n, k, x, w, bias, sums, magnitudes }
    }

    /// The weight as a matrix of this layout.
    pub(crate) fn weight(&self, layout: WeightLayout) -> (Vec<T>, [usize; 2]) {
        let (rows, columns) = layout.rows_columns(self.k, self.n);
        let values = match layout {
            WeightLayout::InOut => self.w.clone(),
            WeightLayout::OutIn => {
                (0..rows * columns).map(|i| self.w[i % self.k * self.n + i / self.k]).collect()
            }
        };
        (values, [rows, columns])
    }

    /// Compares a result with the reference and gives the largest error in units of its tolerance.
    pub(crate) fn compare(
        &self,
        got: &[T],
        bias: bool,
        activation: Activation,
        tier: Tier,
    ) -> Result<f64, String> {
        let mut worst: f64 = 0.0;
        for (i, got) in got.iter().enumerate() {
            let bias = if bias { f64::from(self.bias[i % self.n].to_f32()) } else { 0.0 };
            let sum = self.sums[i] + bias;
            let expected = apply(activation, sum);
            let wide = f64::from(got.to_f32());
            let error = if !expected.is_finite() || !sum.is_finite() {
                let same = wide == expected || (wide.is_nan() && expected.is_nan());
                if same { 0.0 } else { f64::INFINITY }
            } else {
                let magnitude = self.magnitudes[i] + bias.abs();
                let tolerance = self.tolerance(sum, magnitude, expected, activation, tier);
                (wide - expected).abs() / tolerance
            };
            // Not `error > 1.0`: it may be NaN.
            if error.is_nan() || error > 1.0 {
                let (row, column) = (i / self.n, i % self.n);
                return Err(format!(
                    "({row}, {column}): got {got:?}, expected {expected:e}; the error is {error:e} \
                     times its tolerance"
                ));
            }
            worst = worst.max(error);
        }
        Ok(worst)
    }

    fn tolerance(
        &self,
        sum: f64,
        magnitude: f64,
        expected: f64,
        activation: Activation,
        tier: Tier,
    ) -> f64 {
        let u = DType::F32.unit_roundoff();
        let v = T::DTYPE.unit_roundoff();
        let sum_error = 2.0 * ((self.k as f64).sqrt() + 4.0) * u * magnitude;
        let smooth = !matches!(activation, Activation::None | Activation::Relu);
        let approximated = smooth && tier == Tier::Hopper && T::DTYPE != DType::F32;
        let approximation = if approximated { 1.3e-4 * expected.abs() + 4e-7 } else { 0.0 };
        let smallest = match T::DTYPE {
            DType::F16 => 2.0f64.powi(-24),
            _ => f64::from(f32::MIN_POSITIVE),
        };
        (1.13 * sum_error + 8.0 * u * sum.abs() + approximation) * (1.0 + v)
            + v * expected.abs()
            + smallest / 2.0
    }
}
