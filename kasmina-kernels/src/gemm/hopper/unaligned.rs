//! Matrices that TMA cannot address: rows that are not a multiple of 16 bytes apart, or that start
//! elsewhere than at such a multiple.
//!
//! An operand is *packed*: copied to rows that TMA reads, at the speed of a copy. So every tile
//! serves it, and the product reads whole lines. At 4096³ that adds a tenth for each packed operand;
//! a producer that loads by pointers adds more (`comparison`), and has no registers for the shifts.
//!
//! A result is stored from the same slabs in shared memory by ordinary stores: of each row the
//! pieces of 16 bytes that are whole, and the at most eight elements before and behind them one by
//! one. That is also how a result is stored whose rows end inside a piece, which a TMA store would
//! write beyond.
//!
//! A thread of the copy makes four pieces of 16 bytes, in rows of a tile below each other:
//!
//! ```text
//! source   ··[ piece p − 1 ][ piece p ][ piece p + 1 ]··   as the address divides it
//! row              ┆ 8·p … 8·p + 7 ┆                       two loads, shifted by the row's start
//! packed           [    piece p    ]
//! ```
//!
//! # Shape contract
//! Elements of 16 bits, and addresses that are a multiple of theirs; the tiles fit 31 bits.

use crate::abi::{DType, Kernel, KernelParams, Module, module};
use crate::tile_scheduler::TileScheduler;

#[cfg(all(target_arch = "nvptx64", kasmina_tier = "hopper"))]
pub(crate) mod device;

/// Elements of a piece of 16 bytes.
const PIECE: u32 = 8;
const THREADS: u32 = 256;
/// Pieces that a thread copies: their loads are under way together.
const PIECES_PER_THREAD: u32 = 4;
/// Pieces in a row of a tile, at most.
const MAX_TILE_PIECES_LOG2: u32 = 6;
/// Elements of a line of 128 bytes.
const LINE: u64 = 64;

/// Its module.
pub static MODULE: Module = module!(Hopper, "hopper", "pack_rows", ["pack_rows"]);
/// For both 16-bit types: bits are copied.
pub static KERNEL: Kernel<PackParams> =
    Kernel::new(&MODULE, "pack_rows", THREADS, 0).waiting_for_predecessors();

/// A result that is stored without TMA.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlainRows {
    /// Device address; 0 where TMA stores the result.
    pub address: u64,
    /// From row to row, in elements.
    pub stride: u64,
    /// Rows.
    pub rows: u32,
    /// Columns.
    pub columns: u32,
}

impl PlainRows {
    /// No such result: TMA stores it.
    pub const NONE: Self = Self { address: 0, stride: 0, rows: 0, columns: 0 };
}

/// A matrix that is copied.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackJob {
    /// Device address of the matrix.
    pub source: u64,
    /// Device address of the packed one, a multiple of 16.
    pub target: u64,
    /// From row to row of the matrix, in elements.
    pub source_stride: u64,
    /// The same of the packed one: [`packed_stride`].
    pub target_stride: u64,
    /// Rows.
    pub rows: u32,
    /// Columns.
    pub columns: u32,
    /// Tiles of it.
    pub grid: TileScheduler,
    /// Pieces in a row of a tile, as a power of 2.
    pub tile_pieces_log2: u32,
}

impl PackJob {
    /// A job that does nothing.
    pub const NONE: Self = Self::new([0, 0], 0, [0, 0]);

    /// What copies a matrix, `[rows, columns]`, from the first address to the second.
    #[must_use]
    pub const fn new([source, target]: [u64; 2], source_stride: u64, extents: [u32; 2]) -> Self {
        let [rows, columns] = extents;
        let pieces = columns.div_ceil(PIECE);
        let mut tile_pieces_log2 = 0;
        while tile_pieces_log2 < MAX_TILE_PIECES_LOG2 && 1 << tile_pieces_log2 < pieces {
            tile_pieces_log2 += 1;
        }
        let grid = TileScheduler {
            tiles_m: rows.div_ceil(tile_rows(tile_pieces_log2)),
            tiles_n: pieces.div_ceil(1 << tile_pieces_log2),
            group_m: 1,
        };
        let target_stride = packed_stride(columns);
        Self { source, target, source_stride, target_stride, rows, columns, grid, tile_pieces_log2 }
    }

    /// First row and piece of thread `thread` in tile `tile`, and from one of its rows to the next.
    #[must_use]
    #[inline(always)]
    pub const fn place(&self, tile: u32, thread: u32) -> [u32; 3] {
        let (tile_m, tile_n) = self.grid.tile(tile);
        let row = tile_m * tile_rows(self.tile_pieces_log2) + (thread >> self.tile_pieces_log2);
        let within = thread & ((1 << self.tile_pieces_log2) - 1);
        [row, (tile_n << self.tile_pieces_log2) + within, THREADS >> self.tile_pieces_log2]
    }
}

