//! One-dimensional convolution: `y = act(w ⋆ x + b)` and its gradients.
//!
//! With stride s, dilation d, left padding p and groups of `in_channels / groups` = I input and
//! `out_channels / groups` = O output channels, for the channels of one group:
//!
//! ```text
//! forward  z[b, o, l]  = bias[o] + Σ_{i, k} x[b, i, l·s + k·d − p] · w[o, i, k],   y = act(z)
//! dgrad    dx[b, i, j] = Σ_{o, k} dz[b, o, (j + p − k·d) / s] · w[o, i, k]    where s divides
//! wgrad    dw[o, i, k] = Σ_{b, l} dz[b, o, l] · x[b, i, l·s + k·d − p]
//!          db[o]       = Σ_{b, l} dz[b, o, l]
//! ```
//!
//! Positions outside a tensor count as zeros. Every tensor has a layout of its own
//! ([`SequenceLayout`]), and so has the filter ([`FilterLayout`]). f16 and bf16 accumulate in f32
//! and are rounded once.

use core::fmt;

use crate::names::displayed_by_name;
use crate::tile_scheduler::div;

pub mod depthwise;
pub mod hopper;
#[cfg(all(target_arch = "nvptx64", kasmina_tier = "portable"))]
mod parked;
pub mod portable;

/// Which way round the channels and positions of a tensor lie in memory.
///
/// Exhaustive on purpose: whoever lays out data has to know every layout.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum SequenceLayout {
    /// `[batch, channels, length]`: PyTorch's layout.
    #[default]
    Ncl,
    /// `[batch, length, channels]`: channels last.
    Nlc,
}

impl SequenceLayout {
    /// Both layouts.
    pub const ALL: [Self; 2] = [Self::Ncl, Self::Nlc];

    /// Three letters, slowest axis first.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ncl => "ncl",
            Self::Nlc => "nlc",
        }
    }

    /// The extents in memory, slowest first.
    #[must_use]
    pub const fn extents(self, batch: usize, channels: usize, length: usize) -> [usize; 3] {
        match self {
            Self::Ncl => [batch, channels, length],
            Self::Nlc => [batch, length, channels],
        }
    }

    /// Elements from batch to batch, from channel to channel and from position to position, in a
    /// tensor whose rows (of positions or of channels) are `row_stride` elements apart.
    #[must_use]
    pub const fn strides(self, channels: u32, length: u32, row_stride: u64) -> [u64; 3] {
        match self {
            Self::Ncl => [row_stride.wrapping_mul(channels as u64), row_stride, 1],
            Self::Nlc => [row_stride.wrapping_mul(length as u64), 1, row_stride],
        }
    }
}

/// Which way round the filter lies in memory.
///
/// Exhaustive on purpose: whoever lays out data has to know every layout.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum FilterLayout {
    /// `[out_channels, in_channels / groups, kernel_size]`: PyTorch's layout.
    #[default]
    OutInTap,
    /// `[kernel_size, out_channels, in_channels / groups]`: a matrix for every tap.
    TapOutIn,
}

impl FilterLayout {
    /// Both layouts.
    pub const ALL: [Self; 2] = [Self::OutInTap, Self::TapOutIn];

    /// Three letters, slowest axis first.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::OutInTap => "oik",
            Self::TapOutIn => "koi",
        }
    }

    /// The extents in memory, slowest first.
    #[must_use]
    pub const fn extents(self, shape: &Conv1dShape) -> [usize; 3] {
        let (out, input) = (shape.out_channels as usize, shape.group_in() as usize);
        let taps = shape.kernel_size as usize;
        match self {
            Self::OutInTap => [out, input, taps],
            Self::TapOutIn => [taps, out, input],
        }
    }

    /// Elements from output channel to output channel, from input channel to input channel and
    /// from tap to tap, in a filter whose rows (of taps or of input channels) are `row_stride`
    /// elements apart.
    #[must_use]
    pub const fn strides(self, shape: &Conv1dShape, row_stride: u64) -> [u64; 3] {
        match self {
            Self::OutInTap => [row_stride.wrapping_mul(shape.group_in() as u64), row_stride, 1],
            Self::TapOutIn => [row_stride, 1, row_stride.wrapping_mul(shape.out_channels as u64)],
        }
    }
}

