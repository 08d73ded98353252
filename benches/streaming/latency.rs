//! Single answers timed by the host's clock, contenders by turns.

use std::time::{Duration, Instant};

use serde::Serialize;

/// Quantiles of single answers, in microseconds.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Latency {
    pub(crate) samples: usize,
    pub(crate) p50_us: f64,
    pub(crate) p99_us: f64,
    pub(crate) p999_us: f64,
    pub(crate) mean_us: f64,
}

impl Latency {
    pub(crate) fn of(mut times: Vec<Duration>) -> Self {
        times.sort_unstable();
        let at = |q: f64| {
            let rank = (q * times.len() as f64).ceil() as usize;
            times[rank.clamp(1, times.len()) - 1].as_secs_f64() * 1e6
        };
        let total: Duration = times.iter().sum();
        Self {
            samples: times.len(),
            p50_us: at(0.5),
            p99_us: at(0.99),
            p999_us: at(0.999),
            mean_us: total.as_secs_f64() * 1e6 / times.len() as f64,
        }
    }
}

/// Something that is timed: one answer.
pub(crate) type Contender<'a> = &'a mut dyn FnMut() -> anyhow::Result<()>;

/// Answers of one contender in a row, so that each finds the caches and clocks it would have.
const SLICE: usize = 500;

/// Times `samples` answers of each contender, in slices by turns, after one slice to warm up.
pub(crate) fn measure(
    samples: usize,
    contenders: &mut [(&str, Contender<'_>)],
) -> anyhow::Result<Vec<Latency>> {
    let mut times = vec![Vec::with_capacity(samples); contenders.len()];
    for round in 0..=samples.div_ceil(SLICE) {
        for ((_, contender), times) in contenders.iter_mut().zip(&mut times) {
            for _ in 0..SLICE {
                let start = Instant::now();
                contender()?;
                let elapsed = start.elapsed();
                if round > 0 {
                    times.push(elapsed);
                }
            }
        }
    }
    Ok(times.into_iter().map(Latency::of).collect())
}
