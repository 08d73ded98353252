//! Tensors to reduce, and whether the results are right.

use anyhow::ensure;
use kasmina::{Device, Element, Summary, Tensor};

use crate::measure::random::Normals;
use crate::measure::regime::NODES;

/// Largest error of a sum, relative to the sum of absolute values, and of a variance, relative to
/// itself.
const SUM_TOLERANCE: f64 = 1e-6;
const VARIANCE_TOLERANCE: f64 = 1e-5;
/// Columns of a tensor, if its length is a multiple of them; else it is one row.
pub(crate) const COLUMNS: usize = 8192;

/// As many tensors of the same length as it takes for each call to find its own outside the L2
/// cache.
pub(crate) struct Operands<T: Element> {
    data: Vec<Tensor<T>>,
    first: Reference,
}

impl<T: Element> Operands<T> {
    pub(crate) fn new(
        device: &Device,
        len: usize,
        l2_bytes: u64,
        epsilon: f32,
        normals: &mut Normals,
    ) -> anyhow::Result<Self> {
        let sets = (2 * l2_bytes as usize).div_ceil(len * size_of::<T>()).clamp(1, NODES);
        let values = normals.take::<T>(len, 1.0);
        let first = Reference::of(&values, epsilon);
        let columns = if len.is_multiple_of(COLUMNS) { COLUMNS } else { len };
        let shape = [len / columns, columns];
        let mut data = vec![Tensor::from_slice(device, &values, shape)?];
        for _ in 1..sets {
            data.push(Tensor::from_slice(device, &normals.take::<T>(len, 1.0), shape)?);
        }
        Ok(Self { data, first })
    }

    /// The tensor of call `call`.
    pub(crate) fn data(&self, call: usize) -> &Tensor<T> {
        &self.data[call % self.data.len()]
    }

    /// The error of a sum of the first tensor, relative to the sum of its absolute values.
    pub(crate) fn sum_error(&self, sum: f64) -> anyhow::Result<f64> {
        let error = (sum - self.first.sum).abs() / self.first.sum_abs;
        // Also false for NaN.
        let acceptable = error <= SUM_TOLERANCE;
        ensure!(acceptable, "the sum is {sum:e} instead of {:e}", self.first.sum);
        Ok(error)
    }

    /// As [`sum_error`](Self::sum_error), of the sum over all parts; their counts and extremes must
    /// be those of all elements.
    pub(crate) fn parts_error(&self, parts: &[Summary]) -> anyhow::Result<f64> {
        let Reference { count, min, max, .. } = self.first;
        let extremes = parts.iter().filter_map(|part| Some((part.min()?, part.max()?)));
        let exact = extremes.fold((f32::INFINITY, f32::NEG_INFINITY), |all, part| {
            (all.0.min(part.0), all.1.max(part.1))
        });
        let counted: u64 = parts.iter().map(Summary::count).sum();
        ensure!(
            (counted, exact) == (count, (min, max)),
            "count, min and max of the parts are {counted} and {exact:?}"
        );
        self.sum_error(parts.iter().map(Summary::sum).sum())
    }

    /// The larger of the errors of sum and variance of the first tensor; what is exact must be
    /// equal.
    pub(crate) fn summary_error(&self, summary: &Summary) -> anyhow::Result<f64> {
        let Reference { count, variance, min, max, dead, .. } = self.first;
        let exact = (summary.count(), summary.min(), summary.max(), summary.non_finite());
        let expected = (count, Some(min), Some(max), 0);
        ensure!(
            exact == expected,
            "count, min, max and non-finite are {exact:?}, not {expected:?}"
        );
        let dead = (summary.dead_ratio(), Some(dead as f64 / count as f64));
        ensure!(dead.0 == dead.1, "the dead ratio is {:?} instead of {:?}", dead.0, dead.1);
        let got = summary.variance().unwrap_or(f64::NAN);
        let error = (got - variance).abs() / variance;
        let acceptable = error <= VARIANCE_TOLERANCE;
        ensure!(acceptable, "the variance is {got:e} instead of {variance:e}");
        Ok(error.max(self.sum_error(summary.sum())?))
    }
}

/// Statistics in f64.
struct Reference {
    count: u64,
    sum: f64,
    /// Sum of the absolute values.
    sum_abs: f64,
    /// Population variance.
    variance: f64,
    min: f32,
    max: f32,
    /// Elements smaller than ε.
    dead: u64,
}

impl Reference {
    fn of<T: Element>(values: &[T], epsilon: f32) -> Self {
        let count = values.len() as f64;
        let sum = total(values, f64::from);
        let mean = sum / count;
        let floats = || values.iter().map(|value| value.to_f32());
        Self {
            count: values.len() as u64,
            sum,
            sum_abs: total(values, |value| f64::from(value.abs())),
            variance: total(values, |value| (f64::from(value) - mean).powi(2)) / count,
            min: floats().fold(f32::INFINITY, f32::min),
            max: floats().fold(f32::NEG_INFINITY, f32::max),
            dead: floats().filter(|value| value.abs() < epsilon).count() as u64,
        }
    }
}

/// The sum of `term` over all values, by blocks so that rounding does not pile up over 2³⁰ of them.
fn total<T: Element>(values: &[T], term: impl Fn(f32) -> f64) -> f64 {
    const BLOCK: usize = 1 << 15;
    let of_block = |block: &[T]| block.iter().map(|value| term(value.to_f32())).sum::<f64>();
    values.chunks(BLOCK).map(of_block).sum()
}
