//! The gradients of filter and bias on Hopper.
//!
//! For every tap, `dw = dz · xᵀ` over all sequences and positions: rows are output channels,
//! columns the input channels of all taps in blocks of 64 ([`Walk`]), k the positions. wgmma takes
//! both operands K-major (NCL) or MN-major (NLC), each by itself, so no layout needs a transposed
//! copy in global memory.
//!
//! One haloed tile of x with positions as rows can serve three or four taps
//! ([`WgradKernel::tile_taps`]): their operands overlap in shared memory, each a few rows further on
//! than the last. To wgmma these are slabs of 64 columns, whose distance is the descriptor's leading
//! offset (confirmed on an H200 for distances of any number of rows). A channels-last x arrives so.
//! Of a channels-first x a box for every tap would start on any position, where TMA takes multiples
//! of 16 bytes alone: one box for all taps starts on such a multiple, and a warpgroup of its own
//! transposes it on chip ([`WgradKernel::transposes`]).
//!
//! There are few tiles and many steps of k, so the steps of all tiles in a row are cut into equal
//! parts ([`Split`]), one for a block. A block writes its sums of each tile that its part meets, in
//! f32; a second kernel adds them in the order of the parts, converts, and writes the filter in its
//! own layout. The order depends on the shape and the number of parts alone, so equal calls give
//! equal bits.
//!
//! ```text
//! producer      one thread: TMA of dz and x, as in `gemm::hopper`
//! warps 1, 2    bias: add up the rows of dz that they find in the stage; tiles of a row take turns
//! transposers   channels-first x: raw box ─ ldmatrix.trans ─ stmatrix ─ haloed tile of the stage
//! consumers     wgmma over the part's steps ─ sums to the workspace
//! ```
//!
//! # Shape contract
//! - Input NCL: stride 1, and without transposition every tap meets multiples of eight positions.
//!   Input NLC: at most [`super::MAX_STEP`]. Where a tile serves several taps, stride 1, and they
//!   reach no further than it holds ([`HALO_ROWS`]).
//! - Steps of all tiles fit 31 bits.
//! - Positions of the output beyond its end count as zeros and are multiplied by what x has there,
//!   so an infinity or NaN of x may reach further taps than it should.

use super::{BLOCK_K, SLAB_N, box_positions, load_cycles};
use crate::abi::{DType, Kernel, KernelParams, TensorMap, hopper_kernel};
use crate::conv1d::{Conv1dShape, SequenceLayout};
use crate::gemm::hopper::Tile;
use crate::pipeline::RingBarriers;
use crate::tile_scheduler::div;

#[cfg(all(target_arch = "nvptx64", kasmina_tier = "hopper"))]
pub(super) mod device;
pub mod sum;

/// How the steps of all tiles are shared out.
///
/// Either parts follow each other through all tiles in a row, so that all but the last are equal,
/// or every tile has as many parts as the others. Then blocks that run at the same time meet the
/// same positions, so that one read from memory serves all of them.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Split {
    /// Tiles.
    pub tiles: u32,
    /// Steps of a tile, at least 1.
    pub k_blocks: u32,
    /// Steps from tile to tile as parts count them: `k_blocks`, or whole parts.
    pub tile_steps: u32,
    /// Steps of a part, at least 1; the last part may have fewer.
    pub per_part: u32,
}

/// A run of steps of one tile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// The tile.
    pub tile: u32,
    /// The first step.
    pub first: u32,
    /// How many.
    pub count: u32,
    /// Where the part goes on, in steps through all tiles.
    pub next: u32,
    /// Where its sums go.
    pub slot: u32,
}

