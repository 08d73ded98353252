//! What lanes and warps exchange on the way to one summary.

use super::Statistic;
use crate::ptx;
use crate::reduce::Accumulator;
use crate::reduce::moments::{max_nan, min_nan};

/// What is summed over lanes, then over warps: of a chunk, or of all chunks.
#[derive(Clone, Copy)]
pub(super) struct Node {
    /// Of all chunks only; of a chunk, on its way through shared memory, the pivot.
    pub(super) sum: f64,
    pub(super) distances: f64,
    pub(super) squares: f64,
    pub(super) non_finite: u64,
    pub(super) dead: u64,
    pub(super) min: f32,
    pub(super) max: f32,
}

impl Node {
    pub(super) const EMPTY: Self = Self {
        sum: 0.0,
        distances: 0.0,
        squares: 0.0,
        non_finite: 0,
        dead: 0,
        min: f32::INFINITY,
        max: f32::NEG_INFINITY,
    };

    /// Sum with the lane whose number differs in the bits of `MASK`; both get the same bits.
    ///
    /// # Safety
    /// The whole warp executes it.
    #[inline(always)]
    pub(super) unsafe fn with_lane<S: Statistic, const MASK: u32, const GRID: bool>(
        mut self,
    ) -> Self {
        // SAFETY: the caller's contract; the conditions are constants.
        unsafe {
            if S::SUM && GRID {
                self.sum += other_f64::<MASK>(self.sum);
            }
            if S::SUM && (S::SQUARES || !GRID) {
                self.distances += other_f64::<MASK>(self.distances);
            }
            if S::SQUARES {
                self.squares += other_f64::<MASK>(self.squares);
            }
            if S::MIN {
                self.min = min_nan(self.min, other_f32::<MASK>(self.min));
            }
            if S::MAX {
                self.max = max_nan(self.max, other_f32::<MASK>(self.max));
            }
            if S::COUNTS && GRID {
                self.non_finite += other_u64::<MASK>(self.non_finite);
                self.dead += other_u64::<MASK>(self.dead);
            } else if S::COUNTS {
                // Of a chunk they fit 32 bits.
                let (non_finite, dead) = (self.non_finite as u32, self.dead as u32);
                self.non_finite += u64::from(ptx::shfl_sync_bfly::<MASK>(non_finite));
                self.dead += u64::from(ptx::shfl_sync_bfly::<MASK>(dead));
            }
        }
        self
    }

    /// Sum over the warp.
    ///
    /// # Safety
    /// The whole warp executes it.
    #[inline(always)]
    pub(super) unsafe fn over_lanes<S: Statistic, const GRID: bool>(self) -> Self {
        // SAFETY: the caller's contract.
        unsafe { self.with_lane::<S, 16, GRID>().over_warps::<S, GRID>() }
    }

    /// Sum over each half of the warp, where lanes stand for warps.
    ///
    /// # Safety
    /// The whole warp executes it.
    #[inline(always)]
    pub(super) unsafe fn over_warps<S: Statistic, const GRID: bool>(self) -> Self {
        // SAFETY: the caller's contract.
        unsafe {
            self.with_lane::<S, 8, GRID>()
                .with_lane::<S, 4, GRID>()
                .with_lane::<S, 2, GRID>()
                .with_lane::<S, 1, GRID>()
        }
    }

    /// # Safety
    /// `address` is a warp's place in shared memory, which no other thread accesses before the
    /// next barrier.
    #[inline(always)]
    pub(super) unsafe fn put(&self, address: u32) {
        let of = |value: u64| [f32::from_bits(value as u32), f32::from_bits((value >> 32) as u32)];
        let [a, b] = of(self.sum.to_bits());
        let [c, d] = of(self.distances.to_bits());
        let [e, f] = of(self.squares.to_bits());
        let [g, h] = of(self.non_finite);
        let [i, j] = of(self.dead);
        // SAFETY: the caller's contract; places are multiples of 16.
        unsafe {
            ptx::st_shared_v4_f32(address, [a, b, c, d]);
            ptx::st_shared_v4_f32(address + 16, [e, f, g, h]);
            ptx::st_shared_v4_f32(address + 32, [i, j, self.min, self.max]);
        }
    }

    /// # Safety
    /// `address` is a warp's place in shared memory, and a barrier has passed since it was written.
    #[inline(always)]
    pub(super) unsafe fn get(address: u32) -> Self {
        // SAFETY: the caller's contract; places are multiples of 16.
        let ([a, b, c, d], [e, f, g, h], [i, j, min, max]) = unsafe {
            (
                ptx::ld_shared_v4_f32(address),
                ptx::ld_shared_v4_f32(address + 16),
                ptx::ld_shared_v4_f32(address + 32),
            )
        };
        let of = |low: f32, high: f32| joined(low.to_bits(), high.to_bits());
        Self {
            sum: f64::from_bits(of(a, b)),
            distances: f64::from_bits(of(c, d)),
            squares: f64::from_bits(of(e, f)),
            non_finite: of(g, h),
            dead: of(i, j),
            min,
            max,
        }
    }
}

#[inline(always)]
pub(super) fn joined(low: u32, high: u32) -> u64 {
    u64::from(low) | u64::from(high) << 32
}

/// # Safety
/// The whole warp executes it.
#[inline(always)]
pub(super) unsafe fn other_u64<const MASK: u32>(value: u64) -> u64 {
    // SAFETY: the caller's contract.
    unsafe {
        let low = ptx::shfl_sync_bfly::<MASK>(value as u32);
        joined(low, ptx::shfl_sync_bfly::<MASK>((value >> 32) as u32))
    }
}

/// # Safety
/// The whole warp executes it.
#[inline(always)]
pub(super) unsafe fn other_f64<const MASK: u32>(value: f64) -> f64 {
    // SAFETY: the caller's contract.
    f64::from_bits(unsafe { other_u64::<MASK>(value.to_bits()) })
}

/// # Safety
/// The whole warp executes it.
#[inline(always)]
pub(super) unsafe fn other_f32<const MASK: u32>(value: f32) -> f32 {
    // SAFETY: the caller's contract.
    f32::from_bits(unsafe { ptx::shfl_sync_bfly::<MASK>(value.to_bits()) })
}

/// `value` of the warp's first lane.
///
/// # Safety
/// The whole warp executes it.
#[inline(always)]
pub(super) unsafe fn first_lane(value: f32) -> f32 {
    // SAFETY: the caller's contract.
    f32::from_bits(unsafe { ptx::shfl_sync_idx_first(value.to_bits()) })
}

/// Distances and squares relative to the first lane's pivot.
///
/// # Safety
/// The whole warp executes it.
#[inline(always)]
pub(super) unsafe fn rebased(mut node: Node, pivot: f32, count: u32) -> (Node, f32) {
    // SAFETY: the caller's contract.
    let common = unsafe { first_lane(pivot) };
    (node.distances, node.squares) =
        Accumulator::rebased(node.distances, node.squares, pivot, common, count);
    (node, common)
}
