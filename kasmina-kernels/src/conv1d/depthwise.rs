//! Depthwise convolution at the speed of memory: every channel has a filter of its own, so there is
//! nothing to multiply but what is loaded anyway.
//!
//! Forward and dgrad are the same walk with the taps in one order or the other:
//! `out[b, c, q] = act(bias[c] + Σ_t in[b, c, q + first + t] · w[c, first_tap + t·tap_stride])`,
//! for a stride and a dilation of 1 and at most [`MAX_TAPS`] taps.
//!
//! # Positions contiguous (NCL)
//! A thread makes eight neighbouring results from three aligned vectors of eight elements. Where the
//! first tap falls in the first of them is the same for all threads, and is a constant of the code:
//! there are eight copies of it. The first vectors of the next four such windows are always on
//! their way; the other two are those of the thread's neighbours, and so in the L1 cache. Threads
//! of a block share rows if these are short. On Hopper longer rows have a kernel of their own,
//! [`hopper::depthwise`](super::hopper::depthwise).
//!
//! # Channels contiguous (NLC)
//! A thread has two channels and walks along a run of positions, eight at a time; taps and the
//! window over the positions stay in registers.
//!
//! # wgrad
//! A block sums over a part of batch × length for one channel (NCL) or 32 (NLC), NCL by vectors as
//! above where they are aligned; the partial sums
//! are added up by the same kernel as those of [`portable`](super::portable). Any stride, dilation
//! and number of taps.

use crate::abi::{DType, KernelParams};
use crate::conv1d::Conv1dShape;
use crate::conv1d::portable::{Strided, THREADS};

/// The most taps of the fast walk.
pub const MAX_TAPS: u32 = 8;
/// Results of a thread at a time.
pub const RUN: u32 = 8;
/// Positions of a thread of the channel-contiguous kernel.
pub const POSITIONS: u32 = 64;
/// Taps that wgrad sums in one walk over the positions.
pub const WGRAD_TAPS: u32 = 8;
/// Shared memory of wgrad: a sum of every thread for every tap, and one for the bias.
pub const WGRAD_SMEM_BYTES: u32 = THREADS * (WGRAD_TAPS + 1) * 4;

/// What a depthwise forward or dgrad kernel takes.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct DepthwiseParams {
    /// The tensor that is read.
    pub input: Strided,
    /// The tensor that is written.
    pub output: Strided,
    /// Device address of the filter.
    pub filter: u64,
    /// Elements between its channels.
    pub filter_channel: u64,
    /// Elements between taps of the walk, as the two's complement of a signed number.
    pub filter_tap: u64,
    /// Device address of the bias, `[channels]`; 0 for none.
    pub bias: u64,
    /// Sequences.
    pub batch: u32,
    /// Channels.
    pub channels: u32,
    /// Positions that are read.
    pub in_length: u32,
    /// Positions that are written.
    pub out_length: u32,
    /// Position that the first tap meets for the first result.
    pub first: i32,
    /// Taps, 1 to [`MAX_TAPS`].
    pub taps: u32,
    /// [`Activation`](crate::activation::Activation) as its discriminant.
    pub activation: u32,
    /// NCL: log₂ of the threads that share a row. NLC: 0.
    pub log2_row_threads: u32,
}

// SAFETY: repr(C), fixed-width fields: 12 u64, then 8 u32, without padding.
unsafe impl KernelParams for DepthwiseParams {}
const _: () = assert!(size_of::<DepthwiseParams>() == 12 * 8 + 8 * 4);

/// What the depthwise wgrad kernel takes.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct DepthwiseWgradParams {
    /// The input of the convolution.
    pub x: Strided,
    /// The gradient of its result.
    pub dz: Strided,
    /// Where the partial sums go, as those of [`portable`](super::portable).
    pub partials: u64,
    /// The convolution.
    pub shape: Conv1dShape,
    /// Blocks that share a result.
    pub splits: u32,
    /// 1 where neighbouring threads take neighbouring channels, 0 positions.
    pub along_channels: u32,
    /// Positions, of all sequences numbered together, that one split sums.
    pub positions_per_split: u32,
}

// SAFETY: repr(C), fixed-width fields: 9 u64, then 11 + 3 u32, without padding.
unsafe impl KernelParams for DepthwiseWgradParams {}
const _: () = assert!(size_of::<DepthwiseWgradParams>() == 9 * 8 + 14 * 4);

/// Whether the fast walks compute this: a stride and a dilation of 1, and few taps.
#[must_use]
pub const fn serves(shape: &Conv1dShape) -> bool {
    shape.is_depthwise()
        && shape.stride == 1
        && shape.dilation == 1
        && shape.kernel_size <= MAX_TAPS
}

