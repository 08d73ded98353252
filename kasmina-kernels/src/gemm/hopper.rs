//! `Y = act(X·W + b)` on Hopper: TMA, wgmma, warp specialisation, a persistent grid.
//!
//! X `[m, k]` is K-major. W is MN-major as `[k, n]` and K-major as `[n, k]`; wgmma takes both, so
//! neither is ever transposed. f16 or bf16, accumulated in f32.
//!
//! One block per multiprocessor: a producer warpgroup and one or two consumer warpgroups, each of
//! 64 rows of the tile.
//!
//! ```text
//! producer    one thread: wait empty[s] ─ TMA of X and W into stage s ─ next s
//! consumer 0  rows 0–63   wait full[s] ─ 4 × wgmma m64nNk16 ─ release stage s−1 ┐ after the last
//! consumer 1  rows 64–127 the same                                              ┘ k: epilogue
//! epilogue    bias, activation, round ─ stmatrix into a 64×64 slab, two in turn ─ TMA store, of
//!             the slab or, in the widest tiles, of each warp's rows
//! ```
//! A stage is released once the *next* batch has been issued, so that the tensor cores always have
//! one queued. The producer runs ahead into the next tile during the epilogue. A grid starts while
//! the one before it in the stream ends; it fetches its first stages into L2, and waits before it
//! reads or writes global memory. Where tiles are few and k is long, 2 to 8 blocks share a tile
//! (`device/exchange.rs`); where reading L2 takes longest, two blocks with tiles below each other
//! share the columns of W (`device/share.rs`); where tiles are many and k is short, consumers have a
//! tile each and take turns (`ping_pong.rs`).
//!
//! # Shape contract
//! - m, k ≥ 1, and any edge may cut a tile: TMA fills with zeros on load and clips on store.
//! - Addresses and row strides of X and W are multiples of 16 bytes, the rule of tensor maps, and
//!   those of Y and its n too, as a TMA store clips to whole pieces of 16 bytes and would write
//!   beyond Y: else X and W are packed before, and Y is stored without TMA (`unaligned`).
//! - The number of tiles plus a grid fits 32 bits.

use crate::abi::{DType, Kernel, KernelParams, TensorMap, hopper_kernel};
use crate::activation::EpilogueActivation;
use crate::gemm::WeightLayout;
use crate::pipeline::RingBarriers;
use crate::tile_scheduler::TileScheduler;
use unaligned::PlainRows;

pub mod comparison;
pub mod direct;
pub mod ping_pong;
pub mod split;
pub mod telemetry;
pub mod tf32;
pub mod unaligned;
pub mod weight_gradient;

#[cfg(all(target_arch = "nvptx64", kasmina_tier = "hopper"))]
pub(crate) mod device;

/// Depth of one pipeline stage: 128 bytes of a 16-bit type, the span of the widest swizzle.
pub const BLOCK_K: u32 = 64;
/// Columns of a slab, the unit in which MN-major operands are loaded and Y is stored.
pub const SLAB_N: u32 = 64;
/// Rows of Y a consumer warpgroup computes.
pub const CONSUMER_M: u32 = 64;

pub(crate) const WARPGROUP: u32 = 128;
const SLAB_BYTES: u32 = CONSUMER_M * SLAB_N * 2;
/// Rows of Y that a warp has in its registers.
const WARP_M: u32 = 16;

/// How a kernel cuts the problem up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tile {
    /// Rows of Y per tile: 64 or 128, one consumer warpgroup for each 64.
    pub block_m: u32,
    /// Columns of Y per tile: 64, 128 or 256.
    pub block_n: u32,
    /// Stages of the ring.
    pub num_stages: u32,
    /// Blocks that share a tile, each with a part of k: 1, or 2, 4 or 8 where `block_m` is 64.
    pub split_k: u32,
    /// Blocks that share columns of W: they take tiles below each other, and each loads a part of
    /// W into all of them: 1 or 2, and 1 where `split_k` is more.
    pub cluster_m: u32,
}

impl Tile {
    /// A tile that a block computes by itself.
    pub(crate) const fn new(block_m: u32, block_n: u32, num_stages: u32) -> Self {
        Self { block_m, block_n, num_stages, split_k: 1, cluster_m: 1 }
    }

    pub(crate) const fn num_consumers(self) -> u32 {
        self.block_m / CONSUMER_M
    }

    /// Slabs a consumer fills in turn: a second where a tile has more than one.
    const fn slab_buffers(self) -> u32 {
        if self.block_n > SLAB_N { 2 } else { 1 }
    }

