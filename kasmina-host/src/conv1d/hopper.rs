//! The Hopper tier: which passes it serves, and their launches.

use std::sync::Arc;

use kasmina_kernels::abi::{DType, Kernel, TensorMap};
use kasmina_kernels::activation::{Activation, EpilogueActivation};
use kasmina_kernels::conv1d::depthwise::DepthwiseParams;
use kasmina_kernels::conv1d::hopper::depthwise;
use kasmina_kernels::conv1d::hopper::gather::{self, GatherParams, Problem};
use kasmina_kernels::conv1d::hopper::pack::{self, PackParams, Rows};
use kasmina_kernels::conv1d::hopper::wgrad::sum::{self, SumParams};
use kasmina_kernels::conv1d::hopper::wgrad::{self, Split, WgradParams};
use kasmina_kernels::conv1d::hopper::{MAX_STEP, SLAB_N, serves};
use kasmina_kernels::conv1d::{Conv1dShape, Gather, SequenceLayout};
use kasmina_kernels::gemm::hopper::CONSUMER_M;
use kasmina_kernels::tile_scheduler::TileScheduler;

use super::pass::{DgradPass, Filter, ForwardPass, Sequence, WgradPass};
use super::{parts, portable};
use crate::config::KernelConfig;
use crate::error::{Error, Obstacle, Result};
use crate::gpu::{Launch, Stream};
use crate::tensor_map::SequenceMap;

/// TMA wants addresses and strides in multiples of this many bytes.
const TMA_ALIGN: u64 = 16;
/// TMA wants strides below this many bytes.
const TMA_MAX_STRIDE: u64 = 1 << 40;
/// The driver's limit on the blocks of a grid.
const MAX_BLOCKS: u64 = i32::MAX as u64;
/// More parts of a filter's gradient than any GPU has multiprocessors.
pub(super) const MAX_PARTS: u32 = 1 << 16;
/// Bytes of an element of the types that it serves.
const SIZE: u64 = 2;

/// A tensor of sequences as TMA addresses it: its extents and where they lie.
#[derive(Clone, Copy)]
struct Volume {
    sequence: Sequence,
    channels: u32,
    length: u32,
    batch: u32,
    groups: u32,
    dtype: DType,
}

/// Every how many positions, and from which on, a map shows of a tensor.
#[derive(Clone, Copy)]
struct Positions {
    first: u32,
    step: u32,
    count: u32,
}

impl Volume {
    const fn row_bytes(&self) -> u64 {
        SIZE * match self.sequence.layout {
            SequenceLayout::Ncl => self.length as u64,
            SequenceLayout::Nlc => self.channels as u64,
        }
    }

    /// Why TMA cannot address it.
    fn obstacle(&self) -> Option<Obstacle> {
        let Sequence { operand, address, row_stride, layout } = self.sequence;
        if !address.is_multiple_of(TMA_ALIGN) {
            return Some(Obstacle::Address { operand });
        }
        let bytes = SIZE * row_stride;
        let [batch, ..] = layout.strides(self.channels, self.length, row_stride);
        let fits = bytes.is_multiple_of(TMA_ALIGN) && SIZE * batch < TMA_MAX_STRIDE;
        if !fits {
            return Some(Obstacle::RowStride { operand, bytes });
        }
        // Groups follow each other in a row of channels. A map has that distance for one group too.
        let group_bytes = SIZE * u64::from(self.channels / self.groups);
        let ragged = layout == SequenceLayout::Nlc && !group_bytes.is_multiple_of(TMA_ALIGN);
        ragged.then_some(Obstacle::RowLength { operand, bytes: group_bytes })
    }

    /// The same for one that is stored to.
    fn store_obstacle(&self) -> Option<Obstacle> {
        let (operand, bytes) = (self.sequence.operand, self.row_bytes());
        self.obstacle().or_else(|| {
            // A store clips its box to whole pieces of 16 bytes.
            (!bytes.is_multiple_of(TMA_ALIGN)).then_some(Obstacle::RowLength { operand, bytes })
        })
    }

