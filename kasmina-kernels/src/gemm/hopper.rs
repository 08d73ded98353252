//! `Y = act(X·W + b)` on Hopper: TMA, wgmma, warp specialisation, a persistent grid.
//!
//! X is K-major as `[m, k]` and MN-major as `[k, m]`, W MN-major as `[k, n]` and K-major as
//! `[n, k]`; wgmma takes both, so neither is ever transposed. f16 or bf16, accumulated in f32.
//!
//! One block per multiprocessor: a producer warpgroup and one or two consumer warpgroups, each of
//! 64 rows of the tile.
//!
//! ```text
//! producer    one thread: wait empty[s] ─ TMA of X and W into stage s ─ next s
//! consumer 0  rows 0–63   wait full[s] ─ 4 × wgmma m64nNk16 ─ release stage s−1 ┐ after the last
//! consumer 1  rows 64–127 the same                                              ┘ k: epilogue
//! epilogue    bias, activation, round ─ stmatrix into a 64×64 slab, two in turn ─ TMA store
//! ```
//! A stage is released once the *next* batch has been issued, so that the tensor cores always have
//! one queued. The producer runs ahead into the next tile during the epilogue. A grid starts while
//! the one before it in the stream ends, and waits for it before it touches global memory.
//!
//! # Shape contract
//! - m, k ≥ 1, and any edge may cut a tile: TMA fills with zeros on load and clips on store.
//! - n is a multiple of 8: a store clips to whole pieces of 16 bytes and would write beyond Y.
//! - Addresses and row strides of X, W and Y are multiples of 16 bytes: the rule of tensor maps.
//! - The number of tiles plus a grid fits 32 bits.

use crate::abi::{DType, Kernel, KernelParams, Module, TensorMap, module};
use crate::activation::EpilogueActivation;
use crate::gemm::{InputLayout, WeightLayout};
use crate::pipeline::RingBarriers;
use crate::tile_scheduler::TileScheduler;

#[cfg(all(target_arch = "nvptx64", kasmina_tier = "hopper"))]
pub(crate) mod device;

/// Depth of one pipeline stage: 128 bytes of a 16-bit type, the span of the widest swizzle.
pub const BLOCK_K: u32 = 64;
/// Columns of a slab, the unit in which MN-major operands are loaded and Y is stored.
pub const SLAB_N: u32 = 64;
/// Rows of Y a consumer warpgroup computes.
pub const CONSUMER_M: u32 = 64;

const WARPGROUP: u32 = 128;
const SLAB_BYTES: u32 = CONSUMER_M * SLAB_N * 2;

/// How a kernel cuts the problem up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tile {
    /// Rows of Y per tile: 64 or 128, one consumer warpgroup for each 64.
    pub block_m: u32,
    /// Columns of Y per tile: 64, 128 or 256.
    pub block_n: u32,
    /// Stages of the ring.
    pub num_stages: u32,
}

impl Tile {
    pub(crate) const fn num_consumers(self) -> u32 {
        self.block_m / CONSUMER_M
    }

    /// Slabs a consumer fills in turn: all of the tile's where they fit beside the stages, so that
    /// none waits for a store of its own tile, else two.
    pub(crate) const fn slab_buffers(self) -> u32 {
        let slabs = self.block_n / SLAB_N;
        let stages = self.num_stages * (self.x_stage_bytes() + self.w_stage_bytes());
        let fits = stages + self.num_consumers() * slabs * SLAB_BYTES <= 208 * 1024;
        if fits || slabs == 1 { slabs } else { 2 }
    }

    pub(crate) const fn block_dim(self) -> u32 {
        WARPGROUP * (1 + self.num_consumers())
    }

    pub(crate) const fn x_stage_bytes(self) -> u32 {
        self.block_m * BLOCK_K * 2
    }

    pub(crate) const fn w_stage_bytes(self) -> u32 {
        self.block_n * BLOCK_K * 2
    }

    // Swizzled tiles first: each of them starts on a multiple of 1024.
    const fn w_offset(self) -> u32 {
        self.num_stages * self.x_stage_bytes()
    }

    const fn y_offset(self) -> u32 {
        self.w_offset() + self.num_stages * self.w_stage_bytes()
    }

