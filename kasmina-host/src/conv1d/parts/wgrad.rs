//! The gradients of filter and bias in parts.

use std::sync::Arc;

use kasmina_kernels::conv1d::hopper::MAX_STEP;
use kasmina_kernels::conv1d::hopper::parts::split::{self, SplitParams};
use kasmina_kernels::conv1d::hopper::parts::wgrad::{
    self, PartsWgradParams, Workspace, boxes, sums_bytes, sums_tile,
};
use kasmina_kernels::conv1d::hopper::parts::{fits, split::PIECE};
use kasmina_kernels::conv1d::hopper::wgrad::Split;
use kasmina_kernels::conv1d::hopper::wgrad::sum::{self, PartsSumParams, SumParams};
use kasmina_kernels::conv1d::portable::{
    REPAIR_WGRAD, REPAIR_WGRAD_FINAL, RepairWgradFinalParams, RepairWgradParams, Strided,
    StridedFilter, WgradParams, WgradPlan,
};
use kasmina_kernels::conv1d::{Conv1dShape, SequenceLayout};
use kasmina_kernels::gemm::parts::W_SHIFT;

use super::super::hopper::{MAX_PARTS, steps};
use super::super::pass::{Sequence, WgradPass};
use super::super::portable;
use super::input_map;
use crate::config::KernelConfig;
use crate::error::{Error, Obstacle, Result};
use crate::gpu::{Launch, Stream};

/// Elements of a filter that the kernel of the sum can count.
const MAX_ELEMENTS: u64 = i32::MAX as u64;

/// The splits of dz and x into parts that lie nowhere yet.
fn splits(pass: &WgradPass, [dz, x]: [Strided; 2]) -> [SplitParams; 2] {
    let shape = &pass.shape;
    let nowhere = StridedFilter { address: 0, out: 0, input: 0, tap: 0 };
    let split = |input, sequence: Sequence, positions, is_x: bool| SplitParams {
        input,
        input_parts: 0,
        filter: nowhere,
        filter_parts: 0,
        findings: 0,
        sequences: shape.batch,
        positions,
        groups: shape.groups,
        group_out: shape.group_out(),
        group_in: shape.group_in(),
        taps: 0,
        // Its channels are those that a forward pass sums over, or dgrad.
        rows_are_out: u32::from(is_x),
        channels_last: u32::from(sequence.layout == SequenceLayout::Nlc),
        shift: if is_x { W_SHIFT } else { 0 },
        reserved: 0,
    };
    [split(dz, pass.dz, shape.out_length, false), split(x, pass.x, shape.in_length, true)]
}

/// Tiles of the smaller kernel, of which there are more, and steps of each, if they can be counted.
fn counted(shape: &Conv1dShape) -> bool {
    wgrad::KERNELS.iter().all(|kernel| {
        steps(shape, &kernel.walk(shape))
            .and_then(|(tiles, k_blocks)| Split::new(tiles, k_blocks, MAX_PARTS))
            .is_some()
    })
}

/// Why it cannot serve a wgrad pass.
pub(in crate::conv1d) fn wgrad_obstacle(
    pass: &WgradPass,
    config: &KernelConfig,
) -> Option<Obstacle> {
    let shape = &pass.shape;
    if !config.tma_enabled() {
        return Some(Obstacle::TmaDisabled);
    }
    let fits =
        |positions, channels| fits([shape.batch, positions], 1, shape.groups, [channels, PIECE]);
    // As for the other passes; an empty batch or sequence has no steps.
    let unserved = shape.is_depthwise() && shape.groups > 1
        || !config.tiling_enabled()
        || pass.dw.is_none()
        || shape.batch == 0
        || shape.in_length == 0
        || shape.stride > MAX_STEP
        || shape.filter_elements() + u64::from(shape.out_channels) > MAX_ELEMENTS
        || !fits(shape.out_length, shape.group_out())
        || !fits(shape.in_length, shape.group_in())
        || !counted(shape);
    unserved.then_some(Obstacle::Operation)
}

/// Whether it is expected to serve a wgrad pass faster than the portable tier.
pub(in crate::conv1d) fn wgrad_pays(pass: &WgradPass, multiprocessors: u32) -> bool {
    let shape = &pass.shape;
    let params = portable::wgrad_params(pass, multiprocessors);
    let elements = splits(pass, [params.dz, params.x]).map(|split| split.input_elements());
    let portable = WgradPlan::new(shape, multiprocessors).f32_cost(shape, multiprocessors);
    wgrad::pays(shape, elements.iter().sum(), portable, multiprocessors)
}

