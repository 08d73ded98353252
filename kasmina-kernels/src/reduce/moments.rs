//! The arithmetic, the same for device and CPU.

use crate::elementary::fused_multiply_add;

/// Statistics of a run of elements.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Moments {
    /// Number of elements; those that were skipped do not count.
    pub count: u64,
    /// Their sum, as IEEE addition gives it.
    pub sum: f64,
    /// `sum / count`; 0 for no elements.
    pub mean: f64,
    /// Sum of the squared distances from the mean; NaN if an element is not finite.
    pub m2: f64,
    /// Elements that are NaN or infinite, with those that were skipped.
    pub non_finite: u64,
    /// Elements of absolute value below epsilon.
    pub dead: u64,
    /// Smallest element, NaN if any is; +∞ for no elements.
    pub min: f32,
    /// Largest element, NaN if any is; −∞ for no elements.
    pub max: f32,
}

const _: () = assert!(size_of::<Moments>() == 56);

impl Moments {
    /// Of no elements.
    pub const EMPTY: Self = Self {
        count: 0,
        sum: 0.0,
        mean: 0.0,
        m2: 0.0,
        non_finite: 0,
        dead: 0,
        min: f32::INFINITY,
        max: f32::NEG_INFINITY,
    };

    /// Of the elements of both, by Chan's formula: no cancellation, whatever the mean.
    #[must_use]
    pub fn merge(self, other: Self) -> Self {
        // Without elements, but perhaps with some that were skipped.
        let non_finite = self.non_finite + other.non_finite;
        if other.count == 0 {
            return Self { non_finite, ..self };
        }
        if self.count == 0 {
            return Self { non_finite, ..other };
        }
        let count = self.count + other.count;
        let sum = self.sum + other.sum;
        let between = other.mean - self.mean;
        let weight = self.count as f64 * (other.count as f64 / count as f64);
        Self {
            count,
            sum,
            mean: sum / count as f64,
            m2: self.m2 + other.m2 + between * between * weight,
            non_finite,
            dead: self.dead + other.dead,
            min: min_nan(self.min, other.min),
            max: max_nan(self.max, other.max),
        }
    }

    /// Of these elements, each widened to f32 exactly.
    #[must_use]
    pub fn of<T: Copy>(elements: &[T], widen: impl Fn(T) -> f32, rule: Rule) -> Self {
        let Rule { epsilon, skip_nan } = rule;
        // Elements that share a pivot, and elements per batch.
        const RUN: usize = 1024;
        const BATCH: usize = 64;
        let mut all = Self::EMPTY;
        for run in elements.chunks(RUN) {
            let first = &run[..run.len().min(16)];
            let sum: f32 = first.iter().map(|&element| PIVOT_SCALE * widen(element)).sum();
            // Relative to NaN no batch can be taken: each element is then added in f64.
            let pivot = in_range(sum, sum / (first.len() as f32 * PIVOT_SCALE));
            let mut accumulator = Accumulator::new(if pivot.is_nan() { 0.0 } else { pivot });
            for batch in run.chunks(BATCH) {
                let mut sums = Batch::EMPTY;
                let (groups, rest) = batch.as_chunks::<4>();
                for group in groups {
                    sums.add(group.map(&widen), pivot, epsilon);
                }
                if !rest.is_empty() {
                    let mut group = [0.0; 4];
                    for (value, &element) in group.iter_mut().zip(rest) {
                        *value = widen(element);
                    }
                    sums.add_first(group, rest.len() as i32, pivot, epsilon);
                }
                if !accumulator.take(&sums) {
                    batch
                        .iter()
                        .for_each(|&element| accumulator.add_exactly(widen(element), skip_nan));
                }
            }
            all = all.merge(accumulator.moments(run.len() as u64));
        }
        all
    }
}

/// What the elements are measured by.
#[derive(Clone, Copy, Debug)]
pub struct Rule {
    /// Elements of smaller absolute value count as dead.
    pub epsilon: f32,
    /// Whether NaN is counted and left out of everything else.
    pub skip_nan: bool,
}

/// f32 sums of a few elements, in four lanes, relative to a pivot.
#[derive(Clone, Copy, Debug)]
pub struct Batch {
    pub(super) distances: [f32; 4],
    pub(super) squares: [f32; 4],
    pub(super) min: f32,
    pub(super) max: f32,
    pub(super) dead: f32,
}

