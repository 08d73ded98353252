//! `Y = act(X·W + b)` in f32 on Hopper's tensor cores in one launch, without memory for parts: for
//! products that are over before two launches more would pay ([`split`] has those).
//!
//! Operands arrive in shared memory as they are, and each warp splits its elements into bf16
//! [`parts`](crate::gemm::parts) on their way into the tensor cores:
//!
//! ```text
//! slice of warps s   cp.async of 32 k of X and W into a ring of its own, several ahead
//!                    wait ─ 2 × (load, split ─ 6 mma m16n8k16 into c ─ sums += c)
//! block              sums of all slices to shared memory ─ added in order
//! cluster            sums of all blocks, each with a part of k, through distributed shared memory,
//!                    added in order ─ bias, activation ─ Y
//! ```
//! A warp has 32 rows and 64 columns of Y. A slice is a group of warps with tiles side by side; the
//! slices of a block take turns in k, so that a small tile keeps eight warps busy, and with one warp
//! to a slice each element is split once. As in `split`, but for each 16 k, products start from zero,
//! the smallest first, and are added to the sum in f32, rounded to nearest.
//!
//! # What parts cannot express
//! Each block notices it while it splits. Where it matters, the tile is computed again, in plain
//! f32, straight from global memory, before it is stored. Other tiles are not affected.
//!
//! # Which lane holds what
//! An `mma` does not care which k, rows or columns its fragments are, if its operands agree. So lane
//! `4·g + t` takes rows `4·g ..` of X, columns `8·g ..` of W and k `8·t ..` of each 32, which are
//! neighbours in memory either way round; of Y it has rows `4·g ..` and columns `16·t ..`.
//!
//! # Shape contract
//! - m, n, k ≥ 1; any strides, addresses aligned as f32: elements are copied one by one where 16
//!   bytes are not possible.
//! - The number of tiles times the blocks that share one fits 31 bits.

use super::{Forced, split};
use crate::abi::{Kernel, hopper_kernel};
use crate::gemm::portable::{self, PortableGemmParams};
use crate::gemm::{F32Products, InputLayout, WeightLayout};
use crate::tile_scheduler::TileScheduler;

#[cfg(all(target_arch = "nvptx64", kasmina_tier = "hopper"))]
mod device;
#[cfg(test)]
mod tests;

/// Depth of a stage.
pub const BLOCK_K: u32 = 32;
/// Rows of Y of a warp.
pub const WARP_M: u32 = 32;
/// Columns of Y of a warp.
pub const WARP_N: u32 = 64;

/// Bytes of a warp's rows of X, and of its columns of W, in a stage.
const X_BYTES: u32 = WARP_M * BLOCK_K * 4;
const W_BYTES: u32 = WARP_N * BLOCK_K * 4;

/// How a kernel cuts the problem up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirectTile {
    /// Warps of a slice below each other.
    pub warps_m: u32,
    /// Warps of a slice side by side.
    pub warps_n: u32,
    /// Groups of warps that take turns in k.
    pub slices: u32,
    /// Stages of each slice's ring: 2, 3 or 4.
    pub num_stages: u32,
    /// Blocks that share a tile, each with a part of k: 1, 2, 4 or 8.
    pub split_k: u32,
}

impl DirectTile {
    /// Rows of Y per tile.
    #[must_use]
    pub const fn block_m(self) -> u32 {
        self.warps_m * WARP_M
    }

    /// Columns of Y per tile.
    #[must_use]
    pub const fn block_n(self) -> u32 {
        self.warps_n * WARP_N
    }

    /// `[block_m, block_n]`.
    #[must_use]
    pub const fn extents(self) -> [u32; 2] {
        [self.block_m(), self.block_n()]
    }

    const fn warps(self) -> u32 {
        self.warps_m * self.warps_n * self.slices
    }

    const fn block_dim(self) -> u32 {
        self.warps() * 32
    }

    const fn stage_bytes(self) -> u32 {
        self.warps_m * X_BYTES + self.warps_n * W_BYTES
    }

    const fn slice_bytes(self) -> u32 {
        self.num_stages * self.stage_bytes()
    }

    /// Bytes of a tile's sums.
    const fn sums_bytes(self) -> u32 {
        self.block_m() * self.block_n() * 4
    }

    /// The rings, later the sums of all slices; then a word of findings for each warp and one for the
    /// block.
    const fn findings_offset(self) -> u32 {
        let (rings, sums) = (self.slices * self.slice_bytes(), self.slices * self.sums_bytes());
        if rings > sums { rings } else { sums }
    }

    const fn smem_bytes(self) -> u32 {
        self.findings_offset() + (self.warps() + 1) * 4
    }

    /// The tiles of an `[m, n]` output.
    #[must_use]
    pub const fn scheduler(self, m: u32, n: u32) -> TileScheduler {
        TileScheduler {
            tiles_m: m.div_ceil(self.block_m()),
            tiles_n: n.div_ceil(self.block_n()),
            group_m: 16,
        }
    }

