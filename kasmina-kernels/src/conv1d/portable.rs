//! Convolution on any GPU: haloed tiles in shared memory and f32 arithmetic, no tensor cores.
//!
//! Forward and dgrad are one kernel, the *gather*: both are dense walks ([`Gather`]) that multiply
//! a matrix of filter taps with shifted positions of one tensor; dgrad has a walk for every residue
//! of the position modulo the stride. wgrad is a kernel of its own, as its sum runs over positions.
//! Convolutions of very few channels per group take the *direct* kernel, one thread per result, or
//! where they can the one for [`depthwise`](super::depthwise).
//!
//! # Layout
//! All tensors are addressed by three strides (batch, channel, position), so every layout is one
//! code path; only the order in which threads load and store follows the contiguous axis. In shared
//! memory everything is f32.
//!
//! ```text
//! gather   x  [depth][positions and halo]   w [depth][taps][rows + 4]
//! wgrad    x  [channels][positions and halo], dz [positions][rows + 4]
//! ```
//!
//! # Roles
//! 256 threads. A warp owns 8 rows (output channels) and 256 columns; lane ℓ owns the columns
//! ℓ + 32·j. So per step of the inner loop a thread reads eight values of x, one per column and
//! without bank conflicts whatever the shift of the tap, and eight of w that are the same for the
//! whole warp, for 64 multiply-adds. The eight warps lie along the rows, or along the columns where
//! there are fewer rows: [`Tile`].
//!
//! In the gather a column is a position. A tile of positions is loaded once with its halo for all
//! taps of a stage, coalesced along the contiguous axis. Where the halo would outweigh the reuse,
//! or sequences are shorter than a tile, positions of all sequences are numbered together and every
//! tap's are loaded by themselves (*flat*).
//!
//! In wgrad a column is a pair of input channel and tap. Blocks split batch × length; their partial
//! sums go to global memory in f32, and a second kernel adds them up in the order of the splits.
//! The bias gradient is summed from the tiles of dz that are loaded anyway.
//!
//! # Shape contract
//! Any [`Conv1dShape`], any strides between rows; addresses need only the alignment of the element.
//! Channel-contiguous tensors are loaded by 16 bytes where address, strides and channel numbers are
//! multiples of that.

use crate::abi::{DType, Kernel, KernelParams, Module, module};
use crate::conv1d::Conv1dShape;
#[cfg(doc)]
use crate::conv1d::Gather;
use crate::conv1d::depthwise::{self, DepthwiseParams, DepthwiseWgradParams};

/// Threads per block.
pub const THREADS: u32 = 256;
/// Rows of a warp.
const WARP_ROWS: u32 = 8;
/// Columns of a warp: eight per lane.
const WARP_COLUMNS: u32 = 256;
/// Shared memory per block: what every GPU grants unasked.
const SMEM_BYTES: u32 = 48 * 1024;
/// Where a few numbers of the block wait, behind everything else.
const PARKED: u32 = SMEM_BYTES - 64;
/// Where the sums for the bias gradient wait, one for each row of a block.
#[cfg(all(target_arch = "nvptx64", kasmina_tier = "portable"))]
const BIAS_SUMS: u32 = PARKED - 64 * 4;
/// f32 values of a stage, with room for a gap between its two operands.
const SMEM_VALUES: u32 = (PARKED - 64 * 4) / 4 - 4;
/// Keeps rows of w on different banks when they are stored.
const ROW_PAD: u32 = 4;

/// How the eight warps of a block lie: `rows() × columns()` results.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tile {
    /// log₂ of the warps along the rows, 0 to 3.
    pub log2_row_warps: u32,
}

impl Tile {
    /// As few rows as cover `rows`, or all eight warps' worth.
    #[must_use]
    pub const fn covering(rows: u32) -> Self {
        let mut log2_row_warps = 0;
        while log2_row_warps < 3 && (WARP_ROWS << log2_row_warps) < rows {
            log2_row_warps += 1;
        }
        Self { log2_row_warps }
    }