    /// Its map with these boxes over the two inner axes and steps between positions.
    fn map(
        &self,
        boxes: [u32; 2],
        in_step: u32,
        positions: Positions,
        swizzled: bool,
    ) -> Result<TensorMap> {
        let Sequence { address, row_stride, layout, .. } = self.sequence;
        let group_channels = self.channels / self.groups;
        let [batch, channel, position] =
            layout.strides(self.channels, self.length, row_stride).map(|stride| SIZE * stride);
        let group = channel * u64::from(group_channels);
        let (inner, outer, outer_stride) = match layout {
            SequenceLayout::Ncl => (self.length, group_channels, channel),
            SequenceLayout::Nlc => {
                (group_channels, positions.count, position * u64::from(positions.step))
            }
        };
        let key = SequenceMap {
            address: address + position * u64::from(positions.first),
            extents: [inner, outer, self.batch, self.groups],
            strides_bytes: [outer_stride, batch, group],
            boxes,
            steps: [1, if layout == SequenceLayout::Nlc { in_step } else { 1 }],
            dtype: self.dtype,
            swizzled,
        };
        key.encode()
    }

    /// All its positions.
    const fn positions(&self) -> Positions {
        Positions { first: 0, step: 1, count: self.length }
    }
}

const fn volume(sequence: Sequence, shape: &Conv1dShape, is_input: bool, dtype: DType) -> Volume {
    let (channels, length) = if is_input {
        (shape.in_channels, shape.in_length)
    } else {
        (shape.out_channels, shape.out_length)
    };
    Volume { sequence, channels, length, batch: shape.batch, groups: shape.groups, dtype }
}

/// Positions from the first tap to the last.
const fn filter_span(shape: &Conv1dShape) -> u64 {
    (shape.kernel_size as u64 - 1) * shape.dilation as u64
}

/// What holds for every pass.
fn general_obstacle(dtype: DType, shape: &Conv1dShape, config: &KernelConfig) -> Option<Obstacle> {
    if !serves(dtype) {
        return Some(Obstacle::DType(dtype));
    }
    if !config.tma_enabled() {
        return Some(Obstacle::TmaDisabled);
    }
    // Depthwise there is no product of matrices; without tiling, the baseline is wanted.
    (shape.is_depthwise() && shape.groups > 1 || !config.tiling_enabled())
        .then_some(Obstacle::Operation)
}

/// A forward pass, or dgrad as one.
struct GatherPass<'a> {
    shape: &'a Conv1dShape,
    gather: Gather,
    input: Volume,
    output: Volume,
    /// Channels of a group.
    channels: [u32; 2],
    bias: u64,
    activation: Activation,
    /// No walk of the pass has a first and a last tap that meet positions further apart.
    reach: u64,
}

impl<'a> GatherPass<'a> {
    const fn forward(pass: &'a ForwardPass) -> Self {
        let shape = &pass.shape;
        Self {
            shape,
            gather: shape.forward_gather(),
            input: volume(pass.x, shape, true, pass.dtype),
            output: volume(pass.y, shape, false, pass.dtype),
            channels: [shape.group_in(), shape.group_out()],
            bias: pass.bias,
            activation: pass.activation,
            reach: filter_span(shape),
        }
    }

    const fn dgrad(pass: &'a DgradPass, residue: u32) -> Self {
        let shape = &pass.shape;
        Self {
            shape,
            gather: shape.dgrad_gather(residue),
            input: volume(pass.dz, shape, false, pass.dtype),
            output: volume(pass.dx, shape, true, pass.dtype),
            channels: [shape.group_out(), shape.group_in()],
            bias: 0,
            activation: Activation::None,
            reach: filter_span(shape) / shape.stride as u64,
        }
    }

    const fn problem(&self) -> Problem {
        let counts = [self.shape.batch, self.shape.groups];
        Problem { reach: self.reach, ..Problem::new(&self.gather, counts, self.channels) }
    }

    const fn layouts(&self) -> [SequenceLayout; 2] {
        [self.input.sequence.layout, self.output.sequence.layout]
    }

    fn obstacle(&self) -> Option<Obstacle> {
        let scattered =
            self.output.sequence.layout == SequenceLayout::Ncl && self.gather.out_step > 1;
        // The choice among kernels depends on the GPU, whether there is one does not.
        let selected = gather::select(self.input.dtype, self.layouts(), &self.problem(), 1);
        (scattered || selected.is_none() || self.gather.out_step > MAX_STEP)
            .then_some(Obstacle::Operation)
            .or_else(|| self.input.obstacle())
            .or_else(|| self.output.store_obstacle())
    }