impl Batch {
    /// Of no elements.
    pub const EMPTY: Self = Self {
        distances: [0.0; 4],
        squares: [0.0; 4],
        min: f32::INFINITY,
        max: f32::NEG_INFINITY,
        dead: 0.0,
    };

    /// Adds one element to each lane.
    #[inline(always)]
    pub fn add(&mut self, values: [f32; 4], pivot: f32, epsilon: f32) {
        let [a, b, c, d] = values;
        self.add_to(0, a, a - pivot, epsilon);
        self.add_to(1, b, b - pivot, epsilon);
        self.add_to(2, c, c - pivot, epsilon);
        self.add_to(3, d, d - pivot, epsilon);
    }

    /// Adds one element to each lane, to the sums alone: neither to the extremes nor to the dead.
    #[inline(always)]
    pub fn add_to_sums(&mut self, values: [f32; 4], pivot: f32) {
        let mut lane = |lane: usize, value: f32| {
            let distance = value - pivot;
            self.distances[lane] += distance;
            self.squares[lane] = fused_multiply_add(distance, distance, self.squares[lane]);
        };
        let [a, b, c, d] = values;
        lane(0, a);
        lane(1, b);
        lane(2, c);
        lane(3, d);
    }

    /// Adds the first `valid` elements; none if it is negative, all if it is beyond 4.
    #[inline(always)]
    pub fn add_first(&mut self, values: [f32; 4], valid: i32, pivot: f32, epsilon: f32) {
        let mut lane = |lane: usize, value: f32| {
            // NaN is neither an extreme of anything nor below epsilon.
            let (value, distance) =
                if (lane as i32) < valid { (value, value - pivot) } else { (f32::NAN, 0.0) };
            self.add_to(lane, value, distance, epsilon);
        };
        let [a, b, c, d] = values;
        lane(0, a);
        lane(1, b);
        lane(2, c);
        lane(3, d);
    }

    #[inline(always)]
    fn add_to(&mut self, lane: usize, value: f32, distance: f32, epsilon: f32) {
        self.distances[lane] += distance;
        self.squares[lane] = fused_multiply_add(distance, distance, self.squares[lane]);
        // These drop NaN, which the squares then show.
        self.min = self.min.min(value);
        self.max = self.max.max(value);
        self.dead = count_if_below(self.dead, value, epsilon);
    }
}

/// Statistics of a run of elements relative to a pivot, from f32 sums of one batch at a time.
///
/// `Σ(x − p)` and `Σ(x − p)²` need no division and merge by addition. With `p` the mean of k of the
/// n elements, `Σ(x − p)² ≤ (1 + n/k)·m2`, so m2 loses little to cancellation whatever they are.
#[derive(Clone, Copy, Debug)]
pub struct Accumulator {
    /// What is subtracted from every element; finite.
    pub pivot: f32,
    /// `Σ(x − pivot)`
    pub distances: f64,
    /// `Σ(x − pivot)²`
    pub squares: f64,
    /// Smallest element; NaN if any is.
    pub min: f32,
    /// Largest element; NaN if any is.
    pub max: f32,
    /// Elements that are NaN or infinite, with those that were skipped.
    pub non_finite: u32,
    /// Elements that were skipped.
    pub skipped: u32,
    /// Elements of absolute value below epsilon.
    pub dead: u32,
}

impl Accumulator {
    /// Of no elements.
    #[must_use]
    #[inline(always)]
    pub const fn new(pivot: f32) -> Self {
        Self {
            pivot,
            distances: 0.0,
            squares: 0.0,
            min: f32::INFINITY,
            max: f32::NEG_INFINITY,
            non_finite: 0,
            skipped: 0,
            dead: 0,
        }
    }

    /// Adds the elements of a batch, and says whether it could: `false` if their squares left the
    /// range of f32. Then only the dead ones are added, and [`Self::add_exactly`] has to add each.
    #[must_use]
    #[inline(always)]
    pub fn take(&mut self, batch: &Batch) -> bool {
        self.dead += batch.dead as u32;
        let [a, b, c, d] = batch.squares;
        let squares = (a + b) + (c + d);
        // Squares below the smallest normal number lose bits; next to a sum of 2⁻¹²⁰ that is less
        // than rounding. No square at all is right only where all elements equal the pivot: where they
        // equal each other, and their distances, which then have one sign, are 0.
        let [a, b, c, d] = batch.distances;
        let distances = (a + b) + (c + d);
        let none = batch.min >= batch.max && distances == 0.0 && squares == 0.0;
        if !((squares >= SMALLEST_SQUARES || none) && squares < f32::INFINITY) {
            return false;
        }
        self.distances += f64::from(distances);
        self.squares += f64::from(squares);
        self.min = min_nan(self.min, batch.min);
        self.max = max_nan(self.max, batch.max);
        true
    }

