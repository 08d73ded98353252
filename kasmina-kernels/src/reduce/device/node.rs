//! What lanes and warps exchange on the way to one summary.

use super::Statistic;
use crate::ptx;
use crate::reduce::Accumulator;
use crate::reduce::columns::{packed, unpacked};
use crate::reduce::moments::{max_nan, min_nan};

/// Sums of a chunk's elements relative to a pivot: of a lane, of a warp, of the block.
#[derive(Clone, Copy)]
pub(super) struct Node {
    pub(super) distances: f64,
    pub(super) squares: f64,
    pub(super) pivot: f32,
    pub(super) min: f32,
    pub(super) max: f32,
    pub(super) non_finite: u32,
    pub(super) skipped: u32,
    pub(super) dead: u32,
}

impl Node {
    #[inline(always)]
    pub(super) fn of(accumulator: &Accumulator) -> Self {
        let Accumulator { pivot, distances, squares, min, max, non_finite, skipped, dead } =
            *accumulator;
        Self { distances, squares, pivot, min, max, non_finite, skipped, dead }
    }

    /// Relative to the first lane's pivot. The node is of `count` elements.
    ///
    /// # Safety
    /// The whole warp executes it.
    #[inline(always)]
    pub(super) unsafe fn rebased_to_first_lane(mut self, count: u32) -> Self {
        // SAFETY: the caller's contract.
        let first = f32::from_bits(unsafe { ptx::shfl_sync_idx_first(self.pivot.to_bits()) });
        (self.distances, self.squares) =
            Accumulator::rebased(self.distances, self.squares, self.pivot, first, count);
        self.pivot = first;
        self
    }

    /// Sum over the warp, or over its first 8 or 16 lanes if the others hold the same once more.
    ///
    /// # Safety
    /// The whole warp executes it; `LANES` is 32, 16 or 8.
    #[inline(always)]
    pub(super) unsafe fn over<S: Statistic, const LANES: u32>(mut self) -> Self {
        // SAFETY: the caller's contract; all lanes take the same way.
        unsafe {
            if S::SQUARES {
                (self.distances, self.squares) = sum_pair::<LANES>(self.distances, self.squares);
            } else if S::SUM {
                self.distances = sum_f64::<LANES>(self.distances);
            }
            if S::MIN {
                self.min = least::<LANES>(self.min);
            }
            if S::MAX {
                self.max = largest::<LANES>(self.max);
            }
            if S::COUNTS {
                self.dead = sum_u32::<LANES>(self.dead);
            }
            // Those that were skipped are among them.
            if ptx::vote_any(self.non_finite != 0) {
                self.non_finite = sum_u32::<LANES>(self.non_finite);
                self.skipped = sum_u32::<LANES>(self.skipped);
            }
        }
        self
    }

    /// # Safety
    /// `address` is a warp's place in shared memory, which no other thread accesses before the
    /// next barrier.
    #[inline(always)]
    pub(super) unsafe fn put(&self, address: u32) {
        let [a, b] = halves(self.distances.to_bits());
        let [c, d] = halves(self.squares.to_bits());
        let [non_finite, skipped, dead] =
            [self.non_finite, self.skipped, self.dead].map(f32::from_bits);
        // SAFETY: the caller's contract; places are multiples of 16.
        unsafe {
            ptx::st_shared_v4_f32(address, [a, b, c, d]);
            ptx::st_shared_v4_f32(address + 16, [self.pivot, self.min, self.max, dead]);
            ptx::st_shared_v4_f32(address + 32, [non_finite, skipped, 0.0, 0.0]);
        }
    }

    /// # Safety
    /// `address` is a warp's place in shared memory, and a barrier has passed since it was written.
    #[inline(always)]
    pub(super) unsafe fn get(address: u32) -> Self {
        // SAFETY: the caller's contract; places are multiples of 16.
        let ([a, b, c, d], [pivot, min, max, dead], [non_finite, skipped, ..]) = unsafe {
            (
                ptx::ld_shared_v4_f32(address),
                ptx::ld_shared_v4_f32(address + 16),
                ptx::ld_shared_v4_f32(address + 32),
            )
        };
        Self {
            distances: f64::from_bits(joined(a, b)),
            squares: f64::from_bits(joined(c, d)),
            pivot,
            min,
            max,
            non_finite: non_finite.to_bits(),
            skipped: skipped.to_bits(),
            dead: dead.to_bits(),
        }
    }

