//! How a matrix is cut into segments, each with statistics of its own, and segments into strips.
//!
//! The columns are cut into `parts` ranges of equal width, the first ones one wider where it does
//! not divide. A segment is such a range, over all rows or in each row. A strip is a piece of a
//! segment, some rows by some columns, that one warp (or, of narrow rows, a team of fewer lanes)
//! summarises:
//!
//! ```text
//!          part 0          part 1              lanes of a team, `across` 4 of 8:
//!      ┌───────┬───────┬───────┬───────┐        0 1 2 3 0 1 2 3 …  row 0, 16 bytes each
//! block│piece 0│piece 1│piece 0│piece 1│        4 5 6 7 4 5 6 7 …  row 1
//!  0   ├───────┼───────┼───────┼───────┤        0 1 2 3 …          row 2
//!  1   │       │       │       │       │
//! ```
//! Strips are numbered along the columns first, so that neighbouring ones are read at about the
//! same time. Strips and lanes depend on the shape alone, and so do the bits of the result.

use core::num::NonZeroU32;

use super::chunks::{LOG2_MOST_ELEMENTS, ceil_log2};
use super::moments::Rule;
use crate::abi::{DType, KernelParams};

/// Threads per block of the segmented kernel.
pub(super) const SEGMENT_THREADS: u32 = 128;
/// Its blocks that share a multiprocessor, which leaves 96 registers a thread.
#[cfg(target_arch = "nvptx64")]
pub(super) const SEGMENT_BLOCKS_PER_MULTIPROCESSOR: u32 = 5;

/// About how many strips there are: as many as the 132 multiprocessors of an H100 or H200 have warps
/// for at once, so that the last of them do not run almost alone.
const STRIPS: u64 = 2600;
/// Bytes below which a strip is not worth a warp.
const LEAST_STRIP_BYTES: u64 = 4096;

/// Rows and columns of a matrix may have at most this many.
pub const MOST_EXTENT: u64 = i32::MAX as u64;

/// A matrix cut into segments and strips.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segments {
    /// Rows of the matrix.
    pub rows: u32,
    /// Column ranges.
    pub parts: NonZeroU32,
    /// Columns of a part, the first few of which have one more.
    pub width: u32,
    /// How many have one more.
    pub wider: u32,
    /// Columns of a piece, the last of a part may have fewer.
    pub piece: u32,
    /// Pieces of a part.
    pub pieces: NonZeroU32,
    /// Rows of a block, the last may have fewer.
    pub block: u32,
    /// Blocks of rows.
    pub blocks: u32,
    /// log2 of the lanes of a team.
    pub log2_team: u32,
    /// log2 of the lanes of a team that are side by side in a row.
    pub log2_across: u32,
    /// Whether each row has segments of its own, 1 or 0.
    pub by_rows: u32,
    /// Keeps the size a multiple of 8 without padding.
    pub reserved: u32,
}

/// A piece of a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Strip {
    /// Its segment.
    pub segment: u32,
    /// Its number within the segment.
    pub index: u32,
    /// Its first row, and how many it has.
    pub first_row: u32,
    /// How many rows it has.
    pub rows: u32,
    /// Its first column.
    pub first_column: u32,
    /// How many columns it has.
    pub columns: u32,
}

impl Segments {
    /// One segment for each of `parts` ranges of the columns, over all rows. There are at least as
    /// many columns as parts, at least one row, and no more of either than [`MOST_EXTENT`].
    #[must_use]
    pub const fn of_columns(rows: u32, columns: u32, parts: NonZeroU32, dtype: DType) -> Self {
        let width = columns / parts.get();
        let widest = columns.div_ceil(parts.get());
        let vector = 16 / dtype.size() as u32;
        let vectors = widest.div_ceil(vector);
        let log2_across = least(ceil_log2(vectors as u64), 5);
        let down = 32 >> log2_across;

        let bytes = rows as u64 * columns as u64 * dtype.size() as u64;
        let strip_bytes = at_least(bytes / STRIPS, LEAST_STRIP_BYTES);
        let most = 1 << LOG2_MOST_ELEMENTS;
        let piece = pieces_of(widest, strip_bytes, dtype);
        // Whole rounds of lanes.
        let wanted = strip_bytes / (piece as u64 * dtype.size() as u64);
        let wanted = least_u64(at_least(wanted, 1), at_least(most / piece as u64, 1));
        let block = at_least(wanted / down as u64 * down as u64, down as u64);
        // Rounding up to lanes must not go beyond what a strip may have.
        let block = if block * piece as u64 > most { wanted } else { block };
        let block = least_u64(block, rows as u64) as u32;
        Self {
            rows,
            parts,
            width,
            wider: columns % parts.get(),
            piece,
            pieces: at_least_one(widest.div_ceil(piece)),
            block,
            blocks: rows.div_ceil(block),
            log2_team: 5,
            log2_across,
            by_rows: 0,
            reserved: 0,
        }
    }

