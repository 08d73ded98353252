//! f32 on Hopper's tensor cores in TF32.
#![forbid(unsafe_code)]

use kasmina_kernels::abi::Tier;
use kasmina_kernels::gemm::WeightLayout;
use kasmina_kernels::gemm::hopper::tf32::{self, BLOCK_K, Tf32GemmKernel, Tf32GemmParams};

use super::{Extents, Forward, OP, check_tiles, tensor_map_key};
use crate::config::KernelConfig;
use crate::element::Element;
use crate::error::{Obstacle, Result};
use crate::gpu::{Gpu, Launch};
use crate::tensor::Tensor;
use crate::tensor_map::TensorMapKey;

impl<T: Element> Forward<'_, T> {
    /// Enqueues the pass; `T` is f32, and TMA can address X and W.
    pub(super) fn run_in_tf32(
        &self,
        extents: Extents,
        y: &Tensor<T>,
        launch: &Launch<'_>,
        config: &KernelConfig,
    ) -> Result<()> {
        let gpu: &Gpu = launch.stream.gpu();
        let (problem, forced) = (self.problem(extents), config.forced_hopper());
        let sm_count = gpu.capability().sm_count;
        let Some(selected) = tf32::select(self.layout, problem, sm_count, forced) else {
            // `choose_forward_tier` has refused such a tile already.
            let reason = Obstacle::Tile(forced.tile.unwrap_or_default());
            return Err(reason.refuse(OP, Tier::Hopper));
        };
        let params = self.tf32_params(extents, selected, y, gpu)?;
        let free = gpu.free_multiprocessors();
        let blocks = selected.tile.num_blocks(params.tiles.num_tiles(), free);
        launch.prepare(&selected.kernel)?;
        self.ordered(y, || launch.run(&selected.kernel, blocks, &params))
    }

    fn tf32_params(
        &self,
        extents: Extents,
        selected: &Tf32GemmKernel,
        y: &Tensor<T>,
        gpu: &Gpu,
    ) -> Result<Tf32GemmParams> {
        let Extents { m, n, k } = extents;
        let tiles = selected.scheduler(m, n);
        check_tiles(OP, tiles)?;
        let w_extents = match self.layout {
            WeightLayout::InOut => [n, k],
            WeightLayout::OutIn => [k, n],
        };
        let rounded = |key| TensorMapKey { rounds_to_tf32: true, ..key };
        let x = rounded(tensor_map_key(self.x, [k, m], selected.x_box(m)));
        let w = rounded(tensor_map_key(self.w, w_extents, selected.w_box()));
        let [first_map, second_map] = gpu.tensor_maps(&match self.layout {
            WeightLayout::InOut => [w, x],
            WeightLayout::OutIn => [x, w],
        })?;
        Ok(Tf32GemmParams {
            first_map,
            second_map,
            bias: self.bias.map_or(0, Tensor::as_device_ptr),
            y: y.as_device_ptr(),
            y_stride: y.row_stride() as u64,
            m,
            n,
            k_blocks: k.div_ceil(BLOCK_K),
            tiles,
            activation: self.activation as u32,
            stage_bytes: selected.stage_bytes(m),
        })
    }
}