impl Split {
    /// About `parts` parts; fewer where they would have less than four steps. `None` where the
    /// steps are too many to count in 31 bits.
    ///
    /// Every tile has its own parts if that leaves at most a quarter of the blocks idle: timed on
    /// an H200, reading everything again for every tile costs more.
    #[must_use]
    pub const fn new(tiles: u32, k_blocks: u32, parts: u32) -> Option<Self> {
        let steps = tiles as u64 * k_blocks as u64;
        // Whole parts add less than one part, so less than one tile, to every tile.
        if 2 * steps > i32::MAX as u64 - parts as u64 {
            return None;
        }
        let equal = at_least_four((steps as u32).div_ceil(parts));
        let parts_of_tile = div(parts, tiles);
        if parts_of_tile > 0 {
            let per_part = at_least_four(k_blocks.div_ceil(parts_of_tile));
            if 3 * per_part as u64 <= 4 * equal as u64 {
                let tile_steps = k_blocks.next_multiple_of(per_part);
                return Some(Self { tiles, k_blocks, tile_steps, per_part });
            }
        }
        Some(Self { tiles, k_blocks, tile_steps: k_blocks, per_part: equal })
    }

    /// Steps of all tiles.
    #[inline(always)]
    const fn steps(&self) -> u32 {
        self.tiles.wrapping_mul(self.tile_steps)
    }

    /// Parts.
    #[must_use]
    #[inline(always)]
    pub const fn num_parts(&self) -> u32 {
        div(self.steps().wrapping_add(self.per_part - 1), self.per_part)
    }

    /// Places for the sums of segments: each segment begins with a part or with a tile.
    #[must_use]
    pub const fn num_slots(&self) -> u32 {
        self.num_parts() + self.tiles - 1
    }

    /// The first step of a part, counted through all tiles, and the one after its last.
    #[must_use]
    #[inline(always)]
    pub const fn range(&self, part: u32) -> (u32, u32) {
        let first = part.wrapping_mul(self.per_part);
        let (end, steps) = (first.wrapping_add(self.per_part), self.steps());
        (first, if end < steps { end } else { steps })
    }

    /// The segment of `part` that begins with `step`, of a part that ends before `end`.
    #[must_use]
    #[inline(always)]
    pub const fn segment(&self, part: u32, step: u32, end: u32) -> Segment {
        let tile = div(step, self.tile_steps);
        let first = step.wrapping_sub(tile.wrapping_mul(self.tile_steps));
        let (of_tile, of_part) = (self.tile_steps.wrapping_sub(first), end.wrapping_sub(step));
        let steps = if of_tile < of_part { of_tile } else { of_part };
        let real = self.k_blocks.wrapping_sub(first);
        Segment {
            tile,
            first,
            count: if real < steps { real } else { steps },
            next: step.wrapping_add(steps),
            slot: part.wrapping_add(tile),
        }
    }

    /// The first slot of a tile, and how many follow each other.
    #[must_use]
    #[inline(always)]
    pub const fn slots(&self, tile: u32) -> (u32, u32) {
        let first = div(tile.wrapping_mul(self.tile_steps), self.per_part);
        let after = tile.wrapping_add(1).wrapping_mul(self.tile_steps);
        let last = div(after.wrapping_sub(1), self.per_part);
        (first.wrapping_add(tile), last.wrapping_sub(first).wrapping_add(1))
    }
}

const fn at_least_four(steps: u32) -> u32 {
    if steps < 4 { 4 } else { steps }
}

/// Where tiles lie and what their steps meet.
///
/// The columns of the product are input channels in blocks of 64, those of tap 0 first.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Walk {
    /// Position of x that tap 0 meets for position 0 of dz.
    pub in_first: i32,
    /// From position to position of dz.
    pub in_step: u32,
    /// From tap to tap.
    pub tap_step: u32,
    /// Taps.
    pub taps: u32,
    /// Blocks of 64 that cover the input channels of a group.
    pub channel_blocks: u32,
    /// Steps that cover the positions of a sequence of dz.
    pub sequence_blocks: u32,
    /// Sequences.
    pub batch: u32,
    /// Positions that one box of a channels-last x holds, or a tile that is transposed.
    pub box_positions: u32,
    /// Rows of tiles in a group.
    pub tiles_m: u32,
    /// Columns of tiles in a group.
    pub tiles_n: u32,
    /// Taps of a tile that meet the same box of x; 0 where each block of columns has its own.
    pub tile_taps: u32,
    /// Tiles that cover the taps of 64 input channels, where taps share boxes.
    pub tap_tiles: u32,
}

