//! The portable tier: which of its kernels serves a pass, and their launches.

use kasmina_kernels::activation::Activation;
use kasmina_kernels::conv1d::depthwise::{
    self, DepthwiseParams, DepthwiseWgradParams, log2_row_threads, ncl_blocks, nlc_blocks,
    serves_nlc,
};
use kasmina_kernels::conv1d::portable::{
    ActivationGradParams, Direction, GatherParams, GatherPlan, Strided, StridedFilter,
    WgradFinalParams, WgradParams, WgradPlan, element_blocks, kernels, partial_values,
    prefers_direct,
};
use kasmina_kernels::conv1d::{Conv1dShape, SequenceLayout};

use super::pass::{ActivationGradPass, DgradPass, Filter, ForwardPass, Sequence, WgradPass};
use crate::error::{Error, Result};
use crate::gpu::{Launch, Stream};
use std::sync::Arc;

/// The driver's limit on the blocks of a grid.
const MAX_BLOCKS: u64 = i32::MAX as u64;

/// A gather pass: forward, or dgrad as one.
pub(super) struct GatherPass<'a> {
    pub(super) shape: &'a Conv1dShape,
    pub(super) direction: Direction,
    pub(super) input: Strided,
    pub(super) filter: StridedFilter,
    pub(super) bias: u64,
    pub(super) activation: Activation,
    pub(super) output: Strided,
    dtype: kasmina_kernels::abi::DType,
    tiled: bool,
}

impl<'a> GatherPass<'a> {
    pub(super) fn forward(pass: &'a ForwardPass) -> Self {
        let shape = &pass.shape;
        Self {
            shape,
            direction: Direction::Forward,
            input: strided(pass.x, shape.in_channels, shape.in_length),
            filter: strided_filter(pass.w, shape),
            bias: pass.bias,
            activation: pass.activation,
            output: strided(pass.y, shape.out_channels, shape.out_length),
            dtype: pass.dtype,
            tiled: pass.tiled,
        }
    }

    pub(super) fn dgrad(pass: &'a DgradPass) -> Self {
        let shape = &pass.shape;
        Self {
            shape,
            direction: Direction::Dgrad,
            input: strided(pass.dz, shape.out_channels, shape.out_length),
            filter: strided_filter(pass.w, shape),
            bias: 0,
            activation: Activation::None,
            output: strided(pass.dx, shape.in_channels, shape.in_length),
            dtype: pass.dtype,
            tiled: pass.tiled,
        }
    }

    /// What the depthwise kernels over contiguous positions take, where they serve the pass.
    pub(super) fn depthwise_rows(&self) -> Option<DepthwiseParams> {
        let params = self.depthwise()?;
        depthwise::serves_ncl(&params, self.dtype).then_some(params)
    }

    /// What the gather and direct kernels take.
    fn params(&self) -> GatherParams {
        let coalesced = self.output.channel == 1;
        GatherParams {
            input: self.input,
            output: self.output,
            filter: self.filter,
            bias: self.bias,
            shape: *self.shape,
            plan: GatherPlan::new(self.shape, self.direction),
            dgrad: u32::from(self.direction == Direction::Dgrad),
            activation: self.activation as u32,
            // Without tiling: the order that is not coalesced, as the comparison wants it.
            channels_first: u32::from(coalesced == self.tiled),
            reserved: 0,
        }
    }

    /// What the gather kernel takes, and its tiles.
    pub(super) fn gather_params(&self) -> Result<(GatherParams, u32)> {
        let params = self.params();
        Ok((params, checked_blocks(params.plan.blocks(self.shape))?))
    }

    /// Estimated cycles of the gather kernel for f32.
    pub(super) fn f32_cost(&self, multiprocessors: u32) -> u64 {
        let plan = GatherPlan::new(self.shape, self.direction);
        plan.f32_cost(self.shape, self.direction, multiprocessors)
    }

