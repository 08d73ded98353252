//! f32 on Hopper's tensor cores: operands split into bf16 parts, multiplied, and computed again in
//! plain f32 where parts cannot express them.
#![forbid(unsafe_code)]

use std::sync::Arc;

use kasmina_kernels::abi::{DType, Tier};
use kasmina_kernels::gemm::hopper::direct as kernels;
use kasmina_kernels::gemm::hopper::split::{
    self, BLOCK_K, BLOCK_N, SplitGemmParams, SplitOperand, SplitParams, SplitTile, Workspace,
};
use kasmina_kernels::gemm::hopper::{Forced, SLAB_N, tf32};
use kasmina_kernels::gemm::portable::{self, RepairParams};
use kasmina_kernels::gemm::{F32Products, InputLayout, WeightLayout};

use super::{Extents, Forward, OP, check_tiles, choose_tier, direct, pick};
use crate::config::KernelConfig;
use crate::device::Device;
use crate::element::Element;
use crate::error::{Error, Obstacle, Result};
use crate::gpu::{Gpu, Launch, Stream as GpuStream};
use crate::tensor::Tensor;
use crate::tensor_map::{Promotion, TensorMapKey};

/// What matters about a forward pass to the choice of its tier.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pass {
    pub(crate) dtype: DType,
    pub(crate) layout: WeightLayout,
    /// m, n, k.
    pub(crate) shape: [usize; 3],
    /// Whether TMA can address both inputs as they lie.
    pub(crate) addressable: bool,
}

/// The tier that serves a forward pass on this device: as [`choose_tier`], except that f32 is
/// served by `hopper` where that is faster or forced.
pub(crate) fn choose_forward_tier(
    device: &Device,
    config: &KernelConfig,
    pass: Pass,
) -> Result<Tier> {
    let Pass { dtype, layout, shape, addressable } = pass;
    if dtype != DType::F32 {
        return choose_tier(device, config, dtype);
    }
    let forced = forced_tier(device, config);
    let products = products(config, addressable);
    let tier = pick(OP, forced, |tier| {
        let of_call = || match tier {
            Tier::Hopper if !config.tma_enabled() => Some(Obstacle::TmaDisabled),
            Tier::Hopper if products == F32Products::Tf32 => {
                tf32_obstacle(layout, config.forced_hopper())
            }
            Tier::Hopper if direct::is_forced(config, products) => {
                direct::obstacle(InputLayout::Plain, layout, config.forced_hopper())
            }
            Tier::Hopper => {
                let tile = config.forced_hopper_tile().filter(|&tile| !split::has_tile(tile));
                tile.map(Obstacle::Tile)
            }
            _ => None,
        };
        device.obstacle(tier).or_else(of_call)
    })?;
    // Extents beyond 32 bits are refused later; here they only have to be compared.
    let [m, n, k] = shape.map(|extent| u32::try_from(extent).unwrap_or(u32::MAX));
    let multiprocessors = device.capability().map_or(1, |capability| capability.sm_count);
    let better = || {
        let shape = [m, n, k];
        let direct = direct::choose(config, products, layout, shape, multiprocessors);
        products == F32Products::Tf32
            || direct.is_some_and(|row| kernels::pays(row, shape, multiprocessors))
            || fits(shape, layout) && split::pays(products, layout, shape, multiprocessors)
    };
    if tier == Tier::Hopper && forced.is_none() && !better() {
        return Ok(Tier::Portable);
    }
    Ok(tier)
}

/// The products of a pass with these inputs: TF32, where it is asked for, only if TMA can address
/// them.
pub(super) fn products(config: &KernelConfig, addressable: bool) -> F32Products {
    match config.chosen_f32_products() {
        F32Products::Tf32 if !addressable => F32Products::Six,
        products => products,
    }
}

/// Why there is no kernel in TF32 as it is forced.
fn tf32_obstacle(layout: WeightLayout, forced: Forced) -> Option<Obstacle> {
    let any_split = Forced { split_k: None, ..forced };
    let tile = forced.tile.filter(|_| !tf32::exists(layout, any_split)).map(Obstacle::Tile);
    let split = || forced.split_k.filter(|_| !tf32::exists(layout, forced)).map(Obstacle::SplitK);
    tile.or_else(split)
}

/// The tier that the config or the environment forces.
pub(super) fn forced_tier(device: &Device, config: &KernelConfig) -> Option<Tier> {
    config.forced_tier().or(device.defaults().forced_tier())
}

fn fits([m, n, k]: [u32; 3], layout: WeightLayout) -> bool {
    let [rows, columns] = w_extents(layout, n, k);
    split::fits(m, k) && split::fits(rows, columns)
}

/// Rows and columns of W in memory.
const fn w_extents(layout: WeightLayout, n: u32, k: u32) -> [u32; 2] {
    match layout {
        WeightLayout::InOut => [k, n],
        WeightLayout::OutIn => [n, k],
    }
}

