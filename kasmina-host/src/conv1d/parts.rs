//! f32 on Hopper's tensor cores: operands split into bf16 parts, and passes computed again in plain
//! f32 where parts cannot express them. Forward and dgrad here, the gradients of filter and bias in
//! `wgrad`.

mod wgrad;

use std::sync::Arc;

use kasmina_kernels::abi::{DType, TensorMap};
use kasmina_kernels::conv1d::hopper::MAX_STEP;
use kasmina_kernels::conv1d::hopper::gather::{Problem, Walk};
use kasmina_kernels::conv1d::hopper::parts::split::{self, SplitParams};
use kasmina_kernels::conv1d::hopper::parts::{
    self, BLOCK_K, Cut, PARTS, PartsParams, Workspace, padded,
};
use kasmina_kernels::conv1d::portable::{Direction, REPAIR, REPAIR_BLOCKS, RepairParams};
use kasmina_kernels::conv1d::{Conv1dShape, Gather, SequenceLayout};
use kasmina_kernels::tile_scheduler::TileScheduler;

use super::pass::{DgradPass, ForwardPass};
use super::portable;
use crate::config::KernelConfig;
use crate::error::{Obstacle, Result};
use crate::gpu::{Launch, Stream};
use crate::tensor_map::SequenceMap;
pub(super) use wgrad::{wgrad, wgrad_obstacle, wgrad_pays};

/// The driver's limit on the blocks of a grid, and so for tiles.
const MAX_TILES: u64 = i32::MAX as u64;
/// Bytes of an element of a part.
const SIZE: u64 = 2;

/// A pass as a gather, or dgrad as one for every residue of the stride.
struct Pass<'a> {
    gather: portable::GatherPass<'a>,
    input: SequenceLayout,
    output: SequenceLayout,
}

impl<'a> Pass<'a> {
    fn forward(pass: &'a ForwardPass) -> Self {
        let (input, output) = (pass.x.layout, pass.y.layout);
        Self { gather: portable::GatherPass::forward(pass), input, output }
    }

    fn dgrad(pass: &'a DgradPass) -> Self {
        let (input, output) = (pass.dz.layout, pass.dx.layout);
        Self { gather: portable::GatherPass::dgrad(pass), input, output }
    }

    fn is_forward(&self) -> bool {
        self.gather.direction == Direction::Forward
    }

