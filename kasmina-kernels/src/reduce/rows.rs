//! Runs of a middling size, of which each block takes one chunk of whole rows: how they are cut,
//! and when what was summed in f32 may stand.

use super::chunks::Chunks;
use super::{ReduceParams, chunks};
use crate::abi::{DType, KernelParams};

/// Threads per block, and warps.
pub(super) const ROW_THREADS: u32 = 512;
pub(super) const ROW_WARPS: u32 = ROW_THREADS / 32;
/// Bytes of a block's vectors of the same number.
pub(super) const ROW_BYTES: u32 = ROW_THREADS * 16;
/// Blocks that share a multiprocessor, which leaves 64 registers a thread.
#[cfg(kasmina_tier = "hopper")]
pub(super) const ROW_BLOCKS_PER_MULTIPROCESSOR: u32 = 2;
/// Most chunks: what the 132 multiprocessors of an H100 or H200 take on at once, which are constants,
/// so that the result does not depend on the GPU. Half as many up to [`HALF_BYTES`], which leaves room
/// for the next grid and fewer slots to merge.
const MOST_CHUNKS: u64 = 264;
const HALF_BYTES: u64 = 4 << 20;
/// Longest run. Beyond it, a block that takes chunk after chunk is as fast, and evens out what the
/// memory's channels take in different times.
const MOST_BYTES: u64 = 128 << 20;
/// The warps' records and the ticket, then the records of the block that merges.
pub(super) const ROW_RECORDS_BYTES: u32 = ROW_WARPS * super::WARP_BYTES;
pub(super) const ROW_SMEM_BYTES: u32 = 2 * ROW_RECORDS_BYTES + 16;

/// What the kernel of one chunk per block takes.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct RowParams {
    /// As for the other reductions, with the chunks of [`Chunks::rows`]; NaN are not skipped.
    pub reduce: ReduceParams,
    /// 1 / number of elements.
    pub inverse: f64,
    /// Number of elements.
    pub count: f64,
}

// SAFETY: repr(C); 64 bytes of `ReduceParams`, which has no padding, and two f64.
unsafe impl KernelParams for RowParams {}
const _: () = assert!(size_of::<RowParams>() == 80);

impl RowParams {
    /// Of a run with elements.
    #[must_use]
    pub const fn new(reduce: ReduceParams) -> Self {
        let count = reduce.chunks.len as f64;
        Self { reduce, inverse: 1.0 / count, count }
    }
}

impl Chunks {
    /// The chunks of a run that is cut into rows of 8 KiB, shared by at most 264 blocks, up to 4 MiB
    /// by at most 132; `None` where one cluster takes it ([`Chunks::few`]), and beyond 128 MiB.
    #[must_use]
    pub const fn rows(len: u64, dtype: DType) -> Option<Self> {
        let size = dtype.size() as u64;
        if len <= chunks::FEW_BYTES / size || len > MOST_BYTES / size {
            return None;
        }
        let row = ROW_BYTES as u64 / size;
        let most = if len <= HALF_BYTES / size { MOST_CHUNKS / 2 } else { MOST_CHUNKS };
        Some(Self::equal(len, row * len.div_ceil(row).div_ceil(most)))
    }
}

/// The mean of four numbers without the smallest and the largest, so that one that is far from the
/// others does not count; NaN if three are. Halved first, as a sum might be infinite.
#[cfg(any(test, kasmina_tier = "hopper"))]
#[inline(always)]
pub(super) fn middle([a, b, c, d]: [f32; 4]) -> f32 {
    let low = a.min(b).max(c.min(d));
    let high = a.max(b).min(c.max(d));
    0.5 * low + 0.5 * high
}

/// What a run is measured from: a number in the midst of its first elements, four or eight; 0 where
/// there is no finite one. Elements that do not exist are NaN.
///
/// It is a mean of k ≥ 2 of the n elements, so `Σ(x − p)² ≤ (1 + n/k)·m2`, which costs f64 nothing.
#[cfg(any(test, kasmina_tier = "hopper"))]
#[inline(always)]
pub(super) fn pivot(first: [f32; 4], second: Option<[f32; 4]>) -> f32 {
    let one = middle(first);
    let both = match second {
        Some(second) => 0.5 * one + 0.5 * middle(second),
        None => one,
    };
    if both.is_finite() {
        both
    } else if one.is_finite() {
        one
    } else {
        0.0
    }
}