/// Group, row and column of a tile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TilePlace {
    /// The group.
    pub group: u32,
    /// Row of tiles in the group.
    pub row: u32,
    /// Column of tiles in the group.
    pub column: u32,
}

impl Walk {
    /// The walk of a convolution with tiles of this kernel.
    #[must_use]
    pub const fn new(shape: &Conv1dShape, kernel: &WgradKernel) -> Self {
        let (tile, tile_taps) = (kernel.tile, kernel.tile_taps);
        let walk = Self::of_tiles(shape, [tile.block_m, tile.block_n], BLOCK_K);
        let tap_tiles = if tile_taps > 0 { walk.taps.div_ceil(tile_taps) } else { 0 };
        Self {
            box_positions: kernel.x_positions(shape.stride, walk.tap_step),
            tiles_n: if tile_taps > 0 { walk.channel_blocks * tap_tiles } else { walk.tiles_n },
            tile_taps,
            tap_tiles,
            ..walk
        }
    }

    /// The walk of tiles whose blocks of columns each have a box of x, for steps of `block_k`
    /// positions.
    #[must_use]
    pub const fn of_tiles(shape: &Conv1dShape, [block_m, block_n]: [u32; 2], block_k: u32) -> Self {
        let gather = shape.forward_gather();
        let channel_blocks = shape.group_in().div_ceil(SLAB_N);
        Self {
            in_first: gather.in_first,
            in_step: gather.in_step,
            tap_step: gather.tap_step,
            taps: gather.taps,
            channel_blocks,
            sequence_blocks: shape.out_length.div_ceil(block_k),
            batch: shape.batch,
            box_positions: box_positions(block_k, gather.in_step),
            tiles_m: shape.group_out().div_ceil(block_m),
            tiles_n: (channel_blocks * gather.taps).div_ceil(block_n / SLAB_N),
            tile_taps: 0,
            tap_tiles: 0,
        }
    }

    /// The number of a tile.
    #[must_use]
    #[inline(always)]
    pub const fn tile(&self, place: TilePlace) -> u32 {
        let row = place.group.wrapping_mul(self.tiles_m).wrapping_add(place.row);
        row.wrapping_mul(self.tiles_n).wrapping_add(place.column)
    }

    /// Where the tile of this number lies.
    #[must_use]
    #[inline(always)]
    pub const fn place(&self, tile: u32) -> TilePlace {
        let rows = div(tile, self.tiles_n);
        let group = div(rows, self.tiles_m);
        TilePlace {
            group,
            row: rows.wrapping_sub(group.wrapping_mul(self.tiles_m)),
            column: tile.wrapping_sub(rows.wrapping_mul(self.tiles_n)),
        }
    }

    /// Position of x that the first tap of a column of tiles meets for position 0 of dz, where taps
    /// share boxes; as the two's complement of a signed number.
    #[must_use]
    #[inline(always)]
    pub const fn first_met(&self, column: u32) -> u32 {
        let block = div(column, self.tap_tiles);
        let tap = column.wrapping_sub(block.wrapping_mul(self.tap_tiles)) * self.tile_taps;
        (self.in_first as u32).wrapping_add(tap.wrapping_mul(self.tap_step))
    }

    /// Where the sum for an input channel of a group and a tap stands: the column of tiles, and the
    /// column in the tile.
    #[must_use]
    #[inline(always)]
    pub const fn column(&self, channel: u32, tap: u32, block_n: u32) -> (u32, u32) {
        if self.tile_taps > 0 {
            let tile = div(tap, self.tile_taps);
            let within = tap.wrapping_sub(tile.wrapping_mul(self.tile_taps));
            let first = (channel / SLAB_N).wrapping_mul(self.tap_tiles);
            return (first.wrapping_add(tile), within * SLAB_N + channel % SLAB_N);
        }
        let slab = tap.wrapping_mul(self.channel_blocks).wrapping_add(channel / SLAB_N);
        let slabs = block_n / SLAB_N;
        let tile = div(slab, slabs);
        let within = slab.wrapping_sub(tile.wrapping_mul(slabs));
        (tile, within * SLAB_N + channel % SLAB_N)
    }
}