    /// Blocks to launch; `None` where they are more than a grid may have.
    #[must_use]
    pub const fn blocks(self, m: u32, n: u32) -> Option<u32> {
        let TileScheduler { tiles_m, tiles_n, .. } = self.scheduler(m, n);
        let blocks = tiles_m as u64 * tiles_n as u64 * self.split_k as u64;
        if blocks <= i32::MAX as u64 { Some(blocks as u32) } else { None }
    }

    /// Estimated cycles of the busiest multiprocessor, with those of the launch.
    ///
    /// Eight warps take 4800 cycles for 32 k of each: on an H200 loads, splitting and products add up,
    /// as if `mma` and the rest of the instructions did not overlap. A block starts and ends in 6000,
    /// and 2000 more where others share its tile.
    const fn cost(self, [m, n, k]: [u32; 3], multiprocessors: u32) -> u64 {
        let TileScheduler { tiles_m, tiles_n, .. } = self.scheduler(m, n);
        let blocks = tiles_m as u64 * tiles_n as u64 * self.split_k as u64;
        // Clusters of more than two blocks do not fill all multiprocessors.
        let usable =
            if self.split_k > 2 { multiprocessors - multiprocessors / 11 } else { multiprocessors };
        let steps = k.div_ceil(BLOCK_K).div_ceil(self.split_k).div_ceil(self.slices) as u64;
        let together = if self.split_k > 1 { 2000 } else { 0 };
        blocks.div_ceil(usable as u64) * (steps * 4800 + 6000 + together)
    }

    /// The steps of k, from and to, of the block of this rank.
    #[must_use]
    #[inline(always)]
    pub const fn steps(self, rank: u32, k: u32) -> (u32, u32) {
        let all = k.div_ceil(BLOCK_K);
        if self.split_k == 1 {
            return (0, all);
        }
        // Not multiplied first, which might wrap.
        let (each, left) = (all / self.split_k, all % self.split_k);
        let less = if rank < left { rank } else { left };
        let more = if rank < left { 1 } else { 0 };
        let first = rank * each + less;
        (first, first + each + more)
    }
}

/// Offset of 16 bytes in a warp's share of a stage of a K-major operand with `extent` rows: row
/// `row`, four k from `4·chunk`. Rows of two neighbouring groups of lanes have their halves the other
/// way round, so that the eight lanes that the hardware serves together meet on no bank.
#[must_use]
#[inline(always)]
pub const fn k_major_place(extent: u32, row: u32, chunk: u32) -> u32 {
    row * (BLOCK_K * 4) + (chunk ^ (row / (extent / 8) % 2)) * 16
}

/// The same where the operand is MN-major: `k`, four rows or columns from `4·chunk`.
#[must_use]
#[inline(always)]
pub const fn mn_major_place(extent: u32, k: u32, chunk: u32) -> u32 {
    let t = k / 8;
    let swizzle = if extent == 32 { t << 1 } else { t % 2 + t / 2 * 4 };
    k * (extent * 4) + (chunk ^ swizzle) * 16
}

/// Bytes from the start of a row of memory to the `chunk`th four elements from `first`, if they exist.
#[must_use]
#[inline(always)]
pub const fn row_offset(first: u32, chunk: u32) -> u64 {
    // The index of an element fits 32 bits; its bytes do not from 2³⁰ on.
    4 * first.wrapping_add(4 * chunk) as u64
}

/// Offset of four sums of a tile of `block_n` columns, from `row` and `4·chunk`, so that neither
/// lanes that hold rows 4 apart nor those that read a row meet on a bank.
#[must_use]
#[inline(always)]
pub const fn sums_place(tile: DirectTile, row: u32, chunk: u32) -> u32 {
    row * (tile.block_n() * 4) + (chunk ^ (chunk / 8 % 2) ^ (row / 4 % 2 * 2)) * 16
}

/// A kernel that splits on the way, and what it serves.
pub struct DirectGemmKernel {
    /// Which way round X lies.
    pub x_layout: InputLayout,
    /// Layout of W.
    pub layout: WeightLayout,
    /// How it cuts the problem up.
    pub tile: DirectTile,
    /// What to launch.
    pub kernel: Kernel<PortableGemmParams>,
}

/// Whether there are kernels like this; nothing is loaded into several blocks here.
#[must_use]
pub fn exists(x_layout: InputLayout, layout: WeightLayout, forced: Forced) -> bool {
    of_layouts(x_layout, layout).any(|row| admits(forced, row.tile))
}

/// The kernel expected to be fastest for this problem, `[m, n, k]`, on a GPU of so many
/// multiprocessors, or the one whose tile and number of blocks to a tile are forced; `None` where none
/// is like that or has few enough blocks.
#[must_use]
pub fn select(
    x_layout: InputLayout,
    layout: WeightLayout,
    shape @ [m, n, _]: [u32; 3],
    multiprocessors: u32,
    forced: Forced,
) -> Option<&'static DirectGemmKernel> {
    of_layouts(x_layout, layout)
        .filter(|row| admits(forced, row.tile) && row.tile.blocks(m, n).is_some())
        .min_by_key(|row| row.tile.cost(shape, multiprocessors))
}