    /// Adds only the distances of a batch, and says whether they are finite. If not, it adds nothing
    /// and [`Self::add_exactly`] has to add each element.
    #[must_use]
    #[inline(always)]
    pub fn take_distances(&mut self, batch: &Batch) -> bool {
        let [a, b, c, d] = batch.distances;
        let sum = (a + b) + (c + d);
        if sum.is_finite() {
            self.distances += f64::from(sum);
        }
        sum.is_finite()
    }

    /// Adds one element in f64, apart from whether it is dead.
    #[inline(always)]
    pub fn add_exactly(&mut self, value: f32, skip_nan: bool) {
        if skip_nan && value.is_nan() {
            self.non_finite += 1;
            self.skipped += 1;
            return;
        }
        let distance = f64::from(value) - f64::from(self.pivot);
        self.distances += distance;
        self.squares += distance * distance;
        self.min = min_nan(self.min, value);
        self.max = max_nan(self.max, value);
        self.non_finite += u32::from(!value.is_finite());
    }

    /// Distances and squares relative to `to` from those of `count` elements relative to `from`.
    #[must_use]
    #[inline(always)]
    pub fn rebased(distances: f64, squares: f64, from: f32, to: f32, count: u32) -> (f64, f64) {
        let shift = f64::from(from) - f64::from(to);
        let shifted = f64::from(count) * shift;
        // Σ(d + s)² = Σd² + s·(2·Σd + n·s)
        (distances + shifted, squares + shift * (2.0 * distances + shifted))
    }

    /// The elements' statistics; they are `count`, with those that were skipped.
    #[must_use]
    pub fn moments(&self, count: u64) -> Moments {
        let count = count - u64::from(self.skipped);
        if count == 0 {
            return Moments { non_finite: u64::from(self.non_finite), ..Moments::EMPTY };
        }
        let elements = count as f64;
        let sum = self.distances + elements * f64::from(self.pivot);
        Moments {
            count,
            sum,
            mean: sum / elements,
            m2: centred(self.squares, self.distances, self.distances / elements),
            non_finite: u64::from(self.non_finite),
            dead: u64::from(self.dead),
            min: self.min,
            max: self.max,
        }
    }
}

/// 2⁻¹²⁰
const SMALLEST_SQUARES: f32 = f32::from_bits((127 - 120) << 23);

/// `Σ(x − mean)²` from `Σ(x − p)²`, `Σ(x − p)` and `mean − p`.
#[inline(always)]
pub(super) fn centred(squares: f64, distances: f64, distance: f64) -> f64 {
    let m2 = squares - distances * distance;
    // Rounding may leave less than nothing. Not `max`: NaN must stay.
    if m2 < 0.0 { 0.0 } else { m2 }
}

/// Times which elements enter the sum of at most 64 that [`pivot_of`] takes, which then does not
/// overflow.
pub(super) const PIVOT_SCALE: f32 = 1.0 / 64.0;

/// The mean of elements whose scaled sum and inverse number these are; NaN unless all are finite.
#[cfg(target_arch = "nvptx64")]
#[inline(always)]
pub(super) fn pivot_of(sum: f32, inverse: f32) -> f32 {
    in_range(sum, sum * (inverse / PIVOT_SCALE))
}

/// A mean, which rounding may have brought beyond the range of f32 where the elements reach its end;
/// NaN if their scaled sum is not finite.
#[expect(clippy::manual_clamp, reason = "clamp checks its bounds and panics")]
#[inline(always)]
fn in_range(sum: f32, mean: f32) -> f32 {
    let mean = mean.min(f32::MAX).max(-f32::MAX);
    if sum.is_finite() { mean } else { f32::NAN }
}