    /// Rows of a block.
    #[must_use]
    #[inline(always)]
    pub const fn rows(self) -> u32 {
        WARP_ROWS << self.log2_row_warps
    }

    /// log₂ of [`rows`](Self::rows).
    #[must_use]
    #[inline(always)]
    pub const fn log2_rows(self) -> u32 {
        3 + self.log2_row_warps
    }

    /// Columns of a block.
    #[must_use]
    #[inline(always)]
    pub const fn columns(self) -> u32 {
        (WARP_COLUMNS * 8) >> self.log2_row_warps
    }

    /// First row and first column of a thread; its others are 1 and 32 apart.
    #[must_use]
    #[inline(always)]
    pub const fn thread(self, thread: u32) -> (u32, u32) {
        let (warp, lane) = (thread / 32, thread % 32);
        let row_warp = warp & ((1 << self.log2_row_warps) - 1);
        (row_warp * WARP_ROWS, (warp >> self.log2_row_warps) * WARP_COLUMNS + lane)
    }
}

/// The pass that a gather or direct kernel computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the input to the output.
    Forward,
    /// From the output's gradient to the input's.
    Dgrad,
}

/// How the gather kernel cuts a pass.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GatherPlan {
    /// Rows and columns of a block.
    pub tile: Tile,
    /// 1 where positions of all sequences are numbered together, else 0.
    pub flat: u32,
    /// Taps of a stage.
    pub taps: u32,
    /// log₂ of the depth of a stage.
    pub log2_depth: u32,
    /// Positions that a stage loads per channel.
    pub span: u32,
    /// Tiles along the rows of one group.
    pub row_tiles: u32,
    /// Tiles along the positions: of one sequence, or of all if flat.
    pub column_tiles: u32,
    /// Classes of positions with walks of their own.
    pub residues: u32,
}

/// The f32 values a gather's stage occupies.
const fn gather_values(tile: Tile, span: u32, taps: u32, log2_depth: u32) -> u64 {
    (span as u64 + taps as u64 * (tile.rows() + ROW_PAD) as u64) << log2_depth
}

impl GatherPlan {
    /// The plan of a pass.
    #[must_use]
    pub const fn new(shape: &Conv1dShape, direction: Direction) -> Self {
        let (rows, depth, walk, residues) = match direction {
            Direction::Forward => (shape.group_out(), shape.group_in(), shape.forward_gather(), 1),
            Direction::Dgrad => {
                let residues = shape.residues();
                // The first class has the most positions, that of tap 0 the most taps.
                let mut walk = shape.dgrad_gather(0);
                walk.taps = shape.most_dgrad_taps();
                (shape.group_in(), shape.group_out(), walk, residues)
            }
        };
        let tile = Tile::covering(rows);
        let columns = tile.columns();
        let count = walk.out_count;
        let taps = if walk.taps == 0 { 1 } else { walk.taps };

        let mut most_depth = 0;
        while most_depth < 4 && (1 << most_depth) < depth {
            most_depth += 1;
        }
        // As many taps as leave a depth of 4.
        let mut stage_taps = if taps < 16 { taps } else { 16 };
        let enough = if most_depth < 2 { most_depth } else { 2 };
        let base = (columns as u64 - 1) * walk.in_step as u64 + 1;
        let mut span = base + (stage_taps as u64 - 1) * walk.tap_step as u64;
        while stage_taps > 1
            && (span > SMEM_VALUES as u64
                || gather_values(tile, span as u32, stage_taps, enough) > SMEM_VALUES as u64)
        {
            stage_taps -= 1;
            span = base + (stage_taps as u64 - 1) * walk.tap_step as u64;
        }
        let column_tiles = count.div_ceil(columns);
        let idle = column_tiles as u64 * columns as u64 > 2 * count as u64 && shape.batch > 1;
        let flat = idle || span > stage_taps as u64 * columns as u64;
        if flat {
            stage_taps = 1;
            span = columns as u64;
        }
        let span = span as u32;
        let mut log2_depth = most_depth;
        while log2_depth > 0
            && gather_values(tile, span, stage_taps, log2_depth) > SMEM_VALUES as u64
        {
            log2_depth -= 1;
        }
        let positions = if flat { count * shape.batch } else { count };
        Self {
            tile,
            flat: flat as u32,
            taps: stage_taps,
            log2_depth,
            span,
            row_tiles: rows.div_ceil(tile.rows()),
            column_tiles: positions.div_ceil(columns),
            residues,
        }
    }