/// A kernel and what it serves.
pub struct WgradKernel {
    /// Element type of all operands.
    pub dtype: DType,
    /// Layout of dz.
    pub dz: SequenceLayout,
    /// Layout of x.
    pub x: SequenceLayout,
    /// How it cuts the product up.
    pub tile: Tile,
    /// Taps, in as many blocks of 64 columns, that meet the same box of x; 0 where each block has
    /// its own box.
    pub tile_taps: u32,
    /// What to launch.
    pub kernel: Kernel<WgradParams>,
}

/// The most positions of a tile of x that serves several taps.
pub const HALO_ROWS: u32 = 96;

/// Boxes of a channels-first x on their way to the transposers.
pub const RAW_STAGES: u32 = 3;
/// Bytes of the largest of them.
pub const RAW_BYTES: u32 = raw_positions(HALO_ROWS) * SLAB_N * 2;
/// Warps that transpose: a warpgroup.
pub const TRANSPOSERS: u32 = 4;

/// Positions of a box of 64 channels of which so many are transposed: an odd number of pieces of 16
/// bytes, so that neighbouring rows, which follow each other without a swizzle, lie on different
/// banks.
#[must_use]
#[inline(always)]
pub const fn raw_positions(rows: u32) -> u32 {
    if rows / 8 % 2 == 1 { rows } else { rows + 8 }
}

/// Where the boxes to be transposed begin in shared memory, behind what a tile with such stages has.
const fn raw_offset(stages: Tile) -> u32 {
    stages.smem_bytes().next_multiple_of(128)
}

/// Shared memory with the boxes and their barriers.
const fn smem_bytes(stages: Tile, transposes: bool) -> u32 {
    if transposes {
        raw_offset(stages) + RAW_STAGES * RAW_BYTES + RingBarriers::bytes(RAW_STAGES)
    } else {
        stages.smem_bytes()
    }
}

/// Offset in a raw box of the row that `lane` gives to the `ldmatrix.x4.trans` of a piece of 8
/// positions and 32 channels: eight positions of a channel.
#[must_use]
#[inline(always)]
pub const fn piece_in_raw(piece: u32, lane: u32, positions: u32) -> u32 {
    (32 * (piece % 2) + lane) * 2 * positions + piece / 2 * 16
}

/// A stage of the ring where taps share a box of x, as the tile that has such stages.
const fn haloed_stages(tile: Tile) -> Tile {
    Tile { block_n: HALO_ROWS, ..tile }
}

impl WgradKernel {
    /// The boxes of dz and x, innermost axis first, with steps over positions counted: `in_step`
    /// from position to position of dz, `tap_step` from tap to tap.
    #[must_use]
    pub const fn boxes(&self, [in_step, tap_step]: [u32; 2]) -> [[u32; 2]; 2] {
        let dz = match self.dz {
            SequenceLayout::Nlc => [SLAB_N, BLOCK_K],
            SequenceLayout::Ncl => [BLOCK_K, self.tile.block_m],
        };
        let x = match self.x {
            SequenceLayout::Nlc => [SLAB_N, self.x_positions(in_step, tap_step) * in_step],
            SequenceLayout::Ncl if self.transposes() => {
                [raw_positions(self.x_positions(in_step, tap_step)), SLAB_N]
            }
            SequenceLayout::Ncl => [BLOCK_K, SLAB_N],
        };
        [dz, x]
    }

    /// Whether boxes of a channels-first x are transposed, so that taps share them.
    #[must_use]
    pub const fn transposes(&self) -> bool {
        self.tile_taps > 0 && matches!(self.x, SequenceLayout::Ncl)
    }

    /// Positions before the first that a tap meets, at most, that a tile of x holds.
    const fn lead(&self) -> u32 {
        if self.transposes() { 7 } else { 0 }
    }

