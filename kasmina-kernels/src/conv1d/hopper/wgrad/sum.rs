//! The second kernel of wgrad: adds the parts' sums in their order, converts, and writes the
//! gradients of filter and bias in the filter's own layout.
//!
//! Threads follow the elements of the filter as they lie in memory, then those of the bias. Where
//! many parts meet a tile, several threads share an element: each adds every `lanes`th part, and
//! the first adds their sums in order.

use super::{BIAS_SLOT, Split, TilePlace, Walk};
use crate::abi::{DType, Kernel, KernelParams, Module, module};
use crate::conv1d::{Conv1dShape, FilterLayout, rem};
use crate::gemm::hopper::Tile;
use crate::tile_scheduler::div;

#[cfg(all(target_arch = "nvptx64", kasmina_tier = "hopper"))]
mod device;

/// Threads of a block.
pub const THREADS: u32 = 256;
/// The most threads that share an element: neighbours in a warp have neighbouring elements.
const MAX_LANES: u32 = 8;
const SMEM_BYTES: u32 = THREADS * 4;

/// Its module.
pub static MODULE: Module = module!(
    Hopper,
    "hopper",
    "conv1d_wgrad_sum",
    ["conv1d_wgrad_sum_bf16", "conv1d_wgrad_sum_f16", "conv1d_wgrad_sum_f32"]
);
static BF16: Kernel<SumParams> =
    Kernel::new(&MODULE, "conv1d_wgrad_sum_bf16", THREADS, SMEM_BYTES).waiting_for_predecessors();
static F16: Kernel<SumParams> =
    Kernel::new(&MODULE, "conv1d_wgrad_sum_f16", THREADS, SMEM_BYTES).waiting_for_predecessors();

/// The kernel that writes f32, unless what the sums are of has to be computed without parts.
pub static F32: Kernel<PartsSumParams> =
    Kernel::new(&MODULE, "conv1d_wgrad_sum_f32", THREADS, SMEM_BYTES).waiting_for_predecessors();

/// The kernel that writes this type; `None` for one that is not 16 bits wide.
#[must_use]
pub const fn kernel(dtype: DType) -> Option<&'static Kernel<SumParams>> {
    match dtype {
        DType::BF16 => Some(&BF16),
        DType::F16 => Some(&F16),
        DType::F32 => None,
    }
}

/// What the kernel takes. Strides are in elements.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SumParams {
    /// [`super::WgradParams::partials`].
    pub partials: u64,
    /// [`super::WgradParams::bias_partials`].
    pub bias_partials: u64,
    /// Device address of the filter's gradient; 0 for none.
    pub dw: u64,
    /// Device address of the bias's gradient; 0 for none.
    pub db: u64,
    /// From row to row of the filter's gradient, of taps or of input channels.
    pub row_stride: u64,
    /// Who summed what.
    pub split: Split,
    /// Where tiles lie.
    pub walk: Walk,
    /// Rows of a tile.
    pub block_m: u32,
    /// Columns of a tile.
    pub block_n: u32,
    /// Output channels.
    pub out_channels: u32,
    /// Output channels of a group.
    pub group_out: u32,
    /// Input channels of a group.
    pub group_in: u32,
    /// 1 where taps are neighbours in memory, 0 where input channels are.
    pub taps_are_neighbours: u32,
    /// Threads that share an element, a power of two.
    pub lanes: u32,
    /// 1 to add to what is there.
    pub accumulate: u32,
}

// SAFETY: repr(C); five u64 and twenty-four 32-bit fields: no padding.
unsafe impl KernelParams for SumParams {}
const _: () = assert!(size_of::<SumParams>() == 5 * 8 + 24 * 4);

/// What the kernel for f32 takes.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct PartsSumParams {
    /// The sums.
    pub sum: SumParams,
    /// Device address of the findings of the splits' blocks, one word each.
    pub findings: u64,
    /// How many there are.
    pub num_findings: u32,
    /// Keeps the size a multiple of 8 without padding.
    pub reserved: u32,
}

// SAFETY: repr(C); a struct without padding whose size is a multiple of 8, a u64 and two u32.
unsafe impl KernelParams for PartsSumParams {}
const _: () = assert!(size_of::<PartsSumParams>() == size_of::<SumParams>() + 16);

/// Which sum a thread forms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Element {
    /// The tile that holds it.
    pub tile: u32,
    /// Its index in a slot.
    pub index: u32,
    /// Its offset in the gradient, in elements.
    pub offset: u64,
}

impl SumParams {
    /// What adds up the sums of `shape`; addresses and the filter's rows are filled in by the
    /// caller.
    #[must_use]
    pub const fn new(
        shape: &Conv1dShape,
        layout: FilterLayout,
        tile: Tile,
        split: Split,
        walk: Walk,
    ) -> Self {
        Self {
            partials: 0,
            bias_partials: 0,
            dw: 0,
            db: 0,
            row_stride: 0,
            split,
            walk,
            block_m: tile.block_m,
            block_n: tile.block_n,
            out_channels: shape.out_channels,
            group_out: shape.group_out(),
            group_in: shape.group_in(),
            taps_are_neighbours: matches!(layout, FilterLayout::OutInTap) as u32,
            lanes: lanes(&split, shape.filter_elements()),
            accumulate: 0,
        }
    }

