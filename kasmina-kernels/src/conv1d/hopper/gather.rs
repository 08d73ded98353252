//! Forward and dgrad on Hopper: `out = act(Σ in·w + b)` along a [`Gather`].
//!
//! The product of a tile is that of [`crate::gemm::hopper`]; k runs over blocks of 64 channels of
//! the input and, within a block, over the taps, each of which meets the input at a position of its
//! own. The output's layout decides which operand is first:
//!
//! ```text
//! output NLC   out[positions, channels] = in[positions, k] · w[channels, k]ᵀ
//! output NCL   out[channels, positions] = w[channels, k]   · in[positions, k]ᵀ
//! ```
//! A tile lies within one sequence and one group. Of a channels-first input a box for every tap would
//! start on any position, and TMA wants the contiguous coordinate in multiples of 16 bytes (on an
//! H200 anything else is an illegal instruction): its tiles are transposed on chip, once for all taps.
//!
//! Kernels that load the tile's positions of the input anew for every tap serve any walk; those of
//! [`halo`] load them once for all taps, whose reach is limited.
//!
//! # Shape contract
//! - The filter is packed ([`super::pack`]): `[tap, group, channel of out, channel of in]`.
//! - Input NLC: its positions are at most [`super::MAX_STEP`] apart; with a halo they are neighbours,
//!   and the taps reach no further than [`halo::MAX_REACH`]. Input NCL: always with a halo, and
//!   [`halo::MAX_REACH_NCL`].
//! - Output NCL: positions one apart. Output NLC: any, as a wider stride of the map.
//! - The output's contiguous axis, of one group if it is that of channels, is a multiple of 8: a
//!   store clips to whole pieces of 16 bytes. The input's is where there are several groups, whose
//!   addresses and strides TMA takes in multiples of 16 bytes, as those of all tensors.
//! - `taps` is at least 1; a walk without taps has one that meets only zeros ([`Walk::new`]).

use super::{MAX_STEP, box_positions, load_cycles};
use crate::abi::{DType, Kernel, KernelParams, TensorMap, hopper_kernel};
use crate::activation::EpilogueActivation;
use crate::conv1d::{Gather, MAX_POSITIONS, SequenceLayout};
use crate::gemm::hopper::{BLOCK_K, Tile};
use crate::tile_scheduler::{TileScheduler, div};
use halo::HaloTile;

#[cfg(all(target_arch = "nvptx64", kasmina_tier = "hopper"))]
mod device;
pub mod halo;

/// Where a tile of the output lies and what it gathers.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Walk {
    /// Position of the input that the first tap meets for position 0 of the output.
    pub in_first: i32,
    /// From position to position of the output.
    pub in_step: u32,
    /// From tap to tap.
    pub tap_step: u32,
    /// Taps, at least 1.
    pub taps: u32,
    /// The first of them in the packed filter.
    pub first_tap: u32,
    /// From one to the next in the packed filter.
    pub tap_stride: i32,
    /// Steps that cover the input channels of a group, of 64 each or, in parts, of 32.
    pub channel_blocks: u32,
    /// Tiles that cover the positions of a sequence.
    pub sequence_tiles: u32,
    /// Tiles that cover the output channels of a group.
    pub channel_tiles: u32,
    /// Positions that one box of a channels-last input holds.
    pub box_positions: u32,
}

/// The first position and channel of a tile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The sequence.
    pub sequence: u32,
    /// The position in it.
    pub position: u32,
    /// The group.
    pub group: u32,
    /// The channel in it.
    pub channel: u32,
}

impl Walk {
    /// The walk of a [`Gather`] from `in_channels` to `out_channels` per group with this kernel.
    #[must_use]
    pub const fn new(gather: &Gather, channels: [u32; 2], kernel: &GatherKernel) -> Self {
        Self::of_tiles(gather, channels, kernel.extents(), BLOCK_K)
    }

