//! What a pass over a tensor tells, from the moments that it leaves.
#![forbid(unsafe_code)]

use std::fmt;

use kasmina_kernels::reduce::Moments;

/// What one pass over a tensor tells.
///
/// NaN and infinities are counted. Unless NaN are skipped ([`crate::NanPolicy`]), they are not
/// left out: with a NaN among the elements, sum, mean,
/// variance, minimum, maximum and norm are NaN; with infinities alone, the sum is what IEEE
/// addition makes of them and the variance NaN.
///
/// Shown as one line: `4 elements: mean 0.000e0 ± 2.550e0, …`, with as many digits after the points
/// as the format asks for, three by default.
///
/// ```
/// use kasmina_host::{Device, Summary, TelemetryReducer, Tensor};
///
/// let device = Device::cpu();
/// let reducer = TelemetryReducer::new(&device)?;
/// let mut epoch = Summary::EMPTY;
/// for batch in [[0.0f32, 1.0], [2.0, 3.0]] {
///     epoch = epoch.merge(reducer.summary(&Tensor::from_slice(&device, &batch, [2])?)?);
/// }
/// assert_eq!((epoch.count(), epoch.mean(), epoch.variance()), (4, Some(1.5), Some(1.25)));
/// println!("activations: {epoch}");
/// # Ok::<(), kasmina_host::Error>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Summary {
    moments: Moments,
}

impl Summary {
    /// Of no elements, which [`merge`](Self::merge) adds to.
    pub const EMPTY: Self = Self::of(Moments::EMPTY);

    pub(super) const fn of(moments: Moments) -> Self {
        Self { moments }
    }

    /// Of the elements of both, as if they had been reduced together: of batches or of devices, which
    /// should count as dead, and skip, the same ([`crate::ReducerConfig`]).
    ///
    /// Counts, minimum and maximum are exact. With n the numbers of elements, means μ and M = Σ (x −
    /// μ)², M = M₁ + M₂ + (μ₂ − μ₁)²·n₁·n₂/(n₁ + n₂): Chan, Golub and LeVeque, "Updating formulae and a
    /// pairwise algorithm for computing sample variances", 1979, which nothing cancels in. It is in
    /// f64, and how a reduction merges the chunks of a tensor too, so the bounds of
    /// [`summary`](crate::TelemetryReducer::summary) hold. Rounding depends on which summaries are
    /// merged in which order: only the same order gives the same bits.
    #[must_use]
    pub fn merge(self, other: Self) -> Self {
        Self::of(self.moments.merge(other.moments))
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

    /// The standard deviation of the elements as a whole population, √[`variance`](Self::variance);
    /// `None` without elements.
    #[must_use]
    pub fn std_dev(&self) -> Option<f64> {
        self.variance().map(f64::sqrt)
    }

    /// The variance estimated from the elements as a sample: Σ (x − mean)² / (n − 1), with Bessel's
    /// correction. `None` below two elements.
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

    /// How many elements are dead: those of |x| < ε ([`crate::ReducerConfig::epsilon`]).
    #[must_use]
    pub const fn dead(&self) -> u64 {
        self.moments.dead
    }

    /// The share of [`dead`](Self::dead) elements, 0 to 1; `None` without elements.
    #[must_use]
    pub fn dead_ratio(&self) -> Option<f64> {
        self.unless_empty(self.moments.dead as f64 / self.moments.count as f64)
    }

    /// The signal-to-noise ratio, mean / [`std_dev`](Self::std_dev), the inverse of the coefficient of
    /// variation, with the sign of the mean; `None` without elements. It is infinite where all elements
    /// are the same, and NaN where they are 0.
    #[must_use]
    pub fn signal_to_noise(&self) -> Option<f64> {
        Some(self.mean()? / self.std_dev()?)
    }

    fn unless_empty<V>(&self, value: V) -> Option<V> {
        (self.moments.count > 0).then_some(value)
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits = f.precision().unwrap_or(3);
        let Moments { count, mean, min, max, dead, non_finite, .. } = self.moments;
        write!(f, "{count} elements")?;
        if let Some(std_dev) = self.std_dev() {
            let l2 = self.l2();
            write!(f, ": mean {mean:.digits$e} ± {std_dev:.digits$e}, ")?;
            write!(f, "from {min:.digits$e} to {max:.digits$e}, norm {l2:.digits$e}, {dead} dead")?;
        }
        write!(f, ", {non_finite} not finite")
    }
}

#[cfg(test)]
mod tests {
    use kasmina_kernels::reduce::Rule;

    use super::*;

    fn summary(elements: &[f32]) -> Summary {
        let rule = Rule { epsilon: 0.1, skip_nan: false };
        Summary::of(Moments::of(elements, |element| element, rule))
    }

    fn bits(summary: &Summary) -> [u64; 8] {
        let Moments { count, sum, mean, m2, non_finite, dead, min, max } = summary.moments;
        let (min, max) = (u64::from(min.to_bits()), u64::from(max.to_bits()));
        [count, sum.to_bits(), mean.to_bits(), m2.to_bits(), non_finite, dead, min, max]
    }