    /// Blocks of the launch.
    #[must_use]
    pub const fn blocks(&self, shape: &Conv1dShape) -> u64 {
        let batch = if self.flat == 1 { 1 } else { shape.batch as u64 };
        let tiles = self.row_tiles as u64 * self.column_tiles as u64;
        tiles.saturating_mul(batch).saturating_mul(shape.groups as u64 * self.residues as u64)
    }
}

/// Where a tensor of sequences is: its device address, and elements from batch to batch, from
/// channel to channel and from position to position.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Strided {
    /// Device address.
    pub address: u64,
    /// Elements between batches.
    pub batch: u64,
    /// Elements between channels.
    pub channel: u64,
    /// Elements between positions.
    pub position: u64,
}

#[cfg(all(target_arch = "nvptx64", kasmina_tier = "portable"))]
impl Strided {
    /// The same numbers as if new: what follows from them is found where it is used, and occupies
    /// no registers elsewhere.
    #[inline(always)]
    fn opaque(&self) -> Self {
        use crate::ptx::opaque_u64;
        Self {
            address: opaque_u64(self.address),
            batch: opaque_u64(self.batch),
            channel: opaque_u64(self.channel),
            position: opaque_u64(self.position),
        }
    }
}

/// Where a filter is: its device address, and elements from output channel to output channel, from
/// input channel to input channel and from tap to tap.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct StridedFilter {
    /// Device address.
    pub address: u64,
    /// Elements between output channels.
    pub out: u64,
    /// Elements between input channels.
    pub input: u64,
    /// Elements between taps.
    pub tap: u64,
}

#[cfg(all(target_arch = "nvptx64", kasmina_tier = "portable"))]
impl StridedFilter {
    /// As that of [`Strided`].
    #[inline(always)]
    fn opaque(&self) -> Self {
        use crate::ptx::opaque_u64;
        Self {
            address: opaque_u64(self.address),
            out: opaque_u64(self.out),
            input: opaque_u64(self.input),
            tap: opaque_u64(self.tap),
        }
    }
}

/// What the gather and direct kernels take.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct GatherParams {
    /// The tensor that is gathered from: x, or dz for dgrad.
    pub input: Strided,
    /// The tensor that is written: y, or dx for dgrad.
    pub output: Strided,
    /// The filter.
    pub filter: StridedFilter,
    /// Device address of the bias, `[out_channels]`; 0 for none.
    pub bias: u64,
    /// The convolution.
    pub shape: Conv1dShape,
    /// How it is cut; the direct kernel takes no notice.
    pub plan: GatherPlan,
    /// 0 forward, 1 dgrad.
    pub dgrad: u32,
    /// [`Activation`](crate::activation::Activation) as its discriminant.
    pub activation: u32,
    /// Direct kernel: 1 where neighbouring threads take neighbouring channels, 0 positions.
    pub channels_first: u32,
    /// 0.
    pub reserved: u32,
}

// SAFETY: repr(C), fixed-width fields: 13 u64, then 11 + 9 + 4 u32, without padding.
unsafe impl KernelParams for GatherParams {}
const _: () = assert!(size_of::<GatherParams>() == 13 * 8 + 24 * 4);

