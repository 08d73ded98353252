//! `Y = act(X·W + b)` in f32 on Hopper's tensor cores in TF32: of each element they take sign,
//! exponent and the upper 10 bits of the fraction, and add up products in f32.
//!
//! The kernels are built as the 16-bit ones (`hopper.rs`), with 32 k in place of 64: as many bytes.
//! wgmma takes operands of TF32 from shared memory K-major only. X `[m, k]` and W `[n, k]` are;
//! where W is `[k, n]` the kernels compute `Yᵀ = Wᵀ·Xᵀ`, as wgmma takes its first operand from
//! registers too: each consumer loads the fragments of W, a stage ahead of the tensor cores.
//!
//! # Accuracy
//! TMA rounds to TF32 as it loads, to nearest. The tensor cores would cut the lower 13 bits off.
//! Each factor errs by at most 2⁻¹¹ of itself, a product by at most 2⁻¹⁰ + 2⁻²².
//!
//! # Shape contract
//! - m, n, k ≥ 1, and any edge may cut a tile: TMA fills with zeros, Y is stored row by row.
//! - Addresses and row strides of X and W are multiples of 16 bytes: the rule of tensor maps.
//! - The number of tiles plus a grid fits 32 bits.

use super::{Forced, Problem, Tile};
use crate::abi::{Kernel, KernelParams, TensorMap, hopper_kernel};
use crate::gemm::WeightLayout;
use crate::tile_scheduler::TileScheduler;

#[cfg(all(target_arch = "nvptx64", kasmina_tier = "hopper"))]
mod device;

/// Depth of a stage: 128 bytes of f32.
pub const BLOCK_K: u32 = 32;
/// Columns of a box of W as `[k, n]`: 128 bytes.
pub const SLAB_N: u32 = 32;

/// A kernel in TF32.
pub struct Tf32GemmKernel {
    /// Layout of W.
    pub layout: WeightLayout,
    /// How it cuts Y up, or Yᵀ where W is `[k, n]`, in steps of [`BLOCK_K`].
    pub tile: Tile,
    /// What to launch.
    pub kernel: Kernel<Tf32GemmParams>,
}

impl Tf32GemmKernel {
    /// The tiles of an `[m, n]` output.
    #[must_use]
    pub const fn scheduler(&self, m: u32, n: u32) -> TileScheduler {
        match self.layout {
            WeightLayout::OutIn => self.tile.scheduler(m, n),
            WeightLayout::InOut => self.tile.scheduler(n, m),
        }
    }

    /// Extents of a box of X, columns first.
    #[must_use]
    pub const fn x_box(&self, m: u32) -> [u32; 2] {
        match self.layout {
            WeightLayout::OutIn => [BLOCK_K, self.tile.x_rows(m)],
            WeightLayout::InOut => [BLOCK_K, self.tile.block_n],
        }
    }

    /// Extents of a box of W, columns first.
    #[must_use]
    pub const fn w_box(&self) -> [u32; 2] {
        match self.layout {
            WeightLayout::OutIn => [BLOCK_K, self.tile.block_n],
            WeightLayout::InOut => [SLAB_N, BLOCK_K],
        }
    }

    /// Bytes of the boxes of X and W that make a stage.
    #[must_use]
    pub const fn stage_bytes(&self, m: u32) -> u32 {
        match self.layout {
            WeightLayout::OutIn => self.tile.stage_bytes(m),
            WeightLayout::InOut => self.tile.x_stage_bytes() + self.tile.w_stage_bytes(),
        }
    }
}

/// Whether there are kernels like this; nothing is loaded into several blocks here.
#[must_use]
pub fn exists(layout: WeightLayout, forced: Forced) -> bool {
    let forced = of_kernels(layout, forced);
    KERNELS.iter().any(|row| row.layout == layout && forced.admits(row.tile, u32::MAX))
}