/// Whether sums of `count` elements relative to a pivot, of which some were added in f32, are within
/// the bounds; if not, they have to be added in f64.
///
/// `equal` says that no two elements differ, `width` how many fill 16 bytes. With t the distance of
/// the mean from the pivot, squared, over the variance, and k = 2·`width` the additions to one f32
/// sum, what is left of m2 has a relative error of at most `(k + 3)·(1 + t)·u + 2·(k + 1)·√(t·(1 + t))·u`.
/// For t up to 24 / `width` that is below 200·u. Of independent normal numbers, whose pivot errs by
/// 0.55 or 0.39 standard deviations, one chunk in 100000 has a larger t.
#[cfg(any(test, kasmina_tier = "hopper"))]
#[must_use]
#[inline(always)]
pub(super) fn stand(distances: f64, squares: f64, equal: bool, count: u32, width: u32) -> bool {
    // In f32 and without branches, which is a fifth of the time; sums of 2¹⁰⁰ and more, whose squares
    // may not fit, do not stand.
    let (distances, squares, count) = (distances as f32, squares as f32, count as f32);
    let most = (24 / width) as f32;
    // Squares below the smallest normal number lose bits; next to 2⁻¹²⁰ for each element that is
    // less than rounding. No square at all is right for elements that equal the pivot only.
    let none = equal & (squares == 0.0) & (distances == 0.0);
    let exact = (squares >= SMALLEST_SQUARE * count) | none;
    // t = d² / (n·m2), where n·m2 = n·squares − d².
    let near = (1.0 + most) * (distances * distances) <= most * count * squares;
    exact & near & (squares < LARGEST_SQUARES)
}

/// 2⁻¹²⁰
#[cfg(any(test, kasmina_tier = "hopper"))]
const SMALLEST_SQUARE: f32 = f32::from_bits((127 - 120) << 23);
/// 2¹⁰⁰
#[cfg(any(test, kasmina_tier = "hopper"))]
const LARGEST_SQUARES: f32 = f32::from_bits((127 + 100) << 23);

#[cfg(test)]
mod tests {
    use super::*;

    const LENGTHS: [u64; 9] = [
        1 << 17,
        (1 << 18) + 1,
        (1 << 19) - 1,
        999_983,
        1_200_007,
        (1 << 22) + 1,
        16_777_259,
        1 << 25,
        1 << 26,
    ];

    #[test]
    fn rows_cover_every_element_once_in_at_most_264_chunks() {
        for dtype in DType::ALL {
            for len in LENGTHS {
                let Some(chunks) = Chunks::rows(len, dtype) else { continue };
                let mut next = 0;
                for index in 0..chunks.count {
                    let (first, len) = chunks.range(index);
                    assert_eq!(first, next);
                    assert!(len > 0 && len <= 1 << chunks::LOG2_MOST_ELEMENTS);
                    next += u64::from(len);
                }
                assert_eq!(next, len);
                assert!((66..=264).contains(&chunks.count), "{len}: {}", chunks.count);
                assert_eq!(dtype.size() as u32 * chunks.small_len % ROW_BYTES, 0);
            }
        }
    }

    #[test]
    fn rows_begin_where_a_cluster_ends_and_end_at_128_mebibytes() {
        for dtype in DType::ALL {
            let most = MOST_BYTES / dtype.size() as u64;
            for len in [1, 1 << 17, 1 << 18, (1 << 18) + 1, 1 << 19, (1 << 19) + 1, most, most + 1]
            {
                let (few, rows) = (Chunks::few(len, dtype), Chunks::rows(len, dtype));
                assert!(few.is_none() || rows.is_none(), "{len}");
                assert_eq!(few.is_none() && rows.is_none(), len > most, "{len}");
            }
        }
    }

    #[test]
    fn a_pivot_is_in_the_midst_of_the_first_elements() {
        assert_eq!(middle([1.0, 2.0, 4.0, 3.0]), 2.5);
        assert_eq!(middle([-1e30, 2.0, 3.0, 1.0]), 1.5);
        assert_eq!(middle([f32::MAX; 4]), f32::MAX);
        assert_eq!(pivot([1.0, 2.0, 3.0, 1e9], Some([4.0, 5.0, 6.0, -1e9])), 3.5);
        let none = [f32::NAN; 4];
        assert_eq!(pivot([7.0, f32::NAN, f32::NAN, f32::NAN], Some(none)), 7.0);
        assert_eq!(pivot(none, Some(none)), 0.0);
        assert_eq!(pivot([f32::INFINITY; 4], None), 0.0);
    }

    #[test]
    fn sums_stand_within_their_bounds_only() {
        // 1000 elements of variance 1 whose mean is √t from the pivot.
        let at = |t: f64, width| {
            let distances = 1000.0 * t.sqrt();
            stand(distances, 1000.0 * (1.0 + t), false, 1000, width)
        };
        assert!(at(0.0, 4) && at(5.9, 4) && !at(6.1, 4));
        assert!(at(0.0, 8) && at(2.9, 8) && !at(3.1, 8));
        assert!(
            !stand(0.0, f64::INFINITY, false, 10, 4) && !stand(f64::NAN, f64::NAN, false, 9, 4)
        );
        assert!(!stand(0.0, 0.0, false, 10, 4) && stand(0.0, 0.0, true, 10, 4));
        assert!(!stand(0.0, 1e-40, false, 10, 4) && stand(0.0, 0.0, false, 0, 4));
        assert!(!stand(1e-30, 0.0, true, 10, 4));
        assert!(stand(1e14, 1e29, false, 1 << 20, 4) && !stand(0.0, 1e31, false, 10, 4));
    }
}