    /// The same with tiles of so many positions and channels, whose steps are `block_k` channels.
    #[must_use]
    pub const fn of_tiles(
        gather: &Gather,
        [in_channels, out_channels]: [u32; 2],
        [positions, out]: [u32; 2],
        block_k: u32,
    ) -> Self {
        // No position of the output reaches the input from here.
        let nowhere = -(MAX_POSITIONS as i32) - (1 << 16);
        let none = gather.taps == 0;
        Self {
            in_first: if none { nowhere } else { gather.in_first },
            in_step: if none { 1 } else { gather.in_step },
            tap_step: gather.tap_step,
            taps: if none { 1 } else { gather.taps },
            first_tap: gather.first_tap,
            tap_stride: gather.tap_stride,
            channel_blocks: in_channels.div_ceil(block_k),
            sequence_tiles: gather.out_count.div_ceil(positions),
            channel_tiles: out_channels.div_ceil(out),
            box_positions: box_positions(positions, gather.in_step),
        }
    }

    /// Where the tile with these numbers lies; tiles of positions are numbered through all
    /// sequences, tiles of channels through all groups.
    #[must_use]
    #[inline(always)]
    pub const fn place(&self, position_tile: u32, channel_tile: u32, extents: [u32; 2]) -> Place {
        let sequence = div(position_tile, self.sequence_tiles);
        let group = div(channel_tile, self.channel_tiles);
        let position = position_tile.wrapping_sub(sequence.wrapping_mul(self.sequence_tiles));
        let channel = channel_tile.wrapping_sub(group.wrapping_mul(self.channel_tiles));
        Place {
            sequence,
            position: position.wrapping_mul(extents[0]),
            group,
            channel: channel.wrapping_mul(extents[1]),
        }
    }

    /// Steps of k for a tile.
    #[must_use]
    #[inline(always)]
    pub const fn k_blocks(&self) -> u32 {
        self.taps.wrapping_mul(self.channel_blocks)
    }

    /// The tiles of the output in the order of the product's rows and columns.
    #[must_use]
    pub const fn scheduler(&self, kernel: &GatherKernel, batch: u32, groups: u32) -> TileScheduler {
        self.tiles(kernel.channels_are_rows(), batch, groups)
    }

    /// The same of a product whose rows are channels, or positions.
    #[must_use]
    pub const fn tiles(&self, channels_are_rows: bool, batch: u32, groups: u32) -> TileScheduler {
        let (positions, channels) =
            (batch.saturating_mul(self.sequence_tiles), groups.saturating_mul(self.channel_tiles));
        if channels_are_rows {
            TileScheduler { tiles_m: channels, tiles_n: positions, group_m: 16 }
        } else {
            TileScheduler { tiles_m: positions, tiles_n: channels, group_m: 16 }
        }
    }
}

/// How a kernel cuts the product up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// The positions of a tile are loaded for every tap.
    PerTap {
        /// Rows are positions if the output is channels-last, else channels.
        tile: Tile,
        /// Blocks that share a multiprocessor.
        blocks_per_multiprocessor: u32,
    },
    /// They are loaded once for all taps.
    Haloed(HaloTile),
}

/// A kernel and what it serves.
pub struct GatherKernel {
    /// Element type of all operands.
    pub dtype: DType,
    /// Layout of the input.
    pub input: SequenceLayout,
    /// Layout of the output.
    pub output: SequenceLayout,
    /// How it cuts the product up.
    pub cut: Cut,
    /// What to launch.
    pub kernel: Kernel<GatherParams>,
}

impl GatherKernel {
    /// Whether the product's rows are channels and its columns positions.
    #[must_use]
    pub const fn channels_are_rows(&self) -> bool {
        matches!((self.cut, self.output), (Cut::Haloed(_), _) | (_, SequenceLayout::Ncl))
    }

    /// Positions and channels of a tile.
    #[must_use]
    pub const fn extents(&self) -> [u32; 2] {
        match self.cut {
            Cut::PerTap { tile, .. } if self.channels_are_rows() => [tile.block_n, tile.block_m],
            Cut::PerTap { tile, .. } => [tile.block_m, tile.block_n],
            Cut::Haloed(tile) => [halo::POSITIONS, tile.channels],
        }
    }

    /// Blocks that share a multiprocessor.
    #[must_use]
    pub const fn blocks_per_multiprocessor(&self) -> u32 {
        match self.cut {
            Cut::PerTap { blocks_per_multiprocessor, .. } => blocks_per_multiprocessor,
            Cut::Haloed(_) => 1,
        }
    }

