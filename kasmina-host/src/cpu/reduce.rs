//! Statistics of a slice on the CPU: rayon over the chunks that kernels take too.
//!
//! A chunk is computed by one thread and chunks are merged by number, so the bits of the result do
//! not depend on the number of threads.

use kasmina_kernels::reduce::{Chunks, Moments};
use rayon::prelude::*;

use crate::element::Element;

/// The statistics of all values; those of |x| < `epsilon` are dead.
pub(crate) fn moments<T: Element>(values: &[T], epsilon: f32) -> Moments {
    let chunks = Chunks::of(values.len() as u64, T::DTYPE);
    let partials: Vec<Moments> = values
        .par_chunks(1 << chunks.log2_chunk)
        .map(|chunk| Moments::of(chunk, T::to_f32, epsilon))
        .collect();
    partials.into_iter().fold(Moments::EMPTY, Moments::merge)
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::bf16;

    fn sines(count: usize) -> Vec<f32> {
        (0..count).map(|i| (i as f32).sin() + 3.0).collect()
    }

    fn bits(moments: Moments) -> [u64; 8] {
        let Moments { count, sum, mean, m2, min, max, non_finite, dead } = moments;
        let (min, max) = (u64::from(min.to_bits()), u64::from(max.to_bits()));
        [count, sum.to_bits(), mean.to_bits(), m2.to_bits(), min, max, non_finite, dead]
    }

    #[test]
    fn lengths_around_the_edges_of_chunks_match_the_definition() {
        for edge in [1, 16_384, 65_536, 262_144] {
            for count in edge.max(2) - 1..=edge + 1 {
                let values = sines(count);
                let got = moments(&values, 2.5);
                let n = count as f64;
                let mean = values.iter().map(|&x| f64::from(x)).sum::<f64>() / n;
                let m2: f64 = values.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum();
                assert_eq!(got.count, count as u64);
                assert!((got.mean - mean).abs() <= 1e-6 * mean, "{count}");
                assert!((got.sum - mean * n).abs() <= 1e-6 * mean * n, "{count}");
                assert!((got.m2 - m2).abs() <= 1e-6 * m2, "{count}");
                assert_eq!(got.min, values.iter().copied().fold(f32::INFINITY, f32::min));
                assert_eq!(got.max, values.iter().copied().fold(f32::NEG_INFINITY, f32::max));
                let dead = values.iter().filter(|x| x.abs() < 2.5).count();
                assert_eq!((got.dead, got.non_finite), (dead as u64, 0));
            }
        }
    }

    #[test]
    fn a_nan_anywhere_reaches_minimum_and_maximum() {
        let mut values = sines(70_000);
        for position in [0, 1, 2047, 2048, 40_000, 69_999] {
            let value = std::mem::replace(&mut values[position], f32::NAN);
            let got = moments(&values, 0.0);
            assert!(got.min.is_nan() && got.max.is_nan() && got.mean.is_nan(), "{position}");
            assert_eq!((got.non_finite, got.count), (1, 70_000));
            values[position] = value;
        }
    }

    #[test]
    fn the_largest_finite_values_neither_overflow_nor_count_as_infinite() {
        let got = moments(&[f32::MAX; 10_000], 0.0);
        assert_eq!((got.mean, got.m2, got.non_finite), (f64::from(f32::MAX), 0.0, 0));
        assert_eq!(moments(&[bf16::MAX; 100], 0.0).max, bf16::MAX.to_f32());
    }

    #[test]
    fn bits_do_not_depend_on_the_number_of_threads() {
        let values = sines(1 << 20);
        let of = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            bits(pool.install(|| moments(&values, 1.0)))
        };
        let one = of(1);
        for threads in [2, 3, 8] {
            assert_eq!(of(threads), one);
        }
    }
}