    /// Blocks of a cluster.
    pub(crate) const fn cluster(self) -> u32 {
        self.split_k * self.cluster_m
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

    const fn exchange_offset(self) -> u32 {
        self.bias_offset() + self.num_consumers() * self.block_n * 4
    }

    /// The sums in f32 of the rows that one of the blocks that share a tile keeps.
    const fn exchange_bytes(self) -> u32 {
        self.block_m / self.split_k * self.block_n * 4
    }

    const fn barrier_offset(self) -> u32 {
        // What is sent to the others, and what they send.
        self.exchange_offset() + 2 * (self.split_k - 1) * self.exchange_bytes()
    }

    pub(crate) const fn smem_bytes(self) -> u32 {
        // Two barriers of the exchange follow those of the ring.
        self.barrier_offset()
            + RingBarriers::bytes(self.num_stages)
            + if self.split_k > 1 { 16 } else { 0 }
    }

    /// Rows of a box of X. Rows that a tile has beyond m need not be loaded: what they
    /// multiply to is not stored. (Filling them with zeros took a tenth of the time of
    /// 32×4096×4096 on an H200.)
    #[must_use]
    pub const fn x_rows(self, m: u32) -> u32 {
        // Whole groups of 8 rows, the period of the swizzle.
        let rows = m.next_multiple_of(8);
        if rows < self.block_m { rows } else { self.block_m }
    }

    /// Rows of a box of W as `[n, k]`.
    #[must_use]
    pub const fn w_rows(self) -> u32 {
        self.block_n / self.cluster_m
    }

    /// Bytes of the boxes of X and W that make a stage.
    #[must_use]
    pub const fn stage_bytes(self, m: u32) -> u32 {
        self.x_rows(m) * BLOCK_K * 2 + self.w_stage_bytes()
    }

    /// Rows of Y a store of a whole slab covers.
    #[must_use]
    pub const fn store_rows(self) -> u32 {
        CONSUMER_M / self.split_k
    }

    /// Whether each warp of a [`HopperKernel`] stores its own rows of Y, rather than one thread those
    /// of a warpgroup. Warps that do not wait for each other are through the epilogue sooner, and in
    /// the widest tiles the tensor cores wait for it: 2 to 3 % less at 2048³ to 8192³ back to back on
    /// an H200.
    pub(crate) const fn stores_by_warp(self) -> bool {
        self.block_n == 256
    }

    /// Multiprocessors that clusters of this size fill: one runs within a group of up to 18, not all
    /// of whose multiprocessors work. An H200 with 132 had room for 66 pairs, but for no more than
    /// 30 clusters of four or 15 of eight.
    const fn usable(self, multiprocessors: u32) -> u32 {
        if self.cluster() > 2 { multiprocessors - multiprocessors / 11 } else { multiprocessors }
    }

    /// Blocks to launch for so many tiles on a GPU of so many multiprocessors.
    ///
    /// Of the largest tiles no more than it takes to have as many rounds: what others would finish
    /// early saves no time. 128 blocks stay beside each other in the output, where 132 drift apart:
    /// those read a seventh more from memory at 8192³ and took 1 to 2 % longer in burst at 2048³ to
    /// 8192³ on an H200.
    #[must_use]
    pub const fn num_blocks(self, tiles: u32, multiprocessors: u32) -> u32 {
        let groups = self.usable(multiprocessors) / self.cluster();
        let groups = if groups == 0 { 1 } else { groups };
        let groups = if tiles < groups { tiles } else { groups };
        if self.block_n < 256 || groups == 0 {
            return self.cluster() * groups;
        }
        self.cluster() * tiles.div_ceil(tiles.div_ceil(groups))
    }

    /// The steps of k, from and to, of the block of this rank.
    #[must_use]
    #[inline(always)]
    pub const fn steps(self, rank: u32, k_blocks: u32) -> (u32, u32) {
        if self.split_k == 1 {
            return (0, k_blocks);
        }
        (k_blocks * rank / self.split_k, k_blocks * (rank + 1) / self.split_k)
    }

    /// Whether every block has a step of k to do.
    const fn can_split(self, k: u32) -> bool {
        k.div_ceil(BLOCK_K) >= self.split_k
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
            tiles_m: m.div_ceil(self.block_m * self.cluster_m),
            tiles_n: n.div_ceil(self.block_n),
            group_m: 16,
        }
    }