    /// Puts a node of at most 1023 elements of each kind to place `place` of a warp's two halves of
    /// `half` bytes, so that neighbouring places are neighbours in each.
    ///
    /// # Safety
    /// As [`put`](Self::put), of these places.
    #[inline(always)]
    pub(super) unsafe fn put_in_halves(&self, smem: u32, half: u32, warp: u32, place: u32) {
        let [a, b] = halves(self.distances.to_bits());
        let [c, d] = halves(self.squares.to_bits());
        let counts = f32::from_bits(packed([self.dead, self.non_finite, self.skipped]));
        let address = smem + warp * 2 * half + place * 16;
        // SAFETY: the caller's contract; places are multiples of 16.
        unsafe {
            ptx::st_shared_v4_f32(address, [a, b, c, d]);
            ptx::st_shared_v4_f32(address + half, [self.pivot, self.min, self.max, counts]);
        }
    }

    /// What was put there.
    ///
    /// # Safety
    /// As [`get`](Self::get), of these places.
    #[inline(always)]
    pub(super) unsafe fn get_from_halves(smem: u32, half: u32, warp: u32, place: u32) -> Self {
        let address = smem + warp * 2 * half + place * 16;
        // SAFETY: the caller's contract; places are multiples of 16.
        let ([a, b, c, d], [pivot, min, max, counts]) =
            unsafe { (ptx::ld_shared_v4_f32(address), ptx::ld_shared_v4_f32(address + half)) };
        let [dead, non_finite, skipped] = unpacked(counts.to_bits());
        Self {
            distances: f64::from_bits(joined(a, b)),
            squares: f64::from_bits(joined(c, d)),
            pivot,
            min,
            max,
            non_finite,
            skipped,
            dead,
        }
    }

    /// The two halves of a node of fewer than 2¹⁶ elements of each kind, without its pivot.
    #[cfg(kasmina_tier = "hopper")]
    #[inline(always)]
    fn in_halves(&self) -> [[u32; 4]; 2] {
        let [a, b] = words(self.distances);
        let [c, d] = words(self.squares);
        let counts = self.non_finite | self.skipped << 16;
        [[a, b, c, d], [self.min.to_bits(), self.max.to_bits(), self.dead, counts]]
    }

    /// Sends both to another block's shared memory: one to `address`, the other `half` bytes behind.
    ///
    /// # Safety
    /// As [`ptx::st_async_shared_cluster_v4_u32`], for both.
    #[cfg(kasmina_tier = "hopper")]
    #[inline(always)]
    pub(super) unsafe fn send_halves(&self, address: u32, half: u32, barrier: u32) {
        let [first, second] = self.in_halves();
        // SAFETY: the caller's contract; places are multiples of 16.
        unsafe {
            ptx::st_async_shared_cluster_v4_u32(address, first, barrier);
            ptx::st_async_shared_cluster_v4_u32(address + half, second, barrier);
        }
    }

    /// Puts both into the block's own shared memory.
    ///
    /// # Safety
    /// As [`put`](Self::put), of these places.
    #[cfg(kasmina_tier = "hopper")]
    #[inline(always)]
    pub(super) unsafe fn put_halves(&self, address: u32, half: u32) {
        let [first, second] = self.in_halves();
        // SAFETY: the caller's contract; places are multiples of 16.
        unsafe {
            ptx::st_shared_v4_u32(address, first);
            ptx::st_shared_v4_u32(address + half, second);
        }
    }