/// How the wgrad kernel cuts a pass.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WgradPlan {
    /// Rows (output channels) and columns (pairs of input channel and tap) of a block.
    pub tile: Tile,
    /// 1 where positions of all sequences are numbered together, else 0.
    pub flat: u32,
    /// Taps of a block.
    pub taps: u32,
    /// Input channels of a block.
    pub channels: u32,
    /// log₂ of the positions of a stage.
    pub log2_depth: u32,
    /// Positions of x that a stage loads per channel.
    pub span: u32,
    /// f32 values from channel to channel of x in shared memory.
    pub pitch: u32,
    /// Tiles along the output channels of a group.
    pub row_tiles: u32,
    /// Tiles along the input channels of a group.
    pub channel_tiles: u32,
    /// Tiles along the taps.
    pub tap_tiles: u32,
    /// Stages: of one sequence times the batch, or of all sequences if flat.
    pub stages: u32,
    /// Stages that one block sums.
    pub stages_per_split: u32,
    /// Blocks that share a result.
    pub splits: u32,
}

/// The most blocks that share a result: the second kernel adds so many numbers per result.
const MAX_SPLITS: u64 = 256;

impl WgradPlan {
    /// The plan of a pass on a GPU of `sm_count` multiprocessors.
    #[must_use]
    pub const fn new(shape: &Conv1dShape, sm_count: u32) -> Self {
        let (rows, depth) = (shape.group_out(), shape.group_in());
        let mut tile = Tile::covering(rows);
        let (step, tap_step) = (shape.stride as u64, shape.dilation as u64);
        let mut taps = if shape.kernel_size < 16 { shape.kernel_size } else { 16 };
        let mut flat = shape.out_length < 32 && shape.batch > 1;
        let mut log2_depth = 5;
        if !flat {
            // A halo that leaves no gain over loading each tap by itself.
            let span = 31 * step + (taps as u64 - 1) * tap_step + 1;
            flat = span > 32 * taps as u64;
        }
        if flat {
            taps = 1;
        }
        let needed = depth as u64 * taps as u64;
        while tile.log2_row_warps < 3 && tile.columns() as u64 >= 2 * needed {
            tile.log2_row_warps += 1;
        }
        let (mut span, mut pitch, mut channels);
        loop {
            let positions = 1u64 << log2_depth;
            span = if flat {
                positions
            } else {
                (positions - 1) * step + (taps as u64 - 1) * tap_step + 1
            };
            // Lane by lane the columns of a channel follow each other by taps; this makes the next
            // channel's follow on too, on the 32 banks, where the dilation is 1.
            pitch = span + (taps as u64 + 32 - span % 32) % 32;
            channels = (tile.columns() / taps) as u64;
            if channels > depth as u64 {
                channels = depth as u64;
            }
            let values = channels * pitch + ((tile.rows() + ROW_PAD) as u64) * positions;
            if values <= SMEM_VALUES as u64 {
                break;
            }
            // Fewer columns first, then shorter stages.
            if tile.log2_row_warps < 3 {
                tile.log2_row_warps += 1;
            } else if log2_depth > 3 {
                log2_depth -= 1;
            } else {
                // One channel of 16 taps always fits, as its span is at most 8 · 16 · 16.
                channels = SMEM_VALUES as u64 / 2 / pitch;
                break;
            }
        }
        let (span, pitch, channels) = (span as u32, pitch as u32, channels as u32);
        let positions = if flat { shape.out_length * shape.batch } else { shape.out_length };
        let per_row = positions.div_ceil(1 << log2_depth);
        let stages = if flat { per_row } else { per_row * shape.batch };
        let row_tiles = rows.div_ceil(tile.rows());
        let channel_tiles = depth.div_ceil(channels);
        let tap_tiles = shape.kernel_size.div_ceil(taps);
        let tiles =
            row_tiles as u64 * channel_tiles as u64 * tap_tiles as u64 * shape.groups as u64;
        // Two waves of two blocks per multiprocessor.
        let wanted = (4 * sm_count as u64).div_ceil(tiles);
        let mut splits = if wanted < stages as u64 { wanted } else { stages as u64 };
        splits = if splits > MAX_SPLITS { MAX_SPLITS } else { splits };
        splits = if splits == 0 { 1 } else { splits };
        let stages_per_split = (stages as u64).div_ceil(splits) as u32;
        let splits = if stages_per_split == 0 { 1 } else { stages.div_ceil(stages_per_split) };
        Self {
            tile,
            flat: flat as u32,
            taps,
            channels,
            log2_depth,
            span,
            pitch,
            row_tiles,
            channel_tiles,
            tap_tiles,
            stages,
            stages_per_split,
            splits,
        }
    }