    /// Elements of the filter; the caller has checked that they fit.
    #[must_use]
    #[inline(always)]
    pub const fn filter_elements(&self) -> u32 {
        self.out_channels.wrapping_mul(self.group_in).wrapping_mul(self.walk.taps)
    }

    /// Blocks to launch.
    #[must_use]
    pub const fn blocks(&self) -> u32 {
        (self.filter_elements() + self.out_channels).div_ceil(THREADS / self.lanes)
    }

    /// The element of the filter with this number.
    #[must_use]
    #[inline(always)]
    pub const fn element(&self, number: u32) -> Element {
        let (channel, in_channel, tap, row, column);
        if self.taps_are_neighbours != 0 {
            row = div(number, self.walk.taps);
            tap = rem(number, self.walk.taps);
            column = tap;
            channel = div(row, self.group_in);
            in_channel = rem(row, self.group_in);
        } else {
            row = div(number, self.group_in);
            in_channel = rem(number, self.group_in);
            column = in_channel;
            tap = div(row, self.out_channels);
            channel = rem(row, self.out_channels);
        }
        let (place_column, tile_column) = self.walk.column(in_channel, tap, self.block_n);
        let (mut place, tile_row) = self.row(channel);
        place.column = place_column;
        Element {
            tile: self.walk.tile(place),
            index: tile_row.wrapping_mul(self.block_n).wrapping_add(tile_column),
            offset: (row as u64).wrapping_mul(self.row_stride).wrapping_add(column as u64),
        }
    }

    /// The first tile of the row that holds an output channel, and the row in it.
    #[must_use]
    #[inline(always)]
    pub const fn row(&self, channel: u32) -> (TilePlace, u32) {
        let group = div(channel, self.group_out);
        let within = rem(channel, self.group_out);
        let row = div(within, self.block_m);
        (TilePlace { group, row, column: 0 }, rem(within, self.block_m))
    }
}

/// Threads that share an element: so many that few parts are left to each, while there are not
/// more threads than the multiprocessors hold.
const fn lanes(split: &Split, elements: u64) -> u32 {
    let parts = split.k_blocks.div_ceil(split.per_part) + 1;
    let mut lanes = 1;
    while lanes < MAX_LANES && parts > 4 * lanes && elements * (lanes as u64) < 1 << 17 {
        lanes *= 2;
    }
    lanes
}

/// Floats that the sums of the bias take.
#[must_use]
pub const fn bias_floats(split: &Split) -> u64 {
    split.num_slots() as u64 * BIAS_SLOT as u64
}

#[cfg(test)]
mod tests {
    use super::super::KERNELS;
    use super::*;
    use crate::conv1d::{Conv1dExtents, Padding};
    use std::collections::HashSet;

    #[test]
    fn every_element_is_written_once_and_summed_from_a_place_of_its_own() {
        let extents = Conv1dExtents {
            batch: 2,
            in_channels: 2 * 70,
            out_channels: 2 * 150,
            in_length: 99,
            kernel_size: 3,
            stride: 1,
            dilation: 1,
            padding: Padding::Same,
            groups: 2,
        };
        let shape = Conv1dShape::new(&extents).expect("a shape");
        for layout in FilterLayout::ALL {
            for row in &KERNELS {
                let walk = Walk::new(&shape, row);
                let tiles = shape.groups * walk.tiles_m * walk.tiles_n;
                let split = Split::new(tiles, walk.batch * walk.sequence_blocks, 132);
                let split = split.expect("few steps");
                let columns = layout.extents(&shape)[2] as u64;
                let mut params = SumParams::new(&shape, layout, row.tile, split, walk);
                params.row_stride = columns;
                let (mut places, mut offsets) = (HashSet::new(), HashSet::new());
                for number in 0..params.filter_elements() {
                    let element = params.element(number);
                    assert!(element.tile < tiles);
                    assert!(u64::from(element.index) < row.slot_bytes() / 4);
                    assert!(element.offset < shape.filter_elements());
                    assert!(places.insert((element.tile, element.index)));
                    assert!(offsets.insert(element.offset));
                }
                assert_eq!(offsets.len() as u64, shape.filter_elements());
            }
        }
    }

    #[test]
    fn many_parts_are_shared_by_several_threads() {
        let lanes_of =
            |tiles, k_blocks| lanes(&Split::new(tiles, k_blocks, 132).expect("few"), 1 << 12);
        assert_eq!(lanes_of(1, 8192), 8);
        assert_eq!(lanes_of(96, 128), 1);
        assert_eq!(lanes(&Split::new(1, 8192, 132).expect("few"), 1 << 20), 1);
    }
}