    /// One segment for each row; limits as for [`of_columns`](Self::of_columns), one column at
    /// least.
    #[must_use]
    pub const fn of_rows(rows: u32, columns: u32, dtype: DType) -> Self {
        let vector = 16 / dtype.size() as u32;
        let vectors = columns.div_ceil(vector);
        // Up to four vectors for each lane of narrow rows.
        let log2_across = least(ceil_log2(vectors.div_ceil(4) as u64), 5);
        let row_bytes = columns as u64 * dtype.size() as u64;
        // The rows alone may be enough strips.
        let strip_bytes = at_least(row_bytes * rows as u64 / STRIPS, LEAST_STRIP_BYTES);
        let piece = pieces_of(columns, strip_bytes, dtype);
        Self {
            rows,
            parts: NonZeroU32::MIN,
            width: columns,
            wider: 0,
            piece,
            pieces: at_least_one(columns.div_ceil(piece)),
            block: 1,
            blocks: rows,
            log2_team: log2_across,
            log2_across,
            by_rows: 1,
            reserved: 0,
        }
    }

    /// Number of segments.
    #[must_use]
    pub const fn count(&self) -> u64 {
        self.parts.get() as u64 * if self.by_rows == 1 { self.rows as u64 } else { 1 }
    }

    /// Number of strips of each segment.
    #[must_use]
    #[inline(always)]
    pub const fn strips_of_each(&self) -> u32 {
        if self.by_rows == 1 { self.pieces.get() } else { self.pieces.get() * self.blocks }
    }

    /// Number of strips.
    #[must_use]
    #[inline(always)]
    pub const fn strips(&self) -> u64 {
        self.parts.get() as u64 * self.pieces.get() as u64 * self.blocks as u64
    }

    /// Strip `index`, below [`strips`](Self::strips).
    #[must_use]
    #[inline(always)]
    pub fn strip(&self, index: u64) -> Strip {
        let row = NonZeroU32::from(self.pieces).get() as u64 * self.parts.get() as u64;
        // Not 0, but a division would have to check.
        let block = index.checked_div(row).unwrap_or(0) as u32;
        let in_row = (index - block as u64 * row) as u32;
        let (part, piece) = (in_row / self.pieces, in_row % self.pieces);
        let narrower = if part < self.wider { part } else { self.wider };
        let part_columns = self.width + (part < self.wider) as u32;
        let skipped = piece * self.piece;
        // The last piece of a narrower part may be empty.
        let left = part_columns.saturating_sub(skipped);
        let first_row = block * self.block;
        let (segment, within) = if self.by_rows == 1 {
            (block * self.parts.get() + part, piece)
        } else {
            (part, block * self.pieces.get() + piece)
        };
        Strip {
            segment,
            index: within,
            first_row,
            rows: least(self.block, self.rows - first_row),
            first_column: part * self.width + narrower + skipped,
            columns: least(self.piece, left),
        }
    }

    /// Elements of strip `index` of segment `segment`.
    #[must_use]
    #[inline(always)]
    pub fn elements(&self, segment: u32, index: u32) -> u32 {
        // Not by way of `strip`, which divides more than the other merging takes.
        let (block, part, piece) = if self.by_rows == 1 {
            let block = segment / self.parts;
            (block, segment - block * self.parts.get(), index)
        } else {
            let block = index / self.pieces;
            (block, segment, index - block * self.pieces.get())
        };
        let columns = self.width + (part < self.wider) as u32;
        let left = columns.saturating_sub(piece * self.piece);
        least(self.block, self.rows - block * self.block) * least(self.piece, left)
    }

    /// Blocks to launch.
    #[must_use]
    pub const fn grid(&self) -> u64 {
        let teams = SEGMENT_THREADS as u64 >> self.log2_team;
        self.strips().div_ceil(teams)
    }
}

/// Columns of a piece of `columns`, of about `bytes` bytes: whole rounds of a warp if there are
/// several pieces.
const fn pieces_of(columns: u32, bytes: u64, dtype: DType) -> u32 {
    let round = 32 * 16 / dtype.size() as u64;
    let most = 1 << LOG2_MOST_ELEMENTS;
    let wanted = least_u64(bytes / dtype.size() as u64, most);
    let wanted = at_least(wanted / round * round, round);
    if columns as u64 <= wanted { columns } else { wanted as u32 }
}

const fn least(a: u32, b: u32) -> u32 {
    if a < b { a } else { b }
}

const fn least_u64(a: u64, b: u64) -> u64 {
    if a < b { a } else { b }
}

const fn at_least(a: u64, b: u64) -> u64 {
    if a > b { a } else { b }
}

const fn at_least_one(value: u32) -> NonZeroU32 {
    match NonZeroU32::new(value) {
        Some(value) => value,
        None => NonZeroU32::MIN,
    }
}