    /// A node that was sent.
    ///
    /// # Safety
    /// `address` is a place in shared memory to which a node was sent, and the barrier's phase has
    /// ended.
    #[cfg(kasmina_tier = "hopper")]
    #[inline(always)]
    pub(super) unsafe fn received_in_halves(address: u32, half: u32) -> Self {
        // SAFETY: the caller's contract; places are multiples of 16.
        let ([a, b, c, d], [min, max, dead, counts]) =
            unsafe { (ptx::ld_shared_v4_u32(address), ptx::ld_shared_v4_u32(address + half)) };
        let double = |low: u32, high: u32| f64::from_bits(u64::from(low) | u64::from(high) << 32);
        Self {
            distances: double(a, b),
            squares: double(c, d),
            pivot: 0.0,
            min: f32::from_bits(min),
            max: f32::from_bits(max),
            non_finite: counts & 0xFFFF,
            skipped: counts >> 16,
            dead,
        }
    }

    /// Adds another node, of `count` elements without those that were skipped, relative to this
    /// one's pivot.
    #[inline(always)]
    pub(super) fn absorb<S: Statistic>(&mut self, other: &Self, count: u32) {
        let (mut distances, mut squares) = (other.distances, other.squares);
        if S::SQUARES {
            (distances, squares) =
                Accumulator::rebased(distances, squares, other.pivot, self.pivot, count);
        }
        self.distances += distances;
        self.squares += squares;
        self.min = min_nan(self.min, other.min);
        self.max = max_nan(self.max, other.max);
        self.non_finite += other.non_finite;
        self.skipped += other.skipped;
        self.dead += other.dead;
    }

    /// Adds another node relative to the same pivot.
    #[cfg(kasmina_tier = "hopper")]
    #[inline(always)]
    pub(super) fn add<S: Statistic>(&mut self, other: &Self) {
        if S::SUM {
            self.distances += other.distances;
        }
        if S::SQUARES {
            self.squares += other.squares;
        }
        if S::MIN {
            self.min = min_nan(self.min, other.min);
        }
        if S::MAX {
            self.max = max_nan(self.max, other.max);
        }
        self.non_finite += other.non_finite;
        self.skipped += other.skipped;
        if S::COUNTS {
            self.dead += other.dead;
        }
    }
}

#[cfg(kasmina_tier = "hopper")]
#[inline(always)]
fn words(value: f64) -> [u32; 2] {
    let bits = value.to_bits();
    [bits as u32, (bits >> 32) as u32]
}

/// Sums over chunks, with distances of their means from that of the first chunk.
#[derive(Clone, Copy)]
pub(super) struct Total {
    pub(super) sum: f64,
    pub(super) distances: f64,
    pub(super) squares: f64,
    pub(super) non_finite: u64,
    pub(super) skipped: u64,
    pub(super) dead: u64,
    pub(super) min: f32,
    pub(super) max: f32,
}

impl Total {
    pub(super) const EMPTY: Self = Self {
        sum: 0.0,
        distances: 0.0,
        squares: 0.0,
        non_finite: 0,
        skipped: 0,
        dead: 0,
        min: f32::INFINITY,
        max: f32::NEG_INFINITY,
    };

    /// As [`Node::over`].
    ///
    /// # Safety
    /// As there.
    #[inline(always)]
    pub(super) unsafe fn over<S: Statistic, const LANES: u32>(mut self) -> Self {
        // SAFETY: the caller's contract; all lanes take the same way.
        unsafe {
            if S::SUM {
                self.sum = sum_f64::<LANES>(self.sum);
            }
            if S::SQUARES {
                (self.distances, self.squares) = sum_pair::<LANES>(self.distances, self.squares);
            }
            if S::MIN {
                self.min = least::<LANES>(self.min);
            }
            if S::MAX {
                self.max = largest::<LANES>(self.max);
            }
            if S::COUNTS {
                self.dead = sum_u64::<LANES>(self.dead);
            }
            if ptx::vote_any(self.non_finite != 0) {
                self.non_finite = sum_u64::<LANES>(self.non_finite);
                self.skipped = sum_u64::<LANES>(self.skipped);
            }
        }
        self
    }