    /// Enqueues the pass with a packed filter.
    fn run(&self, launch: &Launch<'_>, packed: &Packed) -> Result<()> {
        let [_, out_channels] = self.channels;
        let (gather, groups) = (&self.gather, self.shape.groups);
        let layouts = self.layouts();
        let sm_count = launch.stream.gpu().capability().sm_count;
        let dtype = self.input.dtype;
        let unsupported =
            || Error::DType { op: launch.operation.name(), expected: DType::BF16, got: dtype };
        let selected =
            gather::select(dtype, layouts, &self.problem(), sm_count).ok_or_else(unsupported)?;
        let walk = gather::Walk::new(gather, self.channels, selected);
        let tiles = walk.scheduler(selected, self.shape.batch, groups);
        // The same order, and `group_m · tiles_n` is no more than the number of tiles.
        let tiles = TileScheduler { group_m: tiles.group_m.min(tiles.tiles_m), ..tiles };
        let blocks = u64::from(tiles.tiles_m) * u64::from(tiles.tiles_n);
        let blocks =
            checked_blocks(launch, blocks)?.min(sm_count * selected.blocks_per_multiprocessor());
        let [in_box, w_box] = selected.boxes(walk.in_step);
        let written =
            Positions { first: gather.out_first, step: gather.out_step, count: gather.out_count };
        let params = GatherParams {
            in_map: self.input.map(in_box, walk.in_step, self.input.positions(), true)?,
            w_map: packed.map(w_box, dtype)?,
            out_map: self.output.map([SLAB_N, CONSUMER_M], 1, written, true)?,
            bias: self.bias,
            group_out: out_channels,
            out_channels: out_channels * groups,
            tiles,
            walk,
            activation: EpilogueActivation::new(self.activation),
            reserved: 0,
        };
        launch.run(&selected.kernel, blocks, &params)
    }
}

/// A filter as a matrix for every tap and group.
struct Packed {
    address: u64,
    /// Elements from row to row.
    stride: u64,
    rows: u32,
    columns: u32,
    taps: u32,
    groups: u32,
}

impl Packed {
    fn map(&self, boxes: [u32; 2], dtype: DType) -> Result<TensorMap> {
        let row = SIZE * self.stride;
        let group = row * u64::from(self.rows);
        let key = SequenceMap {
            address: self.address,
            extents: [self.columns, self.rows, self.taps, self.groups],
            strides_bytes: [row, group * u64::from(self.groups), group],
            boxes,
            steps: [1, 1],
            dtype,
            swizzled: true,
        };
        key.encode()
    }
}

/// Packs the filter, if it is not as it should be, and calls `enqueue` with it.
fn with_packed(
    launch: &Launch<'_>,
    stream: &Arc<Stream>,
    shape: &Conv1dShape,
    filter: Filter,
    rows: Rows,
    enqueue: impl FnOnce(&Packed) -> Result<()>,
) -> Result<()> {
    let Filter { address, layout, row_stride, .. } = filter;
    let params = PackParams::new(shape, rows, [address, 0], layout, row_stride);
    let packed = |address, stride| Packed {
        address,
        stride,
        rows: params.rows(),
        columns: params.columns(),
        taps: params.taps,
        groups: params.groups,
    };
    let aligned = address.is_multiple_of(TMA_ALIGN);
    if rows == Rows::Out && aligned && pack::is_packed(shape, layout, row_stride) {
        return enqueue(&packed(address, row_stride));
    }
    let bytes = params.packed_elements().checked_mul(SIZE);
    let bytes = bytes.and_then(|bytes| usize::try_from(bytes).ok());
    let overflow = Error::Overflow {
        op: launch.operation.name(),
        quantity: "the size of the packed filter",
        limit: isize::MAX as u64,
    };
    let blocks = checked_blocks(launch, params.blocks())?;
    // Freed in the stream's order, so after the kernels that use it.
    let buffer = stream.allocate(bytes.ok_or(overflow)?)?;
    let params = PackParams { packed: buffer.address(), ..params };
    launch.run(&pack::KERNEL, blocks, &params)?;
    enqueue(&packed(buffer.address(), params.packed_stride))
}