    /// Positions that one box of a channels-last x holds, or a tile that is transposed.
    const fn x_positions(&self, in_step: u32, tap_step: u32) -> u32 {
        if self.tile_taps > 0 {
            // Whole groups of 8 rows, the period of the swizzle.
            (BLOCK_K + self.lead() + (self.tile_taps - 1) * tap_step).next_multiple_of(8)
        } else {
            box_positions(BLOCK_K, in_step)
        }
    }

    /// Whether it serves a convolution of its type and layouts.
    #[must_use]
    pub const fn serves(&self, shape: &Conv1dShape) -> bool {
        let most = (HALO_ROWS - BLOCK_K - self.lead()) as u64;
        if self.tile_taps > 0 {
            shape.stride == 1 && (self.tile_taps as u64 - 1) * shape.dilation as u64 <= most
        } else {
            matches!(self.x, SequenceLayout::Nlc) || meets_whole_pieces(shape)
        }
    }

    /// Bytes of a slot: the sums of a tile.
    #[must_use]
    pub const fn slot_bytes(&self) -> u64 {
        self.tile.block_m as u64 * self.tile.block_n as u64 * 4
    }

    /// Estimated cycles of a step of all tiles.
    const fn cost(&self, shape: &Conv1dShape) -> u64 {
        let walk = Walk::new(shape, self);
        let multiply = self.tile.block_m * self.tile.block_n / 32;
        let x_rows = if self.transposes() {
            raw_positions(walk.box_positions)
        } else if self.tile_taps > 0 {
            walk.box_positions
        } else {
            self.tile.block_n
        };
        let load = load_cycles(self.tile.block_m + x_rows);
        let step = if multiply > load { multiply } else { load } as u64;
        walk.tiles_m as u64 * walk.tiles_n as u64 * step
    }
}

/// Whether every tap meets positions that TMA can begin a box with where positions are contiguous:
/// multiples of 16 bytes.
const fn meets_whole_pieces(shape: &Conv1dShape) -> bool {
    shape.stride == 1
        && shape.padding_left.is_multiple_of(8)
        && (shape.kernel_size == 1 || shape.dilation.is_multiple_of(8))
}

/// The kernel expected to be fastest; `None` for what no kernel serves.
#[must_use]
pub fn select(
    dtype: DType,
    [dz, x]: [SequenceLayout; 2],
    shape: &Conv1dShape,
) -> Option<&'static WgradKernel> {
    KERNELS
        .iter()
        .filter(|row| (row.dtype, row.dz, row.x) == (dtype, dz, x))
        .filter(|row| row.serves(shape))
        .min_by_key(|row| row.cost(shape))
}

/// Sums of dz that a segment leaves for the bias: two for each of up to 128 rows, of which those
/// of 128 rows use one.
pub const BIAS_SLOT: u32 = 128;

/// What a kernel takes.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct WgradParams {
    /// dz, 128-byte swizzle, box [`WgradKernel::boxes`] × 1 × 1.
    pub dz_map: TensorMap,
    /// x, likewise.
    pub x_map: TensorMap,
    /// Device address of the sums, `[slot, block_m, block_n]` in f32.
    pub partials: u64,
    /// Device address of the bias's sums, `[slot, BIAS_SLOT]` in f32; 0 where they are not wanted.
    pub bias_partials: u64,
    /// Who does what.
    pub split: Split,
    /// Where tiles lie.
    pub walk: Walk,
}

// SAFETY: repr(C); 256 bytes of maps, two u64 and sixteen 32-bit fields: no padding.
unsafe impl KernelParams for WgradParams {}
const _: () = assert!(size_of::<WgradParams>() == 2 * 128 + 2 * 8 + 16 * 4);