/// `count + 1` if `|x| < bound`, else `count`.
#[inline(always)]
pub(super) fn count_if_below(count: f32, x: f32, bound: f32) -> f32 {
    #[cfg(target_arch = "nvptx64")]
    return crate::ptx::count_if_below_f32(count, x, bound);
    #[cfg(not(target_arch = "nvptx64"))]
    return if x.abs() < bound { count + 1.0 } else { count };
}

/// The smaller; NaN if either is.
#[must_use]
#[inline(always)]
pub(super) fn min_nan(a: f32, b: f32) -> f32 {
    if a < b || a.is_nan() { a } else { b }
}

/// The larger; NaN if either is.
#[must_use]
#[inline(always)]
pub(super) fn max_nan(a: f32, b: f32) -> f32 {
    if a > b || a.is_nan() { a } else { b }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec::Vec;

    const EPSILON: f32 = 1e-3;
    const RULE: Rule = Rule { epsilon: EPSILON, skip_nan: false };

    fn of(elements: &[f32]) -> Moments {
        Moments::of(elements, |element| element, RULE)
    }

    /// Mean and m2 in f64, in two passes.
    fn reference(elements: &[f32]) -> (f64, f64, f64) {
        let sum: f64 = elements.iter().map(|&x| f64::from(x)).sum();
        let mean = sum / elements.len() as f64;
        let m2 = elements.iter().map(|&x| (f64::from(x) - mean) * (f64::from(x) - mean)).sum();
        (sum, mean, m2)
    }

    /// Roughly normal, from a linear congruence.
    fn noise(len: usize) -> Vec<f32> {
        let mut state = 1u64;
        let mut uniform = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
        };
        (0..len).map(|_| (0..12).map(|_| uniform()).sum()).collect()
    }

    #[track_caller]
    fn assert_close(elements: &[f32]) {
        let (got, (sum, mean, m2)) = (of(elements), reference(elements));
        let magnitude: f64 = elements.iter().map(|&x| f64::from(x).abs()).sum();
        assert_eq!(got.count, elements.len() as u64);
        assert!((got.sum - sum).abs() <= 1e-6 * magnitude, "{} {sum}", got.sum);
        assert!((got.mean - mean).abs() <= 1e-6 * magnitude / elements.len() as f64);
        assert!((got.m2 - m2).abs() <= 1e-6 * m2, "{:e} {m2:e}", got.m2);
        assert_eq!(got.min, elements.iter().copied().fold(f32::INFINITY, f32::min));
        assert_eq!(got.max, elements.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        let dead = elements.iter().filter(|x| x.abs() < EPSILON).count();
        assert_eq!((got.dead, got.non_finite), (dead as u64, 0));
    }

    #[test]
    fn moments_of_any_length_match_f64() {
        for len in [1, 2, 3, 4, 5, 15, 16, 17, 63, 64, 65, 1023, 1024, 1025, 70_001] {
            assert_close(&noise(len));
        }
    }

    #[test]
    fn variance_of_unit_noise_survives_a_mean_of_ten_thousand() {
        let elements: Vec<f32> = noise(1 << 18).iter().map(|x| x + 1e4).collect();
        assert_close(&elements);
    }

    #[test]
    fn outliers_among_the_first_elements_cost_no_more_than_their_share() {
        let mut elements = noise(4096);
        for outlier in [1e2, -1e4, 1e6] {
            elements[0] = outlier;
            assert_close(&elements);
        }
    }

    #[test]
    fn equal_elements_have_no_variance_and_an_exact_sum() {
        for value in [0.0, 0.1, -1e4, 1e-40, f32::MAX] {
            let got = of(&[value; 3000]);
            assert_eq!((got.m2, got.sum), (0.0, 3000.0 * f64::from(value)), "{value:e}");
        }
    }

    #[test]
    fn squares_outside_the_range_of_f32_are_right() {
        for scale in [f32::MAX, 1e25, 1e-22, 1e-38, 1e-43] {
            let elements: Vec<f32> = noise(3000).iter().map(|x| x / 6.0 * scale).collect();
            assert_close(&elements);
        }
    }

    #[test]
    fn equal_elements_at_the_end_of_the_range_have_no_variance() {
        for value in [f32::MAX, -f32::MAX] {
            for count in [1, 3, 16, 17, 1000, 20_011] {
                let elements = &[value; 20_011][..count];
                let moments = Moments::of(elements, |x| x, Rule { epsilon: 1.0, skip_nan: false });
                assert_eq!((moments.m2, moments.mean), (0.0, f64::from(value)), "{count}");
            }
        }
    }

    #[test]
    fn equal_elements_beside_a_pivot_too_near_for_squares_in_f32_are_right() {
        // The last batch is one element, or a whole one.
        for count in [1, 64] {
            let mut elements = [1e-30; 64].to_vec();
            elements.extend([3e-30; 64].iter().take(count));
            assert_close(&elements);
        }
    }

    #[test]
    fn an_element_that_is_not_finite_is_counted_and_shows_wherever_it_is() {
        for place in [0, 1, 15, 64, 1999, 2999] {
            let mut elements = noise(3000);
            elements[place] = f32::NAN;
            let got = of(&elements);
            assert_eq!(got.non_finite, 1);
            assert!(got.sum.is_nan() && got.mean.is_nan() && got.m2.is_nan());
            assert!(got.min.is_nan() && got.max.is_nan());

            elements[place] = f32::NEG_INFINITY;
            let got = of(&elements);
            assert_eq!((got.non_finite, got.sum, got.mean), (1, got.min.into(), got.min.into()));
            assert_eq!(got.min, f32::NEG_INFINITY);
            assert!(got.m2.is_nan() && got.max.is_finite());
        }
    }

    #[test]
    fn skipped_elements_are_counted_and_leave_no_other_trace() {
        for places in [&[0][..], &[1, 2, 3], &[15, 16, 64, 1999], &[1024, 2999]] {
            let mut elements: Vec<f32> = noise(3000).iter().map(|x| x + 1e4).collect();
            places.iter().for_each(|&place| elements[place] = f32::NAN);
            let skipping = Rule { skip_nan: true, ..RULE };
            let got = Moments::of(&elements, |element| element, skipping);
            elements.retain(|element| !element.is_nan());
            let (sum, _, m2) = reference(&elements);
            assert_eq!((got.count, got.non_finite), (elements.len() as u64, places.len() as u64));
            assert!((got.sum - sum).abs() <= 1e-6 * sum);
            assert!((got.m2 - m2).abs() <= 1e-6 * m2, "{:e} {m2:e}", got.m2);
            assert_eq!(got.min, elements.iter().copied().fold(f32::INFINITY, f32::min));
            assert_eq!(got.max, elements.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        }
        let nothing_else =
            Moments::of(&[f32::NAN; 70], |element| element, Rule { skip_nan: true, ..RULE });
        assert_eq!(nothing_else, Moments { non_finite: 70, ..Moments::EMPTY });
        let one = of(&[2.0]);
        assert_eq!(one.merge(nothing_else), Moments { non_finite: 70, ..one });
        assert_eq!(nothing_else.merge(one), Moments { non_finite: 70, ..one });
    }

    #[test]
    fn merging_with_no_elements_changes_nothing() {
        let some = of(&noise(10));
        assert_eq!(some.merge(Moments::EMPTY), some);
        assert_eq!(Moments::EMPTY.merge(some), some);
    }

    #[test]
    fn elements_that_do_not_exist_leave_no_trace() {
        for valid in -1..=5 {
            let (mut some, mut each) = (Batch::EMPTY, Accumulator::new(1.5));
            let values = [1.0, -2.0, 0.0, 4.0];
            some.add_first(values, valid, 1.5, EPSILON);
            let existing = &values[..valid.clamp(0, 4) as usize];
            existing.iter().for_each(|&value| each.add_exactly(value, false));
            let mut got = Accumulator::new(1.5);
            assert!(got.take(&some) || existing.is_empty());
            assert_eq!((got.distances, got.squares), (each.distances, each.squares));
            assert_eq!((got.min, got.max), (each.min, each.max));
            assert_eq!(got.dead as usize, existing.iter().filter(|x| x.abs() < EPSILON).count());
        }
    }

    #[test]
    fn rebasing_to_another_pivot_keeps_the_moments() {
        let mut near = Accumulator::new(10.0);
        [9.0, 10.5, 12.0].iter().for_each(|&value| near.add_exactly(value, false));
        let (distances, squares) =
            Accumulator::rebased(near.distances, near.squares, 10.0, -3.0, 3);
        let far = Accumulator { pivot: -3.0, distances, squares, ..near };
        assert_eq!(far.moments(3), near.moments(3));
        assert_eq!((near.moments(3).sum, near.moments(3).m2), (31.5, 4.5));
    }
}
