//! f32 on Hopper's tensor cores in one launch: operands are split on their way.
#![forbid(unsafe_code)]

use kasmina_kernels::abi::{DType, Tier};
use kasmina_kernels::gemm::hopper::Forced;
use kasmina_kernels::gemm::hopper::direct::{self, DirectGemmKernel};
use kasmina_kernels::gemm::{F32Products, InputLayout, WeightLayout};

use super::split::forced_tier;
use super::{Extents, Forward, MAX_TILES, OP, pick};
use crate::config::KernelConfig;
use crate::device::Device;
use crate::element::Element;
use crate::error::{Error, Obstacle, Result};
use crate::gpu::Launch;
use crate::tensor::Tensor;

/// Whether the config insists on these kernels for a pass with such products.
pub(super) fn is_forced(config: &KernelConfig, products: F32Products) -> bool {
    products == F32Products::Six && config.forced_hopper_direct() == Some(true)
}

/// The kernel that serves a forward pass in f32, `[m, n, k]`, if one of these does.
pub(super) fn choose(
    config: &KernelConfig,
    products: F32Products,
    layout: WeightLayout,
    shape: [u32; 3],
    multiprocessors: u32,
) -> Option<&'static DirectGemmKernel> {
    let of = |forced| direct::select(InputLayout::Plain, layout, shape, multiprocessors, forced);
    if is_forced(config, products) {
        return of(config.forced_hopper());
    }
    // A tile that is forced is one of those that take parts.
    let is_open = config.forced_hopper_direct().is_none() && config.forced_hopper_tile().is_none();
    if products != F32Products::Six || !is_open {
        return None;
    }
    of(Forced::default()).filter(|row| direct::beats_split(row, shape, multiprocessors))
}

/// What is forced on the weight's gradient: a tile is one of these kernels' only where the config
/// insists on them.
pub(super) fn forced_for_gradient(config: &KernelConfig) -> Forced {
    if config.forced_hopper_direct() == Some(true) {
        config.forced_hopper()
    } else {
        Forced::default()
    }
}

/// The tier of the weight's gradient in f32, `[m, n, k]` as a product: `hopper` where that is faster
/// or forced.
pub(super) fn choose_gradient_tier(
    device: &Device,
    config: &KernelConfig,
    op: &'static str,
    shape: [u32; 3],
) -> Result<Tier> {
    const LAYOUTS: (InputLayout, WeightLayout) = (InputLayout::Transposed, WeightLayout::InOut);
    let forced = forced_tier(device, config);
    let of_kernels = forced_for_gradient(config);
    let tier = pick(op, forced, |tier| {
        let of_call = || match tier {
            Tier::Hopper if config.forced_hopper_direct() == Some(false) => {
                Some(Obstacle::DType(DType::F32))
            }
            Tier::Hopper => obstacle(LAYOUTS.0, LAYOUTS.1, of_kernels),
            _ => None,
        };
        device.obstacle(tier).or_else(of_call)
    })?;
    let multiprocessors = device.capability().map_or(1, |capability| capability.sm_count);
    let selected = || direct::select(LAYOUTS.0, LAYOUTS.1, shape, multiprocessors, of_kernels);
    let pays = || selected().is_some_and(|row| direct::pays(row, shape, multiprocessors));
    let is_open = forced.is_none() && config.forced_hopper_direct().is_none();
    if tier == Tier::Hopper && is_open && !pays() {
        return Ok(Tier::Portable);
    }
    Ok(tier)
}

/// Why there is no such kernel as it is forced.
pub(super) fn obstacle(
    x_layout: InputLayout,
    layout: WeightLayout,
    forced: Forced,
) -> Option<Obstacle> {
    let any_split = Forced { split_k: None, ..forced };
    let exists = |forced| direct::exists(x_layout, layout, forced);
    let tile = forced.tile.filter(|_| !exists(any_split)).map(Obstacle::Tile);
    tile.or_else(|| forced.split_k.filter(|_| !exists(forced)).map(Obstacle::SplitK))
}

/// Blocks to launch the kernel with, for a product of so many rows and columns.
pub(super) fn blocks(
    selected: &DirectGemmKernel,
    [m, n]: [u32; 2],
    op: &'static str,
) -> Result<u32> {
    let overflow = Error::Overflow { op, quantity: "the number of blocks", limit: MAX_TILES };
    selected.tile.blocks(m, n).ok_or(overflow)
}

impl<T: Element> Forward<'_, T> {
    /// Enqueues the pass; `T` is f32.
    pub(super) fn run_direct(
        &self,
        extents: Extents,
        y: &Tensor<T>,
        launch: &Launch<'_>,
        selected: &'static DirectGemmKernel,
    ) -> Result<()> {
        let blocks = blocks(selected, [extents.m, extents.n], OP)?;
        let params = self.portable_params(extents, y);
        launch.prepare(&selected.kernel)?;
        self.ordered(y, || launch.run(&selected.kernel, blocks, &params))
    }
}