    /// What the depthwise kernels for a stride of 1 take, if they are allowed.
    fn depthwise(&self) -> Option<DepthwiseParams> {
        let shape = self.shape;
        if !self.tiled || !depthwise::serves(shape) {
            return None;
        }
        let last = shape.kernel_size - 1;
        // Backward the taps are met from the last to the first.
        let (first, first_tap, step, in_length, out_length) = match self.direction {
            Direction::Forward => {
                (-(shape.padding_left as i32), 0, 1, shape.in_length, shape.out_length)
            }
            Direction::Dgrad => {
                let first = shape.padding_left as i32 - last as i32;
                (first, last, -1, shape.out_length, shape.in_length)
            }
        };
        let size = self.dtype.size() as u64;
        Some(DepthwiseParams {
            input: self.input,
            output: self.output,
            filter: self.filter.address + u64::from(first_tap) * self.filter.tap * size,
            filter_channel: self.filter.out,
            filter_tap: (self.filter.tap as i64 * step) as u64,
            bias: self.bias,
            batch: shape.batch,
            channels: shape.in_channels,
            in_length,
            out_length,
            first,
            taps: shape.kernel_size,
            activation: self.activation as u32,
            log2_row_threads: log2_row_threads(out_length),
        })
    }
}

/// Enqueues a forward pass whose output has elements.
pub(super) fn forward(launch: &Launch<'_>, pass: &ForwardPass) -> Result<()> {
    gather(launch, &GatherPass::forward(pass))
}

/// Enqueues a dgrad pass whose result has elements.
pub(super) fn dgrad(launch: &Launch<'_>, pass: &DgradPass) -> Result<()> {
    gather(launch, &GatherPass::dgrad(pass))
}

fn gather(launch: &Launch<'_>, pass: &GatherPass<'_>) -> Result<()> {
    let &GatherPass { shape, direction, .. } = pass;
    let kernels = kernels(pass.dtype);
    if let Some(params) = pass.depthwise_rows() {
        let blocks = checked_blocks(ncl_blocks(&params))?;
        return launch.run(kernels.depthwise_ncl, blocks, &params);
    }
    if let Some(params) = pass.depthwise().filter(|params| serves_nlc(params, pass.dtype)) {
        let params = DepthwiseParams { log2_row_threads: 0, ..params };
        let blocks = checked_blocks(nlc_blocks(&params))?;
        return launch.run(kernels.depthwise_nlc, blocks, &params);
    }
    let params = pass.params();
    let direct = !pass.tiled || prefers_direct(shape, direction);
    if direct {
        let (channels, length) = if direction == Direction::Dgrad {
            (shape.in_channels, shape.in_length)
        } else {
            (shape.out_channels, shape.out_length)
        };
        let elements = u64::from(shape.batch) * u64::from(channels) * u64::from(length);
        let blocks = checked_blocks(element_blocks(elements))?;
        return launch.run(kernels.direct, blocks, &params);
    }
    let (params, blocks) = pass.gather_params()?;
    launch.run(kernels.gather, blocks, &params)
}

/// Enqueues a wgrad pass.
pub(super) fn wgrad(launch: &Launch<'_>, stream: &Arc<Stream>, pass: &WgradPass) -> Result<()> {
    let shape = &pass.shape;
    if shape.batch == 0 {
        // The sum of nothing.
        return finish_wgrad(launch, pass, 0, 0);
    }
    let kernels = kernels(pass.dtype);
    let sm_count = stream.gpu().capability().sm_count;
    let params = wgrad_params(pass, sm_count);
    let [splits, positions_per_split] =
        depthwise::wgrad_splits(shape, pass.x.layout == SequenceLayout::Nlc, sm_count);
    let is_depthwise = shape.is_depthwise();
    let splits = if is_depthwise { splits } else { params.plan.splits };
    let bytes = partial_bytes(shape, splits);
    let bytes = bytes.and_then(|bytes| usize::try_from(bytes).ok());
    let overflow = Error::Overflow {
        op: launch.operation.name(),
        quantity: "the size of the partial sums",
        limit: isize::MAX as u64,
    };
    // Freed in the stream's order, so after the kernels that use it.
    let partials = stream.allocate(bytes.ok_or(overflow)?)?;
    let address = partials.address();
    if is_depthwise {
        let params = DepthwiseWgradParams {
            x: params.x,
            dz: params.dz,
            partials: address,
            shape: *shape,
            splits,
            along_channels: u32::from(pass.x.layout == SequenceLayout::Nlc),
            positions_per_split,
        };
        launch.run(kernels.depthwise_wgrad, checked_blocks(params.blocks())?, &params)?;
    } else {
        let params = WgradParams { partials: address, ..params };
        launch.run(kernels.wgrad, checked_blocks(params.plan.blocks(shape))?, &params)?;
    }
    finish_wgrad(launch, pass, address, splits)
}