    const fn shape(&self) -> &'a Conv1dShape {
        self.gather.shape
    }

    /// Channels of a group: those that are summed over, and those of the output.
    fn channels(&self) -> [u32; 2] {
        let shape = self.shape();
        let (input, output) = (shape.group_in(), shape.group_out());
        if self.is_forward() { [input, output] } else { [output, input] }
    }

    /// Positions of the tensor that is gathered from.
    fn positions(&self) -> u32 {
        if self.is_forward() { self.shape().in_length } else { self.shape().out_length }
    }

    fn residues(&self) -> u32 {
        if self.is_forward() { 1 } else { self.shape().residues() }
    }

    fn walk(&self, residue: u32) -> Gather {
        let shape = self.shape();
        if self.is_forward() { shape.forward_gather() } else { shape.dgrad_gather(residue) }
    }

    /// What the choice of the kernel rests on. The first residue has the most positions.
    fn problem(&self) -> Problem {
        let shape = self.shape();
        let problem = Problem::new(&self.walk(0), [shape.batch, shape.groups], self.channels());
        let taps = if self.is_forward() { shape.kernel_size } else { shape.most_dgrad_taps() };
        Problem { taps, ..problem }
    }

    /// The split of its operands into parts that lie nowhere yet.
    fn split(&self) -> SplitParams {
        let shape = self.shape();
        SplitParams {
            input: self.gather.input,
            input_parts: 0,
            filter: self.gather.filter,
            filter_parts: 0,
            findings: 0,
            sequences: shape.batch,
            positions: self.positions(),
            groups: shape.groups,
            group_out: shape.group_out(),
            group_in: shape.group_in(),
            taps: shape.kernel_size,
            rows_are_out: u32::from(self.is_forward()),
            channels_last: u32::from(self.input == SequenceLayout::Nlc),
            shift: 0,
            reserved: 0,
        }
    }

    fn obstacle(&self, config: &KernelConfig) -> Option<Obstacle> {
        let shape = self.shape();
        if !config.tma_enabled() {
            return Some(Obstacle::TmaDisabled);
        }
        let [inner, outer] = self.channels();
        let counts = [shape.batch, self.positions()];
        let tiles = |cut: &Cut| {
            let walk = self.tile_walk(&self.walk(0), cut);
            let tiles = walk.tiles(true, shape.batch, shape.groups);
            u64::from(tiles.tiles_m) * u64::from(tiles.tiles_n)
        };
        // Depthwise there is no product of matrices; without tiling, the baseline is wanted. A
        // tensor without elements has no map, though padding alone gives an output.
        let unserved = shape.is_depthwise() && shape.groups > 1
            || !config.tiling_enabled()
            || self.positions() == 0
            || shape.stride > MAX_STEP
            || !parts::fits(counts, shape.kernel_size, shape.groups, [inner, outer])
            || Cut::all(self.output).iter().any(|cut| tiles(cut) > MAX_TILES);
        unserved.then_some(Obstacle::Operation)
    }

    /// Whether it is expected to be faster than the portable tier's kernels.
    fn pays(&self, multiprocessors: u32) -> bool {
        let portable = self.gather.f32_cost(multiprocessors);
        let (problem, residues) = (self.problem(), self.residues());
        parts::pays(&problem, residues, self.output, &self.split(), portable, multiprocessors)
    }

    fn tile_walk(&self, gather: &Gather, cut: &Cut) -> Walk {
        Walk::of_tiles(gather, self.channels(), cut.extents(), BLOCK_K)
    }

    /// Enqueues the split, the product for every residue, and the repair.
    ///
    /// The memory for the parts comes from the stream's pool and goes back to it, in the stream's
    /// order, when this returns: six bytes for each element of the input and of the filter, with a
    /// group's channels padded to a multiple of 16.
    fn run(&self, launch: &Launch<'_>, stream: &Arc<Stream>) -> Result<()> {
        let gpu = stream.gpu();
        let sm_count = gpu.capability().sm_count;
        let cut = parts::select(&self.problem(), self.output, sm_count);
        let kernel = &cut.kernel.kernel;
        let split = self.split();
        let blocks = split.blocks(sm_count);
        let at = Workspace::new(&split, blocks);
        let (repair, repair_tiles) = self.gather.gather_params()?;

        let workspace = stream.allocate(usize::try_from(at.bytes).unwrap_or(usize::MAX))?;
        let address = workspace.address();
        let split = SplitParams {
            input_parts: address + at.input,
            filter_parts: address + at.filter,
            findings: address,
            ..split
        };
        let repair = RepairParams {
            gather: repair,
            findings: address,
            num_findings: blocks,
            blocks: repair_tiles,
        };
        launch.prepare(&split::KERNEL)?;
        launch.prepare(kernel)?;
        launch.prepare(&REPAIR)?;
        launch.run(&split::KERNEL, blocks, &split)?;
        for residue in 0..self.residues() {
            let params = self.product(&self.walk(residue), cut, &split)?;
            let blocks = params.tiles.num_tiles().min(gpu.free_multiprocessors());
            launch.run(kernel, blocks, &params)?;
        }
        launch.run(&REPAIR, repair_tiles.min(sm_count * REPAIR_BLOCKS), &repair)
    }

    fn product(&self, gather: &Gather, cut: &Cut, split: &SplitParams) -> Result<PartsParams> {
        let shape = self.shape();
        let (walk, [_, group_out]) = (self.tile_walk(gather, cut), self.channels());
        let channels_are_rows = cut.channels_are_rows;
        let tiles = walk.tiles(channels_are_rows, shape.batch, shape.groups);
        // The same order, and `group_m · tiles_n` is no more than the number of tiles.
        let tiles = TileScheduler { group_m: tiles.group_m.min(tiles.tiles_m), ..tiles };
        let output = self.gather.output;
        let step = output.position * u64::from(gather.out_step);
        let first = output.position * u64::from(gather.out_first);
        let (out_row, out_column) =
            if channels_are_rows { (output.channel, step) } else { (step, output.channel) };
        let (rows, columns) = if channels_are_rows {
            (group_out, gather.out_count)
        } else {
            (gather.out_count, group_out)
        };
        let [_, tile_channels] = cut.extents();
        Ok(PartsParams {
            in_map: input_map(split, [BLOCK_K, walk.box_positions * walk.in_step], walk.in_step)?,
            w_map: filter_map(split, tile_channels)?,
            bias: self.gather.bias,
            out: output.address + first * DType::F32.size() as u64,
            out_sequence: output.batch,
            out_group: output.channel * u64::from(group_out),
            out_row,
            out_column,
            rows,
            columns,
            group_out,
            sequences: shape.batch,
            filter_taps: shape.kernel_size,
            channels_are_rows: u32::from(channels_are_rows),
            tiles,
            walk,
            activation: self.gather.activation as u32,
        })
    }
}

