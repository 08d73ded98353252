//! The gradients of filter and bias in parts: for every tap, `dw = dz · xᵀ` over all sequences and
//! positions, with tiles, their split into parts of steps and the sums' places as in
//! [`super::super::wgrad`].
//!
//! Five kernels follow each other:
//!
//! ```text
//! split    dz ──▶ parts, then x ──▶ parts; what was noticed, one word per block
//! product  parts ──▶ sums of parts of the steps, and of dz for the bias
//! sum      sums ──▶ dw, db                                        unless a repair follows
//! repair   if parts could not express dz or x: both again, in plain f32, and their totals
//! ```
//! Parts lie channels-last, so both operands are MN-major: slabs of 64 channels, 32 positions each.
//! A position of x that lies beyond its end, or meets one of dz that does, adds zero: parts are
//! finite whatever the elements are.
//!
//! ```text
//! producer      one thread: TMA of all parts of dz and x, 32 positions a stage
//! warps 1, 2    bias: the sum of the parts is dz, which they add up; tiles of a row take turns
//! consumers     six products of parts, added up in f32 ─ sums to the workspace
//! ```
//!
//! # Shape contract
//! - Any layouts, channels, groups and taps; positions at most [`super::super::MAX_STEP`] apart.
//! - Both tensors as [`super::fits`] has it, and steps of all tiles in 31 bits.

use super::{BLOCK_K, BLOCK_N, PARTS, SplitTile, split};
use crate::abi::{Kernel, KernelParams, TensorMap, hopper_kernel};
use crate::conv1d::Conv1dShape;
use crate::conv1d::hopper::wgrad::sum;
use crate::conv1d::hopper::wgrad::{Split, Walk};
use crate::gemm::hopper::{SLAB_N, Tile};

#[cfg(all(target_arch = "nvptx64", kasmina_tier = "hopper"))]
mod device;

/// A kernel of the product.
pub struct PartsWgradKernel {
    /// How it cuts the product up: rows are output channels.
    pub tile: SplitTile,
    /// What to launch.
    pub kernel: Kernel<PartsWgradParams>,
}

/// The boxes of dz and of x whose positions are `in_step` apart, innermost axis first, steps counted.
#[must_use]
pub const fn boxes(in_step: u32) -> [[u32; 2]; 2] {
    [[SLAB_N, BLOCK_K], [SLAB_N, BLOCK_K * in_step]]
}

/// As the 16-bit kernels describe a tile of so many rows.
#[must_use]
pub const fn sums_tile(block_m: u32) -> Tile {
    Tile::new(block_m, BLOCK_N, 1)
}

impl PartsWgradKernel {
    /// Where tiles lie.
    #[must_use]
    pub const fn walk(&self, shape: &Conv1dShape) -> Walk {
        Walk::of_tiles(shape, [self.tile.block_m, BLOCK_N], BLOCK_K)
    }

    /// Bytes of a slot: the sums of a tile.
    #[must_use]
    pub const fn slot_bytes(&self) -> u64 {
        self.tile.block_m as u64 * BLOCK_N as u64 * 4
    }

    /// Estimated cycles of all steps of all tiles, by themselves.
    const fn cost(&self, shape: &Conv1dShape) -> u64 {
        let walk = self.walk(shape);
        let tiles = shape.groups as u64 * walk.tiles_m as u64 * walk.tiles_n as u64;
        let steps = tiles * walk.sequence_blocks as u64 * walk.batch as u64;
        let add = if self.tile.num_consumers() == 1 { 64 } else { 0 };
        steps * (super::PRODUCTS * self.tile.block_m * BLOCK_N / 64 + add) as u64
    }
}

/// The kernel expected to be fastest.
#[must_use]
pub fn select(shape: &Conv1dShape) -> &'static PartsWgradKernel {
    let [large, small] = &KERNELS;
    if small.cost(shape) < large.cost(shape) { small } else { large }
}

/// Whether the way through parts is expected to be faster than the portable tier's for this
/// convolution, whose tensors have so many elements in a part.
#[must_use]
pub fn pays(
    shape: &Conv1dShape,
    elements: u64,
    portable_cycles: u64,
    multiprocessors: u32,
) -> bool {
    let bytes = elements * (4 + super::PART_BYTES);
    let cost = select(shape).cost(shape) / u64::from(multiprocessors);
    cost + bytes / 2400 + 25_000 < portable_cycles
}

/// What a kernel of the product takes.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct PartsWgradParams {
    /// The parts of dz, bf16, 128-byte swizzle: `[channel, position, part · sequence, group]`, box
    /// [`boxes`] × 1 × 1.
    pub dz_map: TensorMap,
    /// The parts of x, likewise.
    pub x_map: TensorMap,
    /// Device address of the sums, `[slot, block_m, BLOCK_N]` in f32.
    pub partials: u64,
    /// Device address of the bias's sums, `[slot, BIAS_SLOT]` in f32; 0 where they are not wanted.
    pub bias_partials: u64,
    /// Who does what.
    pub split: Split,
    /// Where tiles lie.
    pub walk: Walk,
}

// SAFETY: repr(C); 256 bytes of maps, two u64 and sixteen 32-bit fields: no padding.
unsafe impl KernelParams for PartsWgradParams {}
const _: () = assert!(size_of::<PartsWgradParams>() == 2 * 128 + 2 * 8 + 16 * 4);