    /// Blocks of the launch.
    #[must_use]
    pub const fn blocks(&self, shape: &Conv1dShape) -> u64 {
        let tiles = self.row_tiles as u64 * self.channel_tiles as u64;
        tiles
            .saturating_mul(self.tap_tiles as u64 * shape.groups as u64)
            .saturating_mul(self.splits as u64)
    }
}

/// f32 values of the partial sums that `splits` blocks leave: filters as `[out, in, tap]`, then
/// biases, one after the other.
#[must_use]
pub const fn partial_values(shape: &Conv1dShape, splits: u32) -> u64 {
    (shape.filter_elements() + shape.out_channels as u64).saturating_mul(splits as u64)
}

/// What the wgrad kernel takes.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct WgradParams {
    /// The input of the convolution.
    pub x: Strided,
    /// The gradient of its result.
    pub dz: Strided,
    /// Where the partial sums go: [`partial_values`] f32.
    pub partials: u64,
    /// The convolution.
    pub shape: Conv1dShape,
    /// How it is cut.
    pub plan: WgradPlan,
}

// SAFETY: repr(C), fixed-width fields: 9 u64, then 11 + 13 u32, without padding.
unsafe impl KernelParams for WgradParams {}
const _: () = assert!(size_of::<WgradParams>() == 9 * 8 + 24 * 4);

/// What the kernel takes that adds up partial sums.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct WgradFinalParams {
    /// [`partial_values`] f32.
    pub partials: u64,
    /// The filter's gradient; its address is 0 where it is not wanted.
    pub dw: StridedFilter,
    /// Device address of the bias gradient; 0 where it is not wanted.
    pub db: u64,
    /// Elements of the filter.
    pub filter_elements: u64,
    /// Elements of the bias.
    pub out_channels: u32,
    /// Input channels of a group.
    pub group_in: u32,
    /// Taps.
    pub kernel_size: u32,
    /// Partial sums per result.
    pub splits: u32,
    /// 1 where the sum is added to what is there, else 0.
    pub accumulate: u32,
    /// 0.
    pub reserved: u32,
}

// SAFETY: repr(C), fixed-width fields: 7 u64, then 6 u32, without padding.
unsafe impl KernelParams for WgradFinalParams {}

/// What the kernel takes that makes `dz = dy · act'(z)`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ActivationGradParams {
    /// The result before the activation; for ReLU the one behind it serves as well.
    pub z: Strided,
    /// The gradient behind the activation.
    pub dy: Strided,
    /// The gradient before it.
    pub dz: Strided,
    /// Sequences.
    pub batch: u32,
    /// Channels.
    pub channels: u32,
    /// Positions.
    pub length: u32,
    /// [`Activation`](crate::activation::Activation) as its discriminant.
    pub activation: u32,
}

// SAFETY: repr(C), fixed-width fields: 12 u64, then 4 u32, without padding.
unsafe impl KernelParams for ActivationGradParams {}

/// Blocks of a kernel with one thread per element.
#[must_use]
pub const fn element_blocks(elements: u64) -> u64 {
    elements.div_ceil(THREADS as u64)
}

/// Whether the direct kernel is the better one: so few channels per group that a tile of the gather
/// would mostly be idle.
#[must_use]
pub const fn prefers_direct(shape: &Conv1dShape, direction: Direction) -> bool {
    let (rows, depth) = match direction {
        Direction::Forward => (shape.group_out(), shape.group_in()),
        Direction::Dgrad => (shape.group_in(), shape.group_out()),
    };
    rows <= 2 && depth as u64 * shape.kernel_size as u64 <= 64
}

