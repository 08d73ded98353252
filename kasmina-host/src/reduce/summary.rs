//! What a pass over a tensor tells, from the moments that it leaves.
#![forbid(unsafe_code)]

use kasmina_kernels::reduce::Moments;

/// What one pass over a tensor tells.
///
/// NaN and infinities are counted. Unless NaN are skipped ([`crate::NanPolicy`]), they are not
/// left out: with a NaN among the elements, sum, mean,
/// variance, minimum, maximum and norm are NaN; with infinities alone, the sum is what IEEE
/// addition makes of them and the variance NaN.
#[derive(Clone, Copy, Debug)]
pub struct Summary {
    moments: Moments,
}

impl Summary {
    pub(super) const fn of(moments: Moments) -> Self {
        Self { moments }
    }

    /// The number of elements, without those that were skipped.
    #[must_use]
    pub const fn count(&self) -> u64 {
        self.moments.count
    }

    /// The sum; 0 without elements.
    #[must_use]
    pub const fn sum(&self) -> f64 {
        self.moments.sum
    }

    /// The smallest element; NaN if one is, `None` without elements.
    #[must_use]
    pub fn min(&self) -> Option<f32> {
        self.unless_empty(self.moments.min)
    }

    /// The largest element; NaN if one is, `None` without elements.
    #[must_use]
    pub fn max(&self) -> Option<f32> {
        self.unless_empty(self.moments.max)
    }

    /// The largest absolute value; NaN if an element is, `None` without elements.
    #[must_use]
    pub fn abs_max(&self) -> Option<f32> {
        let Moments { min, max, .. } = self.moments;
        // Both are NaN if one element is, but `f32::max` would need only one that is not.
        self.unless_empty(if max.is_nan() { max } else { max.max(-min) })
    }

    /// The arithmetic mean; `None` without elements.
    #[must_use]
    pub fn mean(&self) -> Option<f64> {
        self.unless_empty(self.moments.mean)
    }

    /// The variance of the elements as a whole population: the mean of (x − mean)². `None` without
    /// elements.
    #[must_use]
    pub fn variance(&self) -> Option<f64> {
        self.unless_empty(self.moments.m2 / self.moments.count as f64)
    }

    /// The variance estimated from the elements as a sample: Σ (x − mean)² / (n − 1). `None` below
    /// two elements.
    #[must_use]
    pub fn sample_variance(&self) -> Option<f64> {
        let Moments { count, m2, .. } = self.moments;
        (count > 1).then(|| m2 / (count - 1) as f64)
    }

    /// The Euclidean norm, √(Σ x²); 0 without elements.
    #[must_use]
    pub fn l2(&self) -> f64 {
        let Moments { count, mean, m2, .. } = self.moments;
        match self.abs_max() {
            None => 0.0,
            // Infinite or NaN, where Σ (x − mean)² is NaN either way.
            Some(largest) if !largest.is_finite() => f64::from(largest),
            Some(_) => (m2 + count as f64 * mean * mean).sqrt(),
        }
    }

    /// How many elements are NaN or infinite, with those that were skipped.
    #[must_use]
    pub const fn non_finite(&self) -> u64 {
        self.moments.non_finite
    }

    /// The share of dead elements, those of |x| < ε ([`crate::ReducerConfig::epsilon`]); `None` without
    /// elements.
    #[must_use]
    pub fn dead_ratio(&self) -> Option<f64> {
        self.unless_empty(self.moments.dead as f64 / self.moments.count as f64)
    }

    /// The signal-to-noise ratio, mean / √variance, with the sign of the mean; `None` without
    /// elements. It is infinite where all elements are the same, and NaN where they are 0.
    #[must_use]
    pub fn signal_to_noise(&self) -> Option<f64> {
        Some(self.mean()? / self.variance()?.sqrt())
    }

    fn unless_empty<V>(&self, value: V) -> Option<V> {
        (self.moments.count > 0).then_some(value)
    }
}
