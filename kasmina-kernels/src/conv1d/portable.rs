//! Convolution on any GPU: haloed tiles in shared memory and f32 arithmetic, no tensor cores.
//!
//! Forward and dgrad are one kernel, the *gather*: both are dense walks ([`Gather`]) that multiply
//! a matrix of filter taps with shifted positions of one tensor; dgrad has a walk for every residue
//! of the position modulo the stride. wgrad is a kernel of its own, as its sum runs over positions.
//! Convolutions of very few channels per group take the *direct* kernel, one thread per result, or
//! where they can the one for [`depthwise`].
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

mod plan;

pub use plan::{Direction, GatherPlan, Tile, WgradPlan};

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

/// What the kernel takes that repairs a product of parts.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct RepairParams {
    /// The pass.
    pub gather: GatherParams,
    /// Device address of the findings of the split's blocks, one word each.
    pub findings: u64,
    /// How many there are.
    pub num_findings: u32,
    /// Tiles of the plan.
    pub blocks: u32,
}

// SAFETY: repr(C); a struct without padding whose size is a multiple of 8, a u64 and two u32.
unsafe impl KernelParams for RepairParams {}
const _: () = assert!(size_of::<RepairParams>() == size_of::<GatherParams>() + 16);

/// The same for partial sums of wgrad.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct RepairWgradParams {
    /// The pass.
    pub wgrad: WgradParams,
    /// As those of [`RepairParams`].
    pub findings: u64,
    /// Likewise.
    pub num_findings: u32,
    /// 0.
    pub reserved: u32,
}

// SAFETY: as `RepairParams`.
unsafe impl KernelParams for RepairWgradParams {}
const _: () = assert!(size_of::<RepairWgradParams>() == size_of::<WgradParams>() + 16);

/// The same for their totals.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct RepairWgradFinalParams {
    /// The sums.
    pub sum: WgradFinalParams,
    /// As those of [`RepairParams`].
    pub findings: u64,
    /// Likewise.
    pub num_findings: u32,
    /// 0.
    pub reserved: u32,
}

// SAFETY: as `RepairParams`.
unsafe impl KernelParams for RepairWgradFinalParams {}
const _: () = assert!(size_of::<RepairWgradFinalParams>() == size_of::<WgradFinalParams>() + 16);

/// f32, computed only where parts could not express the operands.
pub static F32_REPAIR: Module = module!(
    Portable,
    "portable",
    "conv1d_repair_f32",
    ["conv1d_repair_f32", "conv1d_repair_f32_wgrad", "conv1d_repair_f32_wgrad_final"]
);

/// The kernel that computes an f32 pass where [`needs_repair`](crate::gemm::parts::needs_repair)
/// says so, and else does nothing. Any number of blocks share the tiles.
pub static REPAIR: Kernel<RepairParams> =
    Kernel::new(&F32_REPAIR, "conv1d_repair_f32", THREADS, SMEM_BYTES);
/// The same for partial sums of wgrad, launched as [`Kernels::wgrad`].
pub static REPAIR_WGRAD: Kernel<RepairWgradParams> =
    Kernel::new(&F32_REPAIR, "conv1d_repair_f32_wgrad", THREADS, SMEM_BYTES);
/// The same for their totals, launched as [`Kernels::wgrad_final`].
pub static REPAIR_WGRAD_FINAL: Kernel<RepairWgradFinalParams> =
    Kernel::new(&F32_REPAIR, "conv1d_repair_f32_wgrad_final", THREADS, 0);

/// Blocks of [`REPAIR`] that run at once on a multiprocessor.
pub const REPAIR_BLOCKS: u32 = 2;

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

            /// # Safety
            /// As the entries below, and the findings are readable.
            #[unsafe(no_mangle)]
            pub(crate) unsafe extern "ptx-kernel" fn conv1d_repair_f32(params: RepairParams) {
                // SAFETY: the host checks every shape and stride against its allocation.
                unsafe { portable::repair::repair::<element::F32>(&params) }
            }

            /// # Safety
            /// As above.
            #[unsafe(no_mangle)]
            pub(crate) unsafe extern "ptx-kernel" fn conv1d_repair_f32_wgrad(
                params: RepairWgradParams,
            ) {
                // SAFETY: as above.
                unsafe { portable::repair::repair_wgrad::<element::F32>(&params) }
            }

            /// # Safety
            /// As above.
            #[unsafe(no_mangle)]
            pub(crate) unsafe extern "ptx-kernel" fn conv1d_repair_f32_wgrad_final(
                params: RepairWgradFinalParams,
            ) {
                // SAFETY: as above.
                unsafe { portable::repair::repair_wgrad_final::<element::F32>(&params) }
            }

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
                    portable::gather::mark();
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
pub(in crate::conv1d) mod gather;
#[cfg(all(target_arch = "nvptx64", kasmina_tier = "portable"))]
mod repair;
#[cfg(all(target_arch = "nvptx64", kasmina_tier = "portable"))]
mod wgrad;

#[cfg(test)]
mod tests;