/// What the segmented kernel takes.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct SegmentParams {
    /// Device address of the first element.
    pub data: u64,
    /// Bytes from row to row.
    pub row_stride: u64,
    /// How the matrix is cut up; at least one element in each segment.
    pub segments: Segments,
    /// Device address of a [`Partial`](super::Partial) for each strip, 16-aligned; unused if
    /// segments have one strip.
    pub partials: u64,
    /// Device address of a u32 for each segment, 0 before and after; unused if segments have one
    /// strip.
    pub arrived: u64,
    /// Device address of a [`Moments`](super::Moments) for each segment, which are written.
    pub results: u64,
    /// Elements of smaller absolute value count as dead.
    pub epsilon: f32,
    /// 1 to count NaN and leave them out of everything else, or 0.
    pub skip_nan: u32,
}

// SAFETY: repr(C); two u64, 48 bytes of u32, three u64 and two 32-bit fields: no padding.
unsafe impl KernelParams for SegmentParams {}
const _: () = assert!(size_of::<SegmentParams>() == 96);

impl SegmentParams {
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
    use std::vec;

    const SHAPES: [(u32, u32); 13] = [
        (1, 1),
        (1, 7),
        (7, 1),
        (3, 97),
        (97, 3),
        (33, 64),
        (64, 33),
        (20_011, 1),
        (1009, 130),
        (130, 401),
        (256, 256),
        (2, 8191),
        (1, 20_011),
    ];

    /// Every way to cut a matrix of this shape.
    fn cuts(rows: u32, columns: u32, dtype: DType) -> vec::Vec<Segments> {
        let mut cuts = vec![Segments::of_rows(rows, columns, dtype)];
        for parts in [1, 2, 3, 7, 16, columns / 2, columns - 1, columns] {
            // The check below is quadratic.
            let parts = parts.min(500);
            if let Some(parts) = NonZeroU32::new(parts).filter(|parts| parts.get() <= columns) {
                cuts.push(Segments::of_columns(rows, columns, parts, dtype));
            }
        }
        cuts
    }

    #[test]
    fn strips_cover_every_element_once_and_know_their_segment() {
        for dtype in DType::ALL {
            for (rows, columns) in SHAPES {
                for cut in cuts(rows, columns, dtype) {
                    let mut owner = vec![u32::MAX; rows as usize * columns as usize];
                    let each = cut.strips_of_each();
                    let mut seen = vec![false; cut.strips() as usize];
                    for index in 0..cut.strips() {
                        let strip = cut.strip(index);
                        assert!(u64::from(strip.segment) < cut.count() && strip.index < each);
                        let slot = strip.segment * each + strip.index;
                        assert!(!std::mem::replace(&mut seen[slot as usize], true));
                        let elements = strip.rows * strip.columns;
                        assert_eq!(cut.elements(strip.segment, strip.index), elements);
                        assert!(elements <= 1 << LOG2_MOST_ELEMENTS);
                        for row in strip.first_row..strip.first_row + strip.rows {
                            let first = (row * columns + strip.first_column) as usize;
                            for element in &mut owner[first..first + strip.columns as usize] {
                                assert_eq!(std::mem::replace(element, strip.segment), u32::MAX);
                            }
                        }
                    }
                    for (element, &segment) in owner.iter().enumerate() {
                        let (row, column) = (element as u32 / columns, element as u32 % columns);
                        let part = (0..cut.parts.get())
                            .rfind(|part| part * cut.width + (*part).min(cut.wider) <= column);
                        let expected = if cut.by_rows == 1 { Some(row) } else { part };
                        assert_eq!(Some(segment), expected, "{cut:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn parts_differ_by_one_column_at_most() {
        let parts = NonZeroU32::new(7).unwrap_or(NonZeroU32::MIN);
        let cut = Segments::of_columns(1, 24, parts, DType::F32);
        let widths: vec::Vec<u32> = (0..cut.strips()).map(|i| cut.strip(i).columns).collect();
        assert_eq!(widths, [4, 4, 4, 3, 3, 3, 3]);
    }

    #[test]
    fn large_matrices_have_a_bounded_number_of_slots() {
        for (rows, columns) in [(1, 1 << 30), (1 << 30, 1), (1 << 15, 1 << 15), (1 << 20, 1000)] {
            for cut in cuts(rows, columns, DType::BF16) {
                let slots = if cut.strips_of_each() > 1 { cut.strips() } else { 0 };
                assert!(slots <= 2 * STRIPS + cut.count().max(1 << 12) * 2, "{slots}: {cut:?}");
            }
        }
    }

    #[test]
    fn pieces_of_a_part_start_at_whole_rounds_of_a_warp() {
        let cut = Segments::of_rows(3, 1 << 20, DType::BF16);
        assert!(cut.pieces.get() > 1 && cut.piece.is_multiple_of(256), "{cut:?}");
    }
}
