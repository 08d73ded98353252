//! Quantiles of repeated measurements.

/// What repeated measurements of one thing gave, in microseconds per call.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Summary {
    /// How many there were.
    pub(crate) samples: usize,
    /// Half of them took no longer.
    pub(crate) median: f64,
    /// A tenth of them took no longer.
    pub(crate) p10: f64,
    /// Nine tenths of them took no longer.
    pub(crate) p90: f64,
    /// Total time over number of calls.
    pub(crate) mean: f64,
}

impl Summary {
    /// Summarises samples that each stand for the same number of calls; at least one.
    pub(crate) fn new(mut samples: Vec<f64>) -> Self {
        samples.sort_by(f64::total_cmp);
        Self {
            samples: samples.len(),
            median: quantile(&samples, 0.5),
            p10: quantile(&samples, 0.1),
            p90: quantile(&samples, 0.9),
            mean: samples.iter().sum::<f64>() / samples.len() as f64,
        }
    }
}

/// The value at fraction `q` of `sorted`, linear between neighbours.
fn quantile(sorted: &[f64], q: f64) -> f64 {
    let position = q * (sorted.len() - 1) as f64;
    let (below, above) = (position.floor() as usize, position.ceil() as usize);
    sorted[below] + (sorted[above] - sorted[below]) * position.fract()
}