/// The kernel expected to be fastest for this problem on a GPU of so many multiprocessors, or the
/// one that is forced; `None` where none is of the forced kind.
#[must_use]
pub fn select(
    layout: WeightLayout,
    problem: Problem,
    multiprocessors: u32,
    forced: Forced,
) -> Option<&'static Tf32GemmKernel> {
    let forced = of_kernels(layout, forced);
    let problem = match layout {
        WeightLayout::OutIn => problem,
        WeightLayout::InOut => Problem {
            m: problem.n,
            n: problem.m,
            k: problem.k,
            x_straddles: problem.w_straddles,
            w_straddles: problem.x_straddles,
        },
    };
    // A step takes as long as one of 64 k of a 16-bit type.
    let problem = Problem { k: problem.k.saturating_mul(2), ..problem };
    // The first of equals: rows go from the largest tile, which reads least, to the smallest.
    KERNELS
        .iter()
        .filter(|row| row.layout == layout)
        .filter(|row| forced.admits(row.tile, problem.k) && row.tile.can_split(problem.k))
        .min_by_key(|row| row.tile.cost(problem, multiprocessors))
}

/// What is forced, in terms of the rows of [`KERNELS`].
fn of_kernels(layout: WeightLayout, forced: Forced) -> Forced {
    let tile = forced.tile.map(|[rows, columns]| match layout {
        WeightLayout::OutIn => [rows, columns],
        WeightLayout::InOut => [columns, rows],
    });
    Forced { tile, cluster_m: None, ..forced }
}

/// What a kernel takes.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Tf32GemmParams {
    /// The operand whose rows or columns are the tile's rows, 128-byte swizzle, rounded to TF32: X
    /// as `[m, k]` with box `[x_rows(m), BLOCK_K]`, or W as `[k, n]` with box `[BLOCK_K, SLAB_N]`.
    pub first_map: TensorMap,
    /// The other one, likewise: W as `[n, k]` or X as `[m, k]`, with box `[block_n, BLOCK_K]`.
    pub second_map: TensorMap,
    /// Device address of the bias, `[n]`; 0 for none.
    pub bias: u64,
    /// Device address of Y, `[m, n]`.
    pub y: u64,
    /// From row to row of Y, in elements.
    pub y_stride: u64,
    /// Rows of Y.
    pub m: u32,
    /// Columns of Y.
    pub n: u32,
    /// Steps of `BLOCK_K` that cover k, at least 1.
    pub k_blocks: u32,
    /// The tiles of Y, or of Yᵀ.
    pub tiles: TileScheduler,
    /// [`Activation`](crate::activation::Activation) as its discriminant.
    pub activation: u32,
    /// Bytes of the boxes of X and W that make a stage.
    pub stage_bytes: u32,
}

// SAFETY: repr(C); 256 bytes of maps, three u64 and eight 32-bit fields: no padding.
unsafe impl KernelParams for Tf32GemmParams {}
const _: () = assert!(size_of::<Tf32GemmParams>() == 2 * 128 + 3 * 8 + 8 * 4);

/// One row makes a kernel's module, its host-side description and, on the device, its entry.
macro_rules! kernels {
    ($($entry:ident: $layout:ident $order:ident $block_m:literal x $block_n:tt, $num_stages:literal stages,
        $split_k:tt split;)+) => {
        /// Every kernel, for each layout from the largest tile to the smallest.
        pub static KERNELS: [Tf32GemmKernel; [$(stringify!($entry)),+].len()] = [$({
            let tile = Tile {
                block_m: $block_m, block_n: $block_n, num_stages: $num_stages, split_k: $split_k,
                cluster_m: 1,
            };
            Tf32GemmKernel {
                layout: WeightLayout::$layout,
                tile,
                kernel: hopper_kernel!($entry, tile.block_dim(), tile.smem_bytes()),
            }
        }),+];
        $(
            #[cfg(all(target_arch = "nvptx64", kasmina_tier = "hopper"))]
            device::entry!($entry, $order, $block_m, $block_n, $num_stages, $split_k);
        )+
    };
}