displayed_by_name!(SequenceLayout, FilterLayout);

/// Zeros before and after the input.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Padding {
    /// None.
    #[default]
    Valid,
    /// So many that the output has ⌈length / stride⌉ positions; where their number is odd, the
    /// additional one is on the right, as in PyTorch and TensorFlow.
    Same,
    /// These numbers.
    Explicit {
        /// Before the first position.
        left: u32,
        /// After the last position.
        right: u32,
    },
}

/// What a convolution is given as; [`Conv1dShape::new`] checks it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Conv1dExtents {
    /// Sequences.
    pub batch: usize,
    /// Channels of the input.
    pub in_channels: usize,
    /// Channels of the output.
    pub out_channels: usize,
    /// Positions of the input.
    pub in_length: usize,
    /// Taps of the filter.
    pub kernel_size: usize,
    /// Input positions from one output position to the next.
    pub stride: usize,
    /// Input positions from one tap to the next.
    pub dilation: usize,
    /// Zeros around the input.
    pub padding: Padding,
    /// Groups into which the channels are divided.
    pub groups: usize,
}

/// A checked convolution. Every product of extents that index arithmetic forms is in range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Conv1dShape {
    /// Sequences; may be 0.
    pub batch: u32,
    /// Channels of the input, at least 1.
    pub in_channels: u32,
    /// Channels of the output, at least 1.
    pub out_channels: u32,
    /// Positions of the input.
    pub in_length: u32,
    /// Positions of the output, at least 1.
    pub out_length: u32,
    /// Taps of the filter, at least 1.
    pub kernel_size: u32,
    /// Input positions from one output position to the next, at least 1.
    pub stride: u32,
    /// Input positions from one tap to the next, at least 1.
    pub dilation: u32,
    /// Zeros before the input.
    pub padding_left: u32,
    /// Zeros after the input.
    pub padding_right: u32,
    /// Groups; divides both numbers of channels.
    pub groups: u32,
}

/// Why there is no such convolution.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Conv1dFault {
    /// Something that must be at least 1 is 0.
    Zero {
        /// What is 0.
        quantity: &'static str,
    },
    /// The number of groups does not divide a number of channels.
    Groups {
        /// Which channels.
        quantity: &'static str,
        /// Their number.
        channels: usize,
        /// The number of groups.
        groups: usize,
    },
    /// The filter, with its gaps, is longer than the padded input.
    KernelTooLong {
        /// `(kernel_size − 1)·dilation + 1`
        span: u64,
        /// `in_length + left + right`
        padded: u64,
    },
    /// A size exceeds what kernels can address.
    Overflow {
        /// What is too large.
        quantity: &'static str,
    },
}

impl fmt::Display for Conv1dFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Zero { quantity } => write!(f, "{quantity} is 0; it must be at least 1"),
            Self::Groups { quantity, channels, groups } => write!(
                f,
                "{channels} {quantity} cannot be divided into {groups} groups; choose a number of \
                 groups that divides both numbers of channels"
            ),
            Self::KernelTooLong { span, padded } => write!(
                f,
                "the filter spans {span} positions and the padded input has {padded}; use more \
                 padding, a longer input, or less dilation"
            ),
            Self::Overflow { quantity } => {
                write!(f, "{quantity} exceeds {MAX_POSITIONS}; split the operation")
            }
        }
    }
}

impl core::error::Error for Conv1dFault {}

/// The largest extent: 32-bit signed arithmetic, with room for a tile beyond the end.
pub const MAX_POSITIONS: u32 = i32::MAX as u32 - (1 << 17);

