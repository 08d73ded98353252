//! Statistics on the CPU: rayon over the chunks, or over the segments, that kernels take too.
//!
//! A chunk is computed by one thread and chunks are merged by number, so the bits of the result do
//! not depend on the number of threads.

use std::num::NonZeroU32;

use kasmina_kernels::reduce::{Chunks, Moments, Rule};
use rayon::prelude::*;

use crate::element::Element;

/// Elements that are gathered before they are added up, where they are not neighbours.
const GATHERED: usize = 1024;

/// The statistics of all values.
pub(crate) fn moments<T: Element>(values: &[T], rule: Rule) -> Moments {
    let chunks = Chunks::of(values.len() as u64, T::DTYPE);
    let partials: Vec<Moments> = (0..chunks.count)
        .into_par_iter()
        .map(|index| {
            let (first, len) = chunks.range(index);
            Moments::of(&values[first as usize..][..len as usize], T::to_f32, rule)
        })
        .collect();
    partials.into_iter().fold(Moments::EMPTY, Moments::merge)
}

/// A matrix in host memory, with room between its rows.
#[derive(Clone, Copy)]
pub(crate) struct Matrix<'a, T> {
    /// From the first element on.
    pub(crate) values: &'a [T],
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    pub(crate) row_stride: usize,
}

impl<T: Element> Matrix<'_, T> {
    /// The statistics of each row.
    pub(crate) fn moments_of_rows(&self, rule: Rule) -> Vec<Moments> {
        (0..self.rows)
            .into_par_iter()
            .map(|row| {
                let row = &self.values[row * self.row_stride..][..self.columns];
                Moments::of(row, T::to_f32, rule)
            })
            .collect()
    }

    /// The statistics of each of `parts` ranges of the columns, the first of which are one wider
    /// where they do not divide.
    pub(crate) fn moments_of_columns(&self, parts: NonZeroU32, rule: Rule) -> Vec<Moments> {
        let parts = parts.get() as usize;
        let (width, wider) = (self.columns / parts, self.columns % parts);
        (0..parts)
            .into_par_iter()
            .map(|part| {
                let first = part * width + part.min(wider);
                self.moments_of_range(first, width + usize::from(part < wider), rule)
            })
            .collect()
    }

    fn moments_of_range(&self, first: usize, width: usize, rule: Rule) -> Moments {
        let mut all = Moments::EMPTY;
        let mut gathered = Vec::with_capacity(GATHERED + width.min(GATHERED));
        for row in 0..self.rows {
            let row = &self.values[row * self.row_stride + first..][..width];
            if width >= GATHERED {
                all = all.merge(Moments::of(row, T::to_f32, rule));
                continue;
            }
            gathered.extend_from_slice(row);
            if gathered.len() >= GATHERED {
                all = all.merge(Moments::of(&gathered, T::to_f32, rule));
                gathered.clear();
            }
        }
        all.merge(Moments::of(&gathered, T::to_f32, rule))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::bf16;

    fn rule(epsilon: f32) -> Rule {
        Rule { epsilon, skip_nan: false }
    }

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
                let got = moments(&values, rule(2.5));
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
            let got = moments(&values, rule(0.0));
            assert!(got.min.is_nan() && got.max.is_nan() && got.mean.is_nan(), "{position}");
            assert_eq!((got.non_finite, got.count), (1, 70_000));
            values[position] = value;
        }
    }

    #[test]
    fn the_largest_finite_values_neither_overflow_nor_count_as_infinite() {
        let got = moments(&[f32::MAX; 10_000], rule(0.0));
        assert_eq!((got.mean, got.m2, got.non_finite), (f64::from(f32::MAX), 0.0, 0));
        assert_eq!(moments(&[bf16::MAX; 100], rule(0.0)).max, bf16::MAX.to_f32());
    }

    #[test]
    fn bits_do_not_depend_on_the_number_of_threads() {
        let values = sines(1 << 20);
        let of = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            bits(pool.install(|| moments(&values, rule(1.0))))
        };
        let one = of(1);
        for threads in [2, 3, 8] {
            assert_eq!(of(threads), one);
        }
    }

    #[test]
    fn segments_are_what_their_elements_give_alone() {
        let (rows, columns, row_stride) = (37, 1500, 1511);
        let values = sines(rows * row_stride);
        let matrix = Matrix { values: &values, rows, columns, row_stride };
        let gathered = |range: std::ops::Range<usize>, rows: std::ops::Range<usize>| {
            let row = |row: usize| &values[row * row_stride..][range.clone()];
            rows.flat_map(|r| row(r).to_vec()).collect::<Vec<f32>>()
        };
        let agree = |got: &Moments, elements: Vec<f32>| {
            let expected = moments(&elements, rule(2.5));
            assert_eq!((got.count, got.dead), (expected.count, expected.dead));
            assert_eq!((got.min, got.max), (expected.min, expected.max));
            assert!((got.sum - expected.sum).abs() <= 1e-6 * expected.sum);
            assert!((got.m2 - expected.m2).abs() <= 1e-6 * expected.m2);
        };
        for (row, got) in matrix.moments_of_rows(rule(2.5)).iter().enumerate() {
            agree(got, gathered(0..columns, row..row + 1));
        }
        for parts in [1, 7, 1500] {
            let ends: Vec<usize> = (0..=parts)
                .map(|part| part * (columns / parts) + part.min(columns % parts))
                .collect();
            let count = NonZeroU32::new(parts as u32).unwrap();
            let got = matrix.moments_of_columns(count, rule(2.5));
            assert_eq!(got.len(), parts);
            for (part, got) in got.iter().enumerate() {
                agree(got, gathered(ends[part]..ends[part + 1], 0..rows));
            }
        }
    }
}