    const fn bias_offset(self) -> u32 {
        self.y_offset() + self.num_consumers() * self.slab_buffers() * SLAB_BYTES
    }

    const fn barrier_offset(self) -> u32 {
        self.bias_offset() + self.num_consumers() * self.block_n * 4
    }

    pub(crate) const fn smem_bytes(self) -> u32 {
        self.barrier_offset() + RingBarriers::bytes(self.num_stages)
    }

    /// `[block_m, block_n]`.
    #[must_use]
    pub const fn extents(self) -> [u32; 2] {
        [self.block_m, self.block_n]
    }

    /// The tiles of an `[m, n]` output.
    #[must_use]
    pub const fn scheduler(self, m: u32, n: u32) -> TileScheduler {
        TileScheduler {
            tiles_m: m.div_ceil(self.block_m),
            tiles_n: n.div_ceil(self.block_n),
            group_m: 16,
        }
    }

    /// Estimated cycles of the busiest multiprocessor.
    ///
    /// Per step of k it multiplies `block_m · block_n · 64` at 2048 products a cycle and loads
    /// `128 · (block_m + block_n)` bytes at 80 a cycle (fitted to timings of small tiles on an H200); the
    /// larger counts. Each tile pays for its epilogue as for two steps.
    const fn cost(self, m: u32, n: u32, k: u32, multiprocessors: u32) -> u64 {
        let TileScheduler { tiles_m, tiles_n, .. } = self.scheduler(m, n);
        // Not `num_tiles`, which wraps: whether the product fits is checked later.
        let waves = (tiles_m as u64 * tiles_n as u64).div_ceil(multiprocessors as u64);
        let multiply = self.block_m * self.block_n / 32;
        let load = (self.block_m + self.block_n) * 8 / 5;
        let step = if multiply > load { multiply } else { load };
        waves * (k.div_ceil(BLOCK_K) + 2) as u64 * step as u64
    }
}

/// A Hopper forward kernel and what it serves.
pub struct HopperKernel {
    /// Element type of all operands.
    pub dtype: DType,
    /// Layout of X.
    pub x_layout: InputLayout,
    /// Layout of W.
    pub layout: WeightLayout,
    /// How it cuts the problem up.
    pub tile: Tile,
    /// What to launch.
    pub kernel: Kernel<HopperGemmParams>,
}

/// Whether there are kernels for this element type: not for f32, which wgmma would round.
#[must_use]
pub const fn serves(dtype: DType) -> bool {
    matches!(dtype, DType::F16 | DType::BF16)
}

/// Whether there are kernels of this tile, `[block_m, block_n]`.
#[must_use]
pub fn has_tile(tile: [u32; 2]) -> bool {
    KERNELS.iter().any(|row| row.tile.extents() == tile)
}

/// The kernel expected to be fastest for this problem on a GPU of so many multiprocessors, or the
/// one of the tile that is forced; `None` where no kernel [`serves`] the type, takes both layouts
/// or has that tile.
#[must_use]
pub fn select(
    dtype: DType,
    x_layout: InputLayout,
    layout: WeightLayout,
    [m, n, k]: [u32; 3],
    multiprocessors: u32,
    forced_tile: Option<[u32; 2]>,
) -> Option<&'static HopperKernel> {
    // The first of equals: rows go from the largest tile, which reads least, to the smallest.
    KERNELS
        .iter()
        .filter(|row| (row.dtype, row.x_layout, row.layout) == (dtype, x_layout, layout))
        .filter(|row| forced_tile.is_none_or(|tile| row.tile.extents() == tile))
        .min_by_key(|row| row.tile.cost(m, n, k, multiprocessors))
}

/// What a Hopper forward kernel takes.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct HopperGemmParams {
    /// X, 128-byte swizzle: as `[m, k]` with box `[block_m, BLOCK_K]`, as `[k, m]` with box
    /// `[BLOCK_K, SLAB_N]`.
    pub x_map: TensorMap,
    /// W, 128-byte swizzle: as `[n, k]` with box `[block_n, BLOCK_K]`, as `[k, n]` with box
    /// `[BLOCK_K, SLAB_N]`.
    pub w_map: TensorMap,
    /// Y `[m, n]`, box `[CONSUMER_M, SLAB_N]`, 128-byte swizzle.
    pub y_map: TensorMap,
    /// Device address of the bias, `[n]`; 0 for none.
    pub bias: u64,
    /// Columns of Y.
    pub n: u32,
    /// Steps of `BLOCK_K` that cover k, at least 1.
    pub k_blocks: u32,
    /// The tiles of Y.
    pub tiles: TileScheduler,
    /// Applied to `X·W + b`.
    pub activation: EpilogueActivation,
    /// Keeps the size a multiple of 8 without padding.
    pub reserved: u32,
}