    /// Estimated cycles of the busiest multiprocessor.
    ///
    /// Per step of k it multiplies `block_m · block_n · 64` at 2048 products a cycle and loads
    /// `128 · (x_rows + block_n)` bytes at 80 a cycle, a stage arrives no sooner than 1600 cycles
    /// after it was asked for, and all blocks together read 60 lines a cycle from L2 (fitted to
    /// timings of small tiles on an H200), where a row that straddles two lines reads both; the
    /// slowest counts. Each tile pays for its epilogue as for two steps, and 3000 cycles for what
    /// the blocks of a cluster do together.
    const fn cost(self, problem: Problem, multiprocessors: u32) -> u64 {
        let (waves, step) = self.waves_and_step(problem, multiprocessors);
        let steps = problem.k.div_ceil(BLOCK_K).div_ceil(self.split_k) + 2;
        let together = if self.cluster() > 1 { 3000 } else { 0 };
        waves * (steps as u64 * step as u64 + together)
    }

    /// Tiles that the busiest multiprocessor does, and the cycles of a step of k.
    const fn waves_and_step(self, problem: Problem, multiprocessors: u32) -> (u64, u32) {
        let Problem { m, n, x_straddles, w_straddles, .. } = problem;
        let TileScheduler { tiles_m, tiles_n, .. } = self.scheduler(m, n);
        // Not `num_tiles`, which wraps: whether the product fits is checked later.
        let blocks = tiles_m as u64 * tiles_n as u64 * self.cluster() as u64;
        let usable = self.usable(multiprocessors);
        let waves = blocks.div_ceil(usable as u64);
        let at_once = if waves > 1 { usable } else { blocks as u32 };
        let x_rows = self.x_rows(m);
        let columns = self.block_n / self.cluster_m;
        let lines = (x_rows << x_straddles as u32) + (columns << w_straddles as u32);
        let arriving = x_rows + self.block_n;
        let loaded = if lines > arriving { lines } else { arriving };
        let read = at_once * lines / 60;
        let step = self.cycles_per_step(loaded);
        (waves, if step > read { step } else { read })
    }

    /// Estimated cycles in which a multiprocessor multiplies and loads a step of k, so many lines
    /// of 128 bytes.
    const fn cycles_per_step(self, lines: u32) -> u32 {
        let multiply = self.block_m * self.block_n / 32;
        let load = lines * 8 / 5;
        let lap = 1600 / self.num_stages;
        let load = if load > lap { load } else { lap };
        if multiply > load { multiply } else { load }
    }
}

/// What a kernel is chosen for.
#[derive(Clone, Copy, Debug)]
pub struct Problem {
    /// Rows of Y.
    pub m: u32,
    /// Columns of Y.
    pub n: u32,
    /// Products that each element of Y sums.
    pub k: u32,
    /// Whether rows of X start elsewhere than at multiples of 128 bytes, so that each piece of 128
    /// bytes reads two lines.
    pub x_straddles: bool,
    /// The same of W.
    pub w_straddles: bool,
}

impl Problem {
    /// One whose rows start at multiples of 128 bytes.
    #[must_use]
    pub const fn aligned(m: u32, n: u32, k: u32) -> Self {
        Self { m, n, k, x_straddles: false, w_straddles: false }
    }

    /// Whether rows at this distance, in bytes, start elsewhere than at multiples of 128 bytes.
    #[must_use]
    pub const fn straddles(row_stride_bytes: u64) -> bool {
        !row_stride_bytes.is_multiple_of(128)
    }
}

/// A Hopper forward kernel and what it serves.
pub struct HopperKernel {
    /// Element type of all operands.
    pub dtype: DType,
    /// Layout of W.
    pub layout: WeightLayout,
    /// How it cuts the problem up.
    pub tile: Tile,
    /// Whether consumers have a tile each and take turns.
    pub ping_pong: bool,
    /// What to launch.
    pub kernel: Kernel<HopperGemmParams>,
}

impl HopperKernel {
    /// Rows of Y a store covers.
    #[must_use]
    pub const fn store_rows(&self) -> u32 {
        if self.tile.stores_by_warp() { WARP_M } else { self.tile.store_rows() }
    }

    const fn cost(&self, problem: Problem, multiprocessors: u32) -> u64 {
        if self.ping_pong {
            self.tile.cost_in_turns(problem, multiprocessors)
        } else {
            self.tile.cost(problem, multiprocessors)
        }
    }
}

/// Whether there are kernels here for this element type: not for f32, which wgmma would round and
/// [`split`] takes in parts.
#[must_use]
pub const fn serves(dtype: DType) -> bool {
    matches!(dtype, DType::F16 | DType::BF16)
}

