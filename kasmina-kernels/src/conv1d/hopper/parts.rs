//! f32 on Hopper's tensor cores. [`wgrad`] has the gradients of filter and bias; here, forward and
//! dgrad, with the accuracy of f32: `out = act(Σ in·w +
//! b)` along a [`Gather`], both operands as sums of three bf16 parts
//! ([`crate::gemm::parts`]).
//!
//! Three kernels follow each other:
//!
//! ```text
//! split    input, filter ──▶ parts, as matrices of bf16; what was noticed, one word per block
//! product  parts ──▶ out                                          on tensor cores, below
//! repair   if parts could not express an operand: input, filter ──▶ out again, in plain f32
//! ```
//!
//! The product is that of [`crate::gemm::hopper::split`]: stages of 32 k of all parts of both
//! operands, six products of parts, every batch of 32 k added up in f32. k runs over blocks of 32
//! channels of the input and, within a block, over the taps, each of which meets the input at a
//! position of its own, as in [`super::gather`]; what TMA fills with zeros beyond the ends of a
//! sequence is the padding. Parts are channels-last whichever way round the tensor lies ([`split`]),
//! so both operands are K-major, and either may be the first:
//!
//! ```text
//! output NLC        out[positions, channels] = in[positions, k] · w[channels, k]ᵀ
//! output NCL        out[channels, positions] = w[channels, k]   · in[positions, k]ᵀ
//! NLC, few channels likewise, transposed on its way out ([`Cut::all`])
//! ```
//! Results leave by ordinary stores, as those of the linear layer do.
//!
//! # Layouts
//! ```text
//! parts of the input    [part, sequence, position, group, channel]   a group's channels padded
//! parts of the filter   [part, tap, group, channel of out, channel of in]
//! ```
//! Tensor maps have the axes of the 16-bit kernels': parts count as sequences, or as taps.
//!
//! # Shape contract
//! - Any layouts, channels, groups, taps and addresses: the split reads and the epilogue writes
//!   element by element where 16 bytes are not possible.
//! - Positions of the input are at most [`super::MAX_STEP`] apart, for TMA.
//! - Pieces of eight channels of either operand can be counted in 31 bits, and so can parts times
//!   sequences and parts times taps ([`fits`]).
//! - The number of tiles plus a grid fits 32 bits.

use super::gather::{Problem, Walk};
use crate::abi::{Kernel, KernelParams, TensorMap, hopper_kernel};
use crate::conv1d::SequenceLayout;
#[cfg(doc)]
use crate::conv1d::{Gather, portable};
use crate::gemm::hopper::split::SplitTile;
use crate::tile_scheduler::TileScheduler;
use split::SplitParams;

pub use crate::gemm::hopper::split::{BLOCK_K, BLOCK_N};
pub use crate::gemm::parts::PARTS;

#[cfg(all(target_arch = "nvptx64", kasmina_tier = "hopper"))]
mod device;
pub mod split;
pub mod wgrad;

/// Elements to which a group's channels are padded in parts: 32 bytes, a sector of the L2.
pub const CHANNEL_ALIGN: u32 = 16;

/// Channels of a group with their padding.
#[must_use]
#[inline(always)]
pub const fn padded(channels: u32) -> u32 {
    channels.div_ceil(CHANNEL_ALIGN) * CHANNEL_ALIGN
}

/// A kernel.
pub struct PartsKernel {
    /// How it cuts the product up.
    pub tile: SplitTile,
    /// What to launch.
    pub kernel: Kernel<PartsParams>,
}

/// Positions and channels of a tile of `rows` rows.
#[must_use]
#[inline(always)]
pub const fn extents(rows: u32, channels_are_rows: bool) -> [u32; 2] {
    if channels_are_rows { [BLOCK_N, rows] } else { [rows, BLOCK_N] }
}

/// A kernel, and which way round it multiplies.
#[derive(Clone, Copy)]
pub struct Cut {
    /// The kernel.
    pub kernel: &'static PartsKernel,
    /// Whether the product's rows are channels and its columns positions.
    pub channels_are_rows: bool,
}

impl Cut {
    /// Positions and channels of a tile.
    #[must_use]
    pub const fn extents(&self) -> [u32; 2] {
        extents(self.kernel.tile.block_m, self.channels_are_rows)
    }

    /// The ways there are for an output of this layout, from the largest tile to the smallest.
    /// Channels-first, positions are columns, as these are contiguous; channels-last they are where
    /// there are few channels, which are contiguous along rows then.
    #[must_use]
    pub const fn all(output: SequenceLayout) -> &'static [Self] {
        const LARGE: &PartsKernel = &KERNELS[0];
        const SMALL: &PartsKernel = &KERNELS[1];
        const fn cut(kernel: &'static PartsKernel, channels_are_rows: bool) -> Cut {
            Cut { kernel, channels_are_rows }
        }
        match output {
            SequenceLayout::Ncl => &const { [cut(LARGE, true), cut(SMALL, true)] },
            SequenceLayout::Nlc => {
                &const { [cut(LARGE, false), cut(SMALL, false), cut(SMALL, true)] }
            }
        }
    }

    /// Estimated cycles of the busiest multiprocessor, as those of
    /// [`split`](crate::gemm::hopper::split): a single consumer adds up its batches while nobody
    /// multiplies, and nothing overlaps the epilogue.
    const fn cost(&self, problem: &Problem, multiprocessors: u32) -> u64 {
        let [positions, channels] = self.extents();
        let tiles = problem.batch as u64
            * problem.positions.div_ceil(positions) as u64
            * problem.groups as u64
            * problem.out_channels.div_ceil(channels) as u64;
        let k_blocks = problem.taps as u64 * problem.in_channels.div_ceil(BLOCK_K) as u64;
        let tile = self.kernel.tile;
        let add = if tile.num_consumers() == 1 { 64 } else { 0 };
        let step = PRODUCTS * tile.block_m * BLOCK_N / 64 + add;
        tiles.div_ceil(multiprocessors as u64) * (k_blocks * step as u64 + 5000)
    }
}

