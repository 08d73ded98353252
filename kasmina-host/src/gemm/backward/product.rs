//! The weight's gradient as a product on a GPU.

use kasmina_kernels::abi::{DType, Tier};
use kasmina_kernels::activation::Activation;
use kasmina_kernels::gemm::hopper::direct::{self, DirectGemmKernel};
use kasmina_kernels::gemm::hopper::unaligned::PlainRows;
use kasmina_kernels::gemm::hopper::weight_gradient::{self, Plan, Summed, WeightGradientParams};
use kasmina_kernels::gemm::hopper::{BLOCK_K, CONSUMER_M, SLAB_N};
use kasmina_kernels::gemm::portable::{self, PortableGemmParams};
use kasmina_kernels::gemm::{InputLayout, WeightLayout};
use kasmina_kernels::tile_scheduler::TileScheduler;

use super::OP;
use super::partials::Partials;
use crate::config::KernelConfig;
use crate::device::Device;
use crate::element::Element;
use crate::error::{Obstacle, Result};
use crate::gemm::direct::{blocks, forced_for_gradient};
use crate::gemm::{Packed, check_tiles, extent, pack, plain_rows, tensor_map_key};
use crate::gpu::{Gpu, Launch};
use crate::tensor::Tensor;

/// How dW is computed.
pub(super) enum WeightGradient {
    Portable(TileScheduler),
    Hopper(Plan),
    /// f32.
    Direct(&'static DirectGemmKernel),
}

impl WeightGradient {
    /// How dW is computed, with its kernel loaded.
    pub(super) fn plan<T: Element>(
        dw: &Tensor<T>,
        batch: u32,
        tier: Tier,
        config: &KernelConfig,
        launch: &Launch<'_>,
    ) -> Result<WeightGradient> {
        let rows = extent(OP, "the number of rows of the weight", dw.shape().rows())?;
        let columns = extent(OP, "the number of columns of the weight", dw.shape().columns())?;
        let sm_count = launch.stream.gpu().capability().sm_count;
        let (extents, tile) = ([rows, columns, batch], config.forced_hopper_tile());
        if T::DTYPE == DType::F32 && tier == Tier::Hopper {
            let forced = forced_for_gradient(config);
            let selected = direct::select(
                InputLayout::Transposed,
                WeightLayout::InOut,
                extents,
                sm_count,
                forced,
            );
            let selected = selected.ok_or_else(|| Obstacle::Operation.refuse(OP, tier))?;
            launch.prepare(&selected.kernel)?;
            return Ok(WeightGradient::Direct(selected));
        }
        match weight_gradient::select(T::DTYPE, extents, sm_count, tile) {
            Some(plan) if tier == Tier::Hopper => {
                check_tiles(OP, plan.row.tile.scheduler(rows, columns))?;
                launch.prepare(&plan.row.kernel)?;
                Ok(WeightGradient::Hopper(plan))
            }
            _ => {
                let tiles = portable::tiles(rows, columns);
                check_tiles(OP, tiles)?;
                Ok(WeightGradient::Portable(tiles))
            }
        }
    }
}

/// `dW = firstᵀ·second`, with both `[batch, …]`.
pub(super) struct Product<'a, T: Element> {
    /// Of the stream that it runs on, whose pool copies of operands come from.
    pub(super) device: &'a Device,
    pub(super) first: &'a Tensor<T>,
    pub(super) second: &'a Tensor<T>,
    pub(super) batch: u32,
    pub(super) accumulate: bool,
}

impl<T: Element> Product<'_, T> {
    /// Rows and columns of the product, which `plan` has checked.
    fn extents(&self) -> [u32; 2] {
        [self.first, self.second].map(|operand| operand.shape().columns() as u32)
    }

    pub(super) fn enqueue_portable(
        &self,
        dw: &Tensor<T>,
        tiles: TileScheduler,
        launch: &Launch<'_>,
    ) -> Result<()> {
        let kernel = portable::kernel(T::DTYPE, InputLayout::Transposed, WeightLayout::InOut);
        let unsupported = || Obstacle::DType(T::DTYPE).refuse(OP, Tier::Portable);
        let kernel = kernel.ok_or_else(unsupported)?;
        launch.run(kernel, tiles.num_tiles(), &self.plain_params(dw))
    }

    /// On tensor cores in f32, split on its way.
    pub(super) fn enqueue_direct(
        &self,
        dw: &Tensor<T>,
        selected: &'static DirectGemmKernel,
        launch: &Launch<'_>,
    ) -> Result<()> {
        let blocks = blocks(selected, self.extents(), OP)?;
        launch.run(&selected.kernel, blocks, &self.plain_params(dw))
    }

    fn plain_params(&self, dw: &Tensor<T>) -> PortableGemmParams {
        let [m, n] = self.extents();
        PortableGemmParams {
            x: self.first.as_device_ptr(),
            w: self.second.as_device_ptr(),
            bias: 0,
            y: dw.as_device_ptr(),
            x_stride: self.first.row_stride() as u64,
            w_stride: self.second.row_stride() as u64,
            y_stride: dw.row_stride() as u64,
            m,
            n,
            k: self.batch,
            activation: Activation::None as u32,
            accumulate: u32::from(self.accumulate),
            reserved: 0,
        }
    }

    /// With `db`, the sums of an operand's columns too.
    pub(super) fn enqueue_hopper(
        &self,
        dw: &Tensor<T>,
        plan: Plan,
        db: Option<(&mut Tensor<T>, Summed)>,
        partials: &mut Partials<'_>,
        launch: &Launch<'_>,
    ) -> Result<()> {
        let [m, n] = self.extents();
        let tiles = plan.row.tile.scheduler(m, n);
        let gpu: &Gpu = launch.stream.gpu();
        let packed = |operand| Packed::new(operand, self.device, launch, OP);
        let (first, second) = (packed(self.first)?, packed(self.second)?);
        pack(&[&first, &second], launch)?;
        let operand_box = [SLAB_N, BLOCK_K];
        let first_key = tensor_map_key(first.tensor(), [m, self.batch], operand_box);
        let second_key = tensor_map_key(second.tensor(), [n, self.batch], operand_box);
        let product_key = tensor_map_key(dw, [n, m], [SLAB_N, CONSUMER_M]);
        let plain = plain_rows(dw, [m, n]);
        // A map that nothing uses has to be one all the same.
        let product_key = if plain == PlainRows::NONE { product_key } else { first_key };
        let [first_map, second_map, product_map] =
            gpu.tensor_maps(&[first_key, second_key, product_key])?;
        let parts = plan.parts;
        let mut params = WeightGradientParams {
            first_map,
            second_map,
            product_map,
            partials: 0,
            sums: 0,
            m,
            n,
            k_blocks: self.batch.div_ceil(BLOCK_K),
            part_k_blocks: plan.part_k_blocks,
            parts,
            tiles,
            summed: Summed::Neither as u32,
            accumulate: u32::from(self.accumulate),
            plain,
        };
        if parts > 1 {
            params.partials = partials.add(parts, dw, self.accumulate)?;
        }
        if let Some((db, summed)) = db {
            params.summed = summed as u32;
            if parts > 1 {
                params.sums = partials.add(parts, db, self.accumulate)?;
            } else {
                params.sums = db.as_device_ptr();
            }
        }
        let items = u64::from(tiles.num_tiles()) * u64::from(parts);
        let blocks = items.min(u64::from(gpu.free_multiprocessors())) as u32;
        launch.run(&plan.row.kernel, blocks, &params)
    }
}
