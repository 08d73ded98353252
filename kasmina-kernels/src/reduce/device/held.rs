//! Statistics of elements that a warp's lanes hold in registers, in few instructions.
//!
//! A lane adds 8 elements at a time. Means and squares are of pairs of equal size, merged in a tree:
//! with `s = a + b` and `t = a − b` the sum of the squared distances from the mean grows by
//! `t² / 2n`, where a and b are sums of n elements. That is three instructions per merge, needs no
//! pivot, and no difference of large squares is ever taken. Sums of 16-bit elements that are close
//! to each other are exact, so that the variance of elements far from zero loses nothing.

use super::Element;
use super::node::{largest, least, other_f32, sum_u32};
use super::{Pairs, Partial, Rule};
use crate::ptx;
use crate::reduce::chunks::Counts;
use crate::unroll::unroll;

/// Merged statistics of as many elements in every lane.
#[derive(Clone, Copy)]
pub(crate) struct Held {
    sum: f32,
    m2: f32,
    pairs: Pairs,
    /// Whether every lane's f32 were wide enough so far.
    exact: bool,
}

/// Sums of this size and more are left to f64, and so are squares of the size of their squares.
const LARGEST_SUM: f32 = f32::from_bits((127 + 50) << 23);
const LARGEST_SQUARES: f32 = f32::from_bits((127 + 100) << 23);
/// Squares below the smallest normal number lose bits; next to a sum of 2⁻¹²⁰ that is less than
/// rounding.
const SMALLEST_SQUARES: f32 = f32::from_bits((127 - 120) << 23);
/// 16-bit elements whose sum has this size and whose squared distances vanish are equal, and if
/// those of another lane are not equal to them, then by so much that the square of that is normal.
const SMALLEST_SUM: f32 = f32::from_bits((127 - 45) << 23);

impl Held {
    /// Of no elements, or none that could be summarised.
    pub(crate) const NONE: Self =
        Self { sum: 0.0, m2: 0.0, pairs: Pairs { min: 0, max: 0, dead: 0 }, exact: false };

    /// Of 32 elements, in pairs.
    #[inline(always)]
    pub(crate) fn of<E: Element>(words: [[u32; 4]; 4], rule: Rule) -> Self {
        let bounds = E::pair_of_bounds(rule.epsilon);
        let mut pairs = E::NO_PAIRS;
        let mut squares = [0.0f32; 5];
        let mut sums = [0.0f32; 4];
        unroll!(g: usize in [0 1 2 3] {
            unroll!(i: usize in [0 1 2 3] {
                E::add_pair(&mut pairs, words[g][i], bounds);
            });
            let [a, b, c, d] = E::four(words[g], false);
            let [e, f, g8, h] = E::four(words[g], true);
            let ab = merge(&mut squares[0], a, b);
            let cd = merge(&mut squares[0], c, d);
            let ef = merge(&mut squares[0], e, f);
            let gh = merge(&mut squares[0], g8, h);
            let abcd = merge(&mut squares[1], ab, cd);
            let efgh = merge(&mut squares[1], ef, gh);
            sums[g] = merge(&mut squares[2], abcd, efgh);
        });
        let first = merge(&mut squares[3], sums[0], sums[1]);
        let last = merge(&mut squares[3], sums[2], sums[3]);
        let sum = merge(&mut squares[4], first, last);
        let [a, b, c, d, e] = squares;
        let m2 = 0.5 * (a + 0.5 * (b + 0.5 * (c + 0.5 * (d + 0.5 * e))));
        let size = sum.abs();
        let equal = m2 == 0.0 && (size >= SMALLEST_SUM || sum == 0.0 && E::are_zero(pairs));
        let exact = (m2 >= SMALLEST_SQUARES || equal) && m2 < LARGEST_SQUARES && size < LARGEST_SUM;
        Self { sum, m2, pairs, exact }
    }

    /// Of these and as many others; each lane has `len` of either.
    #[inline(always)]
    pub(crate) fn with<E: Element>(self, other: Self, len: f32) -> Self {
        let distance = self.sum - other.sum;
        Self {
            sum: self.sum + other.sum,
            m2: ptx::fma_rn_f32(distance * distance, 0.5 / len, self.m2 + other.m2),
            pairs: E::joined(self.pairs, other.pairs),
            exact: self.exact && other.exact,
        }
    }

    /// The summary of what the warp's lanes hold, `len` elements each, in every lane; `None` if f32
    /// was not wide enough for one of them.
    ///
    /// # Safety
    /// The whole warp executes it.
    #[inline(always)]
    pub(crate) unsafe fn of_warp<E: Element>(self, len: f32) -> Option<Partial> {
        // SAFETY: the caller's contract.
        unsafe {
            let exact = !ptx::vote_any(!self.exact);
            let (mut sum, mut m2, mut weight) = (self.sum, self.m2, 0.5 / len);
            let mut level = |other_sum: f32, other_m2: f32| {
                let distance = sum - other_sum;
                sum += other_sum;
                m2 = ptx::fma_rn_f32(distance * distance, weight, m2 + other_m2);
                weight *= 0.5;
                (sum, m2)
            };
            let (s, m) = level(other_f32::<1>(self.sum), other_f32::<1>(self.m2));
            let (s, m) = level(other_f32::<2>(s), other_f32::<2>(m));
            let (s, m) = level(other_f32::<4>(s), other_f32::<4>(m));
            let (s, m) = level(other_f32::<8>(s), other_f32::<8>(m));
            let (s, m) = level(other_f32::<16>(s), other_f32::<16>(m));
            let (min, max, dead) = E::of_pairs(self.pairs);
            let (min, max) = (least::<32>(min), largest::<32>(max));
            let counts = Counts::new(0, 0, sum_u32::<32>(dead as u32));
            let partial = Partial { sum: f64::from(s), m2: f64::from(m), min, max, counts };
            if exact { Some(partial) } else { None }
        }
    }
}

/// The sum, after adding the square of the difference.
#[inline(always)]
fn merge(squares: &mut f32, a: f32, b: f32) -> f32 {
    let distance = a - b;
    *squares = ptx::fma_rn_f32(distance, distance, *squares);
    a + b
}