    /// The boxes of input and filter, innermost axis first, with steps over positions counted.
    #[must_use]
    pub const fn boxes(&self, in_step: u32) -> [[u32; 2]; 2] {
        let [positions, channels] = self.extents();
        let input = match self.cut {
            Cut::PerTap { .. } => box_positions(positions, in_step) * in_step,
            Cut::Haloed(tile) if tile.transposes => halo::SLAB_POSITIONS,
            Cut::Haloed(_) => halo::BOX_ROWS,
        };
        [[BLOCK_K, input], [BLOCK_K, channels]]
    }

    /// Whether it serves a problem of its type and layouts.
    #[must_use]
    pub const fn serves(&self, problem: &Problem) -> bool {
        match self.cut {
            Cut::PerTap { .. } => problem.in_step <= MAX_STEP,
            Cut::Haloed(tile) => {
                let most = if tile.transposes { halo::MAX_REACH_NCL } else { halo::MAX_REACH };
                problem.in_step == 1 && problem.reach <= most as u64
            }
        }
    }

    /// Estimated cycles of the busiest multiprocessor.
    ///
    /// A step multiplies at 2048 products a cycle and loads as [`load_cycles`] says, or transposes
    /// as [`halo::TRANSPOSE_CYCLES`] says; the largest counts. A tile pays for its epilogue by its
    /// elements, unless another tile is multiplied meanwhile: where two blocks share a
    /// multiprocessor, or two consumers take turns.
    const fn cost(&self, problem: &Problem, multiprocessors: u32) -> u64 {
        let [positions, channels] = self.extents();
        let tiles = problem.batch as u64
            * problem.positions.div_ceil(positions) as u64
            * problem.groups as u64
            * problem.out_channels.div_ceil(channels) as u64;
        let waves = tiles.div_ceil(multiprocessors as u64);
        let channel_blocks = problem.in_channels.div_ceil(BLOCK_K) as u64;
        let taps = problem.taps as u64;
        let multiply = taps * (positions * channels / 32) as u64;
        let (load, overlaps) = match self.cut {
            Cut::PerTap { blocks_per_multiprocessor, .. } => {
                (taps * load_cycles(positions + channels) as u64, blocks_per_multiprocessor > 1)
            }
            Cut::Haloed(tile) => {
                let transpose = if tile.transposes { halo::TRANSPOSE_CYCLES as u64 } else { 0 };
                let load = load_cycles(halo::ROWS) as u64 + taps * load_cycles(channels) as u64;
                let load = if transpose > load { transpose } else { load };
                (load, tile.readers() == 1)
            }
        };
        let block = if multiply > load { multiply } else { load };
        let epilogue = if overlaps { 0 } else { (positions * channels / 16) as u64 };
        waves * (channel_blocks * block + epilogue)
    }
}

/// What matters about a pass to the choice of its kernel.
#[derive(Clone, Copy, Debug)]
pub struct Problem {
    /// Sequences.
    pub batch: u32,
    /// Positions of the output that are computed.
    pub positions: u32,
    /// Groups.
    pub groups: u32,
    /// Input channels of a group.
    pub in_channels: u32,
    /// Output channels of a group.
    pub out_channels: u32,
    /// Taps, at least 1.
    pub taps: u32,
    /// Positions from the one that the first tap meets to that of the last, at most.
    pub reach: u64,
    /// From position to position of the output.
    pub in_step: u32,
}

impl Problem {
    /// What computes this gather for `batch` sequences and so many groups of channels.
    #[must_use]
    pub const fn new(gather: &Gather, [batch, groups]: [u32; 2], channels: [u32; 2]) -> Self {
        let [in_channels, out_channels] = channels;
        let taps = if gather.taps > 0 { gather.taps } else { 1 };
        Self {
            batch,
            positions: gather.out_count,
            groups,
            in_channels,
            out_channels,
            taps,
            reach: (taps as u64 - 1) * gather.tap_step as u64,
            in_step: if gather.taps > 0 { gather.in_step } else { 1 },
        }
    }
}

/// The kernel expected to be fastest for this problem on a GPU of so many multiprocessors; `None`
/// for a type or a problem that no kernel serves.
#[must_use]
pub fn select(
    dtype: DType,
    [input, output]: [SequenceLayout; 2],
    problem: &Problem,
    multiprocessors: u32,
) -> Option<&'static GatherKernel> {
    KERNELS
        .iter()
        .chain(&halo::KERNELS)
        .filter(|row| (row.dtype, row.input, row.output) == (dtype, input, output))
        .filter(|row| row.serves(problem))
        .min_by_key(|row| row.cost(problem, multiprocessors))
}

