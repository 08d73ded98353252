//! How a matrix is cut up where each of a few wide chunks of columns has statistics of its own.
//!
//! A block takes all columns of a chunk in a band of rows. Its lanes lie side by side across the
//! chunk, 16 bytes each, in as many rows at a time as there are lanes for:
//!
//! ```text
//!        part 0: `across` lanes    part 1
//!      ┌─────────────────────────┬────────
//! band │ threads 0, 1, 2, …      │           row 0, `down`, 2·`down`, …
//!  0   │ threads `across`, …     │           row 1, `down` + 1, …
//!      ├─────────────────────────┼────────
//!  1   │                         │
//! ```
//! So a warp never leaves a row, and where a thread's next vector is takes one addition. The bands
//! depend on the shape alone, and so do the bits of the result.

use core::num::NonZeroU32;

use super::moments::Rule;
use super::{THREADS, VECTORS};
use crate::abi::{DType, KernelParams};

/// Batches of a thread at most, as all of them are measured from a mean of the first.
const MOST_BATCHES: u32 = 16;
/// Batches in which a block takes a whole part rather than share it, as merging takes longer.
const ALONE_BATCHES: u32 = 2;
/// Blocks that a GPU of 132 multiprocessors takes on at once.
const WAVE: u32 = 528;

/// A matrix cut into parts, ranges of columns, and these into bands of rows.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bands {
    /// Rows of the matrix.
    pub rows: u32,
    /// Column ranges.
    pub parts: NonZeroU32,
    /// Columns of a part.
    pub width: u32,
    /// log2 of the lanes side by side in a part: one for every 16 bytes.
    pub log2_across: u32,
    /// Rows of a band, the last may have fewer.
    pub band: u32,
    /// Number of bands.
    pub bands: u32,
}

impl Bands {
    /// Of a matrix with rows; `None` unless a row of a part is 2ⁿ vectors of 16 bytes, a warp's at
    /// least and a block's at most.
    #[must_use]
    pub const fn of(rows: u32, columns: u32, parts: NonZeroU32, dtype: DType) -> Option<Self> {
        let width = columns / parts.get();
        let bytes = width as u64 * dtype.size() as u64;
        let across = bytes / 16;
        let fits = across >= 32 && across <= THREADS as u64 && across.is_power_of_two();
        if !columns.is_multiple_of(parts.get()) || !bytes.is_multiple_of(16) || !fits {
            return None;
        }
        let log2_across = across.ilog2();
        let batch = VECTORS * (THREADS >> log2_across);
        let wanted = WAVE / parts.get();
        let band = if wanted < 2 { rows } else { rows.div_ceil(wanted) }.next_multiple_of(batch);
        let band = if band < MOST_BATCHES * batch { band } else { MOST_BATCHES * batch };
        let alone = ALONE_BATCHES * batch;
        let band = if rows <= alone { alone } else { band };
        Some(Self { rows, parts, width, log2_across, band, bands: rows.div_ceil(band) })
    }

    /// Blocks to launch.
    #[must_use]
    pub const fn grid(&self) -> u64 {
        self.parts.get() as u64 * self.bands as u64
    }

    /// Number of slots: one for each block, if a part has several.
    #[must_use]
    pub const fn slots(&self) -> u64 {
        if self.bands > 1 { self.grid() } else { 0 }
    }

    /// Rows of band `index`.
    #[must_use]
    #[inline(always)]
    pub const fn rows_of(&self, index: u32) -> u32 {
        let left = self.rows - index * self.band;
        if left < self.band { left } else { self.band }
    }

    /// How many of `rows` rows of a band a warp has.
    #[must_use]
    #[inline(always)]
    pub const fn rows_of_warp(&self, rows: u32, warp: u32) -> u32 {
        let log2_down = THREADS.ilog2() - self.log2_across;
        let y = warp * 32 >> self.log2_across;
        (rows.saturating_sub(y) + (1 << log2_down) - 1) >> log2_down
    }
}

