//! The filter as TMA takes it: `packed[tap, group, row, column]`, a matrix for every tap and group
//! whose columns are the channels that are summed over. Rows are a multiple of 16 bytes apart; what
//! lies beyond `columns` is never read.
//!
//! A block copies 32 × 32 elements of a tap through shared memory, so that both sides are accessed
//! in runs; the blocks of neighbouring taps, which read the same lines, are neighbours.

use crate::abi::{DType, Kernel, KernelParams, Module, module};
use crate::conv1d::{Conv1dShape, FilterLayout};
use crate::tile_scheduler::div;

#[cfg(all(target_arch = "nvptx64", kasmina_tier = "hopper"))]
mod device;

/// Rows and columns that a block copies.
pub const TILE: u32 = 32;
/// Threads: each copies four elements.
const THREADS: u32 = 256;
/// One more column, against bank conflicts.
const SMEM_BYTES: u32 = TILE * (TILE + 1) * 4;

/// Its module.
pub static MODULE: Module = module!(Hopper, "hopper", "conv1d_pack_filter", ["conv1d_pack_filter"]);
/// For both 16-bit types: bits are copied.
pub static KERNEL: Kernel<PackParams> =
    Kernel::new(&MODULE, "conv1d_pack_filter", THREADS, SMEM_BYTES).waiting_for_predecessors();

/// Which channels are the rows of the packed filter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rows {
    /// Those of the output, and columns those of the input: for the forward pass.
    Out,
    /// Those of the input, and columns those of the output: for dgrad.
    In,
}

/// What the kernel takes. Strides are in elements.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackParams {
    /// Device address of the filter.
    pub filter: u64,
    /// Device address of the packed filter.
    pub packed: u64,
    /// From group to group of the filter.
    pub group_stride: u64,
    /// From row to row.
    pub row_stride: u64,
    /// From column to column.
    pub column_stride: u64,
    /// From tap to tap.
    pub tap_stride: u64,
    /// From row to row of the packed filter.
    pub packed_stride: u64,
    /// Groups.
    pub groups: u32,
    /// Rows of a group.
    pub rows: u32,
    /// Columns of a group.
    pub columns: u32,
    /// Taps.
    pub taps: u32,
    /// 1 where neighbours in the filter are rows, 0 where they are columns.
    pub rows_are_neighbours: u32,
    /// Keeps the size a multiple of 8 without padding.
    pub reserved: u32,
}

// SAFETY: repr(C); seven u64 and six u32: no padding.
unsafe impl KernelParams for PackParams {}
const _: () = assert!(size_of::<PackParams>() == 7 * 8 + 6 * 4);

impl PackParams {
    /// What packs the filter of `shape` at `filter`, whose rows are `row_stride` elements apart.
    #[must_use]
    pub const fn new(
        shape: &Conv1dShape,
        rows: Rows,
        [filter, packed]: [u64; 2],
        layout: FilterLayout,
        row_stride: u64,
    ) -> Self {
        let [out_stride, in_stride, tap_stride] = layout.strides(shape, row_stride);
        let (group_out, group_in) = (shape.group_out(), shape.group_in());
        let (rows_count, columns, row_stride, column_stride) = match rows {
            Rows::Out => (group_out, group_in, out_stride, in_stride),
            Rows::In => (group_in, group_out, in_stride, out_stride),
        };
        Self {
            filter,
            packed,
            group_stride: out_stride * group_out as u64,
            row_stride,
            column_stride,
            tap_stride,
            packed_stride: packed_stride(columns),
            groups: shape.groups,
            rows: rows_count,
            columns,
            taps: shape.kernel_size,
            rows_are_neighbours: (row_stride < column_stride) as u32,
            reserved: 0,
        }
    }

    /// Blocks to launch; more than a grid may have where the filter is too large.
    #[must_use]
    pub const fn blocks(&self) -> u64 {
        self.groups as u64
            * self.rows.div_ceil(TILE) as u64
            * self.columns.div_ceil(TILE) as u64
            * self.taps as u64
    }