/// The kernels of one element type.
#[derive(Clone, Copy)]
pub struct Kernels {
    /// Forward and dgrad by tiles.
    pub gather: &'static Kernel<GatherParams>,
    /// Forward and dgrad by one thread per result, straight from global memory.
    pub direct: &'static Kernel<GatherParams>,
    /// Partial sums of wgrad.
    pub wgrad: &'static Kernel<WgradParams>,
    /// Their totals.
    pub wgrad_final: &'static Kernel<WgradFinalParams>,
    /// `dz = dy · act'(z)`
    pub activation_grad: &'static Kernel<ActivationGradParams>,
    /// Depthwise forward and dgrad, positions contiguous.
    pub depthwise_ncl: &'static Kernel<DepthwiseParams>,
    /// Depthwise forward and dgrad, channels contiguous.
    pub depthwise_nlc: &'static Kernel<DepthwiseParams>,
    /// Depthwise partial sums of wgrad, any layout.
    pub depthwise_wgrad: &'static Kernel<DepthwiseWgradParams>,
}

/// One row per element type: its module, its kernels and their entries.
macro_rules! portable_kernels {
    ($($dtype:ident, $name:literal, $constant:ident, $gather:ident, $direct:ident, $wgrad:ident,
       $final:ident, $activation:ident, $ncl:ident, $nlc:ident, $dw:ident;)+) => {
        $(
            #[doc = concat!("Every convolution of ", stringify!($dtype), ".")]
            pub static $dtype: Module = module!(Portable, "portable", $name, [
                stringify!($gather), stringify!($direct), stringify!($wgrad), stringify!($final),
                stringify!($activation), stringify!($ncl), stringify!($nlc), stringify!($dw),
            ]);
            static $constant: Kernels = {
                static GATHER: Kernel<GatherParams> =
                    Kernel::new(&$dtype, stringify!($gather), THREADS, SMEM_BYTES);
                static DIRECT: Kernel<GatherParams> =
                    Kernel::new(&$dtype, stringify!($direct), THREADS, 0);
                static WGRAD: Kernel<WgradParams> =
                    Kernel::new(&$dtype, stringify!($wgrad), THREADS, SMEM_BYTES);
                static FINAL: Kernel<WgradFinalParams> =
                    Kernel::new(&$dtype, stringify!($final), THREADS, 0);
                static ACTIVATION: Kernel<ActivationGradParams> =
                    Kernel::new(&$dtype, stringify!($activation), THREADS, 0);
                static NCL: Kernel<DepthwiseParams> =
                    Kernel::new(&$dtype, stringify!($ncl), THREADS, 0);
                static NLC: Kernel<DepthwiseParams> =
                    Kernel::new(&$dtype, stringify!($nlc), THREADS, 0);
                static DW: Kernel<DepthwiseWgradParams> =
                    Kernel::new(&$dtype, stringify!($dw), THREADS, depthwise::WGRAD_SMEM_BYTES);
                Kernels {
                    gather: &GATHER,
                    direct: &DIRECT,
                    wgrad: &WGRAD,
                    wgrad_final: &FINAL,
                    activation_grad: &ACTIVATION,
                    depthwise_ncl: &NCL,
                    depthwise_nlc: &NLC,
                    depthwise_wgrad: &DW,
                }
            };
        )+

        /// The kernels of an element type.
        #[must_use]
        pub const fn kernels(dtype: DType) -> &'static Kernels {
            match dtype {
                $(DType::$dtype => &$constant,)+
            }
        }

        #[cfg(all(target_arch = "nvptx64", kasmina_tier = "portable"))]
        mod entries {
            use super::*;
            use crate::conv1d::{depthwise, portable};
            use crate::gemm::element;

            $(
                /// # Safety
                /// Tensors and filter are as the strides say, and the grid is that of the plan (the
                /// host's `conv1d::portable`).
                #[unsafe(no_mangle)]
                pub(crate) unsafe extern "ptx-kernel" fn $gather(params: GatherParams) {
                    // SAFETY: the host checks every shape and stride against its allocation.
                    unsafe { portable::gather::gather::<element::$dtype>(&params) }
                }

                /// # Safety
                /// As above, with a thread for each result.
                #[unsafe(no_mangle)]
                pub(crate) unsafe extern "ptx-kernel" fn $direct(params: GatherParams) {
                    // SAFETY: as above.
                    unsafe { portable::direct::direct::<element::$dtype>(&params) }
                }

                /// # Safety
                /// As above; the partial sums have room.
                #[unsafe(no_mangle)]
                pub(crate) unsafe extern "ptx-kernel" fn $wgrad(params: WgradParams) {
                    // SAFETY: as above.
                    unsafe { portable::wgrad::wgrad::<element::$dtype>(&params) }
                }

                /// # Safety
                /// As above, with a thread for each sum.
                #[unsafe(no_mangle)]
                pub(crate) unsafe extern "ptx-kernel" fn $final(params: WgradFinalParams) {
                    // SAFETY: as above.
                    unsafe { portable::wgrad::finish::<element::$dtype>(&params) }
                }

                /// # Safety
                /// As above, with a thread for each element.
                #[unsafe(no_mangle)]
                pub(crate) unsafe extern "ptx-kernel" fn $activation(
                    params: ActivationGradParams,
                ) {
                    // SAFETY: as above.
                    unsafe { portable::direct::activation_grad::<element::$dtype>(&params) }
                }

                /// # Safety
                /// As above; `depthwise::serves_ncl` holds.
                #[unsafe(no_mangle)]
                pub(crate) unsafe extern "ptx-kernel" fn $ncl(params: DepthwiseParams) {
                    // SAFETY: as above.
                    unsafe { depthwise::device::ncl::<element::$dtype>(&params) }
                }

                /// # Safety
                /// As above; `depthwise::serves_nlc` holds.
                #[unsafe(no_mangle)]
                pub(crate) unsafe extern "ptx-kernel" fn $nlc(params: DepthwiseParams) {
                    // SAFETY: as above.
                    unsafe { depthwise::device::nlc::<element::$dtype>(&params) }
                }

                /// # Safety
                /// As above; the partial sums have room.
                #[unsafe(no_mangle)]
                pub(crate) unsafe extern "ptx-kernel" fn $dw(params: DepthwiseWgradParams) {
                    // SAFETY: as above.
                    unsafe { depthwise::device::wgrad::<element::$dtype>(&params) }
                }
            )+
        }
    };
}