kernels! {
    gemm_f32_tf32_nk_128x256x32: OutIn K 128 x 256, 4 stages, 1 split;
    gemm_f32_tf32_nk_128x128x32: OutIn K 128 x 128, 6 stages, 1 split;
    gemm_f32_tf32_nk_64x128x32: OutIn K 64 x 128, 8 stages, 1 split;
    gemm_f32_tf32_nk_64x64x32: OutIn K 64 x 64, 8 stages, 1 split;
    gemm_f32_tf32_nk_64x64x32_k2: OutIn K 64 x 64, 8 stages, 2 split;
    gemm_f32_tf32_nk_64x64x32_k4: OutIn K 64 x 64, 8 stages, 4 split;
    gemm_f32_tf32_nk_64x64x32_k8: OutIn K 64 x 64, 8 stages, 8 split;
    gemm_f32_tf32_kn_128x256x32: InOut MN 128 x 256, 4 stages, 1 split;
    gemm_f32_tf32_kn_128x128x32: InOut MN 128 x 128, 6 stages, 1 split;
    gemm_f32_tf32_kn_64x128x32: InOut MN 64 x 128, 8 stages, 1 split;
    gemm_f32_tf32_kn_64x64x32: InOut MN 64 x 64, 8 stages, 1 split;
    gemm_f32_tf32_kn_64x64x32_k2: InOut MN 64 x 64, 8 stages, 2 split;
    gemm_f32_tf32_kn_64x64x32_k4: InOut MN 64 x 64, 8 stages, 4 split;
    gemm_f32_tf32_kn_64x64x32_k8: InOut MN 64 x 64, 8 stages, 8 split;
}

#[cfg(test)]
mod tests {
    use super::*;

    const MULTIPROCESSORS: u32 = 132;

    fn selected(layout: WeightLayout, [m, n, k]: [u32; 3]) -> ([u32; 2], u32) {
        let problem = Problem::aligned(m, n, k);
        let row = select(layout, problem, MULTIPROCESSORS, Forced::default()).expect("a kernel");
        (row.tile.extents(), row.tile.split_k)
    }

    #[test]
    fn the_tiles_that_were_fastest_on_an_h200_are_chosen() {
        for layout in WeightLayout::ALL {
            for (shape, tile) in [
                ([8192; 3], [128, 256]),
                ([4096; 3], [128, 256]),
                ([4096, 14336, 4096], [128, 256]),
                ([1024; 3], [64, 128]),
                ([512; 3], [64, 64]),
                ([128; 3], [64, 64]),
            ] {
                assert_eq!(selected(layout, shape), (tile, 1), "{layout:?} {shape:?}");
            }
            assert_eq!(selected(layout, [32, 4096, 4096]), ([64, 64], 2), "{layout:?}");
        }
    }

    #[test]
    fn a_forced_tile_is_one_of_y() {
        let forced = |tile| Forced { tile: Some(tile), ..Forced::default() };
        for (layout, tile, other) in [
            (WeightLayout::OutIn, [128, 256], [256, 128]),
            (WeightLayout::InOut, [256, 128], [128, 256]),
        ] {
            assert!(exists(layout, forced(tile)) && !exists(layout, forced(other)));
            let row = select(layout, Problem::aligned(64, 64, 64), MULTIPROCESSORS, forced(tile));
            let tiles = row.expect("a kernel").scheduler(300, 300);
            assert_eq!(tiles.num_tiles(), 300u32.div_ceil(tile[0]) * 300u32.div_ceil(tile[1]));
        }
    }

    #[test]
    fn blocks_that_share_a_tile_all_have_a_step_of_k() {
        let forced = Forced { tile: Some([64, 64]), split_k: Some(8), ..Forced::default() };
        for layout in WeightLayout::ALL {
            let split_k = |k| {
                let problem = Problem::aligned(64, 64, k);
                select(layout, problem, MULTIPROCESSORS, forced).map(|row| row.tile.split_k)
            };
            assert_eq!(
                [split_k(8 * BLOCK_K - BLOCK_K + 1), split_k(7 * BLOCK_K)],
                [Some(8), Some(1)]
            );
        }
    }
}