/// What a caller insists on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Forced {
    /// `[block_m, block_n]`.
    pub tile: Option<[u32; 2]>,
    /// Blocks that share a tile; a k of fewer steps than that gets one block all the same.
    pub split_k: Option<u32>,
    /// Blocks that share columns of W.
    pub cluster_m: Option<u32>,
    /// Whether consumers have a tile each and take turns.
    pub ping_pong: Option<bool>,
}

impl Forced {
    /// Whether there are kernels like this.
    #[must_use]
    pub fn exists(self) -> bool {
        all_kernels().any(|row| self.admits_kernel(row, u32::MAX))
    }

    fn admits_kernel(self, row: &HopperKernel, k: u32) -> bool {
        self.admits(row.tile, k) && self.ping_pong.is_none_or(|turns| row.ping_pong == turns)
    }

    fn admits(self, tile: Tile, k: u32) -> bool {
        let steps = k.div_ceil(BLOCK_K);
        self.tile.is_none_or(|extents| tile.extents() == extents)
            && self
                .split_k
                .is_none_or(|blocks| tile.split_k == if blocks <= steps { blocks } else { 1 })
            && self.cluster_m.is_none_or(|blocks| tile.cluster_m == blocks)
    }
}

/// The kernel expected to be fastest for this problem on a GPU of so many multiprocessors, or the
/// one that is forced; `None` where no kernel [`serves`] the type, or is of the forced kind.
#[must_use]
pub fn select(
    dtype: DType,
    layout: WeightLayout,
    problem: Problem,
    multiprocessors: u32,
    forced: Forced,
) -> Option<&'static HopperKernel> {
    // The first of equals: rows go from the largest tile, which reads least, to the smallest.
    all_kernels()
        .filter(|row| (row.dtype, row.layout) == (dtype, layout))
        .filter(|row| forced.admits_kernel(row, problem.k) && row.tile.can_split(problem.k))
        .min_by_key(|row| row.cost(problem, multiprocessors))
}

fn all_kernels() -> impl Iterator<Item = &'static HopperKernel> {
    KERNELS.iter().chain(&ping_pong::KERNELS)
}

/// What a Hopper forward kernel takes.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct HopperGemmParams {
    /// X `[m, k]`, box `[x_rows(m), BLOCK_K]`, 128-byte swizzle.
    pub x_map: TensorMap,
    /// W, 128-byte swizzle: as `[n, k]` with box `[w_rows(), BLOCK_K]`, as `[k, n]` with box
    /// `[BLOCK_K, SLAB_N]`.
    pub w_map: TensorMap,
    /// Y `[m, n]`, box `[store_rows(), SLAB_N]` with the kernel's, 128-byte swizzle.
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
    /// Bytes of the boxes of X and W that make a stage.
    pub stage_bytes: u32,
    /// Y, where TMA cannot store it; then `y_map` is not used.
    pub plain: PlainRows,
}

// SAFETY: repr(C); 384 bytes of maps, three u64 and eighteen 32-bit fields, of which
// sixteen stand after the first u64: no padding.
unsafe impl KernelParams for HopperGemmParams {}
const _: () = assert!(size_of::<HopperGemmParams>() == 3 * 128 + 3 * 8 + 18 * 4);

/// One row makes a kernel's module, its host-side description and, on the device, its entry.
macro_rules! kernels {
    ($($entry:ident: $element:ident $ptx_type:literal, $layout:ident $w_major:ident,
        $block_m:literal x $block_n:tt, $num_stages:literal stages,
        $split_k:tt split, $cluster_m:tt share;)+) => {
        /// Every kernel, for each element type and layout from the largest tile to the smallest.
        pub static KERNELS: [HopperKernel; [$(stringify!($entry)),+].len()] = [$({
            let tile = Tile {
                block_m: $block_m, block_n: $block_n, num_stages: $num_stages, split_k: $split_k,
                cluster_m: $cluster_m,
            };
            HopperKernel {
                dtype: DType::$element,
                layout: WeightLayout::$layout,
                tile,
                ping_pong: false,
                kernel: hopper_kernel!($entry, tile.block_dim(), tile.smem_bytes()),
            }
        }),+];
        $(
            #[cfg(all(target_arch = "nvptx64", kasmina_tier = "hopper"))]
            device::entry!(
                $entry, $element, $ptx_type, $w_major, $block_m, $block_n, $num_stages,
                $split_k, $cluster_m
            );
        )+
    };
}

