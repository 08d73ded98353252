//! The forward pass by a Hopper kernel that goes without one of its parts, to measure its gain.
#![forbid(unsafe_code)]

use kasmina_kernels::abi::{DType, Tier};
use kasmina_kernels::gemm::WeightLayout;
use kasmina_kernels::gemm::hopper::comparison::{self, ComparisonParams, Without};
use kasmina_kernels::gemm::hopper::{self, Forced, Problem};

use super::{Extents, Forward, OP, row_stride_bytes};
use crate::config::KernelConfig;
use crate::element::Element;
use crate::error::{Obstacle, Result};
use crate::gpu::{Gpu, Launch};
use crate::tensor::Tensor;

/// The tile where none is forced.
const DEFAULT_TILE: [u32; 2] = [128, 256];

/// Why no kernel of the `hopper` tier goes without what the config leaves out.
pub(super) fn obstacle(
    config: &KernelConfig,
    dtype: DType,
    layout: WeightLayout,
) -> Option<Obstacle> {
    let without = config.left_out()?;
    let tile = config.forced_hopper_tile().unwrap_or(DEFAULT_TILE);
    let served = match without {
        Without::PersistentBlocks => hopper::serves(dtype),
        _ => {
            let exists = comparison::kernel(without, tile).is_some();
            exists && (dtype, layout) == (DType::BF16, WeightLayout::InOut)
        }
    };
    (!served).then_some(Obstacle::Without(without))
}

impl<T: Element> Forward<'_, T> {
    /// Enqueues the pass without a part; `obstacle` has found nothing against it.
    pub(super) fn run_without(
        &self,
        without: Without,
        extents: Extents,
        y: &Tensor<T>,
        launch: &Launch<'_>,
        gpu: &Gpu,
        config: &KernelConfig,
    ) -> Result<()> {
        let extents_of_tile = config.forced_hopper_tile().unwrap_or(DEFAULT_TILE);
        let refused = || Obstacle::Without(without).refuse(OP, Tier::Hopper);
        let Extents { m, n, k } = extents;
        if without == Without::PersistentBlocks {
            let tile = Some(extents_of_tile);
            let forced =
                Forced { tile, split_k: Some(1), cluster_m: Some(1), ping_pong: Some(false) };
            let problem = Problem::aligned(m, n, k);
            let count = gpu.capability().sm_count;
            let row = hopper::select(T::DTYPE, self.layout, problem, count, forced)
                .ok_or_else(refused)?;
            let params = self.hopper_params(extents, row.tile, row.store_rows(), y, gpu)?;
            launch.prepare(&row.kernel)?;
            return self.ordered(y, || launch.run(&row.kernel, params.tiles.num_tiles(), &params));
        }
        let row = comparison::kernel(without, extents_of_tile).ok_or_else(refused)?;
        let params = ComparisonParams {
            forward: self.hopper_params(extents, row.tile, row.tile.store_rows(), y, gpu)?,
            x: self.x.as_device_ptr(),
            w: self.w.as_device_ptr(),
            x_stride: row_stride_bytes(self.x),
            w_stride: row_stride_bytes(self.w),
            m,
            k,
        };
        let tiles = params.forward.tiles.num_tiles();
        let blocks = row.tile.num_blocks(tiles, gpu.free_multiprocessors());
        launch.prepare(&row.kernel)?;
        self.ordered(y, || launch.run(&row.kernel, blocks, &params))
    }
}