/// One row makes a kernel's module, its host-side description and, on the device, its entry.
macro_rules! kernels {
    ($($entry:ident: $block_m:literal x 128, $num_stages:literal stages;)+) => {
        /// The kernels, from the larger tile to the smaller.
        pub static KERNELS: [PartsWgradKernel; [$(stringify!($entry)),+].len()] = [$({
            let tile = SplitTile {
                block_m: $block_m, num_stages: $num_stages, parts: PARTS as u32,
            };
            PartsWgradKernel {
                tile,
                kernel: hopper_kernel!($entry, tile.block_dim(), tile.smem_bytes()),
            }
        }),+];
        $(
            #[cfg(all(target_arch = "nvptx64", kasmina_tier = "hopper"))]
            device::entry!($entry, $block_m, $num_stages);
        )+
    };
}

kernels! {
    conv1d_f32_six_wgrad_128x128x32: 128 x 128, 4 stages;
    conv1d_f32_six_wgrad_64x128x32: 64 x 128, 5 stages;
}

/// Bytes that the sums take, those of the bias last, at an offset that is also given.
#[must_use]
pub const fn sums_bytes(kernel: &PartsWgradKernel, split: &Split) -> (u64, u64) {
    let sums = split.num_slots() as u64 * kernel.slot_bytes();
    (sums, sums + 4 * sum::bias_floats(split))
}

/// Where things lie, in bytes from the start of a workspace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Workspace {
    /// Findings of the split of x; those of dz stand first.
    pub x_findings: u64,
    /// Sums.
    pub sums: u64,
    /// Parts of dz; a repair's sums take their place, when they are done with.
    pub dz: u64,
    /// Parts of x.
    pub x: u64,
    /// All bytes.
    pub bytes: u64,
}

impl Workspace {
    /// For the splits of dz and x by so many blocks, `sums` bytes of sums and `repair` bytes of a
    /// repair's.
    #[must_use]
    pub fn new(
        [dz, x]: [&split::SplitParams; 2],
        [dz_blocks, x_blocks]: [u32; 2],
        sums: u64,
        repair: u64,
    ) -> Self {
        let aligned = |bytes: u64| bytes.next_multiple_of(1024);
        let x_findings = u64::from(dz_blocks) * 4;
        let sums_at = aligned(x_findings + u64::from(x_blocks) * 4);
        let dz_at = sums_at + aligned(sums);
        let x_at = dz_at + aligned(dz.input_elements() * super::PART_BYTES);
        let end = x_at + x.input_elements() * super::PART_BYTES;
        let bytes = end.max(dz_at.saturating_add(repair));
        Self { x_findings, sums: sums_at, dz: dz_at, x: x_at, bytes }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conv1d::hopper::wgrad::sum::SumParams;
    use crate::conv1d::{Conv1dExtents, FilterLayout, Padding};
    use std::collections::HashSet;

    fn shape(channels: [usize; 2], stride: usize) -> Conv1dShape {
        let extents = Conv1dExtents {
            batch: 2,
            in_channels: 2 * channels[0],
            out_channels: 2 * channels[1],
            in_length: 99,
            kernel_size: 3,
            stride,
            dilation: 1,
            padding: Padding::Same,
            groups: 2,
        };
        Conv1dShape::new(&extents).expect("a shape")
    }

    #[test]
    fn every_element_of_the_filter_is_summed_from_a_place_of_its_own() {
        for channels in [[70, 150], [1, 64], [128, 65]] {
            let shape = shape(channels, 1);
            for row in &KERNELS {
                let walk = row.walk(&shape);
                assert_eq!(walk.sequence_blocks, 4);
                let tiles = shape.groups * walk.tiles_m * walk.tiles_n;
                let split = Split::new(tiles, walk.batch * walk.sequence_blocks, 132);
                let tile = sums_tile(row.tile.block_m);
                let layout = FilterLayout::OutInTap;
                let mut params =
                    SumParams::new(&shape, layout, tile, split.expect("few steps"), walk);
                params.row_stride = 3;
                let mut places = HashSet::new();
                for number in 0..params.filter_elements() {
                    let element = params.element(number);
                    assert!(element.tile < tiles);
                    assert!(u64::from(element.index) < row.slot_bytes() / 4);
                    assert!(places.insert((element.tile, element.index)));
                }
            }
        }
    }

    #[test]
    fn a_box_of_x_holds_a_stage_s_positions_at_every_step() {
        for stride in 1..=8 {
            let walk = KERNELS[0].walk(&shape([64, 64], stride));
            assert_eq!(walk.box_positions, BLOCK_K);
            let [_, [channels, positions]] = boxes(walk.in_step);
            assert!(channels == SLAB_N && positions <= 256);
        }
    }

    #[test]
    fn rows_that_few_channels_leave_empty_are_not_chosen() {
        assert_eq!(select(&shape([64, 64], 1)).tile.block_m, 64);
        assert_eq!(select(&shape([64, 128], 1)).tile.block_m, 128);
    }

    #[test]
    fn entry_names_say_what_the_kernel_computes() {
        for row in &KERNELS {
            let expected =
                std::format!("conv1d_f32_six_wgrad_{}x{BLOCK_N}x{BLOCK_K}", row.tile.block_m);
            assert_eq!(row.kernel.entry, expected);
            assert_eq!(row.kernel.module.entries, [row.kernel.entry]);
        }
    }
}
