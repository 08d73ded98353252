//! How a matrix is cut up where each column has statistics of its own.
//!
//! A block takes 512 bytes of each row of a stripe of rows: a lane has the columns of 16 bytes, a
//! warp every eighth row.
//!
//! ```text
//!           group 0                 group 1
//!        lane 0 │ lane 1 │ …     │
//!        16 B   │ 16 B   │ 512 B │                 row 0, 8, 16, …: warp 0
//! stripe ───────┼────────┼───────┼───────          row 1, 9, 17, …: warp 1
//!   0           │        │       │                 …
//!        ───────┴────────┴───────┴───────
//! stripe 1
//! ```
//! Of a column a lane has at most 128 elements of a stripe. They are measured from the mean of the
//! first 16, so that the squares of these distances are at most 8 times those of the distances from
//! the mean of all. They are added by fours, these in runs of four, and the runs one by one, so that
//! each sum errs by at most 15·u of itself.

use super::WARPS;
use super::moments::Rule;
#[cfg(any(test, target_arch = "nvptx64"))]
use super::share;
use crate::abi::{DType, KernelParams};

/// Bytes of a row that a block takes.
const GROUP_BYTES: u32 = 32 * 16;
/// Bytes of a row from which on half of the lanes have something to do at least.
const LEAST_ROW_BYTES: u64 = GROUP_BYTES as u64 / 2;
/// Most rows of a stripe: 128 for each warp.
const MOST_ROWS: u32 = 128 * WARPS;
/// Blocks that a GPU of 132 multiprocessors takes on at once.
const WAVE: u32 = 264;

/// A matrix cut into groups of columns and stripes of rows.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Columns {
    /// Rows of the matrix.
    pub rows: u32,
    /// Its columns.
    pub columns: u32,
    /// Rows of a stripe, the last may have fewer.
    pub stripe: u32,
    /// Number of stripes.
    pub stripes: u32,
}

impl Columns {
    /// Of a matrix with elements; `None` for one whose rows are so short that most lanes would be
    /// idle.
    #[must_use]
    pub const fn of(rows: u32, columns: u32, dtype: DType) -> Option<Self> {
        if (columns as u64 * dtype.size() as u64) < LEAST_ROW_BYTES {
            return None;
        }
        let groups = columns.div_ceil(Self::group(dtype));
        // As few as keep the GPU busy, and as the length of a stripe allows.
        let wanted = WAVE / groups;
        let stripe = if wanted < 2 { rows } else { rows.div_ceil(wanted) };
        let stripe = if stripe < MOST_ROWS { stripe } else { MOST_ROWS };
        let stripe = stripe.next_multiple_of(WARPS);
        Some(Self { rows, columns, stripe, stripes: rows.div_ceil(stripe) })
    }

    /// Columns of a group.
    #[must_use]
    pub const fn group(dtype: DType) -> u32 {
        GROUP_BYTES / dtype.size() as u32
    }

    /// Number of groups.
    #[must_use]
    pub const fn groups(&self, dtype: DType) -> u32 {
        self.columns.div_ceil(Self::group(dtype))
    }

    /// Blocks to launch.
    #[must_use]
    pub const fn grid(&self, dtype: DType) -> u64 {
        self.groups(dtype) as u64 * self.stripes as u64
    }

    /// Number of slots: one for each column of each stripe, if there are several.
    #[must_use]
    pub const fn slots(&self) -> u64 {
        if self.stripes > 1 { self.columns as u64 * self.stripes as u64 } else { 0 }
    }

    /// Rows of stripe `index`.
    #[must_use]
    #[inline(always)]
    pub const fn rows_of(&self, index: u32) -> u32 {
        let left = self.rows - index * self.stripe;
        if left < self.stripe { left } else { self.stripe }
    }
}

/// How many of `rows` rows of a stripe a warp has.
#[cfg(any(test, target_arch = "nvptx64"))]
#[must_use]
#[inline(always)]
pub(super) const fn rows_of_warp(rows: u32, warp: u32) -> u32 {
    share(rows, 1, WARPS, warp)
}