kernels! {
    gemm_bf16_kn_128x256x64: BF16 "bf16", InOut MN, 128 x 256, 4 stages, 1 split, 1 share;
    gemm_bf16_kn_128x128x64: BF16 "bf16", InOut MN, 128 x 128, 6 stages, 1 split, 1 share;
    gemm_bf16_kn_64x128x64: BF16 "bf16", InOut MN, 64 x 128, 8 stages, 1 split, 1 share;
    gemm_bf16_kn_64x64x64: BF16 "bf16", InOut MN, 64 x 64, 8 stages, 1 split, 1 share;
    gemm_bf16_kn_64x128x64_c2: BF16 "bf16", InOut MN, 64 x 128, 8 stages, 1 split, 2 share;
    gemm_bf16_kn_64x64x64_k2: BF16 "bf16", InOut MN, 64 x 64, 8 stages, 2 split, 1 share;
    gemm_bf16_kn_64x64x64_k4: BF16 "bf16", InOut MN, 64 x 64, 8 stages, 4 split, 1 share;
    gemm_bf16_kn_64x64x64_k8: BF16 "bf16", InOut MN, 64 x 64, 8 stages, 8 split, 1 share;
    gemm_bf16_nk_128x256x64: BF16 "bf16", OutIn K, 128 x 256, 4 stages, 1 split, 1 share;
    gemm_bf16_nk_128x128x64: BF16 "bf16", OutIn K, 128 x 128, 6 stages, 1 split, 1 share;
    gemm_bf16_nk_64x128x64: BF16 "bf16", OutIn K, 64 x 128, 8 stages, 1 split, 1 share;
    gemm_bf16_nk_64x64x64: BF16 "bf16", OutIn K, 64 x 64, 8 stages, 1 split, 1 share;
    gemm_bf16_nk_64x128x64_c2: BF16 "bf16", OutIn K, 64 x 128, 8 stages, 1 split, 2 share;
    gemm_bf16_nk_64x64x64_k2: BF16 "bf16", OutIn K, 64 x 64, 8 stages, 2 split, 1 share;
    gemm_bf16_nk_64x64x64_k4: BF16 "bf16", OutIn K, 64 x 64, 8 stages, 4 split, 1 share;
    gemm_bf16_nk_64x64x64_k8: BF16 "bf16", OutIn K, 64 x 64, 8 stages, 8 split, 1 share;
    gemm_f16_kn_128x256x64: F16 "f16", InOut MN, 128 x 256, 4 stages, 1 split, 1 share;
    gemm_f16_kn_128x128x64: F16 "f16", InOut MN, 128 x 128, 6 stages, 1 split, 1 share;
    gemm_f16_kn_64x128x64: F16 "f16", InOut MN, 64 x 128, 8 stages, 1 split, 1 share;
    gemm_f16_kn_64x64x64: F16 "f16", InOut MN, 64 x 64, 8 stages, 1 split, 1 share;
    gemm_f16_kn_64x128x64_c2: F16 "f16", InOut MN, 64 x 128, 8 stages, 1 split, 2 share;
    gemm_f16_kn_64x64x64_k2: F16 "f16", InOut MN, 64 x 64, 8 stages, 2 split, 1 share;
    gemm_f16_kn_64x64x64_k4: F16 "f16", InOut MN, 64 x 64, 8 stages, 4 split, 1 share;
    gemm_f16_kn_64x64x64_k8: F16 "f16", InOut MN, 64 x 64, 8 stages, 8 split, 1 share;
    gemm_f16_nk_128x256x64: F16 "f16", OutIn K, 128 x 256, 4 stages, 1 split, 1 share;
    gemm_f16_nk_128x128x64: F16 "f16", OutIn K, 128 x 128, 6 stages, 1 split, 1 share;
    gemm_f16_nk_64x128x64: F16 "f16", OutIn K, 64 x 128, 8 stages, 1 split, 1 share;
    gemm_f16_nk_64x64x64: F16 "f16", OutIn K, 64 x 64, 8 stages, 1 split, 1 share;
    gemm_f16_nk_64x128x64_c2: F16 "f16", OutIn K, 64 x 128, 8 stages, 1 split, 2 share;
    gemm_f16_nk_64x64x64_k2: F16 "f16", OutIn K, 64 x 64, 8 stages, 2 split, 1 share;
    gemm_f16_nk_64x64x64_k4: F16 "f16", OutIn K, 64 x 64, 8 stages, 4 split, 1 share;
    gemm_f16_nk_64x64x64_k8: F16 "f16", OutIn K, 64 x 64, 8 stages, 8 split, 1 share;
}

#[cfg(test)]
mod tests;