/// One row makes a kernel's module, its host-side description and, on the device, its entry.
macro_rules! kernels {
    ($($entry:ident: $element:ident $ptx_type:literal,
        $dz:ident $dz_major:ident x $x:ident $x_major:ident,
        $block_m:literal x $block_n:tt, $num_stages:literal stages, $tile_taps:tt taps;)+) => {
        /// Every kernel, for each element type and pair of layouts from the largest tile to the
        /// smallest, those whose taps share boxes first.
        pub static KERNELS: [WgradKernel; [$(stringify!($entry)),+].len()] = [$({
            let tile = Tile::new($block_m, $block_n, $num_stages);
            let stages = if $tile_taps > 0 { haloed_stages(tile) } else { tile };
            let transposes = $tile_taps > 0 && matches!(SequenceLayout::$x, SequenceLayout::Ncl);
            let transposers = if transposes { 32 * TRANSPOSERS } else { 0 };
            WgradKernel {
                dtype: DType::$element,
                dz: SequenceLayout::$dz,
                x: SequenceLayout::$x,
                tile,
                tile_taps: $tile_taps,
                kernel: hopper_kernel!($entry, tile.block_dim() + transposers, smem_bytes(stages, transposes)),
            }
        }),+];
        $(
            #[cfg(all(target_arch = "nvptx64", kasmina_tier = "hopper"))]
            device::entry!(
                $entry, $element, $ptx_type, $dz_major, $x $x_major, $block_m, $block_n,
                $num_stages, $tile_taps
            );
        )+
    };
}

