//! Sums on their way from the registers that tensor cores leave them in to rows.

use super::super::{STAGED_N, WARPGROUP};
use super::Block;
use crate::ptx;

/// Where a warp puts its sums so that others of its lanes find them: 16 rows, which no other warp
/// has to do with.
#[derive(Clone, Copy)]
pub(crate) struct Staging {
    pub(crate) lane: u32,
    /// First of the warp's rows in the tile.
    pub(crate) row: u32,
    staged: u32,
}

impl Staging {
    #[inline(always)]
    pub(crate) fn new(block: Block, consumer: u32) -> Self {
        let thread = ptx::thread_index() % WARPGROUP;
        let warp = consumer * 4 + thread / 32;
        Self { lane: thread % 32, row: 16 * warp, staged: block.staged(warp) }
    }

    /// Stages 16 columns: registers `8·group ..` of the tile, as
    /// `smem_layout::accumulator_position` places them.
    ///
    /// # Safety
    /// The whole warp calls it, after it has read the columns staged before.
    #[inline(always)]
    pub(crate) unsafe fn stage(self, group: u32, sums: [f32; 8]) {
        let (row, column) = (self.lane / 4, 16 * (group % 4) + 2 * (self.lane % 4));
        // SAFETY: this thread's places among the warp's rows.
        unsafe {
            let at = |row, column| self.staged + staged_offset(row, column);
            ptx::st_shared_v2_f32(at(row, column), sums[0], sums[1]);
            ptx::st_shared_v2_f32(at(row + 8, column), sums[2], sums[3]);
            ptx::st_shared_v2_f32(at(row, column + 8), sums[4], sums[5]);
            ptx::st_shared_v2_f32(at(row + 8, column + 8), sums[6], sums[7]);
        }
    }

    /// Four columns of a row, the first a multiple of 4.
    ///
    /// # Safety
    /// They are staged, and a barrier of the warp has passed since.
    #[inline(always)]
    pub(crate) unsafe fn four(self, row: u32, column: u32) -> [f32; 4] {
        // SAFETY: inside the warp's rows.
        unsafe { ptx::ld_shared_v4_f32(self.staged + staged_offset(row, column)) }
    }

    /// Rows `4·four ..` of a column. Where `four` is a lane's number modulo 4, and eight neighbouring
    /// columns go with each, lanes meet on no bank: each takes its rows in an order of its own.
    ///
    /// # Safety
    /// As [`four`](Self::four).
    #[inline(always)]
    pub(crate) unsafe fn four_rows(self, four: u32, column: u32) -> [f32; 4] {
        let value = |i: u32| {
            let row = 4 * four + (i + four) % 4;
            // SAFETY: inside the warp's rows.
            unsafe { ptx::ld_shared_f32(self.staged + staged_offset(row, column)) }
        };
        let mut rows = [value(0), value(1), value(2), value(3)];
        if four & 1 != 0 {
            rows = [rows[3], rows[0], rows[1], rows[2]];
        }
        if four & 2 != 0 {
            rows = [rows[2], rows[3], rows[0], rows[1]];
        }
        rows
    }
}

/// Offset of an element of the 16 staged rows. Groups of 8 columns change places from row to row,
/// so that the four rows that the hardware serves together meet on no bank.
#[inline(always)]
const fn staged_offset(row: u32, column: u32) -> u32 {
    (row * STAGED_N + (column ^ (row % 4 * 8))) * 4
}