/// The parts of both operands, in the memory of one call.
struct Parts {
    x: SplitOperand,
    w: SplitOperand,
    /// Address of the findings of the split's blocks.
    findings: u64,
    blocks: u32,
}

impl<T: Element> Forward<'_, T> {
    /// Enqueues the pass in parts; `T` is f32.
    ///
    /// The memory for the parts comes from the stream's pool and goes back to it, in the stream's
    /// order, when this returns.
    pub(super) fn run_in_parts(
        &self,
        extents: Extents,
        y: &Tensor<T>,
        launch: &Launch<'_>,
        stream: &Arc<GpuStream>,
        products: F32Products,
        config: &KernelConfig,
    ) -> Result<()> {
        let Extents { m, n, k } = extents;
        let gpu = stream.gpu();
        let sm_count = gpu.capability().sm_count;
        if !fits([m, n, k], self.layout) {
            let (quantity, limit) = ("the rows or the elements of an operand", i32::MAX as u64 / 3);
            return Err(Error::Overflow { op: OP, quantity, limit });
        }
        let tile = config.forced_hopper_tile();
        let Some(selected) = split::select(products, self.layout, [m, n, k], sm_count, tile) else {
            // `choose_forward_tier` has refused such a tile already.
            let reason = Obstacle::Tile(tile.unwrap_or_default());
            return Err(reason.refuse(OP, Tier::Hopper));
        };
        let repair = portable::repair(self.layout);
        let repair_tiles = portable::tiles(m, n);
        check_tiles(OP, repair_tiles)?;
        check_tiles(OP, selected.tile.scheduler(m, n))?;

        let x = [m as usize, k as usize];
        let w = w_extents(self.layout, n, k);
        let blocks = split::split_blocks([m, k], w, sm_count);
        let at = Workspace::new(x, w.map(|extent| extent as usize), selected.tile.parts, blocks);
        let workspace = stream.allocate(usize::try_from(at.bytes).unwrap_or(usize::MAX))?;
        let operand = |tensor: &Tensor<T>, [rows, columns]: [u32; 2], at: u64| SplitOperand {
            source: tensor.as_device_ptr(),
            parts: workspace.address() + at,
            row_stride: tensor.row_stride() as u64,
            rows,
            columns,
        };
        let parts = Parts {
            x: operand(self.x, [m, k], at.x),
            w: operand(self.w, w, at.w),
            findings: workspace.address(),
            blocks,
        };
        let split_params = SplitParams {
            x: parts.x,
            w: parts.w,
            findings: parts.findings,
            parts: selected.tile.parts,
            reserved: 0,
        };
        let params = self.split_gemm_params(extents, selected.tile, &parts, y, gpu)?;
        let repair_params = RepairParams {
            gemm: self.portable_params(extents, y),
            findings: parts.findings,
            num_findings: parts.blocks,
            reserved: 0,
        };
        launch.prepare(&split::SPLIT)?;
        launch.prepare(&selected.kernel)?;
        launch.prepare(repair)?;
        self.ordered(y, || {
            launch.run(&split::SPLIT, blocks, &split_params)?;
            let blocks = params.tiles.num_tiles().min(gpu.free_multiprocessors());
            launch.run(&selected.kernel, blocks, &params)?;
            launch.run(repair, repair_tiles.num_tiles(), &repair_params)
        })
    }

    fn split_gemm_params(
        &self,
        extents: Extents,
        tile: SplitTile,
        parts: &Parts,
        y: &Tensor<T>,
        gpu: &Gpu,
    ) -> Result<SplitGemmParams> {
        let Extents { m, n, k } = extents;
        let w_box = match self.layout {
            WeightLayout::InOut => [SLAB_N, BLOCK_K],
            WeightLayout::OutIn => [BLOCK_K, BLOCK_N],
        };
        // All parts as one matrix, each below the one before.
        let key = |operand: &SplitOperand, box_extents| TensorMapKey {
            address: operand.parts,
            row_stride_bytes: (operand.columns as usize).next_multiple_of(split::ROW_ALIGN) as u64
                * DType::BF16.size() as u64,
            extents: [operand.columns, tile.parts * operand.rows],
            box_extents,
            dtype: DType::BF16,
            rounds_to_tf32: false,
            promotion: Promotion::default(),
        };
        let [x_map, w_map] =
            gpu.tensor_maps(&[key(&parts.x, [BLOCK_K, tile.block_m]), key(&parts.w, w_box)])?;
        Ok(SplitGemmParams {
            x_map,
            w_map,
            bias: self.bias.map_or(0, Tensor::as_device_ptr),
            y: y.as_device_ptr(),
            y_stride: y.row_stride() as u64,
            m,
            n,
            k,
            tiles: tile.scheduler(m, n),
            activation: self.activation as u32,
            reserved: 0,
        })
    }
}
