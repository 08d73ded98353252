//! The filter as TMA takes it: `packed[tap, group, row, column]`, a matrix for every tap and group
//! whose columns are the channels that are summed over. Rows are a multiple of 16 bytes apart; what
//! lies beyond `columns` is never read.
//!
//! A block copies 64 output × 32 input channels through shared memory, all taps at once where these
//! are neighbours in the filter and few ([`MAX_TAPS`]), else one tap. Both sides are accessed in
//! pieces of 16 bytes, the filter's where they are whole and aligned.

use crate::abi::{DType, Kernel, KernelParams, Module, module};
use crate::conv1d::{Conv1dShape, FilterLayout};
use crate::tile_scheduler::div;

#[cfg(all(target_arch = "nvptx64", kasmina_tier = "hopper"))]
mod device;

/// Output channels that a block copies.
pub const TILE_OUT: u32 = 64;
/// Input channels that a block copies.
pub const TILE_IN: u32 = 32;
/// The most taps that a block copies.
pub const MAX_TAPS: u32 = 11;
/// Elements of a piece of 16 bytes.
pub const PIECE: u32 = 8;
/// Threads: each writes a piece of every tap.
const THREADS: u32 = TILE_OUT * TILE_IN / PIECE;
const SMEM_BYTES: u32 = TILE_OUT * pitch(MAX_TAPS) * 2;
const _: () = assert!(SMEM_BYTES <= 48 * 1024, "what every block may have");

/// Elements from output channel to output channel in shared memory: an odd number of words, so that
/// neighbours start on different banks.
#[must_use]
#[inline(always)]
pub const fn pitch(taps: u32) -> u32 {
    TILE_IN * taps + 2
}

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
    /// From output channel to output channel of the filter.
    pub out_stride: u64,
    /// From input channel to input channel.
    pub in_stride: u64,
    /// From tap to tap.
    pub tap_stride: u64,
    /// From row to row of the packed filter.
    pub packed_stride: u64,
    /// Groups.
    pub groups: u32,
    /// Output channels of a group.
    pub group_out: u32,
    /// Input channels of a group.
    pub group_in: u32,
    /// Taps.
    pub taps: u32,
    /// Taps that a block copies: all, which are neighbours as are the input channels, or 1.
    pub block_taps: u32,
    /// 1 where rows are the channels of the output.
    pub rows_are_out: u32,
    /// 1 where the filter is read in pieces of 16 bytes.
    pub in_pieces: u32,
    /// Keeps the size a multiple of 8 without padding.
    pub reserved: u32,
}