portable_kernels! {
    F32, "conv1d_f32", KERNELS_F32, conv1d_f32_gather, conv1d_f32_direct, conv1d_f32_wgrad,
        conv1d_f32_wgrad_final, conv1d_f32_activation_grad, conv1d_f32_depthwise_ncl,
        conv1d_f32_depthwise_nlc, conv1d_f32_depthwise_wgrad;
    F16, "conv1d_f16", KERNELS_F16, conv1d_f16_gather, conv1d_f16_direct, conv1d_f16_wgrad,
        conv1d_f16_wgrad_final, conv1d_f16_activation_grad, conv1d_f16_depthwise_ncl,
        conv1d_f16_depthwise_nlc, conv1d_f16_depthwise_wgrad;
    BF16, "conv1d_bf16", KERNELS_BF16, conv1d_bf16_gather, conv1d_bf16_direct, conv1d_bf16_wgrad,
        conv1d_bf16_wgrad_final, conv1d_bf16_activation_grad, conv1d_bf16_depthwise_ncl,
        conv1d_bf16_depthwise_nlc, conv1d_bf16_depthwise_wgrad;
}

#[cfg(all(target_arch = "nvptx64", kasmina_tier = "portable"))]
mod direct;
#[cfg(all(target_arch = "nvptx64", kasmina_tier = "portable"))]
mod gather;
#[cfg(all(target_arch = "nvptx64", kasmina_tier = "portable"))]
mod wgrad;

#[cfg(test)]
mod tests;