    /// # Safety
    /// As [`Node::put`].
    #[inline(always)]
    pub(super) unsafe fn put(&self, address: u32) {
        let [a, b] = halves(self.sum.to_bits());
        let [c, d] = halves(self.distances.to_bits());
        let [e, f] = halves(self.squares.to_bits());
        let [g, h] = halves(self.non_finite);
        let [i, j] = halves(self.skipped);
        let [k, l] = halves(self.dead);
        // SAFETY: the caller's contract; places are multiples of 16.
        unsafe {
            ptx::st_shared_v4_f32(address, [a, b, c, d]);
            ptx::st_shared_v4_f32(address + 16, [e, f, g, h]);
            ptx::st_shared_v4_f32(address + 32, [i, j, k, l]);
            ptx::st_shared_v4_f32(address + 48, [self.min, self.max, 0.0, 0.0]);
        }
    }

    /// # Safety
    /// As [`Node::get`].
    #[inline(always)]
    pub(super) unsafe fn get(address: u32) -> Self {
        // SAFETY: the caller's contract; places are multiples of 16.
        let ([a, b, c, d], [e, f, g, h], [i, j, k, l], [min, max, ..]) = unsafe {
            (
                ptx::ld_shared_v4_f32(address),
                ptx::ld_shared_v4_f32(address + 16),
                ptx::ld_shared_v4_f32(address + 32),
                ptx::ld_shared_v4_f32(address + 48),
            )
        };
        Self {
            sum: f64::from_bits(joined(a, b)),
            distances: f64::from_bits(joined(c, d)),
            squares: f64::from_bits(joined(e, f)),
            non_finite: joined(g, h),
            skipped: joined(i, j),
            dead: joined(k, l),
            min,
            max,
        }
    }
}

#[inline(always)]
fn halves(value: u64) -> [f32; 2] {
    [f32::from_bits(value as u32), f32::from_bits((value >> 32) as u32)]
}

#[inline(always)]
fn joined(low: f32, high: f32) -> u64 {
    u64::from(low.to_bits()) | u64::from(high.to_bits()) << 32
}

/// # Safety
/// The whole warp executes it.
#[inline(always)]
unsafe fn other_u64<const MASK: u32>(value: u64) -> u64 {
    // SAFETY: the caller's contract.
    unsafe {
        let low = ptx::shfl_sync_bfly::<MASK>(value as u32);
        let high = ptx::shfl_sync_bfly::<MASK>((value >> 32) as u32);
        u64::from(low) | u64::from(high) << 32
    }
}

