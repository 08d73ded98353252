//! A thread's elements of a batch: loading them and adding them up.

use super::{Element, Statistic, thread_of_block};
use crate::ptx;
use crate::reduce::moments::{PIVOT_SCALE, max_nan, min_nan, pivot_of};
use crate::reduce::{Accumulator, Batch, Rule, THREADS, VECTORS};
use crate::unroll::unroll;

/// Elements of a block between a thread's vectors, and in a batch.
const fn row<E: Element>() -> u32 {
    THREADS * E::WIDTH
}
pub(super) const fn batch<E: Element>() -> u32 {
    VECTORS * row::<E>()
}

/// A thread's elements of one batch.
pub(super) type Vectors = [[u32; 4]; VECTORS as usize];

/// Address of vector `index` if that of vector 0 is `address`.
#[inline(always)]
pub(super) fn address_of(address: u64, index: u32) -> u64 {
    address + u64::from(index * THREADS * 16)
}

/// Elements that exist from the start of a thread's vector 0 on, where `left` exist from the start
/// of the batch on; none of the thread's do if it is not positive.
#[inline(always)]
pub(super) fn left_of_thread<E: Element>(left: u32) -> i32 {
    // Beyond a batch it makes no difference, and this cannot overflow.
    let left = if left < batch::<E>() { left } else { batch::<E>() };
    left as i32 - (ptx::opaque_u32(thread_of_block()) * E::WIDTH) as i32
}

/// Elements that exist from vector `v` on, of those from vector 0 on.
#[inline(always)]
pub(super) fn left_of_vector<E: Element>(left: i32, v: u32) -> i32 {
    left - (v * row::<E>()) as i32
}

/// Loads a thread's vectors of a batch, the first of which is at `address`; `left` elements exist
/// from the start of the batch on, and the others are zero.
///
/// # Safety
/// The elements are readable, and nothing writes them while the kernel runs; `address` is a
/// multiple of 16 if `aligned`.
#[inline(always)]
pub(super) unsafe fn load<E: Element>(address: u64, left: u32, aligned: bool) -> Vectors {
    if aligned && left >= batch::<E>() {
        // SAFETY: the whole batch exists.
        return unsafe {
            [
                ptx::ld_global_v4_u32(address),
                ptx::ld_global_v4_u32(address_of(address, 1)),
                ptx::ld_global_v4_u32(address_of(address, 2)),
                ptx::ld_global_v4_u32(address_of(address, 3)),
            ]
        };
    }
    let left = left_of_thread::<E>(left);
    let at = |v: u32| (address_of(address, v), left_of_vector::<E>(left, v));
    // SAFETY: as many elements exist.
    unsafe { load_vectors::<E>([at(0), at(1), at(2), at(3)], aligned) }
}

/// Loads four vectors, given by address and number of elements that exist; the others are zero.
///
/// # Safety
/// As [`load`].
#[inline(always)]
pub(super) unsafe fn load_vectors<E: Element>(at: [(u64, i32); 4], aligned: bool) -> Vectors {
    // SAFETY: only vectors that exist are loaded whole.
    let mut vectors = at.map(|(address, left)| unsafe {
        ptx::ld_global_v4_u32_if(address, aligned && left >= E::WIDTH as i32)
    });
    let mut at = at;
    each_vector(&mut vectors, |vector| {
        // SAFETY: the caller's contract.
        unsafe { load_rest::<E>(vector, at[0], aligned) };
        at = [at[1], at[2], at[3], at[0]];
    });
    vectors
}

/// Does something with each vector in turn, in a loop that is not unrolled: the vectors move
/// through one place. For what is seldom done, and would take registers that the rest needs.
#[inline(always)]
pub(super) fn each_vector(vectors: &mut Vectors, mut body: impl FnMut(&mut [u32; 4])) {
    let mut v = 0;
    while v < VECTORS {
        ptx::nounroll();
        let [mut first, b, c, d] = *vectors;
        body(&mut first);
        *vectors = [b, c, d, first];
        v += 1;
    }
}

/// Loads one by one what exists of a vector that cannot be loaded whole.
///
/// # Safety
/// As [`load`].
#[inline(always)]
unsafe fn load_rest<E: Element>(vector: &mut [u32; 4], (address, left): (u64, i32), aligned: bool) {
    if left <= 0 || aligned && left >= E::WIDTH as i32 {
        return;
    }
    unroll!(i: u32 in [0 1 2 3 4 5 6 7] {
        if i < E::WIDTH && (i as i32) < left {
            let byte = i << E::LOG2_SIZE;
            // SAFETY: the element exists.
            let bits = unsafe { E::load(address + u64::from(byte)) };
            vector[(byte / 4 % 4) as usize] |= bits << (byte % 4 * 8);
        }
    });
}

/// What is subtracted from the elements that are added next: the mean of these, of which `count`
/// exist and the others are zero; NaN where that is not finite. What is left of a number then is
/// NaN as well, so that every batch is added in f64: no other element stands for all.
#[inline(always)]
pub(super) fn pivot<E: Element>(vectors: &Vectors, count: u32) -> f32 {
    let mut sums = [0.0; 4];
    unroll!(v: usize in [0 1 2 3] {
        // Opaque, so that widened elements do not stay in registers until they are used again.
        let vector = vectors[v].map(ptx::opaque_u32);
        sums = sum_of_scaled(sums, E::four(vector, false));
        if E::WIDTH == 8 {
            sums = sum_of_scaled(sums, E::four(vector, true));
        }
    });
    let [a, b, c, d] = sums;
    let inverse = match count {
        count if count == VECTORS * E::WIDTH => 1.0 / (VECTORS * E::WIDTH) as f32,
        0 => 1.0,
        count => ptx::rcp_approx_f32(count as f32),
    };
    pivot_of((a + b) + (c + d), inverse)
}