/// A depthwise kernel and what it takes, where it serves a pass.
type Depthwise = (&'static Kernel<DepthwiseParams>, DepthwiseParams);

fn depthwise(dtype: DType, pass: &portable::GatherPass<'_>) -> Option<Depthwise> {
    let kernel = depthwise::kernel(dtype)?;
    Some(kernel).zip(pass.depthwise_rows().filter(depthwise::serves))
}

fn run_depthwise(launch: &Launch<'_>, (kernel, params): Depthwise) -> Result<()> {
    launch.run(kernel, checked_blocks(launch, depthwise::blocks(&params))?, &params)
}

/// Why it cannot serve a forward pass.
pub(super) fn forward_obstacle(pass: &ForwardPass, config: &KernelConfig) -> Option<Obstacle> {
    if depthwise(pass.dtype, &portable::GatherPass::forward(pass)).is_some() {
        return None;
    }
    if pass.dtype == DType::F32 {
        return parts::forward_obstacle(pass, config);
    }
    // A tensor without elements has no map, though padding alone gives an output.
    let empty = pass.shape.in_length == 0;
    general_obstacle(pass.dtype, &pass.shape, config)
        .or_else(|| empty.then_some(Obstacle::Operation))
        .or_else(|| GatherPass::forward(pass).obstacle())
}

/// Why it cannot serve a dgrad pass.
pub(super) fn dgrad_obstacle(pass: &DgradPass, config: &KernelConfig) -> Option<Obstacle> {
    if depthwise(pass.dtype, &portable::GatherPass::dgrad(pass)).is_some() {
        return None;
    }
    if pass.dtype == DType::F32 {
        return parts::dgrad_obstacle(pass, config);
    }
    general_obstacle(pass.dtype, &pass.shape, config)
        .or_else(|| GatherPass::dgrad(pass, 0).obstacle())
}

/// Why it cannot serve a wgrad pass.
pub(super) fn wgrad_obstacle(pass: &WgradPass, config: &KernelConfig) -> Option<Obstacle> {
    if pass.dtype == DType::F32 {
        return parts::wgrad_obstacle(pass, config);
    }
    let shape = &pass.shape;
    let operands =
        [volume(pass.x, shape, true, pass.dtype), volume(pass.dz, shape, false, pass.dtype)];
    // An empty batch or sequence has no steps; the gradient of the filter is zeros.
    let unserved = pass.dw.is_none()
        || shape.stride > MAX_STEP
        || shape.batch == 0
        || shape.in_length == 0
        || shape.filter_elements() > MAX_BLOCKS;
    general_obstacle(pass.dtype, shape, config)
        .or_else(|| unserved.then_some(Obstacle::Operation))
        .or_else(|| operands.iter().find_map(Volume::obstacle))
        .or_else(|| {
            let counted = wgrad::select(pass.dtype, [pass.dz.layout, pass.x.layout], shape)
                .and_then(|selected| steps(shape, &wgrad::Walk::new(shape, selected)))
                .and_then(|(tiles, k_blocks)| Split::new(tiles, k_blocks, MAX_PARTS));
            counted.is_none().then_some(Obstacle::Operation)
        })
}

/// Tiles of a filter's gradient, and steps over positions of each.
pub(super) fn steps(shape: &Conv1dShape, walk: &wgrad::Walk) -> Option<(u32, u32)> {
    let tiles = u64::from(shape.groups) * u64::from(walk.tiles_m) * u64::from(walk.tiles_n);
    Some((u32::try_from(tiles).ok()?, walk.batch.checked_mul(walk.sequence_blocks)?))
}

/// Enqueues a forward pass whose output has elements.
pub(super) fn forward(launch: &Launch<'_>, stream: &Arc<Stream>, pass: &ForwardPass) -> Result<()> {
    if let Some(rows) = depthwise(pass.dtype, &portable::GatherPass::forward(pass)) {
        return run_depthwise(launch, rows);
    }
    if pass.dtype == DType::F32 {
        return parts::forward(launch, stream, pass);
    }
    with_packed(launch, stream, &pass.shape, pass.w, Rows::Out, |packed| {
        GatherPass::forward(pass).run(launch, packed)
    })
}

/// Enqueues a dgrad pass whose result has elements: a gather for every residue of the stride.
pub(super) fn dgrad(launch: &Launch<'_>, stream: &Arc<Stream>, pass: &DgradPass) -> Result<()> {
    if let Some(rows) = depthwise(pass.dtype, &portable::GatherPass::dgrad(pass)) {
        return run_depthwise(launch, rows);
    }
    if pass.dtype == DType::F32 {
        return parts::dgrad(launch, stream, pass);
    }
    with_packed(launch, stream, &pass.shape, pass.w, Rows::In, |packed| {
        (0..pass.shape.residues())
            .try_for_each(|residue| GatherPass::dgrad(pass, residue).run(launch, packed))
    })
}

/// Enqueues a wgrad pass that wants the filter's gradient.
pub(super) fn wgrad(launch: &Launch<'_>, stream: &Arc<Stream>, pass: &WgradPass) -> Result<()> {
    if pass.dtype == DType::F32 {
        return parts::wgrad(launch, stream, pass);
    }
    let shape = &pass.shape;
    let op = launch.operation.name();
    let dtype = pass.dtype;
    let layouts = [pass.dz.layout, pass.x.layout];
    let unsupported = || Error::DType { op, expected: DType::BF16, got: dtype };
    let selected = wgrad::select(dtype, layouts, shape).ok_or_else(unsupported)?;
    let sum_kernel = sum::kernel(dtype).ok_or_else(unsupported)?;
    let sm_count = stream.gpu().capability().sm_count;
    let walk = wgrad::Walk::new(shape, selected);
    let overflow = || Error::Overflow {
        op,
        quantity: "the number of steps over tiles and positions",
        limit: i32::MAX as u64,
    };
    let split = steps(shape, &walk)
        .and_then(|(tiles, k_blocks)| Split::new(tiles, k_blocks, sm_count))
        .ok_or_else(overflow)?;

    let sums = u64::from(split.num_slots()) * selected.slot_bytes();
    let bytes = sums + 4 * sum::bias_floats(&split);
    // Freed in the stream's order, so after the kernels that use it.
    let workspace = stream.allocate(usize::try_from(bytes).map_err(|_| overflow())?)?;
    let partials = workspace.address();
    let bias_partials = if pass.db.is_some() { partials + sums } else { 0 };

    let [dz_box, x_box] = selected.boxes([walk.in_step, walk.tap_step]);
    let (dz, x) = (volume(pass.dz, shape, false, dtype), volume(pass.x, shape, true, dtype));
    let params = WgradParams {
        dz_map: dz.map(dz_box, 1, dz.positions(), true)?,
        x_map: x.map(x_box, walk.in_step, x.positions(), !selected.transposes())?,
        partials,
        bias_partials,
        split,
        walk,
    };
    launch.run(&selected.kernel, split.num_parts().min(sm_count), &params)?;

    let Some(dw) = pass.dw else { return Ok(()) };
    let params = SumParams {
        partials,
        bias_partials,
        dw: dw.address,
        db: pass.db.unwrap_or(0),
        row_stride: dw.row_stride,
        accumulate: u32::from(pass.accumulate),
        ..SumParams::new(shape, dw.layout, selected.tile, split, walk)
    };
    launch.run(sum_kernel, params.blocks(), &params)
}

fn checked_blocks(launch: &Launch<'_>, blocks: u64) -> Result<u32> {
    let op = launch.operation.name();
    let overflow = Error::Overflow { op, quantity: "the number of blocks", limit: MAX_BLOCKS };
    u32::try_from(blocks).ok().filter(|&blocks| u64::from(blocks) <= MAX_BLOCKS).ok_or(overflow)
}

#[cfg(test)]
mod tests {
    use super::*;
    use kasmina_kernels::conv1d::{Conv1dExtents, FilterLayout, Padding};

    fn shape(kernel_size: usize, dilation: usize, left: u32, groups: usize) -> Conv1dShape {
        let extents = Conv1dExtents {
            batch: 3,
            in_channels: 64,
            out_channels: 48,
            in_length: 200,
            kernel_size,
            stride: 1,
            dilation,
            padding: Padding::Explicit { left, right: 8 },
            groups,
        };
        Conv1dShape::new(&extents).unwrap()
    }

    fn sequence(operand: &'static str, layout: SequenceLayout, row_stride: u64) -> Sequence {
        Sequence { operand, address: 4096, layout, row_stride }
    }

    fn forward(layouts: [SequenceLayout; 2], shape: Conv1dShape) -> ForwardPass {
        let stride = |layout, channels, length| match layout {
            SequenceLayout::Ncl => u64::from(length),
            SequenceLayout::Nlc => u64::from(channels),
        };
        let [x, y] = layouts;
        ForwardPass {
            shape,
            dtype: DType::BF16,
            x: sequence("x", x, stride(x, shape.in_channels, shape.in_length)),
            w: Filter { address: 4096, layout: FilterLayout::OutInTap, row_stride: 3 },
            bias: 0,
            activation: Activation::None,
            y: sequence("y", y, stride(y, shape.out_channels, shape.out_length)),
            tiled: true,
        }
    }

    #[test]
    fn filter_gradients_of_more_steps_than_can_be_counted_are_left_to_others() {
        let nlc = SequenceLayout::Nlc;
        let with = |batch| {
            let shape = Conv1dShape { batch, ..shape(3, 1, 1, 1) };
            let pass = WgradPass {
                shape,
                dtype: DType::BF16,
                x: sequence("x", nlc, 64),
                dz: sequence("dz", nlc, 48),
                dw: Some(Filter { address: 4096, layout: FilterLayout::OutInTap, row_stride: 3 }),
                db: None,
                accumulate: false,
            };
            wgrad_obstacle(&pass, &KernelConfig::default())
        };
        assert_eq!(with(3), None);
        assert_eq!(with(i32::MAX as u32), Some(Obstacle::Operation));
    }

    #[test]
    fn passes_that_it_cannot_serve_say_why() {
        let (ncl, nlc) = (SequenceLayout::Ncl, SequenceLayout::Nlc);
        let config = KernelConfig::default();
        let obstacle = |pass: &ForwardPass| forward_obstacle(pass, &config);
        let served = forward([nlc; 2], shape(3, 1, 1, 1));
        assert_eq!(obstacle(&served), None);
        // Channels first, the first and the last tap meet positions at most 9 apart.
        assert_eq!(obstacle(&forward([ncl, nlc], shape(3, 4, 1, 1))), None);
        let far = forward([ncl, nlc], shape(3, 5, 1, 1));
        assert_eq!(obstacle(&far), Some(Obstacle::Operation));
        // In parts any taps can be met, but no channels by themselves and no positions that TMA
        // cannot step over.
        let f32_pass = ForwardPass { dtype: DType::F32, ..served };
        assert_eq!(obstacle(&f32_pass), None);
        assert_eq!(obstacle(&ForwardPass { dtype: DType::F32, ..far }), None);
        let stepping = |stride| Conv1dShape { stride, ..served.shape };
        assert_eq!(obstacle(&ForwardPass { shape: stepping(8), ..f32_pass }), None);
        let wide = ForwardPass { shape: stepping(9), ..f32_pass };
        assert_eq!(obstacle(&wide), Some(Obstacle::Operation));
        let alone = Conv1dShape { groups: 48, in_channels: 48, ..served.shape };
        let alone = ForwardPass { shape: alone, ..f32_pass };
        assert_eq!(obstacle(&alone), Some(Obstacle::Operation));
        // 207 positions: stores would write beyond them.
        let ragged = forward([nlc, ncl], shape(3, 1, 1, 1));
        assert_eq!(obstacle(&ragged), Some(Obstacle::RowStride { operand: "y", bytes: 414 }));
        // Groups of 4 channels do not start on whole pieces.
        let groups = forward([nlc; 2], shape(3, 1, 1, 16));
        assert_eq!(obstacle(&groups), Some(Obstacle::RowLength { operand: "x", bytes: 8 }));
        // 60 channels of rows of 64.
        let narrow = Conv1dShape { in_channels: 60, ..served.shape };
        let expected = Some(Obstacle::RowLength { operand: "x", bytes: 120 });
        assert_eq!(obstacle(&ForwardPass { shape: narrow, ..served }), expected);
        let empty = Conv1dShape { in_length: 0, ..served.shape };
        let pass = ForwardPass { shape: empty, ..served };
        assert_eq!(obstacle(&pass), Some(Obstacle::Operation));
        let x = Sequence { address: 4104, ..served.x };
        let expected = Some(Obstacle::Address { operand: "x" });
        assert_eq!(obstacle(&ForwardPass { x, ..served }), expected);
    }
}