    /// Elements of the packed filter.
    #[must_use]
    pub const fn packed_elements(&self) -> u64 {
        self.packed_stride * self.rows as u64 * self.groups as u64 * self.taps as u64
    }

    /// Group, first row, first column and tap of a block.
    #[must_use]
    #[inline(always)]
    pub const fn place(&self, block: u32) -> [u32; 4] {
        let tile = div(block, self.taps);
        let tap = block.wrapping_sub(tile.wrapping_mul(self.taps));
        let (tiles_r, tiles_c) = (self.rows.div_ceil(TILE), self.columns.div_ceil(TILE));
        let row_tile = div(tile, tiles_c);
        let group = div(row_tile, tiles_r);
        let row = row_tile.wrapping_sub(group.wrapping_mul(tiles_r));
        let column = tile.wrapping_sub(row_tile.wrapping_mul(tiles_c));
        [group, row.wrapping_mul(TILE), column.wrapping_mul(TILE), tap]
    }
}

/// Elements from row to row of a packed filter: whole pieces of 16 bytes.
#[must_use]
pub const fn packed_stride(columns: u32) -> u64 {
    columns.next_multiple_of(8) as u64
}

/// Whether a filter can be used as it lies, with [`Rows::Out`].
#[must_use]
pub const fn is_packed(shape: &Conv1dShape, layout: FilterLayout, row_stride: u64) -> bool {
    matches!(layout, FilterLayout::TapOutIn)
        && row_stride.is_multiple_of(8)
        && row_stride >= shape.group_in() as u64
}

/// Element types whose bits it copies.
#[must_use]
pub const fn serves(dtype: DType) -> bool {
    dtype.size() == 2
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conv1d::{Conv1dExtents, Padding};
    use std::collections::HashSet;

    fn shape() -> Conv1dShape {
        let extents = Conv1dExtents {
            batch: 1,
            in_channels: 2 * 70,
            out_channels: 2 * 33,
            in_length: 9,
            kernel_size: 3,
            stride: 1,
            dilation: 1,
            padding: Padding::Valid,
            groups: 2,
        };
        Conv1dShape::new(&extents).expect("a shape")
    }

    #[test]
    fn blocks_cover_every_row_and_column_of_every_group_once() {
        for rows in [Rows::Out, Rows::In] {
            let params = PackParams::new(&shape(), rows, [0; 2], FilterLayout::OutInTap, 3);
            let places: HashSet<_> =
                (0..params.blocks() as u32).map(|block| params.place(block)).collect();
            assert_eq!(places.len() as u64, params.blocks());
            for [group, row, column, tap] in places {
                assert!(group < 2 && row < params.rows && column < params.columns && tap < 3);
            }
        }
    }

    #[test]
    fn the_last_element_lies_inside_the_filter_in_every_layout() {
        let shape = shape();
        for (layout, row_stride) in [(FilterLayout::OutInTap, 3), (FilterLayout::TapOutIn, 70)] {
            for rows in [Rows::Out, Rows::In] {
                let p = PackParams::new(&shape, rows, [0; 2], layout, row_stride);
                let last = u64::from(p.groups - 1) * p.group_stride
                    + u64::from(p.rows - 1) * p.row_stride
                    + u64::from(p.columns - 1) * p.column_stride
                    + u64::from(p.taps - 1) * p.tap_stride;
                assert_eq!(last + 1, shape.filter_elements());
            }
        }
    }

    #[test]
    fn only_a_matrix_per_tap_with_rows_of_whole_pieces_is_packed() {
        let shape = shape();
        assert!(is_packed(&shape, FilterLayout::TapOutIn, 72));
        assert!(!is_packed(&shape, FilterLayout::TapOutIn, 70));
        assert!(!is_packed(&shape, FilterLayout::OutInTap, 8));
    }
}