/// Numbers of dead, non-finite and skipped elements, each below 1024, in one word.
#[cfg(any(test, target_arch = "nvptx64"))]
#[must_use]
#[inline(always)]
pub(super) const fn packed([dead, non_finite, skipped]: [u32; 3]) -> u32 {
    dead | non_finite << 10 | skipped << 20
}

/// The numbers that were [`packed`].
#[cfg(any(test, target_arch = "nvptx64"))]
#[must_use]
#[inline(always)]
pub(super) const fn unpacked(word: u32) -> [u32; 3] {
    [word & 1023, word >> 10 & 1023, word >> 20]
}

/// What the kernel for columns takes.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ColumnParams {
    /// Device address of the first element.
    pub data: u64,
    /// Bytes from row to row.
    pub row_stride: u64,
    /// How the matrix is cut up; at least one row.
    pub columns: Columns,
    /// Device address of a [`Partial`](super::Partial) for each column of each stripe, stripe by
    /// stripe, 16-aligned; unused if there is one stripe.
    pub partials: u64,
    /// Device address of a u32 for each group, 0 before and after; unused if there is one stripe.
    pub arrived: u64,
    /// Device address of a [`Moments`](super::Moments) for each column, which are written.
    pub results: u64,
    /// Elements of smaller absolute value count as dead.
    pub epsilon: f32,
    /// 1 to count NaN and leave them out of everything else, or 0.
    pub skip_nan: u32,
}

// SAFETY: repr(C); two u64, 16 bytes of u32, three u64 and two 32-bit fields: no padding.
unsafe impl KernelParams for ColumnParams {}
const _: () = assert!(size_of::<ColumnParams>() == 64);

impl ColumnParams {
    /// What the elements are measured by.
    #[must_use]
    #[inline(always)]
    pub const fn rule(&self) -> Rule {
        Rule { epsilon: self.epsilon, skip_nan: self.skip_nan != 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stripes_cover_every_row_and_are_never_longer_than_a_lane_may_add() {
        for dtype in DType::ALL {
            for rows in [1, 7, 8, 9, 255, 1024, 1025, 8192, 100_003, i32::MAX as u32] {
                for columns in [128, 129, 1000, 8192, 70_001] {
                    let cut = Columns::of(rows, columns, dtype).expect("wide enough");
                    let all: u64 =
                        (0..cut.stripes).map(|index| u64::from(cut.rows_of(index))).sum();
                    assert_eq!(all, u64::from(rows));
                    assert!((0..cut.stripes.min(9)).all(|index| cut.rows_of(index) > 0));
                    assert!(rows_of_warp(cut.rows_of(0), 0) <= 128, "{cut:?}");
                }
            }
        }
    }

    #[test]
    fn narrow_matrices_are_left_to_others() {
        assert_eq!(Columns::of(100, 63, DType::F32), None);
        assert!(Columns::of(100, 64, DType::F32).is_some());
        assert_eq!(Columns::of(100, 127, DType::BF16), None);
    }

    #[test]
    fn an_activation_of_8192_by_8192_takes_one_wave_of_stripes() {
        let cut = Columns::of(8192, 8192, DType::BF16).expect("wide enough");
        assert_eq!((cut.stripes, cut.grid(DType::BF16), cut.slots()), (8, 256, 8 * 8192));
    }

    #[test]
    fn packed_counts_come_out_as_they_went_in() {
        for count in [0, 1, 63, 64, 1023] {
            for counts in [[count, 0, 0], [0, count, 0], [0, 0, count], [count, 7, count]] {
                assert_eq!(unpacked(packed(counts)), counts);
            }
        }
    }

    #[test]
    fn the_warps_share_the_rows_of_a_stripe() {
        for rows in [1, 8, 9, 511, 512] {
            assert_eq!((0..WARPS).map(|warp| rows_of_warp(rows, warp)).sum::<u32>(), rows);
        }
    }
}