/// What the wgrad kernel takes on a GPU of so many multiprocessors, with partial sums nowhere yet.
pub(super) fn wgrad_params(pass: &WgradPass, sm_count: u32) -> WgradParams {
    let shape = &pass.shape;
    WgradParams {
        x: strided(pass.x, shape.in_channels, shape.in_length),
        dz: strided(pass.dz, shape.out_channels, shape.out_length),
        partials: 0,
        shape: *shape,
        plan: WgradPlan::new(shape, sm_count),
    }
}

/// Bytes of the partial sums of `splits` blocks.
pub(super) fn partial_bytes(shape: &Conv1dShape, splits: u32) -> Option<u64> {
    partial_values(shape, splits).checked_mul(4)
}

/// What the kernel takes that adds up the partial sums of `splits` blocks, which lie at `partials` as
/// [`partial_values`] says, into the wanted gradients, and its blocks.
pub(super) fn final_params(
    pass: &WgradPass,
    partials: u64,
    splits: u32,
) -> Result<(WgradFinalParams, u32)> {
    let shape = &pass.shape;
    let nowhere = StridedFilter { address: 0, out: 0, input: 0, tap: 0 };
    let params = WgradFinalParams {
        partials,
        dw: pass.dw.map_or(nowhere, |dw| strided_filter(dw, shape)),
        db: pass.db.unwrap_or(0),
        filter_elements: shape.filter_elements(),
        out_channels: shape.out_channels,
        group_in: shape.group_in(),
        kernel_size: shape.kernel_size,
        splits,
        accumulate: u32::from(pass.accumulate),
        reserved: 0,
    };
    let blocks = element_blocks(shape.filter_elements() + u64::from(shape.out_channels));
    Ok((params, checked_blocks(blocks)?))
}

fn finish_wgrad(launch: &Launch<'_>, pass: &WgradPass, partials: u64, splits: u32) -> Result<()> {
    let (params, blocks) = final_params(pass, partials, splits)?;
    launch.run(kernels(pass.dtype).wgrad_final, blocks, &params)
}

/// Enqueues `dz = dy · act'(z)` over tensors that have elements.
pub(super) fn activation_grad(launch: &Launch<'_>, pass: &ActivationGradPass) -> Result<()> {
    let [batch, channels, length] = pass.extents;
    let params = ActivationGradParams {
        z: strided(pass.z, channels, length),
        dy: strided(pass.dy, channels, length),
        dz: strided(pass.dz, channels, length),
        batch,
        channels,
        length,
        activation: pass.activation as u32,
    };
    let elements = u64::from(batch) * u64::from(channels) * u64::from(length);
    let blocks = checked_blocks(element_blocks(elements))?;
    launch.run(kernels(pass.dtype).activation_grad, blocks, &params)
}

fn strided(sequence: Sequence, channels: u32, length: u32) -> Strided {
    let [batch, channel, position] = sequence.layout.strides(channels, length, sequence.row_stride);
    Strided { address: sequence.address, batch, channel, position }
}

fn strided_filter(filter: Filter, shape: &Conv1dShape) -> StridedFilter {
    let [out, input, tap] = filter.layout.strides(shape, filter.row_stride);
    StridedFilter { address: filter.address, out, input, tap }
}

pub(super) fn checked_blocks(blocks: u64) -> Result<u32> {
    let overflow =
        Error::Overflow { op: "conv1d", quantity: "the number of blocks", limit: MAX_BLOCKS };
    u32::try_from(blocks).ok().filter(|&blocks| u64::from(blocks) <= MAX_BLOCKS).ok_or(overflow)
}