// SAFETY: repr(C); six u64 and eight u32: no padding.
unsafe impl KernelParams for PackParams {}
const _: () = assert!(size_of::<PackParams>() == 6 * 8 + 8 * 4);

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
        let taps = shape.kernel_size;
        let dense = tap_stride == 1 && in_stride == taps as u64 && taps <= MAX_TAPS;
        let block_taps = if dense { taps } else { 1 };
        let neighbours = in_stride == block_taps as u64;
        let run = group_in as u64 * block_taps as u64;
        let whole = (run | out_stride).is_multiple_of(PIECE as u64)
            && (dense || tap_stride.is_multiple_of(PIECE as u64));
        Self {
            filter,
            packed,
            out_stride,
            in_stride,
            tap_stride,
            packed_stride: packed_stride(match rows {
                Rows::Out => group_in,
                Rows::In => group_out,
            }),
            groups: shape.groups,
            group_out,
            group_in,
            taps,
            block_taps,
            rows_are_out: matches!(rows, Rows::Out) as u32,
            in_pieces: (neighbours && whole && filter.is_multiple_of(16)) as u32,
            reserved: 0,
        }
    }

    /// Rows of a group.
    #[must_use]
    #[inline(always)]
    pub const fn rows(&self) -> u32 {
        if self.rows_are_out != 0 { self.group_out } else { self.group_in }
    }

    /// Columns of a group.
    #[must_use]
    #[inline(always)]
    pub const fn columns(&self) -> u32 {
        if self.rows_are_out != 0 { self.group_in } else { self.group_out }
    }

    /// Blocks to launch; more than a grid may have where the filter is too large.
    #[must_use]
    pub const fn blocks(&self) -> u64 {
        self.groups as u64
            * self.group_out.div_ceil(TILE_OUT) as u64
            * self.group_in.div_ceil(TILE_IN) as u64
            * (self.taps / self.block_taps) as u64
    }

    /// Elements of the packed filter.
    #[must_use]
    pub const fn packed_elements(&self) -> u64 {
        self.packed_stride * self.rows() as u64 * self.groups as u64 * self.taps as u64
    }

    /// Group, first output channel, first input channel and first tap of a block.
    #[must_use]
    #[inline(always)]
    pub const fn place(&self, block: u32) -> [u32; 4] {
        let tap_blocks = div(self.taps, self.block_taps);
        let tile = div(block, tap_blocks);
        let tap = block.wrapping_sub(tile.wrapping_mul(tap_blocks));
        let (tiles_out, tiles_in) =
            (self.group_out.div_ceil(TILE_OUT), self.group_in.div_ceil(TILE_IN));
        let out_tile = div(tile, tiles_in);
        let group = div(out_tile, tiles_out);
        let out = out_tile.wrapping_sub(group.wrapping_mul(tiles_out));
        let input = tile.wrapping_sub(out_tile.wrapping_mul(tiles_in));
        [group, out.wrapping_mul(TILE_OUT), input.wrapping_mul(TILE_IN), tap]
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
    fn blocks_cover_all_channels_of_every_group_once() {
        for row_stride in [3, 4] {
            let params =
                PackParams::new(&shape(), Rows::In, [0; 2], FilterLayout::OutInTap, row_stride);
            let tap_blocks = if row_stride == 3 { 1 } else { 3 };
            let places: HashSet<_> =
                (0..params.blocks() as u32).map(|block| params.place(block)).collect();
            assert_eq!(places.len() as u64, params.blocks());
            // 33 output and 70 input channels of 2 groups.
            assert_eq!(params.blocks(), 2 * 3 * tap_blocks);
            for [group, out, input, tap] in places {
                assert!(group < 2 && out == 0 && input < 70 && u64::from(tap) < tap_blocks);
            }
        }
    }

    #[test]
    fn the_last_element_lies_inside_the_filter_in_every_layout() {
        let shape = shape();
        for (layout, row_stride) in [(FilterLayout::OutInTap, 3), (FilterLayout::TapOutIn, 70)] {
            for rows in [Rows::Out, Rows::In] {
                let p = PackParams::new(&shape, rows, [0; 2], layout, row_stride);
                let last = u64::from(p.groups * p.group_out - 1) * p.out_stride
                    + u64::from(p.group_in - 1) * p.in_stride
                    + u64::from(p.taps - 1) * p.tap_stride;
                assert_eq!(last + 1, shape.filter_elements());
            }
        }
    }

    #[test]
    fn only_whole_aligned_runs_are_read_in_pieces() {
        let even = Conv1dShape { in_channels: 2 * 72, ..shape() };
        let in_pieces = |shape: &Conv1dShape, address, layout, row_stride| {
            PackParams::new(shape, Rows::Out, [address, 0], layout, row_stride).in_pieces == 1
        };
        assert!(in_pieces(&even, 4096, FilterLayout::OutInTap, 3));
        assert!(!in_pieces(&even, 4098, FilterLayout::OutInTap, 3));
        assert!(!in_pieces(&even, 4096, FilterLayout::OutInTap, 4));
        assert!(in_pieces(&even, 4096, FilterLayout::TapOutIn, 72));
        assert!(!in_pieces(&shape(), 4096, FilterLayout::OutInTap, 3));
        assert!(!in_pieces(&shape(), 4096, FilterLayout::TapOutIn, 72));
    }

    #[test]
    fn rows_of_a_tile_are_an_odd_number_of_words_apart() {
        assert_eq!(pitch(1) / 2 % 2, 1);
        assert_eq!(pitch(MAX_TAPS) / 2 % 2, 1);
    }

    #[test]
    fn only_a_matrix_per_tap_with_rows_of_whole_pieces_is_packed() {
        let shape = shape();
        assert!(is_packed(&shape, FilterLayout::TapOutIn, 72));
        assert!(!is_packed(&shape, FilterLayout::TapOutIn, 70));
        assert!(!is_packed(&shape, FilterLayout::OutInTap, 8));
    }
}