/// The parts of the input: `[channel, position, part · sequence, group]`.
fn input_map(split: &SplitParams, boxes: [u32; 2], in_step: u32) -> Result<TensorMap> {
    let group = SIZE * u64::from(padded(split.channels()));
    let position = group * u64::from(split.groups);
    let sequence = position * u64::from(split.positions);
    let sequences = PARTS as u32 * split.sequences;
    let key = SequenceMap {
        address: split.input_parts,
        extents: [split.channels(), split.positions, sequences, split.groups],
        strides_bytes: [position, sequence, group],
        boxes,
        steps: [1, in_step],
        dtype: DType::BF16,
        swizzled: true,
    };
    key.encode()
}

/// The parts of the filter: `[channel summed over, row, part · tap, group]`.
fn filter_map(split: &SplitParams, tile_channels: u32) -> Result<TensorMap> {
    let row = SIZE * u64::from(padded(split.channels()));
    let group = row * u64::from(split.rows());
    let key = SequenceMap {
        address: split.filter_parts,
        extents: [split.channels(), split.rows(), PARTS as u32 * split.taps, split.groups],
        strides_bytes: [row, group * u64::from(split.groups), group],
        boxes: [BLOCK_K, tile_channels],
        steps: [1, 1],
        dtype: DType::BF16,
        swizzled: true,
    };
    key.encode()
}

/// Why it cannot serve a forward pass.
pub(super) fn forward_obstacle(pass: &ForwardPass, config: &KernelConfig) -> Option<Obstacle> {
    Pass::forward(pass).obstacle(config)
}

/// Why it cannot serve a dgrad pass.
pub(super) fn dgrad_obstacle(pass: &DgradPass, config: &KernelConfig) -> Option<Obstacle> {
    Pass::dgrad(pass).obstacle(config)
}

/// Whether it is expected to serve a forward pass faster than the portable tier.
pub(super) fn forward_pays(pass: &ForwardPass, multiprocessors: u32) -> bool {
    Pass::forward(pass).pays(multiprocessors)
}

/// The same for dgrad.
pub(super) fn dgrad_pays(pass: &DgradPass, multiprocessors: u32) -> bool {
    Pass::dgrad(pass).pays(multiprocessors)
}

/// Enqueues a forward pass whose output has elements.
pub(super) fn forward(launch: &Launch<'_>, stream: &Arc<Stream>, pass: &ForwardPass) -> Result<()> {
    Pass::forward(pass).run(launch, stream)
}

/// Enqueues a dgrad pass whose result has elements.
pub(super) fn dgrad(launch: &Launch<'_>, stream: &Arc<Stream>, pass: &DgradPass) -> Result<()> {
    Pass::dgrad(pass).run(launch, stream)
}