    #[test]
    fn a_summary_of_small_integers_is_exact() {
        let summary = summary(&[3.0, -4.0, 0.0, 1.0]);
        assert_eq!((summary.count(), summary.sum(), summary.mean()), (4, 0.0, Some(0.0)));
        assert_eq!(
            (summary.min(), summary.max(), summary.abs_max()),
            (Some(-4.0), Some(3.0), Some(4.0))
        );
        assert_eq!((summary.variance(), summary.sample_variance()), (Some(6.5), Some(26.0 / 3.0)));
        assert_eq!((summary.l2(), summary.dead_ratio()), (26.0_f64.sqrt(), Some(0.25)));
        assert_eq!((summary.non_finite(), summary.signal_to_noise()), (0, Some(0.0)));
    }

    #[test]
    fn a_sample_of_one_has_no_variance() {
        let summary = summary(&[2.0]);
        assert_eq!((summary.variance(), summary.sample_variance()), (Some(0.0), None));
        assert_eq!(summary.signal_to_noise(), Some(f64::INFINITY));
    }

    #[test]
    fn non_finite_elements_are_counted_and_reach_every_statistic_they_belong_to() {
        let with_nan = summary(&[1.0, f32::NAN, f32::INFINITY]);
        assert_eq!(with_nan.non_finite(), 2);
        assert!(with_nan.sum().is_nan() && with_nan.variance().unwrap().is_nan());
        assert!(with_nan.min().unwrap().is_nan() && with_nan.abs_max().unwrap().is_nan());
        assert!(with_nan.l2().is_nan());

        let infinite = summary(&[1.0, f32::NEG_INFINITY]);
        assert_eq!((infinite.sum(), infinite.max()), (f64::NEG_INFINITY, Some(1.0)));
        assert_eq!((infinite.abs_max(), infinite.l2()), (Some(f32::INFINITY), f64::INFINITY));
    }

    #[test]
    fn merged_parts_are_as_near_to_the_whole_as_a_summary_of_it() {
        let n = 20_011;
        let waves = |i: usize| (i as f32 * 0.7).sin() + (i as f32 * 0.013).cos();
        for mean in [0.0, 1e4] {
            let elements: Vec<f32> = (0..n).map(|i| waves(i) + mean).collect();
            let wide = || elements.iter().map(|&x| f64::from(x));
            let sum = wide().sum::<f64>();
            let variance = wide().map(|x| (x - sum / n as f64).powi(2)).sum::<f64>() / n as f64;
            let magnitude: f64 = wide().map(f64::abs).sum();
            let u = 2.0f64.powi(-24);
            for part in [1, 2, 63, 64, 1000, 6007, n] {
                let parts: Vec<Summary> = elements.chunks(part).map(summary).collect();
                let forward = parts.iter().copied().fold(Summary::EMPTY, Summary::merge);
                let back = parts.iter().rev().copied().fold(Summary::EMPTY, Summary::merge);
                for got in [forward, back] {
                    let whole = summary(&elements);
                    assert_eq!((got.count(), got.dead()), (n as u64, whole.dead()));
                    assert_eq!((got.min(), got.max()), (whole.min(), whole.max()));
                    assert!((got.sum() - sum).abs() <= 650.0 * u * magnitude, "{part}");
                    let error = (got.variance().unwrap() - variance).abs();
                    assert!(error <= 780.0 * u * variance, "{part}: {error:e} of {variance}");
                }
            }
        }
    }

    #[test]
    fn merging_with_a_summary_of_nothing_changes_no_bit() {
        let some = summary(&[3.0, -4.0, 0.0]);
        for merged in [some.merge(Summary::EMPTY), Summary::EMPTY.merge(some)] {
            assert_eq!(bits(&merged), bits(&some));
        }
        assert_eq!(bits(&Summary::EMPTY.merge(Summary::EMPTY)), bits(&summary(&[])));
    }

    #[test]
    fn the_order_of_merges_decides_the_bits() {
        let [large, opposite, small] = [1e30f32, -1e30, 1.0].map(|x| summary(&[x]));
        // The small one vanishes beside a large one.
        assert_eq!(large.merge(opposite).merge(small).sum(), 1.0);
        assert_eq!(large.merge(opposite.merge(small)).sum(), 0.0);
    }

    #[test]
    fn a_nan_in_one_part_reaches_what_is_merged() {
        let merged = summary(&[1.0]).merge(summary(&[f32::NAN]));
        assert_eq!((merged.count(), merged.non_finite()), (2, 1));
        assert!(merged.sum().is_nan() && merged.max().unwrap().is_nan());
        assert!(merged.std_dev().unwrap().is_nan());
    }

    #[test]
    fn the_standard_deviation_is_the_root_of_the_variance() {
        let some = summary(&[1.0, 5.0, 0.0, 2.0]);
        assert_eq!((some.variance(), some.std_dev()), (Some(3.5), Some(3.5f64.sqrt())));
        assert_eq!((some.dead(), some.dead_ratio()), (1, Some(0.25)));
        assert_eq!((Summary::EMPTY.std_dev(), Summary::EMPTY.dead()), (None, 0));
    }

    #[test]
    fn a_summary_is_shown_as_one_line() {
        let some = summary(&[3.0, -4.0, 0.0, 1.0]);
        assert_eq!(
            some.to_string(),
            "4 elements: mean 0.000e0 ± 2.550e0, from -4.000e0 to 3.000e0, norm 5.099e0, 1 dead, \
             0 not finite"
        );
        assert!(format!("{some:.1}").contains("mean 0.0e0 ± 2.5e0"), "{some:.1}");
        assert_eq!(Summary::EMPTY.to_string(), "0 elements, 0 not finite");
    }
}