/// # Safety
/// The whole warp executes it.
#[inline(always)]
unsafe fn other_f64<const MASK: u32>(value: f64) -> f64 {
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

/// # Safety
/// As [`Node::over`].
#[inline(always)]
unsafe fn sum_f64<const LANES: u32>(mut value: f64) -> f64 {
    // SAFETY: the caller's contract.
    unsafe {
        if LANES == 32 {
            value += other_f64::<16>(value);
        }
        if LANES >= 16 {
            value += other_f64::<8>(value);
        }
        value += other_f64::<4>(value);
        value += other_f64::<2>(value);
        value + other_f64::<1>(value)
    }
}

/// Both sums, with the exchanges of little more than one: the lower lanes go on with the first,
/// the upper lanes with the second. Shuffles are what a block waits for otherwise.
///
/// # Safety
/// As [`Node::over`].
#[inline(always)]
unsafe fn sum_pair<const LANES: u32>(a: f64, b: f64) -> (f64, f64) {
    let upper = ptx::lane_index() >= 16;
    // SAFETY: the caller's contract.
    unsafe {
        let (mut sum, given) = if upper { (b, a) } else { (a, b) };
        if LANES == 32 {
            sum += other_f64::<16>(given);
        }
        if LANES >= 16 {
            sum += other_f64::<8>(sum);
        }
        sum = sum_f64::<8>(sum);
        let other = other_f64::<16>(sum);
        // Opaque, so that no exchange is duplicated for the two cases.
        let upper = ptx::opaque_u32(ptx::lane_index()) >= 16;
        if upper { (other, sum) } else { (sum, other) }
    }
}

/// # Safety
/// As [`Node::over`].
#[inline(always)]
pub(super) unsafe fn sum_u32<const LANES: u32>(value: u32) -> u32 {
    // SAFETY: the caller's contract.
    unsafe {
        #[cfg(kasmina_tier = "hopper")]
        return ptx::redux_sync_add_u32(if ptx::lane_index() >= LANES { 0 } else { value });
        #[cfg(not(kasmina_tier = "hopper"))]
        return {
            let mut sum = value;
            if LANES == 32 {
                sum += ptx::shfl_sync_bfly::<16>(sum);
            }
            if LANES >= 16 {
                sum += ptx::shfl_sync_bfly::<8>(sum);
            }
            sum += ptx::shfl_sync_bfly::<4>(sum);
            sum += ptx::shfl_sync_bfly::<2>(sum);
            sum + ptx::shfl_sync_bfly::<1>(sum)
        };
    }
}

/// Of numbers below 2⁴⁶.
///
/// # Safety
/// As [`Node::over`].
#[inline(always)]
unsafe fn sum_u64<const LANES: u32>(value: u64) -> u64 {
    const LOW: u64 = (1 << 20) - 1;
    // SAFETY: the caller's contract; sums of 20 bits over 32 lanes fit 32 bits.
    unsafe {
        let low = sum_u32::<LANES>((value & LOW) as u32);
        let high = sum_u32::<LANES>((value >> 20) as u32);
        u64::from(low) + (u64::from(high) << 20)
    }
}

/// The smallest; NaN if any is.
///
/// # Safety
/// As [`Node::over`].
#[inline(always)]
pub(super) unsafe fn least<const LANES: u32>(value: f32) -> f32 {
    // SAFETY: the caller's contract.
    unsafe {
        #[cfg(kasmina_tier = "hopper")]
        return of_order(ptx::redux_sync_min_s32(if value.is_nan() {
            i32::MIN
        } else {
            order(value)
        }));
        #[cfg(not(kasmina_tier = "hopper"))]
        return {
            let mut least = value;
            if LANES == 32 {
                least = min_nan(least, other_f32::<16>(least));
            }
            if LANES >= 16 {
                least = min_nan(least, other_f32::<8>(least));
            }
            least = min_nan(least, other_f32::<4>(least));
            least = min_nan(least, other_f32::<2>(least));
            min_nan(least, other_f32::<1>(least))
        };
    }
}

/// The largest; NaN if any is.
///
/// # Safety
/// As [`Node::over`].
#[inline(always)]
pub(super) unsafe fn largest<const LANES: u32>(value: f32) -> f32 {
    // SAFETY: the caller's contract.
    unsafe {
        #[cfg(kasmina_tier = "hopper")]
        return of_order(ptx::redux_sync_max_s32(if value.is_nan() {
            i32::MAX
        } else {
            order(value)
        }));
        #[cfg(not(kasmina_tier = "hopper"))]
        return {
            let mut largest = value;
            if LANES == 32 {
                largest = max_nan(largest, other_f32::<16>(largest));
            }
            if LANES >= 16 {
                largest = max_nan(largest, other_f32::<8>(largest));
            }
            largest = max_nan(largest, other_f32::<4>(largest));
            largest = max_nan(largest, other_f32::<2>(largest));
            max_nan(largest, other_f32::<1>(largest))
        };
    }
}

/// An integer that is larger for a larger number. Those of the two infinities are next to NaNs,
/// and the smallest and largest of all integers are NaNs.
#[cfg(kasmina_tier = "hopper")]
#[inline(always)]
fn order(value: f32) -> i32 {
    let bits = value.to_bits() as i32;
    bits ^ (bits >> 31 & i32::MAX)
}

/// The number of this [`order`].
#[cfg(kasmina_tier = "hopper")]
#[inline(always)]
fn of_order(order: i32) -> f32 {
    f32::from_bits((order ^ (order >> 31 & i32::MAX)) as u32)
}