impl Conv1dShape {
    /// The shape of a convolution.
    ///
    /// # Errors
    /// [`Conv1dFault`], for what no kernel could compute.
    pub fn new(extents: &Conv1dExtents) -> Result<Self, Conv1dFault> {
        let &Conv1dExtents { groups, .. } = extents;
        for (quantity, value) in [
            ("the number of input channels", extents.in_channels),
            ("the number of output channels", extents.out_channels),
            ("the kernel size", extents.kernel_size),
            ("the stride", extents.stride),
            ("the dilation", extents.dilation),
            ("the number of groups", groups),
        ] {
            if value == 0 {
                return Err(Conv1dFault::Zero { quantity });
            }
        }
        for (quantity, channels) in
            [("input channels", extents.in_channels), ("output channels", extents.out_channels)]
        {
            if !channels.is_multiple_of(groups) {
                return Err(Conv1dFault::Groups { quantity, channels, groups });
            }
        }
        let in_length = limited("the input length", extents.in_length)?;
        let kernel_size = limited("the kernel size", extents.kernel_size)?;
        let stride = limited("the stride", extents.stride)?;
        let dilation = limited("the dilation", extents.dilation)?;
        let span = (u64::from(kernel_size) - 1) * u64::from(dilation) + 1;
        let (left, right) = match extents.padding {
            Padding::Valid => (0, 0),
            Padding::Explicit { left, right } => (u64::from(left), u64::from(right)),
            Padding::Same => {
                let out = u64::from(in_length.div_ceil(stride)).max(1);
                let needed =
                    ((out - 1) * u64::from(stride) + span).saturating_sub(u64::from(in_length));
                (needed / 2, needed - needed / 2)
            }
        };
        let padded = u64::from(in_length) + left + right;
        if span > padded {
            return Err(Conv1dFault::KernelTooLong { span, padded });
        }
        let _ = limited_u64("the padded input length", padded)?;
        let out_length = (padded - span) / u64::from(stride) + 1;
        let shape = Self {
            batch: limited("the batch", extents.batch)?,
            in_channels: limited("the number of input channels", extents.in_channels)?,
            out_channels: limited("the number of output channels", extents.out_channels)?,
            in_length,
            out_length: limited_u64("the output length", out_length)?,
            kernel_size,
            stride,
            dilation,
            padding_left: limited_u64("the padding", left)?,
            padding_right: limited_u64("the padding", right)?,
            groups: limited("the number of groups", groups)?,
        };
        let product = |a: u32, b: u32| u64::from(a) * u64::from(b);
        let positions = product(shape.batch, in_length.max(shape.out_length));
        let _ = limited_u64("the batch times the length", positions)?;
        let columns = product(shape.group_in(), kernel_size);
        let _ = limited_u64("input channels per group times kernel size", columns)?;
        if product(shape.out_channels, shape.group_in()).saturating_mul(kernel_size.into())
            > i64::MAX as u64
        {
            return Err(Conv1dFault::Overflow { quantity: "the size of the filter" });
        }
        Ok(shape)
    }

    /// Input channels of a group.
    #[must_use]
    #[inline(always)]
    pub const fn group_in(&self) -> u32 {
        div(self.in_channels, self.groups)
    }

    /// Output channels of a group.
    #[must_use]
    #[inline(always)]
    pub const fn group_out(&self) -> u32 {
        div(self.out_channels, self.groups)
    }

    /// Whether every channel is convolved by itself.
    #[must_use]
    pub const fn is_depthwise(&self) -> bool {
        self.groups == self.in_channels && self.in_channels == self.out_channels
    }

    /// Elements of the filter.
    #[must_use]
    pub const fn filter_elements(&self) -> u64 {
        self.out_channels as u64 * self.group_in() as u64 * self.kernel_size as u64
    }

    /// Multiplications and additions of one pass, counted as two per tap.
    #[must_use]
    pub const fn flops(&self) -> u64 {
        let positions = self.batch as u64 * self.out_length as u64;
        2 * positions
            * self.out_channels as u64
            * (self.group_in() as u64 * self.kernel_size as u64)
    }

    /// What the forward pass gathers from the input.
    #[must_use]
    #[inline(always)]
    pub const fn forward_gather(&self) -> Gather {
        Gather {
            out_first: 0,
            out_step: 1,
            out_count: self.out_length,
            in_first: (self.padding_left as i32).wrapping_neg(),
            in_step: self.stride,
            tap_step: self.dilation,
            taps: self.kernel_size,
            first_tap: 0,
            tap_stride: 1,
        }
    }

    /// Classes into which the input positions fall by their remainder modulo the stride. Each is a
    /// convolution of stride 1 over taps of its own.
    #[must_use]
    #[inline(always)]
    pub const fn residues(&self) -> u32 {
        if self.stride < self.in_length { self.stride } else { self.in_length }
    }