/// Enqueues a wgrad pass that wants the filter's gradient.
///
/// The memory comes from the stream's pool and goes back to it, in the stream's order, when this
/// returns: six bytes for each element of dz and of x, with a group's channels padded to a multiple of
/// 16, and sums, at most two tiles of 64 KiB for each multiprocessor and one for each tile of the
/// gradient.
pub(in crate::conv1d) fn wgrad(
    launch: &Launch<'_>,
    stream: &Arc<Stream>,
    pass: &WgradPass,
) -> Result<()> {
    let Some(dw) = pass.dw else { return Ok(()) };
    let shape = &pass.shape;
    let sm_count = stream.gpu().capability().sm_count;
    let kernel = wgrad::select(shape);
    let walk = kernel.walk(shape);
    let overflow = || Error::Overflow {
        op: launch.operation.name(),
        quantity: "the number of steps over tiles and positions, or the size of the partial sums",
        limit: i32::MAX as u64,
    };
    let split = steps(shape, &walk)
        .and_then(|(tiles, k_blocks)| Split::new(tiles, k_blocks, sm_count))
        .ok_or_else(overflow)?;
    let plain = portable::wgrad_params(pass, sm_count);
    let plain_blocks = portable::checked_blocks(plain.plan.blocks(shape))?;
    let plain_bytes = portable::partial_bytes(shape, plain.plan.splits).ok_or_else(overflow)?;

    let [dz, x] = splits(pass, [plain.dz, plain.x]);
    let [dz_blocks, x_blocks] = [&dz, &x].map(|split| split.blocks(sm_count));
    let (bias_at, sums) = sums_bytes(kernel, &split);
    let at = Workspace::new([&dz, &x], [dz_blocks, x_blocks], sums, plain_bytes);
    let workspace = stream.allocate(usize::try_from(at.bytes).map_err(|_| overflow())?)?;
    let address = workspace.address();
    let dz = SplitParams { input_parts: address + at.dz, findings: address, ..dz };
    let x = SplitParams { input_parts: address + at.x, findings: address + at.x_findings, ..x };
    let (findings, num_findings) = (address, dz_blocks + x_blocks);
    let partials = address + at.sums;
    let bias_partials = if pass.db.is_some() { partials + bias_at } else { 0 };
    let [dz_box, x_box] = boxes(walk.in_step);
    let product = PartsWgradParams {
        dz_map: input_map(&dz, dz_box, 1)?,
        x_map: input_map(&x, x_box, walk.in_step)?,
        partials,
        bias_partials,
        split,
        walk,
    };
    let sum = PartsSumParams {
        sum: SumParams {
            partials,
            bias_partials,
            dw: dw.address,
            db: pass.db.unwrap_or(0),
            row_stride: dw.row_stride,
            accumulate: u32::from(pass.accumulate),
            ..SumParams::new(shape, dw.layout, sums_tile(kernel.tile.block_m), split, walk)
        },
        findings,
        num_findings,
        reserved: 0,
    };
    // Over the parts, which nothing needs any more then.
    let plain_partials = address + at.dz;
    let repair = RepairWgradParams {
        wgrad: WgradParams { partials: plain_partials, ..plain },
        findings,
        num_findings,
        reserved: 0,
    };
    let (totals, total_blocks) = portable::final_params(pass, plain_partials, plain.plan.splits)?;
    let totals = RepairWgradFinalParams { sum: totals, findings, num_findings, reserved: 0 };

    launch.prepare(&split::KERNEL)?;
    launch.prepare(&kernel.kernel)?;
    launch.prepare(&sum::F32)?;
    launch.prepare(&REPAIR_WGRAD)?;
    launch.run(&split::KERNEL, dz_blocks, &dz)?;
    launch.run(&split::KERNEL, x_blocks, &x)?;
    launch.run(&kernel.kernel, split.num_parts().min(sm_count), &product)?;
    launch.run(&sum::F32, sum.sum.blocks(), &sum)?;
    launch.run(&REPAIR_WGRAD, plain_blocks, &repair)?;
    launch.run(&REPAIR_WGRAD_FINAL, total_blocks, &totals)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conv1d::pass::Filter;
    use kasmina_kernels::abi::DType;
    use kasmina_kernels::conv1d::{Conv1dExtents, FilterLayout, Padding};

    fn pass(channels: [usize; 2], stride: usize, groups: usize) -> WgradPass {
        let extents = Conv1dExtents {
            batch: 3,
            in_channels: channels[0],
            out_channels: channels[1],
            in_length: 4001,
            kernel_size: 3,
            stride,
            dilation: 5,
            padding: Padding::Same,
            groups,
        };
        let shape = Conv1dShape::new(&extents).unwrap();
        let sequence = |operand, row_stride| Sequence {
            operand,
            address: 4,
            layout: SequenceLayout::Nlc,
            row_stride,
        };
        WgradPass {
            shape,
            dtype: DType::F32,
            x: sequence("x", u64::from(shape.in_channels)),
            dz: sequence("dz", u64::from(shape.out_channels)),
            dw: Some(Filter { address: 4, layout: FilterLayout::OutInTap, row_stride: 3 }),
            db: None,
            accumulate: false,
        }
    }

    #[test]
    fn filter_gradients_of_any_channels_and_addresses_are_served_but_not_of_single_channels() {
        let obstacle = |pass: &WgradPass| wgrad_obstacle(pass, &KernelConfig::default());
        for groups in [1, 3] {
            for stride in [1, 8] {
                assert_eq!(obstacle(&pass([15, 33], stride, groups)), None);
            }
        }
        let refused = Some(Obstacle::Operation);
        assert_eq!(obstacle(&pass([15, 33], 9, 1)), refused);
        assert_eq!(obstacle(&pass([15, 15], 1, 15)), refused);
        let served = pass([15, 33], 1, 1);
        assert_eq!(obstacle(&WgradPass { dw: None, ..served }), refused);
        let empty = Conv1dShape { batch: 0, ..served.shape };
        assert_eq!(obstacle(&WgradPass { shape: empty, ..served }), refused);
        // More positions than pieces of eight channels can be numbered for.
        let long = Conv1dShape { batch: 1 << 20, ..served.shape };
        assert_eq!(obstacle(&WgradPass { shape: long, ..served }), refused);
    }

    #[test]
    fn parts_pay_for_filter_gradients_unless_there_is_little_to_multiply() {
        assert!(wgrad_pays(&pass([256, 256], 1, 1), 132));
        let one =
            Conv1dShape { batch: 1, in_length: 64, out_length: 64, ..pass([8; 2], 1, 1).shape };
        assert!(!wgrad_pays(&WgradPass { shape: one, ..pass([8; 2], 1, 1) }, 132));
    }
}
