//! Where partial summaries wait to be merged, and what becomes of them.

use super::Statistic;
use super::node::Total;
use crate::ptx;
use crate::reduce::moments::{centred, max_nan, min_nan};
use crate::reduce::{Moments, Partial};

const SLOT_BYTES: u64 = size_of::<Partial>() as u64;

/// Writes a summary to its slot.
///
/// # Safety
/// One thread of the grid calls it for this slot, which `partials` has.
#[inline(always)]
pub(crate) unsafe fn put(partials: u64, slot: u32, partial: &Partial) {
    let address = partials + u64::from(slot) * SLOT_BYTES;
    let [a, b, c, d] = partial.words();
    // SAFETY: the caller's contract; slots are multiples of 16 bytes.
    unsafe {
        ptx::st_relaxed_gpu_v2_u64(address, [a, b]);
        ptx::st_relaxed_gpu_v2_u64(address + 16, [c, d]);
    }
}

/// What a slot holds now, if all of it has been written.
///
/// # Safety
/// `partials` has the slot.
#[inline(always)]
pub(super) unsafe fn get(partials: u64, slot: u32) -> Option<Partial> {
    let address = partials + u64::from(slot) * SLOT_BYTES;
    // SAFETY: the caller's contract; slots are multiples of 16 bytes.
    let ([a, b], [c, d]) =
        unsafe { (ptx::ld_relaxed_gpu_v2_u64(address), ptx::ld_relaxed_gpu_v2_u64(address + 16)) };
    Partial::from_words([a, b, c, d])
}

/// Makes a slot unwritten.
///
/// # Safety
/// Everybody who reads the slot has done so; `partials` has it.
#[inline(always)]
pub(super) unsafe fn clear(partials: u64, slot: u32) {
    let address = partials + u64::from(slot) * SLOT_BYTES;
    // SAFETY: the caller's contract; slots are multiples of 16 bytes.
    unsafe {
        ptx::st_relaxed_gpu_v2_u64(address, [Partial::UNWRITTEN; 2]);
        ptx::st_relaxed_gpu_v2_u64(address + 16, [Partial::UNWRITTEN; 2]);
    }
}

/// `value / count`, exact by a multiplication where the count is a power of two: a division takes
/// a fifth of a microsecond.
#[inline(always)]
pub(super) fn quotient(value: f64, count: u64) -> f64 {
    if count & count.wrapping_sub(1) == 0 && count != 0 {
        let log2 = 63 - count.leading_zeros();
        value * f64::from_bits(u64::from(1023 - log2) << 52)
    } else {
        value / count as f64
    }
}

/// A number of elements that most slots have in common, by which dividing takes three instructions.
#[derive(Clone, Copy)]
pub(super) struct Usual {
    count: u64,
    inverse: f64,
}

impl Usual {
    /// Of this many elements, at least one.
    #[inline(always)]
    pub(super) fn new(count: u32) -> Self {
        Self { count: u64::from(count), inverse: quotient(1.0, u64::from(count)) }
    }

    /// `value / count`, exact if that is a number.
    #[inline(always)]
    pub(super) fn quotient(self, value: f64, count: u64) -> f64 {
        if count != self.count {
            return quotient(value, count);
        }
        divided(value, count as f64, self.inverse)
    }
}

/// `value / by`, exact if that is a number, where the inverse is known.
#[inline(always)]
pub(super) fn divided(value: f64, by: f64, inverse: f64) -> f64 {
    let near = value * inverse;
    let rest = ptx::fma_rn_f64(-near, by, value);
    ptx::fma_rn_f64(rest, inverse, near)
}

impl Total {
    /// Adds a summary of `count` elements, with those that were skipped, relative to `pivot`.
    #[inline(always)]
    pub(super) fn add<S: Statistic>(
        &mut self,
        partial: &Partial,
        count: u32,
        pivot: f64,
        usual: Usual,
    ) {
        self.sum += partial.sum;
        if S::SQUARES {
            let count = u64::from(count) - partial.counts.skipped();
            if count > 0 {
                let distance = usual.quotient(partial.sum, count) - pivot;
                let weighted = count as f64 * distance;
                self.distances += weighted;
                self.squares += partial.m2 + weighted * distance;
            }
        }
        self.min = min_nan(self.min, partial.min);
        self.max = max_nan(self.max, partial.max);
        self.non_finite += partial.counts.non_finite();
        self.skipped += partial.counts.skipped();
        self.dead += partial.counts.dead();
    }

    /// The statistics of `len` elements, with those that were skipped.
    #[inline(always)]
    pub(super) fn moments<S: Statistic>(&self, len: u64) -> Moments {
        let count = len - self.skipped;
        let non_finite = if S::COUNTS { self.non_finite } else { 0 };
        if count == 0 {
            return Moments { non_finite, ..Moments::EMPTY };
        }
        let m2 = if S::SQUARES {
            centred(self.squares, self.distances, quotient(self.distances, count))
        } else {
            0.0
        };
        Moments {
            count,
            sum: self.sum,
            mean: quotient(self.sum, count),
            m2,
            non_finite,
            dead: self.dead,
            min: self.min,
            max: self.max,
        }
    }
}

/// The mean of a summary of `count` elements, with those that were skipped; 0 if all were.
#[inline(always)]
pub(super) fn mean(partial: &Partial, count: u32) -> f64 {
    let count = u64::from(count) - partial.counts.skipped();
    if count == 0 { 0.0 } else { quotient(partial.sum, count) }
}

/// Writes a result.
///
/// # Safety
/// One thread of the grid calls it; `address` is that of a writable [`Moments`].
#[inline(always)]
pub(super) unsafe fn store_result(address: u64, moments: &Moments) {
    let extremes = u64::from(moments.min.to_bits()) | u64::from(moments.max.to_bits()) << 32;
    // SAFETY: one thread writes 56 bytes, 8-aligned, in the order of the fields.
    unsafe {
        let mut at = address;
        for value in [
            moments.count,
            moments.sum.to_bits(),
            moments.mean.to_bits(),
            moments.m2.to_bits(),
            moments.non_finite,
            moments.dead,
            extremes,
        ] {
            ptx::st_global_v2_u32(at, [value as u32, (value >> 32) as u32]);
            at += 8;
        }
    }
}
