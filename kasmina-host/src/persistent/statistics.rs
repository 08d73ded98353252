//! How long batches take, counted as they finish.
#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Bits of a duration's fraction that are kept: durations in one bucket differ by 3 %.
const FRACTION_BITS: u32 = 5;
const FRACTIONS: usize = 1 << FRACTION_BITS;
/// Octaves from 2⁵ ns up to more than an hour.
const OCTAVES: usize = 38;

/// What a session has done so far.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct StreamStats {
    /// Batches submitted.
    pub submitted: u64,
    /// Batches whose results were taken.
    pub completed: u64,
    /// Parts of batches that hold a slot: in flight, or finished and unread.
    pub depth: usize,
    /// Parts that can.
    pub capacity: usize,
    /// Half of the batches took no longer from submission to result.
    pub p50: Duration,
    /// 99 % took no longer.
    pub p99: Duration,
    /// 99.9 % took no longer.
    pub p999: Duration,
    /// Batches taken per second, since the session began or was reset.
    pub items_per_second: f64,
}

/// Counts of durations, in buckets of a floating-point kind.
pub(super) struct Histogram {
    buckets: Box<[AtomicU64]>,
    began: Instant,
}

impl Histogram {
    pub(super) fn new() -> Self {
        let buckets = (0..OCTAVES * FRACTIONS).map(|_| AtomicU64::new(0)).collect();
        Self { buckets, began: Instant::now() }
    }

    pub(super) fn add(&self, duration: Duration) {
        let nanoseconds = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        self.buckets[bucket(nanoseconds)].fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn counts(&self) -> Vec<u64> {
        self.buckets.iter().map(|count| count.load(Ordering::Relaxed)).collect()
    }

    pub(super) fn age(&self) -> Duration {
        self.began.elapsed()
    }
}

const fn bucket(nanoseconds: u64) -> usize {
    if nanoseconds < FRACTIONS as u64 {
        return nanoseconds as usize;
    }
    let octave = nanoseconds.ilog2() - FRACTION_BITS;
    let fraction = (nanoseconds >> octave) as usize - FRACTIONS;
    let bucket = (octave as usize + 1) * FRACTIONS + fraction;
    if bucket < OCTAVES * FRACTIONS { bucket } else { OCTAVES * FRACTIONS - 1 }
}

/// The upper end of a bucket.
const fn upper_end(bucket: usize) -> u64 {
    if bucket < FRACTIONS {
        return bucket as u64;
    }
    let octave = bucket / FRACTIONS - 1;
    ((bucket % FRACTIONS + FRACTIONS + 1) as u64) << octave
}

/// The duration that fraction `q` of the counted ones do not exceed; zero of none.
pub(super) fn quantile(counts: &[u64], q: f64) -> Duration {
    let total: u64 = counts.iter().sum();
    let rank = ((total as f64 * q).ceil() as u64).max(1);
    let mut seen = 0;
    for (bucket, count) in counts.iter().enumerate() {
        seen += count;
        if seen >= rank {
            return Duration::from_nanos(upper_end(bucket));
        }
    }
    Duration::ZERO
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_rise_and_are_narrower_than_four_percent() {
        let mut last = 0;
        for nanoseconds in (0..100_000).chain((17..35).map(|log2| (1 << log2) + 12_345)) {
            let bucket = bucket(nanoseconds);
            assert!(bucket >= last, "{nanoseconds}");
            last = bucket;
            let end = upper_end(bucket);
            assert!(end >= nanoseconds && end as f64 <= nanoseconds as f64 * 1.04, "{nanoseconds}");
        }
        assert_eq!(super::bucket(u64::MAX), OCTAVES * FRACTIONS - 1);
    }

    #[test]
    fn quantiles_are_those_of_what_was_added() {
        let histogram = Histogram::new();
        assert_eq!(quantile(&histogram.counts(), 0.5), Duration::ZERO);
        for microseconds in 1..=1000 {
            histogram.add(Duration::from_micros(microseconds));
        }
        for (q, expected) in [(0.5, 500.0), (0.99, 990.0), (0.999, 999.0)] {
            let got = quantile(&histogram.counts(), q).as_secs_f64() * 1e6;
            assert!(got >= expected && got <= expected * 1.04, "{q}: {got}");
        }
    }
}