/// Products of parts that are added up.
const PRODUCTS: u32 = 6;

/// The way expected to be fastest for this problem on a GPU of so many multiprocessors.
#[must_use]
pub fn select(problem: &Problem, output: SequenceLayout, multiprocessors: u32) -> &'static Cut {
    let all = Cut::all(output);
    all.iter().min_by_key(|cut| cut.cost(problem, multiprocessors)).unwrap_or(&all[0])
}

/// Whether the operands' parts can be numbered: those of an input of so many sequences and positions,
/// and of a filter of so many taps, of so many groups of channels.
#[must_use]
pub const fn fits(
    [sequences, positions]: [u32; 2],
    taps: u32,
    groups: u32,
    [in_channels, out_channels]: [u32; 2],
) -> bool {
    const LIMIT: u64 = i32::MAX as u64;
    const fn counted(factors: [u32; 4]) -> bool {
        let (mut product, mut index) = (1u64, 0);
        while index < factors.len() {
            product = product.saturating_mul(factors[index] as u64);
            index += 1;
        }
        product <= LIMIT
    }
    let pieces = in_channels.div_ceil(split::PIECE);
    counted([sequences, positions, groups, pieces])
        && counted([taps, groups, out_channels, pieces])
        && counted([PARTS as u32, sequences, 1, 1])
        && counted([PARTS as u32, taps, 1, 1])
}

/// Whether the way through parts is expected to be faster than [`portable`]'s for a pass, from its
/// walks, one for each residue of the stride.
#[must_use]
pub fn pays(
    problem: &Problem,
    residues: u32,
    output: SequenceLayout,
    split: &SplitParams,
    portable_cycles: u64,
    multiprocessors: u32,
) -> bool {
    // Each operand is read in f32 and written in parts, at 2400 bytes a cycle; the two launches
    // more take about 5 µs.
    let elements = split.input_elements() + split.filter_elements();
    let bytes = elements * (4 + PART_BYTES);
    let cost = select(problem, output, multiprocessors).cost(problem, multiprocessors);
    u64::from(residues) * cost + bytes / 2400 + 9000 < portable_cycles
}

/// Where the parts of a pass lie, in bytes from the start of its workspace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Workspace {
    /// Parts of the input.
    pub input: u64,
    /// Parts of the filter.
    pub filter: u64,
    /// All bytes; the findings of the split's blocks stand first.
    pub bytes: u64,
}

impl Workspace {
    /// For the operands of a split by so many blocks.
    #[must_use]
    pub const fn new(split: &SplitParams, blocks: u32) -> Self {
        let input = (blocks as u64 * 4).next_multiple_of(1024);
        let filter = input + (split.input_elements() * PART_BYTES).next_multiple_of(1024);
        Self { input, filter, bytes: filter + split.filter_elements() * PART_BYTES }
    }
}

/// Bytes of all parts of an element.
const PART_BYTES: u64 = 2 * PARTS as u64;

/// What the kernel of the product takes.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct PartsParams {
    /// The parts of the input, bf16, 64-byte swizzle:
    /// `[channel, position, part · sequence, group]`, box
    /// `[BLOCK_K, box_positions · in_step, 1, 1]`.
    pub in_map: TensorMap,
    /// The parts of the filter `[channel of in, channel of out, part · tap, group]`, likewise, box
    /// `[BLOCK_K, channels of a tile, 1, 1]`.
    pub w_map: TensorMap,
    /// Device address of the bias, an element for each output channel of each group; 0 for none.
    pub bias: u64,
    /// Device address of the first position that is written, of the first channel and sequence.
    pub out: u64,
    /// From sequence to sequence of the output, in elements.
    pub out_sequence: u64,
    /// From group to group.
    pub out_group: u64,
    /// From row to row of the product.
    pub out_row: u64,
    /// From column to column.
    pub out_column: u64,
    /// Rows of the product in one sequence and group.
    pub rows: u32,
    /// Columns.
    pub columns: u32,
    /// Output channels of a group.
    pub group_out: u32,
    /// Sequences.
    pub sequences: u32,
    /// Taps of the packed filter.
    pub filter_taps: u32,
    /// 1 where rows are channels and columns positions. Where rows are one apart then, they are
    /// stored by columns.
    pub channels_are_rows: u32,
    /// The tiles of the output.
    pub tiles: TileScheduler,
    /// What a tile gathers.
    pub walk: Walk,
    /// [`Activation`](crate::activation::Activation) as its discriminant.
    pub activation: u32,
}

// SAFETY: repr(C); 256 bytes of maps, six u64 and twenty 32-bit fields: no padding.
unsafe impl KernelParams for PartsParams {}
const _: () = assert!(size_of::<PartsParams>() == 2 * 128 + 6 * 8 + 20 * 4);

/// One row makes a kernel's module, its host-side description and, on the device, its entry.
macro_rules! kernels {
    ($($entry:ident: $block_m:literal x 128, $num_stages:literal stages;)+) => {
        /// The kernels, from the larger tile to the smaller.
        pub static KERNELS: [PartsKernel; [$(stringify!($entry)),+].len()] = [$({
            let tile = SplitTile {
                block_m: $block_m, num_stages: $num_stages, parts: PARTS as u32,
            };
            PartsKernel {
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
    conv1d_f32_six_128x128x32: 128 x 128, 4 stages;
    conv1d_f32_six_64x128x32: 64 x 128, 5 stages;
}

#[cfg(test)]
mod tests;