/// Rows of a tile.
const fn tile_rows(tile_pieces_log2: u32) -> u32 {
    (PIECES_PER_THREAD * THREADS) >> tile_pieces_log2
}

/// Elements from row to row of a packed matrix: whole pieces, and of long rows whole lines, so that
/// no box straddles them.
#[must_use]
pub const fn packed_stride(columns: u32) -> u64 {
    let columns = columns as u64;
    columns.next_multiple_of(if columns < 8 * LINE { PIECE as u64 } else { LINE })
}

/// What the kernel takes: two jobs, the second in the blocks after the first's.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackParams {
    /// The jobs.
    pub jobs: [PackJob; 2],
}

// SAFETY: repr(C); four u64 and six 32-bit fields a job: no padding.
unsafe impl KernelParams for PackParams {}
const _: () = assert!(size_of::<PackParams>() == 2 * (4 * 8 + 6 * 4));

impl PackParams {
    /// Blocks to launch.
    #[must_use]
    pub const fn blocks(&self) -> u32 {
        self.jobs[0].grid.num_tiles() + self.jobs[1].grid.num_tiles()
    }
}

/// Element types whose bits it copies.
#[must_use]
pub const fn serves(dtype: DType) -> bool {
    dtype.size() == 2
}

/// Whether TMA reads rows that start at `address` and are so many bytes apart.
#[must_use]
pub const fn is_aligned(address: u64, row_stride_bytes: u64) -> bool {
    address.is_multiple_of(16) && row_stride_bytes.is_multiple_of(16) && row_stride_bytes < 1 << 40
}

/// Eight elements of 16 bits out of two pieces that follow each other, from element `by`, 0 to 7,
/// of the first on.
#[must_use]
#[inline(always)]
pub const fn shifted(first: [u32; 4], second: [u32; 4], by: u32) -> [u32; 4] {
    let [a, b, c, d] = first;
    let [e, f, g, h] = second;
    let [a, b, c, d, e, f] = if by & 4 != 0 { [c, d, e, f, g, h] } else { [a, b, c, d, e, f] };
    let [a, b, c, d, e] = if by & 2 != 0 { [b, c, d, e, f] } else { [a, b, c, d, e] };
    if by & 1 != 0 {
        [a >> 16 | b << 16, b >> 16 | c << 16, c >> 16 | d << 16, d >> 16 | e << 16]
    } else {
        [a, b, c, d]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn shifting_takes_eight_elements_from_any_start() {
        let elements: std::vec::Vec<u32> = (0..16).map(|i| 0x1000 + 0x111 * i).collect();
        let pair = |i: usize| elements[i] | elements[i + 1] << 16;
        let (first, second) = ([0, 2, 4, 6].map(pair), [8, 10, 12, 14].map(pair));
        for by in 0..8 {
            let expected = [0, 2, 4, 6].map(|i| pair(i + by));
            assert_eq!(shifted(first, second, by as u32), expected);
        }
    }

    #[test]
    fn tiles_cover_every_piece_of_every_row_once() {
        for extents @ [rows, columns] in
            [[1, 1], [5, 7], [3, 8], [1025, 9], [65, 4095], [17, 4097], [300, 511], [16, 65]]
        {
            let job = PackJob::new([0, 0], u64::from(columns), extents);
            let mut seen = HashSet::new();
            for tile in 0..job.grid.num_tiles() {
                for thread in 0..THREADS {
                    let [first, piece, step] = job.place(tile, thread);
                    for i in 0..PIECES_PER_THREAD {
                        let row = first + i * step;
                        if row < rows && piece * PIECE < columns {
                            assert!(seen.insert((row, piece)), "{extents:?}: {row} {piece}");
                        }
                    }
                }
            }
            assert_eq!(seen.len() as u32, rows * columns.div_ceil(PIECE), "{extents:?}");
        }
        assert_eq!(PackJob::NONE.grid.num_tiles(), 0);
    }

    #[test]
    fn packed_rows_are_what_tma_reads_and_long_ones_are_whole_lines() {
        for columns in [1, 8, 9, 511, 512, 4095, 4097] {
            let stride = packed_stride(columns);
            assert!(stride >= u64::from(columns) && is_aligned(4096, 2 * stride));
            assert!(columns < 512 || stride.is_multiple_of(64));
        }
        assert!(!is_aligned(8, 64) && !is_aligned(16, 24) && !is_aligned(16, 1 << 40));
    }
}