/// Whether the walk over contiguous positions can read `input` and write `output`: its vectors of
/// eight elements must be aligned to 16 bytes and whole.
#[must_use]
pub const fn serves_ncl(params: &DepthwiseParams, dtype: DType) -> bool {
    const fn fits(tensor: &Strided, length: u32, size: u64) -> bool {
        tensor.position == 1
            && length.is_multiple_of(RUN)
            && (tensor.address | (tensor.batch * size) | (tensor.channel * size)).is_multiple_of(16)
    }
    let size = dtype.size() as u64;
    fits(&params.input, params.in_length, size) && fits(&params.output, params.out_length, size)
}

/// Whether the walk over contiguous channels can read `input` and write `output`: its pairs of
/// elements must be aligned.
#[must_use]
pub const fn serves_nlc(params: &DepthwiseParams, dtype: DType) -> bool {
    const fn fits(tensor: &Strided, size: u64) -> bool {
        tensor.channel == 1
            && (tensor.address | (tensor.batch * size) | (tensor.position * size))
                .is_multiple_of(2 * size)
    }
    let size = dtype.size() as u64;
    params.channels.is_multiple_of(2) && fits(&params.input, size) && fits(&params.output, size)
}

/// log₂ of the threads that share a row of `length` results: enough for one vector each.
#[must_use]
pub const fn log2_row_threads(length: u32) -> u32 {
    let mut log2 = 0;
    while log2 < 8 && (RUN << log2) < length {
        log2 += 1;
    }
    log2
}

/// Blocks of the walk over contiguous positions.
#[must_use]
pub const fn ncl_blocks(params: &DepthwiseParams) -> u64 {
    let rows = params.batch as u64 * params.channels as u64;
    rows.div_ceil((THREADS >> params.log2_row_threads) as u64)
}

/// Blocks of the walk over contiguous channels: a warp has 64 channels of a run of positions.
#[must_use]
pub const fn nlc_blocks(params: &DepthwiseParams) -> u64 {
    let runs = params.batch as u64 * params.out_length.div_ceil(POSITIONS) as u64;
    let warps = runs.saturating_mul((params.channels / 2).div_ceil(32) as u64);
    warps.div_ceil((THREADS / 32) as u64)
}

impl DepthwiseWgradParams {
    /// Channels of a block.
    #[must_use]
    #[inline(always)]
    pub const fn channels_per_block(&self) -> u32 {
        if self.along_channels == 1 { 32 } else { 1 }
    }

    /// Whether threads walk by vectors of eight elements of `size` bytes: positions are contiguous,
    /// vectors whole and aligned to 16 bytes, and the taps few and next to each other.
    #[must_use]
    #[inline(always)]
    pub const fn by_vectors(&self, size: u32) -> bool {
        let Self { x, dz, shape, .. } = self;
        let strides = x.batch | x.channel | dz.batch | dz.channel;
        let addresses = x.address | dz.address | strides.wrapping_mul(size as u64);
        self.along_channels == 0
            && shape.stride == 1
            && shape.dilation == 1
            && shape.kernel_size <= MAX_TAPS
            && x.position == 1
            && dz.position == 1
            && (shape.in_length | shape.out_length).is_multiple_of(RUN)
            && addresses.is_multiple_of(16)
    }

    /// Blocks of the launch.
    #[must_use]
    pub const fn blocks(&self) -> u64 {
        let channels = self.shape.in_channels.div_ceil(self.channels_per_block());
        channels as u64 * self.splits as u64
    }
}

/// Splits of wgrad and the positions of each, on a GPU of `sm_count` multiprocessors.
#[must_use]
pub const fn wgrad_splits(shape: &Conv1dShape, along_channels: bool, sm_count: u32) -> [u32; 2] {
    let positions = shape.batch as u64 * shape.out_length as u64;
    let channels = if along_channels { shape.in_channels.div_ceil(32) } else { shape.in_channels };
    let wanted = (16 * sm_count as u64).div_ceil(channels as u64);
    // At least 64 positions for every thread that walks along them.
    let walkers = if along_channels { 8 } else { 256 };
    let most = positions.div_ceil(64 * walkers);
    let mut splits = if wanted < most { wanted } else { most };
    splits = if splits > 256 { 256 } else { splits };
    splits = if splits == 0 { 1 } else { splits };
    // Whole vectors.
    let per_split = positions.div_ceil(splits).next_multiple_of(RUN as u64);
    let splits = if per_split == 0 { 1 } else { positions.div_ceil(per_split) };
    [splits as u32, per_split as u32]
}

#[cfg(target_arch = "nvptx64")]
pub(in crate::conv1d) mod device;

#[cfg(test)]
mod tests;