// SAFETY: repr(C); 384 bytes of maps, a u64 and sixteen 32-bit fields: no padding.
unsafe impl KernelParams for HopperGemmParams {}
const _: () = assert!(size_of::<HopperGemmParams>() == 3 * 128 + 8 + 16 * 4);

/// One row makes a kernel's module, its host-side description and, on the device, its entry.
macro_rules! kernels {
    ($($entry:ident: $element:ident $ptx_type:literal,
        $x_layout:ident $x_major:ident, $layout:ident $w_major:ident,
        $block_m:literal x $block_n:tt, $num_stages:literal stages;)+) => {
        /// Every kernel, for each element type and layout from the largest tile to the smallest.
        pub static KERNELS: [HopperKernel; [$(stringify!($entry)),+].len()] = [$({
            static MODULE: Module = module!(Hopper, "hopper", stringify!($entry), [stringify!($entry)]);
            let tile =
                Tile { block_m: $block_m, block_n: $block_n, num_stages: $num_stages };
            HopperKernel {
                dtype: DType::$element,
                x_layout: InputLayout::$x_layout,
                layout: WeightLayout::$layout,
                tile,
                kernel: Kernel::new(
                    &MODULE, stringify!($entry), tile.block_dim(), tile.smem_bytes(),
                )
                .waiting_for_predecessors(),
            }
        }),+];
        $(
            #[cfg(all(target_arch = "nvptx64", kasmina_tier = "hopper"))]
            device::entry!(
                $entry, $element, $ptx_type, $x_major, $w_major, $block_m, $block_n, $num_stages
            );
        )+
    };
}

