//! Statistics of elements that a warp's lanes hold in registers, added up by tensor cores.
//!
//! 16 rows by 16 columns of packed elements are the left operand of a product, and 8 of those rows
//! the right one: the diagonal of the result is what their squares add up to. Another product, with
//! ones, gives the sums of the rows. That is three instructions for 256 elements, where plain
//! arithmetic takes four for each. Then `m2 = Σx² − (Σx)² / n`.
//!
//! # Errors
//! Assumed, as measurements of tensor cores show it but no manual promises it: products of two
//! 16-bit elements are exact, and adding up 16 of them and what was there before cuts off bits below
//! those of the largest, two or more beyond f32's, before one rounding or cut to f32. With `u` the
//! unit roundoff of f32, that loses at most 10u of the sum of magnitudes; were less kept, the factors
//! below would grow in proportion, and nothing else would change.
//!
//! Derived from it: four such products in a row, of a slab, lose 25u, and the additions of slabs and
//! lanes another 10u. So `Σx²` errs by at most 35u of itself, and `(Σx)²/n` by 70u of `|mean|·Σ|x|`. A
//! summary is given only where `m2 ≥ Σx²/2`, so that the mean is no larger than the standard
//! deviation: then `|mean|·Σ|x| ≤ √2·m2`, and m2 errs by at most 170u of itself, the sum by 35u of
//! `Σ|x|`.

use super::Element;
use super::node::{other_f32, sum_u32};
use super::{Pairs, Partial, Rule};
use crate::ptx;
use crate::reduce::chunks::Counts;
use crate::unroll::unroll;

/// Squares of elements beyond these lose bits, or are not finite.
const LARGEST_SQUARES: f64 = f64::from_bits((1023 + 100) << 52);
const SMALLEST_SQUARES: f64 = f64::from_bits((1023 - 90) << 52);

/// What tensor cores have added up of the elements of a warp: 16 rows, of each of which four lanes
/// have a part.
#[derive(Clone, Copy)]
pub(crate) struct Gram {
    /// Of rows `lane / 4` and 8 below, the same in all four lanes.
    sum: f32,
    /// Products of rows `lane / 4` and 8 below by rows `2·(lane % 4)` and the next, and 8 below.
    squares: [f32; 2],
    pairs: Pairs,
}

impl Gram {
    /// Of no elements.
    pub(crate) const NONE: Self =
        Self { sum: 0.0, squares: [0.0; 2], pairs: Pairs { min: 0, max: 0, dead: 0 } };

    /// Of 16×64 elements, 16×16 in the four words of every lane, as they are for `mma.m16n8k16`.
    ///
    /// # Safety
    /// The whole warp executes it.
    #[inline(always)]
    pub(crate) unsafe fn of<E: Element>(words: [[u32; 4]; 4], rule: Rule) -> Self {
        let bounds = E::pair_of_bounds(rule.epsilon);
        let mut pairs = E::NO_PAIRS;
        let (mut sums, mut upper, mut lower) = ([0.0f32; 4], [0.0f32; 4], [0.0f32; 4]);
        unroll!(g: usize in [0 1 2 3] {
            let block = words[g];
            // SAFETY: the caller's contract.
            unsafe {
                E::multiply(&mut sums, block, [E::ONES; 2]);
                E::multiply(&mut upper, block, [block[0], block[2]]);
                E::multiply(&mut lower, block, [block[1], block[3]]);
            }
            unroll!(i: usize in [0 1 2 3] {
                E::add_pair(&mut pairs, block[i], bounds);
            });
        });
        let squares = [upper[0] + lower[2], upper[1] + lower[3]];
        Self { sum: sums[0] + sums[2], squares, pairs }
    }

    /// Of these elements and others of the same rows.
    #[inline(always)]
    pub(crate) fn with<E: Element>(self, other: Self) -> Self {
        let squares = [self.squares[0] + other.squares[0], self.squares[1] + other.squares[1]];
        Self { sum: self.sum + other.sum, squares, pairs: E::joined(self.pairs, other.pairs) }
    }

    /// The summary of the warp's `16 · columns` elements, a power of two, in every lane; `None` if it
    /// would not be accurate.
    ///
    /// # Safety
    /// The whole warp executes it.
    #[inline(always)]
    pub(crate) unsafe fn of_warp<E: Element>(self, columns: u32) -> Option<Partial> {
        let lane = ptx::opaque_u32(ptx::lane_index());
        let (row, column) = (lane / 4, 2 * (lane % 4));
        let [even, odd] = self.squares;
        let mut squares = if row == column {
            even
        } else if row == column + 1 {
            odd
        } else {
            0.0
        };
        let mut sum = self.sum;
        let (min, max, dead) = E::of_pairs(self.pairs);
        // SAFETY: the caller's contract.
        let (min, max, dead) = unsafe {
            squares += other_f32::<1>(squares);
            squares += other_f32::<2>(squares);
            squares += other_f32::<4>(squares);
            sum += other_f32::<4>(sum);
            squares += other_f32::<8>(squares);
            sum += other_f32::<8>(sum);
            squares += other_f32::<16>(squares);
            sum += other_f32::<16>(sum);
            (
                from_ordered(ptx::redux_sync_min_s32(ordered(min))),
                from_ordered(ptx::redux_sync_max_s32(ordered(max))),
                sum_u32::<32>(dead as u32),
            )
        };
        // Exact: a power of two.
        let inverse = f64::from(1.0 / (16 * columns) as f32);
        let (squares, sum) = (f64::from(squares), f64::from(sum));
        let m2 = ptx::fma_rn_f64(-sum * inverse, sum, squares);
        let zero = min == 0.0 && max == 0.0;
        let accurate =
            squares >= SMALLEST_SQUARES && squares < LARGEST_SQUARES && m2 >= 0.5 * squares;
        let partial = Partial { sum, m2, min, max, counts: Counts::new(0, 0, dead) };
        if accurate || zero && squares == 0.0 { Some(partial) } else { None }
    }
}

/// An integer that compares as the number does.
#[inline(always)]
fn ordered(value: f32) -> i32 {
    let bits = value.to_bits() as i32;
    bits ^ (bits >> 31 & 0x7FFF_FFFF)
}

/// The inverse of [`ordered`].
#[inline(always)]
fn from_ordered(key: i32) -> f32 {
    f32::from_bits((key ^ (key >> 31 & 0x7FFF_FFFF)) as u32)
}