    /// Taps of the class with the most of them.
    #[must_use]
    pub const fn most_dgrad_taps(&self) -> u32 {
        let period = div(self.stride, gcd(self.stride, self.dilation));
        self.kernel_size.div_ceil(period)
    }

    /// What dgrad gathers from the output's gradient for the input positions `j` with
    /// `j % stride == residue`; `residue < residues()`.
    ///
    /// A tap k contributes where s divides `residue + p − k·d`. With g = gcd(s, d) such k are
    /// `s/g` apart, and the position that they meet moves by `d/g`. The walk starts at the last of
    /// them, so that positions ascend.
    #[must_use]
    #[inline(always)]
    pub const fn dgrad_gather(&self, residue: u32) -> Gather {
        let (s, d) = (self.stride, self.dilation);
        let shifted = residue.wrapping_add(self.padding_left);
        let g = gcd(s, d);
        let (tap_period, tap_step) = (div(s, g), div(d, g));
        // The smallest tap that meets the class, found within one period.
        let wanted = rem(shifted, s);
        let (mut first, mut met) = (0, 0);
        while first < tap_period && first < self.kernel_size && met != wanted {
            first += 1;
            met = rem(met.wrapping_add(rem(d, s)), s);
        }
        let found = met == wanted && first < tap_period && first < self.kernel_size;
        let taps = if found { div(self.kernel_size - 1 - first, tap_period) + 1 } else { 0 };
        let last = if found { first + (taps - 1) * tap_period } else { 0 };
        // Exact, as s divides it: 64 bits, as the filter may reach far beyond the padding.
        let reach = shifted as i64 - last as i64 * d as i64;
        Gather {
            out_first: residue,
            out_step: s,
            out_count: div(self.in_length.wrapping_sub(residue).wrapping_add(s - 1), s),
            in_first: if found { exact_div(reach, s) } else { 0 },
            in_step: 1,
            tap_step,
            taps,
            first_tap: last,
            tap_stride: (tap_period as i32).wrapping_neg(),
        }
    }
}

/// A dense walk: for q in `0..out_count`,
/// `out[out_first + q·out_step] = Σ_{t < taps} in[in_first + q·in_step + t·tap_step]·w[first_tap + t·tap_stride]`,
/// with positions of `in` beyond its ends counting as zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gather {
    /// First position that is written.
    pub out_first: u32,
    /// From one to the next.
    pub out_step: u32,
    /// How many.
    pub out_count: u32,
    /// Position of `in` that tap 0 of the walk meets for q = 0.
    pub in_first: i32,
    /// From q to q.
    pub in_step: u32,
    /// From tap to tap.
    pub tap_step: u32,
    /// Taps of the walk; 0 where no tap of the filter meets these positions.
    pub taps: u32,
    /// The filter's tap that is the walk's first.
    pub first_tap: u32,
    /// From tap to tap of the walk, in taps of the filter.
    pub tap_stride: i32,
}

fn limited(quantity: &'static str, value: usize) -> Result<u32, Conv1dFault> {
    limited_u64(quantity, value as u64)
}

fn limited_u64(quantity: &'static str, value: u64) -> Result<u32, Conv1dFault> {
    if value > u64::from(MAX_POSITIONS) {
        return Err(Conv1dFault::Overflow { quantity });
    }
    Ok(value as u32)
}

/// `a % b`, 0 where `b` is 0: a plain `%` would leave a panic function in the module.
#[inline(always)]
pub(crate) const fn rem(a: u32, b: u32) -> u32 {
    a.wrapping_sub(div(a, b).wrapping_mul(b))
}

#[inline(always)]
const fn gcd(a: u32, b: u32) -> u32 {
    let (mut a, mut b) = (a, b);
    while b != 0 {
        (a, b) = (b, rem(a, b));
    }
    a
}

/// `value / by`, which leaves no remainder. The quotient fits: positions are bounded.
#[inline(always)]
const fn exact_div(value: i64, by: u32) -> i32 {
    let magnitude = match value.unsigned_abs().checked_div(by as u64) {
        Some(quotient) => quotient as i32,
        None => 0,
    };
    if value < 0 { magnitude.wrapping_neg() } else { magnitude }
}

#[cfg(test)]
mod tests;