/// The pivot of f64 sums, for which any number will do.
#[inline(always)]
pub(super) fn number_or_zero(pivot: f32) -> f32 {
    if pivot.is_nan() { 0.0 } else { pivot }
}

#[inline(always)]
fn sum_of_lanes(a: [f32; 4], b: [f32; 4]) -> [f32; 4] {
    [a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3]]
}

#[inline(always)]
fn sum_of_scaled(sums: [f32; 4], four: [f32; 4]) -> [f32; 4] {
    sum_of_lanes(sums, four.map(|element| PIVOT_SCALE * element))
}

/// How elements are added: relative to `pivot`, with those below epsilon counted.
#[derive(Clone, Copy)]
pub(super) struct Measure {
    pub(super) pivot: f32,
    pub(super) epsilon: f32,
    /// As [`Element::pair_of_bounds`] gives it.
    pub(super) bounds: u32,
}

impl Measure {
    #[inline(always)]
    pub(super) fn new<E: Element, S: Statistic>(rule: Rule) -> Self {
        let paired = S::SQUARES && E::PAIRED;
        let bounds = if paired { E::pair_of_bounds(rule.epsilon) } else { 0 };
        Self { pivot: 0.0, epsilon: rule.epsilon, bounds }
    }
}

/// Adds the elements of a vector that exists as a whole.
#[inline(always)]
pub(super) fn add_whole<E: Element, S: Statistic>(
    sums: &mut Batch,
    pairs: &mut super::Pairs,
    vector: [u32; 4],
    measure: Measure,
) {
    if S::SQUARES && E::PAIRED {
        unroll!(i: usize in [0 1 2 3] {
            E::add_pair(pairs, vector[i], measure.bounds);
        });
        // Opaque, so that elements are widened where they are used.
        sums.add_to_sums(E::four(vector.map(ptx::opaque_u32), false), measure.pivot);
        sums.add_to_sums(E::four(vector.map(ptx::opaque_u32), true), measure.pivot);
        return;
    }
    if S::SQUARES {
        sums.add(E::four(vector, false), measure.pivot, measure.epsilon);
        if E::WIDTH == 8 {
            let vector = vector.map(ptx::opaque_u32);
            sums.add(E::four(vector, true), measure.pivot, measure.epsilon);
        }
        return;
    }
    add_some::<E, S>(sums, vector, E::WIDTH as i32, measure);
}

/// Adds the elements of a vector, of which the first `valid` exist.
#[inline(always)]
pub(super) fn add_some<E: Element, S: Statistic>(
    sums: &mut Batch,
    vector: [u32; 4],
    valid: i32,
    measure: Measure,
) {
    add_four::<S>(sums, E::four(vector, false), valid, measure);
    if E::WIDTH == 8 {
        add_four::<S>(sums, E::four(vector, true), valid - 4, measure);
    }
}

/// Adds four elements, of which the first `valid` exist.
#[inline(always)]
fn add_four<S: Statistic>(sums: &mut Batch, four: [f32; 4], valid: i32, measure: Measure) {
    if S::SQUARES {
        sums.add_first(four, valid, measure.pivot, measure.epsilon);
    } else if S::SUM {
        // Those that do not exist are zero.
        sums.distances = sum_of_lanes(sums.distances, four);
    } else {
        unroll!(i: usize in [0 1 2 3] {
            if S::MIN && (i as i32) < valid {
                sums.min = min_nan(sums.min, four[i]);
            }
            if S::MAX && (i as i32) < valid {
                sums.max = max_nan(sums.max, four[i]);
            }
        });
    }
}

/// Adds a batch's sums, and says whether it could; if not, their elements have to be added one by
/// one in f64.
#[must_use]
#[inline(always)]
pub(super) fn take<S: Statistic>(accumulator: &mut Accumulator, sums: &Batch, rule: Rule) -> bool {
    if S::SQUARES {
        return accumulator.take(sums);
    }
    if S::SUM {
        return accumulator.take_distances(sums);
    }
    if rule.skip_nan && (S::MIN && sums.min.is_nan() || S::MAX && sums.max.is_nan()) {
        return false;
    }
    accumulator.min = min_nan(accumulator.min, sums.min);
    accumulator.max = max_nan(accumulator.max, sums.max);
    true
}

/// Adds the elements of vector `address`, of which the first `valid` exist, one by one, read again.
///
/// # Safety
/// They are readable, and nothing writes them while the kernel runs.
#[inline(always)]
pub(super) unsafe fn add_exactly<E: Element>(
    accumulator: &mut Accumulator,
    address: u64,
    valid: i32,
    rule: Rule,
) {
    let mut element = 0;
    while element < E::WIDTH && (element as i32) < valid {
        // Seldom run; unrolled it would take registers that the elements need.
        ptx::nounroll();
        // SAFETY: the element exists.
        let bits = unsafe { E::load(address + u64::from(element << E::LOG2_SIZE)) };
        accumulator.add_exactly(E::widen(bits), rule.skip_nan);
        element += 1;
    }
}