kernels! {
    conv1d_wgrad_bf16_ncl_ncl_128x256x64: BF16 "bf16", Ncl K x Ncl K, 128 x 256, 4 stages, 0 taps;
    conv1d_wgrad_bf16_ncl_ncl_64x256x64: BF16 "bf16", Ncl K x Ncl K, 64 x 256, 5 stages, 0 taps;
    conv1d_wgrad_taps_bf16_ncl_ncl_128x192x64: BF16 "bf16", Ncl K x Ncl MN, 128 x 192, 5 stages, 3 taps;
    conv1d_wgrad_taps_bf16_ncl_ncl_64x256x64: BF16 "bf16", Ncl K x Ncl MN, 64 x 256, 8 stages, 4 taps;
    conv1d_wgrad_taps_bf16_ncl_ncl_64x192x64: BF16 "bf16", Ncl K x Ncl MN, 64 x 192, 8 stages, 3 taps;
    conv1d_wgrad_taps_bf16_nlc_ncl_128x192x64: BF16 "bf16", Nlc MN x Ncl MN, 128 x 192, 5 stages, 3 taps;
    conv1d_wgrad_taps_bf16_nlc_ncl_64x192x64: BF16 "bf16", Nlc MN x Ncl MN, 64 x 192, 8 stages, 3 taps;
    conv1d_wgrad_taps_bf16_ncl_nlc_128x192x64: BF16 "bf16", Ncl K x Nlc MN, 128 x 192, 6 stages, 3 taps;
    conv1d_wgrad_taps_bf16_ncl_nlc_64x192x64: BF16 "bf16", Ncl K x Nlc MN, 64 x 192, 10 stages, 3 taps;
    conv1d_wgrad_taps_bf16_nlc_nlc_128x256x64: BF16 "bf16", Nlc MN x Nlc MN, 128 x 256, 6 stages, 4 taps;
    conv1d_wgrad_taps_bf16_nlc_nlc_128x192x64: BF16 "bf16", Nlc MN x Nlc MN, 128 x 192, 6 stages, 3 taps;
    conv1d_wgrad_taps_bf16_nlc_nlc_64x256x64: BF16 "bf16", Nlc MN x Nlc MN, 64 x 256, 10 stages, 4 taps;
    conv1d_wgrad_taps_bf16_nlc_nlc_64x192x64: BF16 "bf16", Nlc MN x Nlc MN, 64 x 192, 10 stages, 3 taps;
    conv1d_wgrad_bf16_nlc_nlc_128x256x64: BF16 "bf16", Nlc MN x Nlc MN, 128 x 256, 4 stages, 0 taps;
    conv1d_wgrad_bf16_nlc_nlc_64x256x64: BF16 "bf16", Nlc MN x Nlc MN, 64 x 256, 5 stages, 0 taps;
    conv1d_wgrad_bf16_ncl_nlc_128x256x64: BF16 "bf16", Ncl K x Nlc MN, 128 x 256, 4 stages, 0 taps;
    conv1d_wgrad_bf16_ncl_nlc_64x256x64: BF16 "bf16", Ncl K x Nlc MN, 64 x 256, 5 stages, 0 taps;
    conv1d_wgrad_bf16_nlc_ncl_128x256x64: BF16 "bf16", Nlc MN x Ncl K, 128 x 256, 4 stages, 0 taps;
    conv1d_wgrad_bf16_nlc_ncl_64x256x64: BF16 "bf16", Nlc MN x Ncl K, 64 x 256, 5 stages, 0 taps;
    conv1d_wgrad_f16_ncl_ncl_128x256x64: F16 "f16", Ncl K x Ncl K, 128 x 256, 4 stages, 0 taps;
    conv1d_wgrad_f16_ncl_ncl_64x256x64: F16 "f16", Ncl K x Ncl K, 64 x 256, 5 stages, 0 taps;
    conv1d_wgrad_taps_f16_ncl_ncl_128x192x64: F16 "f16", Ncl K x Ncl MN, 128 x 192, 5 stages, 3 taps;
    conv1d_wgrad_taps_f16_ncl_ncl_64x256x64: F16 "f16", Ncl K x Ncl MN, 64 x 256, 8 stages, 4 taps;
    conv1d_wgrad_taps_f16_ncl_ncl_64x192x64: F16 "f16", Ncl K x Ncl MN, 64 x 192, 8 stages, 3 taps;
    conv1d_wgrad_taps_f16_nlc_ncl_128x192x64: F16 "f16", Nlc MN x Ncl MN, 128 x 192, 5 stages, 3 taps;
    conv1d_wgrad_taps_f16_nlc_ncl_64x192x64: F16 "f16", Nlc MN x Ncl MN, 64 x 192, 8 stages, 3 taps;
    conv1d_wgrad_taps_f16_ncl_nlc_128x192x64: F16 "f16", Ncl K x Nlc MN, 128 x 192, 6 stages, 3 taps;
    conv1d_wgrad_taps_f16_ncl_nlc_64x192x64: F16 "f16", Ncl K x Nlc MN, 64 x 192, 10 stages, 3 taps;
    conv1d_wgrad_taps_f16_nlc_nlc_128x256x64: F16 "f16", Nlc MN x Nlc MN, 128 x 256, 6 stages, 4 taps;
    conv1d_wgrad_taps_f16_nlc_nlc_128x192x64: F16 "f16", Nlc MN x Nlc MN, 128 x 192, 6 stages, 3 taps;
    conv1d_wgrad_taps_f16_nlc_nlc_64x256x64: F16 "f16", Nlc MN x Nlc MN, 64 x 256, 10 stages, 4 taps;
    conv1d_wgrad_taps_f16_nlc_nlc_64x192x64: F16 "f16", Nlc MN x Nlc MN, 64 x 192, 10 stages, 3 taps;
    conv1d_wgrad_f16_nlc_nlc_128x256x64: F16 "f16", Nlc MN x Nlc MN, 128 x 256, 4 stages, 0 taps;
    conv1d_wgrad_f16_nlc_nlc_64x256x64: F16 "f16", Nlc MN x Nlc MN, 64 x 256, 5 stages, 0 taps;
    conv1d_wgrad_f16_ncl_nlc_128x256x64: F16 "f16", Ncl K x Nlc MN, 128 x 256, 4 stages, 0 taps;
    conv1d_wgrad_f16_ncl_nlc_64x256x64: F16 "f16", Ncl K x Nlc MN, 64 x 256, 5 stages, 0 taps;
    conv1d_wgrad_f16_nlc_ncl_128x256x64: F16 "f16", Nlc MN x Ncl K, 128 x 256, 4 stages, 0 taps;
    conv1d_wgrad_f16_nlc_ncl_64x256x64: F16 "f16", Nlc MN x Ncl K, 64 x 256, 5 stages, 0 taps;
}

#[cfg(test)]
mod tests;
