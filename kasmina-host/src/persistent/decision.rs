//! Whether a resident kernel is worth its place on the GPU.
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use super::{StreamConfig, StreamPath};
use crate::config::KernelConfig;
use crate::element::Element;
use crate::error::{Error, Result};
use crate::layer::KasminaLayer;
use crate::tensor::{Tensor, zeroed};

/// Batches per second above which a launch for each is too dear.
const FREQUENT_HZ: f64 = 1000.0;
/// Share of memory time above which keeping the weights on the chip pays.
const MEMORY_BOUND: f64 = 0.7;
/// Batches that each path is timed with, after as many to warm up as a tenth of them.
const TRIALS: usize = 400;
const TIMEOUT: Duration = Duration::from_secs(5);

/// Whether a layer should stay resident: if resident kernels are enabled, and batches come more
/// often than 1,000 times a second, or memory access takes more than 0.7 of a forward pass's time.
#[must_use]
pub fn should_use_persistent(
    config: &KernelConfig,
    batch_frequency_hz: f64,
    memory_bound_ratio: f64,
) -> bool {
    config.persistent_kernels_enabled()
        && (batch_frequency_hz > FREQUENT_HZ || memory_bound_ratio > MEMORY_BOUND)
}

/// What both paths took for one layer and batch: host data in, host data out.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct PersistentTrial {
    /// Median of a resident layer's answers.
    pub persistent: Duration,
    /// Median of copying in, a forward pass, and copying out.
    pub launch: Duration,
    /// Whether the session was in fact resident.
    pub path: StreamPath,
}

impl PersistentTrial {
    /// Whether the resident path is faster, and can keep up with so many batches per second.
    #[must_use]
    pub fn should_use_persistent(&self, batch_frequency_hz: f64) -> bool {
        self.path == StreamPath::Resident
            && self.persistent < self.launch
            && self.persistent.as_secs_f64() * batch_frequency_hz < 1.0
    }
}

impl KasminaLayer {
    /// [`should_use_persistent`] with this layer's config.
    #[must_use]
    pub fn should_use_persistent(&self, batch_frequency_hz: f64, memory_bound_ratio: f64) -> bool {
        should_use_persistent(self.kernel_config(), batch_frequency_hz, memory_bound_ratio)
    }

    /// Times batches of zeros of so many rows on both paths, by turns.
    ///
    /// # Errors
    /// As [`persistent`](Self::persistent) and [`forward`](Self::forward).
    pub fn try_persistent<T: Element>(
        &self,
        rows: usize,
        config: StreamConfig,
    ) -> Result<PersistentTrial> {
        let input: Vec<T> = zeroed(rows.checked_mul(self.in_features()).ok_or_else(|| {
            let (op, limit) = ("KasminaLayer::try_persistent", isize::MAX as u64);
            Error::Overflow { op, quantity: "the batch's size", limit }
        })?)?;
        // A kernel that is first used while a grid stays may have to wait for it.
        self.warmup(rows)?;
        let session = self.persistent::<T>(config)?;
        let (mut persistent, mut launch) = (Vec::new(), Vec::new());
        for trial in 0..TRIALS + TRIALS / 10 {
            let start = Instant::now();
            session.submit_and_wait(&input, TIMEOUT)?;
            let resident = start.elapsed();
            let start = Instant::now();
            let x = Tensor::from_slice(self.device(), &input, [rows, self.in_features()])?;
            self.forward(&x)?.to_vec()?;
            if trial >= TRIALS / 10 {
                persistent.push(resident);
                launch.push(start.elapsed());
            }
        }
        let path = session.path();
        session.close(TIMEOUT)?;
        Ok(PersistentTrial { persistent: median(persistent), launch: median(launch), path })
    }
}

fn median(mut durations: Vec<Duration>) -> Duration {
    durations.sort_unstable();
    durations[durations.len() / 2]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frequent_batches_or_memory_bound_layers_should_stay() {
        let config = KernelConfig::default();
        for (frequency, ratio, expected) in [
            (1000.0, 0.7, false),
            (1000.1, 0.0, true),
            (0.0, 0.71, true),
            (f64::NAN, f64::NAN, false),
        ] {
            assert_eq!(should_use_persistent(&config, frequency, ratio), expected);
            let off = config.clone().enable_persistent_kernels(false);
            assert!(!should_use_persistent(&off, frequency, ratio));
        }
    }

    #[test]
    fn a_trial_advises_what_was_faster_and_can_keep_up() {
        let micros = Duration::from_micros;
        let (persistent, launch) = (micros(5), micros(20));
        let trial = PersistentTrial { persistent, launch, path: StreamPath::Resident };
        assert!(trial.should_use_persistent(10_000.0));
        assert!(!trial.should_use_persistent(1e6));
        assert!(!PersistentTrial { launch: micros(4), ..trial }.should_use_persistent(1.0));
        let threads = PersistentTrial { path: StreamPath::Threads, ..trial };
        assert!(!threads.should_use_persistent(1.0));
    }
}
