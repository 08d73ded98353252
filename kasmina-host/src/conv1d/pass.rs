//! What a tier is told of a pass, and which tiers serve it.

use kasmina_kernels::abi::{DType, Tier};
use kasmina_kernels::activation::Activation;
use kasmina_kernels::conv1d::{Conv1dShape, FilterLayout, SequenceLayout};

use super::{hopper, parts};
use crate::config::KernelConfig;
use crate::error::Obstacle;

/// A tensor of sequences in device memory; `address` is 0 for one in host memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sequence {
    /// Its name in errors.
    pub(crate) operand: &'static str,
    pub(crate) address: u64,
    pub(crate) layout: SequenceLayout,
    /// Elements from row to row: of positions in NCL, of channels in NLC.
    pub(crate) row_stride: u64,
}

/// A filter in device memory; `address` is 0 for one in host memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Filter {
    pub(crate) address: u64,
    pub(crate) layout: FilterLayout,
    /// Elements from row to row: of taps, or of input channels.
    pub(crate) row_stride: u64,
}

/// `y = act(w ⋆ x + b)`
#[derive(Clone, Copy, Debug)]
pub(crate) struct ForwardPass {
    pub(crate) shape: Conv1dShape,
    pub(crate) dtype: DType,
    pub(crate) x: Sequence,
    pub(crate) w: Filter,
    /// Device address of `[out_channels]`; 0 for none.
    pub(crate) bias: u64,
    pub(crate) activation: Activation,
    pub(crate) y: Sequence,
    /// Whether tiles in shared memory, and what else reuses loads, may be used.
    pub(crate) tiled: bool,
}

/// The gradient of the input.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DgradPass {
    pub(crate) shape: Conv1dShape,
    pub(crate) dtype: DType,
    pub(crate) dz: Sequence,
    pub(crate) w: Filter,
    pub(crate) dx: Sequence,
    /// As that of [`ForwardPass`].
    pub(crate) tiled: bool,
}

/// The gradients of filter and bias, at least one of them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct WgradPass {
    pub(crate) shape: Conv1dShape,
    pub(crate) dtype: DType,
    pub(crate) x: Sequence,
    pub(crate) dz: Sequence,
    pub(crate) dw: Option<Filter>,
    /// Device address of `[out_channels]`.
    pub(crate) db: Option<u64>,
    /// Whether both are added to what is there.
    pub(crate) accumulate: bool,
}

/// `dz = dy · act'(z)`
#[derive(Clone, Copy, Debug)]
pub(crate) struct ActivationGradPass {
    /// Batch, channels, length.
    pub(crate) extents: [u32; 3],
    pub(crate) dtype: DType,
    pub(crate) activation: Activation,
    pub(crate) z: Sequence,
    pub(crate) dy: Sequence,
    pub(crate) dz: Sequence,
}

impl ForwardPass {
    /// Why `tier` cannot serve this pass, on a device that has the tier.
    pub(crate) fn obstacle(&self, tier: Tier, config: &KernelConfig) -> Option<Obstacle> {
        (tier == Tier::Hopper).then(|| hopper::forward_obstacle(self, config)).flatten()
    }

    /// Whether `tier`, which serves it, is expected to be faster than those that ask for less.
    pub(crate) fn pays(&self, tier: Tier, multiprocessors: u32) -> bool {
        tier != Tier::Hopper
            || self.dtype != DType::F32
            || parts::forward_pays(self, multiprocessors)
    }
}

impl DgradPass {
    /// Why `tier` cannot serve this pass, on a device that has the tier.
    pub(crate) fn obstacle(&self, tier: Tier, config: &KernelConfig) -> Option<Obstacle> {
        (tier == Tier::Hopper).then(|| hopper::dgrad_obstacle(self, config)).flatten()
    }

    /// Whether `tier`, which serves it, is expected to be faster than those that ask for less.
    pub(crate) fn pays(&self, tier: Tier, multiprocessors: u32) -> bool {
        tier != Tier::Hopper || self.dtype != DType::F32 || parts::dgrad_pays(self, multiprocessors)
    }
}

impl WgradPass {
    /// Why `tier` cannot serve this pass, on a device that has the tier.
    pub(crate) fn obstacle(&self, tier: Tier, config: &KernelConfig) -> Option<Obstacle> {
        (tier == Tier::Hopper).then(|| hopper::wgrad_obstacle(self, config)).flatten()
    }

    /// As that of [`ForwardPass`].
    pub(crate) fn pays(&self, tier: Tier, multiprocessors: u32) -> bool {
        tier != Tier::Hopper || self.dtype != DType::F32 || parts::wgrad_pays(self, multiprocessors)
    }
}