kernels! {
    gemm_bf16_kn_128x256x64: BF16 "bf16", Plain K, InOut MN, 128 x 256, 4 stages;
    gemm_bf16_kn_128x128x64: BF16 "bf16", Plain K, InOut MN, 128 x 128, 6 stages;
    gemm_bf16_kn_64x128x64: BF16 "bf16", Plain K, InOut MN, 64 x 128, 8 stages;
    gemm_bf16_kn_64x64x64: BF16 "bf16", Plain K, InOut MN, 64 x 64, 8 stages;
    gemm_bf16_nk_128x256x64: BF16 "bf16", Plain K, OutIn K, 128 x 256, 4 stages;
    gemm_bf16_nk_128x128x64: BF16 "bf16", Plain K, OutIn K, 128 x 128, 6 stages;
    gemm_bf16_nk_64x128x64: BF16 "bf16", Plain K, OutIn K, 64 x 128, 8 stages;
    gemm_bf16_nk_64x64x64: BF16 "bf16", Plain K, OutIn K, 64 x 64, 8 stages;
    gemm_f16_kn_128x256x64: F16 "f16", Plain K, InOut MN, 128 x 256, 4 stages;
    gemm_f16_kn_128x128x64: F16 "f16", Plain K, InOut MN, 128 x 128, 6 stages;
    gemm_f16_kn_64x128x64: F16 "f16", Plain K, InOut MN, 64 x 128, 8 stages;
    gemm_f16_kn_64x64x64: F16 "f16", Plain K, InOut MN, 64 x 64, 8 stages;
    gemm_f16_nk_128x256x64: F16 "f16", Plain K, OutIn K, 128 x 256, 4 stages;
    gemm_f16_nk_128x128x64: F16 "f16", Plain K, OutIn K, 128 x 128, 6 stages;
    gemm_f16_nk_64x128x64: F16 "f16", Plain K, OutIn K, 64 x 128, 8 stages;
    gemm_f16_nk_64x64x64: F16 "f16", Plain K, OutIn K, 64 x 64, 8 stages;
    gemm_bf16_km_kn_128x256x64: BF16 "bf16", Transposed MN, InOut MN, 128 x 256, 4 stages;
    gemm_bf16_km_kn_128x128x64: BF16 "bf16", Transposed MN, InOut MN, 128 x 128, 6 stages;
    gemm_bf16_km_kn_64x128x64: BF16 "bf16", Transposed MN, InOut MN, 64 x 128, 8 stages;
    gemm_bf16_km_kn_64x64x64: BF16 "bf16", Transposed MN, InOut MN, 64 x 64, 8 stages;
    gemm_f16_km_kn_128x256x64: F16 "f16", Transposed MN, InOut MN, 128 x 256, 4 stages;
    gemm_f16_km_kn_128x128x64: F16 "f16", Transposed MN, InOut MN, 128 x 128, 6 stages;
    gemm_f16_km_kn_64x128x64: F16 "f16", Transposed MN, InOut MN, 64 x 128, 8 stages;
    gemm_f16_km_kn_64x64x64: F16 "f16", Transposed MN, InOut MN, 64 x 64, 8 stages;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn selected(m: u32, n: u32, k: u32) -> (u32, u32) {
        let (plain, layout) = (InputLayout::Plain, WeightLayout::InOut);
        let row = select(DType::BF16, plain, layout, [m, n, k], 132, None).expect("a kernel");
        (row.tile.block_m, row.tile.block_n)
    }

    #[test]
    fn large_problems_get_the_tile_that_reads_least() {
        assert_eq!(selected(8192, 8192, 8192), (128, 256));
        assert_eq!(selected(4096, 4096, 4096), (128, 256));
        assert_eq!(selected(2048, 2048, 2048), (128, 256));
    }

    /// Timed on an H200 with bf16, each was the fastest of the four, except at 32×4096×4096, where
    /// 64×128 was a few percent ahead of 64×64: the model does not know that memory is the limit.
    #[test]
    fn small_and_skinny_problems_get_tiles_that_fill_the_gpu() {
        assert_eq!(selected(1024, 1024, 1024), (64, 128));
        assert_eq!(selected(512, 512, 512), (64, 64));
        assert_eq!(selected(128, 4096, 4096), (64, 64));
        assert_eq!(selected(32, 4096, 4096), (64, 64));
        assert_eq!(selected(8192, 1024, 256), (128, 256));
    }

    #[test]
    fn every_16_bit_type_has_kernels_for_every_layout_and_f32_has_none() {
        let layouts = [
            (InputLayout::Plain, WeightLayout::InOut),
            (InputLayout::Plain, WeightLayout::OutIn),
            (InputLayout::Transposed, WeightLayout::InOut),
        ];
        for (x_layout, layout) in layouts {
            for dtype in [DType::F16, DType::BF16] {
                let row = select(dtype, x_layout, layout, [1; 3], 132, None).expect("a kernel");
                assert_eq!((row.dtype, row.x_layout, row.layout), (dtype, x_layout, layout));
            }
            assert!(!serves(DType::F32));
            assert!(select(DType::F32, x_layout, layout, [1; 3], 132, None).is_none());
        }
    }

    #[test]
    fn a_forced_tile_is_the_one_that_is_used_or_none_is() {
        let forced = |tile| {
            let (x_layout, layout) = (InputLayout::Plain, WeightLayout::OutIn);
            select(DType::F16, x_layout, layout, [8192; 3], 132, Some(tile))
        };
        for tile in [[128, 256], [128, 128], [64, 128], [64, 64]] {
            assert_eq!(forced(tile).expect("a kernel").tile.extents(), tile);
            assert!(has_tile(tile));
        }
        assert!(forced([64, 32]).is_none());
        assert!(!has_tile([64, 32]));
    }

    #[test]
    fn entry_names_say_what_the_kernel_serves() {
        for row in &KERNELS {
            let expected = std::format!(
                "gemm_{}_{}{}_{}x{}x{BLOCK_K}",
                row.dtype,
                if row.x_layout == InputLayout::Transposed { "km_" } else { "" },
                row.layout.name(),
                row.tile.block_m,
                row.tile.block_n,
            );
            assert_eq!(row.kernel.entry, expected);
            assert_eq!(row.kernel.module.entries, [row.kernel.entry]);
        }
    }
}