/// What a kernel takes.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct GatherParams {
    /// The input, 128-byte swizzle, box [`GatherKernel::boxes`] × 1 × 1.
    pub in_map: TensorMap,
    /// The packed filter `[channel of in, channel of out, tap, group]`, likewise.
    pub w_map: TensorMap,
    /// The output, box `[SLAB_N, CONSUMER_M, 1, 1]`, likewise.
    pub out_map: TensorMap,
    /// Device address of the bias, an element for each output channel of each group; 0 for none.
    pub bias: u64,
    /// Output channels of a group.
    pub group_out: u32,
    /// Output channels.
    pub out_channels: u32,
    /// The tiles of the output.
    pub tiles: TileScheduler,
    /// What a tile gathers.
    pub walk: Walk,
    /// Applied to every sum.
    pub activation: EpilogueActivation,
    /// Keeps the size a multiple of 8 without padding.
    pub reserved: u32,
}

// SAFETY: repr(C); 384 bytes of maps, a u64 and twenty-six 32-bit fields: no padding.
unsafe impl KernelParams for GatherParams {}
const _: () = assert!(size_of::<GatherParams>() == 3 * 128 + 8 + 26 * 4);

/// One row makes a kernel's module, its host-side description and, on the device, its entry.
macro_rules! kernels {
    ($($entry:ident: $element:ident $ptx_type:literal,
        $input:ident to $output:ident,
        $block_m:literal x $block_n:tt, $num_stages:literal stages, $blocks:literal per multiprocessor;)+) => {
        /// Every kernel without a halo, for each element type and pair of layouts from the largest
        /// tile to the smallest.
        pub static KERNELS: [GatherKernel; [$(stringify!($entry)),+].len()] = [$({
            let tile = Tile::new($block_m, $block_n, $num_stages);
            GatherKernel {
                dtype: DType::$element,
                input: SequenceLayout::$input,
                output: SequenceLayout::$output,
                cut: Cut::PerTap { tile, blocks_per_multiprocessor: $blocks },
                kernel: hopper_kernel!($entry, tile.block_dim(), tile.smem_bytes()),
            }
        }),+];
        $(
            #[cfg(all(target_arch = "nvptx64", kasmina_tier = "hopper"))]
            device::entry!(
                $entry, $element, $ptx_type, $output,
                $block_m, $block_n, $num_stages, $blocks
            );
        )+
    };
}

kernels! {
    conv1d_bf16_nlc_nlc_128x256x64: BF16 "bf16", Nlc to Nlc, 128 x 256, 3 stages, 1 per multiprocessor;
    conv1d_bf16_nlc_nlc_128x128x64: BF16 "bf16", Nlc to Nlc, 128 x 128, 6 stages, 1 per multiprocessor;
    conv1d_bf16_nlc_nlc_128x64x64: BF16 "bf16", Nlc to Nlc, 128 x 64, 3 stages, 2 per multiprocessor;
    conv1d_bf16_nlc_ncl_128x256x64: BF16 "bf16", Nlc to Ncl, 128 x 256, 3 stages, 1 per multiprocessor;
    conv1d_bf16_nlc_ncl_64x128x64: BF16 "bf16", Nlc to Ncl, 64 x 128, 3 stages, 2 per multiprocessor;
    conv1d_f16_nlc_nlc_128x256x64: F16 "f16", Nlc to Nlc, 128 x 256, 3 stages, 1 per multiprocessor;
    conv1d_f16_nlc_nlc_128x128x64: F16 "f16", Nlc to Nlc, 128 x 128, 6 stages, 1 per multiprocessor;
    conv1d_f16_nlc_nlc_128x64x64: F16 "f16", Nlc to Nlc, 128 x 64, 3 stages, 2 per multiprocessor;
    conv1d_f16_nlc_ncl_128x256x64: F16 "f16", Nlc to Ncl, 128 x 256, 3 stages, 1 per multiprocessor;
    conv1d_f16_nlc_ncl_64x128x64: F16 "f16", Nlc to Ncl, 64 x 128, 3 stages, 2 per multiprocessor;
}

#[cfg(test)]
mod tests;
