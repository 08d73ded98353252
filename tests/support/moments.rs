//! The statistics of a slice in f64, from their definitions, and how far from them a summary may
//! be.
//!
//! # Tolerance
//! Let `u` be the unit roundoff of f32, `A = Σ|x|`, `L = max|x|`, `M = Σ(x − mean)²`, and `r` the
//! elements that share a pivot over those that it is the mean of: at most 16 in kernels, 64 on the
//! CPU. `kasmina_kernels::reduce` gives the bounds of what is rounded to f32:
//!
//! ```text
//! sum = 10·(1 + r)·u·A, and 10·u·A for the sum alone        mean = sum / n
//! m2  = 12·(1 + r)·u·M + n·(2⁻⁴⁴·L)²
//! ```
//!
//! The last term is for f64, in which the mean errs by a few units of its last digits, here and
//! there: it is what remains where all elements are equal. An element that is missed or counted
//! twice shows in the count of elements or of dead ones.

use kasmina::{DType, Element, Reduction, Summary, Tier};

/// The exact statistics, as far as f64 goes.
#[derive(Debug)]
pub(crate) struct Reference {
    count: u64,
    sum: f64,
    mean: f64,
    m2: f64,
    min: f64,
    max: f64,
    non_finite: u64,
    dead: u64,
    /// Σ|x|
    magnitude: f64,
    /// The `1 + r` of the tier it is for.
    spread: f64,
}

/// A number with the error it may have.
struct Expected {
    value: f64,
    tolerance: f64,
}

impl Reference {
    pub(crate) fn of<T: Element>(values: &[T], epsilon: f32, tier: Tier) -> Self {
        let wide = || values.iter().map(|value| f64::from(value.to_f32()));
        let count = values.len() as u64;
        let sum = accurate_sum(values, |x| x);
        let mean = sum / count as f64;
        let nan = wide().any(f64::is_nan);
        Self {
            count,
            sum,
            mean,
            m2: accurate_sum(values, |x| (x - mean).powi(2)),
            min: if nan { f64::NAN } else { wide().fold(f64::INFINITY, f64::min) },
            max: if nan { f64::NAN } else { wide().fold(f64::NEG_INFINITY, f64::max) },
            non_finite: wide().filter(|x| !x.is_finite()).count() as u64,
            dead: wide().filter(|x| x.abs() < f64::from(epsilon)).count() as u64,
            magnitude: accurate_sum(values, f64::abs),
            spread: if tier == Tier::Cpu { 65.0 } else { 17.0 },
        }
    }

    /// With so many elements that are not finite, of which nothing else is told.
    pub(crate) fn with_non_finite(self, non_finite: u64) -> Self {
        Self { non_finite, ..self }
    }

    /// Of the same elements so many times.
    #[allow(dead_code, reason = "only whole tensors are long enough to need it")]
    pub(crate) fn repeated(self, times: u64) -> Self {
        let factor = times as f64;
        Self {
            count: self.count * times,
            sum: self.sum * factor,
            m2: self.m2 * factor,
            non_finite: self.non_finite * times,
            dead: self.dead * times,
            magnitude: self.magnitude * factor,
            ..self
        }
    }

    fn abs_max(&self) -> f64 {
        if self.max.is_nan() { self.max } else { self.max.max(-self.min) }
    }

    /// Compares every number of a summary and gives the largest error in units of its tolerance.
    pub(crate) fn compare(&self, got: &Summary) -> Result<f64, String> {
        let counts = [
            ("count", got.count(), self.count),
            ("non-finite", got.non_finite(), self.non_finite),
            ("dead", got.dead(), self.dead),
        ];
        for (name, got, expected) in counts {
            if got != expected {
                return Err(format!("{name}: got {got}, expected {expected}"));
            }
        }
        let numbers = [
            (Reduction::Sum, Some(got.sum())),
            (Reduction::Mean, got.mean()),
            (Reduction::Variance, got.variance()),
            (Reduction::Min, got.min().map(f64::from)),
            (Reduction::Max, got.max().map(f64::from)),
            (Reduction::AbsMax, got.abs_max().map(f64::from)),
            (Reduction::L2, Some(got.l2())),
        ];
        let mut worst: f64 = 0.0;
        for (reduction, got) in numbers {
            worst = worst.max(self.compare_one(reduction, got)?);
        }
        Ok(worst)
    }

    /// As [`compare`](Self::compare), for the result of one reduction.
    pub(crate) fn compare_one(
        &self,
        reduction: Reduction,
        got: Option<f64>,
    ) -> Result<f64, String> {
        let of_none = matches!(reduction, Reduction::Sum | Reduction::L2).then_some(0.0);
        if self.count == 0 || got.is_none() {
            let agree = self.count == 0 && got == of_none;
            let message = || format!("{reduction:?}: got {got:?} of {} elements", self.count);
            return if agree { Ok(0.0) } else { Err(message()) };
        }
        let got = got.unwrap_or(f64::NAN);
        let Expected { value, tolerance } = self.expected(reduction);
        let error = (got - value).abs();
        if got == value || (got.is_nan() && value.is_nan()) {
            return Ok(0.0);
        }
        // Not `error > tolerance`: it may be NaN.
        if error.is_nan() || error > tolerance {
            return Err(format!(
                "{reduction:?}: got {got:e}, expected {value:e}; the error is {error:e}, the \
                 tolerance {tolerance:e}"
            ));
        }
        Ok(error / tolerance)
    }

    fn expected(&self, reduction: Reduction) -> Expected {
        let u = DType::F32.unit_roundoff();
        let n = self.count as f64;
        let sum = 10.0 * self.spread * u * self.magnitude;
        let of_mean = 2.0f64.powi(-44) * self.abs_max();
        let m2 = 12.0 * self.spread * u * self.m2 + n * of_mean * of_mean;
        let (value, tolerance) = match reduction {
            Reduction::Sum => (self.sum, sum),
            Reduction::Mean => (self.mean, sum / n),
            Reduction::Variance => (self.m2 / n, m2 / n),
            Reduction::Min => (self.min, 0.0),
            Reduction::Max => (self.max, 0.0),
            Reduction::AbsMax => (self.abs_max(), 0.0),
            Reduction::L2 if !self.abs_max().is_finite() => (self.abs_max(), 0.0),
            Reduction::L2 => {
                let squares = self.m2 + n * self.mean * self.mean;
                let error = m2 + 2.0 * self.mean.abs() * sum + sum * sum / n;
                // √(s + d) − √s is at most d / √s, and at most √d.
                let root = squares.sqrt();
                (root, if error < squares { error / root } else { error.sqrt() })
            }
            other => panic!("{other:?} has no reference: add its definition here"),
        };
        Expected { value, tolerance }
    }
}

/// Σ f(x), in parts so that f64 loses nothing that counts.
fn accurate_sum<T: Element>(values: &[T], f: impl Fn(f64) -> f64) -> f64 {
    let part = |part: &[T]| part.iter().map(|value| f(f64::from(value.to_f32()))).sum::<f64>();
    values.chunks(4096).map(part).sum()
}