/// What the kernel for bands takes.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct BandParams {
    /// Device address of the first element.
    pub data: u64,
    /// Bytes from row to row.
    pub row_stride: u64,
    /// How the matrix is cut up; at least one row.
    pub bands: Bands,
    /// Device address of a [`Partial`](super::Partial) for each band of each part, part by part,
    /// 16-aligned; unused if there is one band.
    pub partials: u64,
    /// Device address of a u32 for each part, 0 before and after; unused if there is one band.
    pub arrived: u64,
    /// Device address of a [`Moments`](super::Moments) for each part, which are written.
    pub results: u64,
    /// Elements of smaller absolute value count as dead.
    pub epsilon: f32,
    /// 1 to count NaN and leave them out of everything else, or 0.
    pub skip_nan: u32,
}

// SAFETY: repr(C); two u64, 24 bytes of u32, three u64 and two 32-bit fields: no padding.
unsafe impl KernelParams for BandParams {}
const _: () = assert!(size_of::<BandParams>() == 72);

impl BandParams {
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
    use crate::reduce::WARPS;

    fn of(rows: u32, columns: u32, parts: u32, dtype: DType) -> Option<Bands> {
        Bands::of(rows, columns, NonZeroU32::new(parts).expect("some"), dtype)
    }

    #[test]
    fn bands_cover_every_row_and_are_never_longer_than_a_thread_may_add() {
        for dtype in DType::ALL {
            for rows in [1, 7, 8, 9, 255, 512, 513, 8192, 100_003, i32::MAX as u32] {
                for (vectors, parts) in [(32, 1), (32, 1000), (64, 16), (128, 3), (256, 7)] {
                    let columns = vectors * parts * 16 / dtype.size() as u32;
                    let cut = of(rows, columns, parts, dtype).expect("2ⁿ vectors");
                    let all: u64 = (0..cut.bands).map(|index| u64::from(cut.rows_of(index))).sum();
                    assert_eq!(all, u64::from(rows), "{cut:?}");
                    assert!((0..cut.bands.min(9)).all(|index| cut.rows_of(index) > 0));
                    assert!(cut.rows_of_warp(cut.rows_of(0), 0) <= VECTORS * MOST_BATCHES);
                }
            }
        }
    }

    #[test]
    fn parts_that_lanes_do_not_fill_are_left_to_others() {
        // 31, 48 and 512 vectors, half a vector more than 32, and parts of different width.
        for (columns, parts) in [(124, 1), (192, 1), (2048, 1), (130, 1), (257, 2)] {
            assert_eq!(of(100, columns, parts, DType::F32), None, "{columns}");
        }
        assert!(of(100, 128, 1, DType::F32).is_some());
        assert_eq!(of(100, 128, 1, DType::BF16), None);
    }

    #[test]
    fn an_activation_of_8192_by_8192_in_16_chunks_takes_whole_waves() {
        let cut = of(8192, 8192, 16, DType::BF16).expect("64 vectors");
        assert_eq!((cut.band, cut.bands, cut.grid(), cut.slots()), (256, 32, 512, 512));
        let cut = of(8192, 8192, 16, DType::F32).expect("128 vectors");
        assert_eq!((cut.band, cut.bands, cut.grid(), cut.slots()), (128, 64, 1024, 1024));
    }

    #[test]
    fn short_parts_have_one_block_and_no_slots() {
        for rows in [1, 8, 16] {
            let cut = of(rows, 8192, 16, DType::F32).expect("128 vectors");
            assert_eq!((cut.bands, cut.grid(), cut.slots()), (1, 16, 0));
        }
        assert_eq!(of(17, 8192, 16, DType::F32).expect("128 vectors").bands, 3);
    }

    #[test]
    fn the_warps_share_the_rows_of_a_band() {
        for vectors in [32, 64, 128, 256] {
            let cut = of(100, vectors * 4, 1, DType::F32).expect("2ⁿ vectors");
            for rows in [1, 2, 7, 8, 9, 63, 64] {
                let lanes: u32 = (0..WARPS).map(|warp| 32 * cut.rows_of_warp(rows, warp)).sum();
                assert_eq!(lanes, rows * vectors);
            }
        }
    }
}