fn of_layouts(
    x_layout: InputLayout,
    layout: WeightLayout,
) -> impl Iterator<Item = &'static DirectGemmKernel> {
    KERNELS.iter().filter(move |row| (row.x_layout, row.layout) == (x_layout, layout))
}

fn admits(forced: Forced, tile: DirectTile) -> bool {
    forced.tile.is_none_or(|extents| tile.extents() == extents)
        && forced.split_k.is_none_or(|blocks| tile.split_k == blocks)
}

/// Whether `row` is expected to be faster than [`portable`]'s kernel. It never is where k is so small
/// that plain f32 would err less.
#[must_use]
pub fn pays(row: &DirectGemmKernel, shape: [u32; 3], multiprocessors: u32) -> bool {
    let [_, _, k] = shape;
    // The estimate for `portable` leaves out the launch.
    let portable = portable::f32_cost(shape, multiprocessors) + 3500;
    k >= BLOCK_K && row.tile.cost(shape, multiprocessors) < portable
}

/// Whether `row` is expected to be faster than parts made before, with six products.
#[must_use]
pub fn beats_split(row: &DirectGemmKernel, shape: [u32; 3], multiprocessors: u32) -> bool {
    let split = split::cost(F32Products::Six, row.layout, shape, multiprocessors);
    row.tile.cost(shape, multiprocessors) < split
}

/// One row makes a kernel's module, its host-side description and, on the device, its entry.
macro_rules! kernels {
    ($($entry:ident: $x_layout:ident $x:ident, $layout:ident $w:ident, $warps_m:literal x $warps_n:literal warps,
        $slices:literal slices, $num_stages:literal stages, $split_k:tt split;)+) => {
        /// Every kernel.
        pub static KERNELS: [DirectGemmKernel; [$(stringify!($entry)),+].len()] = [$({
            let tile = DirectTile {
                warps_m: $warps_m, warps_n: $warps_n, slices: $slices,
                num_stages: $num_stages, split_k: $split_k,
            };
            DirectGemmKernel {
                x_layout: InputLayout::$x_layout,
                layout: WeightLayout::$layout,
                tile,
                kernel: hopper_kernel!($entry, tile.block_dim(), tile.smem_bytes()),
            }
        }),+];
        $(
            #[cfg(all(target_arch = "nvptx64", kasmina_tier = "hopper"))]
            device::entry!($entry, $x, $w, $warps_m, $warps_n, $slices, $num_stages, $split_k);
        )+
    };
}

kernels! {
    gemm_f32_direct_kn_64x64: Plain K, InOut MN, 2 x 1 warps, 4 slices, 3 stages, 1 split;
    gemm_f32_direct_kn_32x64: Plain K, InOut MN, 1 x 1 warps, 8 slices, 2 stages, 1 split;
    gemm_f32_direct_kn_32x64_k2: Plain K, InOut MN, 1 x 1 warps, 8 slices, 2 stages, 2 split;
    gemm_f32_direct_kn_32x64_k4: Plain K, InOut MN, 1 x 1 warps, 8 slices, 2 stages, 4 split;
    gemm_f32_direct_kn_32x64_k8: Plain K, InOut MN, 1 x 1 warps, 8 slices, 2 stages, 8 split;
    gemm_f32_direct_nk_64x64: Plain K, OutIn K, 2 x 1 warps, 4 slices, 3 stages, 1 split;
    gemm_f32_direct_nk_32x64: Plain K, OutIn K, 1 x 1 warps, 8 slices, 2 stages, 1 split;
    gemm_f32_direct_nk_32x64_k2: Plain K, OutIn K, 1 x 1 warps, 8 slices, 2 stages, 2 split;
    gemm_f32_direct_nk_32x64_k4: Plain K, OutIn K, 1 x 1 warps, 8 slices, 2 stages, 4 split;
    gemm_f32_direct_nk_32x64_k8: Plain K, OutIn K, 1 x 1 warps, 8 slices, 2 stages, 8 split;
    gemm_f32_direct_km_kn_64x64: Transposed MN, InOut MN, 2 x 1 warps, 4 slices, 3 stages, 1 split;
    gemm_f32_direct_km_kn_32x64: Transposed MN, InOut MN, 1 x 1 warps, 8 slices, 2 stages, 1 split;
    gemm_f32_direct_km_kn_32x64_k2: Transposed MN, InOut MN, 1 x 1 warps, 8 slices, 2 stages, 2 split;
    gemm_f32_direct_km_kn_32x64_k4: Transposed MN, InOut MN, 1 x 1 warps, 8 slices, 2 stages, 4 split;
    gemm_f32_direct_km_kn_32x64_k8: Transposed MN, InOut MN, 1 x 1 warps, 8 slices, 2 stages, 8 split;
}
