//! `dW = Xᵀ·dZ` and `db = Σ over rows of dZ` on Hopper.
//!
//! Both operands are `[batch, …]` row-major, so the index they are multiplied over is the slow one
//! of both: X counts as `[k, m]`, dZ as `[k, n]`, and both are MN-major to wgmma. With the weight as
//! `[out, in]` the same product is `dZᵀ·X`, and dZ is the first operand. Nothing is transposed.
//!
//! The pipeline is that of the forward kernels, with three differences:
//! - A long batch with few tiles is cut into *parts* along k. Each part of a tile is a work item of
//!   its own that leaves f32 partials, which the sum kernel adds in the order of the parts.
//! - The result may be added to what is there, by a TMA store that adds.
//! - The tiles that are first in the other direction add the rows of dZ while they lie in shared
//!   memory, as a product with 8 columns of ones. So db costs no pass over dZ, and no memory traffic
//!   but its own.
//!
//! ```text
//! producer   one thread: wait empty[s] ─ TMA of both operands into stage s ─ next s
//! consumers  wait full[s] ─ 4 × wgmma m64n8k16 of dZ and ones ─ 4 × wgmma m64nNk16 ─
//!            release stage s−1
//! epilogue   one part: round ─ stmatrix ─ TMA store or add;  several: f32 to the partials
//! ```
//!
//! # Shape contract
//! As the forward kernels', for both operands and the product; the number of work items plus a grid
//! fits 32 bits.

use super::unaligned::PlainRows;
use super::{BLOCK_K, Tile};
use crate::abi::{DType, Kernel, KernelParams, TensorMap, hopper_kernel};
use crate::tile_scheduler::TileScheduler;

#[cfg(all(target_arch = "nvptx64", kasmina_tier = "hopper"))]
mod device;

/// Bytes of the operand of ones, 16 by 8 elements.
#[cfg(all(target_arch = "nvptx64", kasmina_tier = "hopper"))]
const ONES_BYTES: u32 = 256;
/// The fewest steps of a part: below, filling the pipeline would cost as much.
const MIN_PART: u32 = 4;
/// The most parts.
const MAX_PARTS: u32 = 16;

/// Which operand's columns are summed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Summed {
    /// No sums.
    Neither,
    /// Those of the first operand, `[k, m]`.
    First,
    /// Those of the second operand, `[k, n]`.
    Second,
}

/// What a weight-gradient kernel takes. The product is `[m, n]`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct WeightGradientParams {
    /// The first operand, `[k, m]`, box `[BLOCK_K, SLAB_N]`, 128-byte swizzle.
    pub first_map: TensorMap,
    /// The second operand, `[k, n]`, box `[BLOCK_K, SLAB_N]`, 128-byte swizzle.
    pub second_map: TensorMap,
    /// The product, `[m, n]`, box `[CONSUMER_M, SLAB_N]`, 128-byte swizzle.
    pub product_map: TensorMap,
    /// Device address of f32 `[parts, m, n]` with several parts; unused with one.
    pub partials: u64,
    /// Where the sums go: with one part the device address of elements, else of f32
    /// `[parts, columns of the summed operand]`.
    pub sums: u64,
    /// Columns of the first operand, rows of the product.
    pub m: u32,
    /// Columns of the second operand and of the product.
    pub n: u32,
    /// Steps of `BLOCK_K` that cover k, at least 1.
    pub k_blocks: u32,
    /// Steps of a part, at least 1; the last may have fewer.
    pub part_k_blocks: u32,
    /// Parts of k.
    pub parts: u32,
    /// The tiles of the product.
    pub tiles: TileScheduler,
    /// [`Summed`] as its discriminant.
    pub summed: u32,
    /// 1 to add to what product and sums hold, with one part; else 0.
    pub accumulate: u32,
    /// The product, where TMA cannot store it; then `product_map` is not used.
    pub plain: PlainRows,
}

// SAFETY: repr(C); 384 bytes of maps, four u64 and twelve 32-bit fields, of which ten
// stand after the first two u64: no padding.
unsafe impl KernelParams for WeightGradientParams {}
const _: () = assert!(size_of::<WeightGradientParams>() == 3 * 128 + 4 * 8 + 12 * 4);

/// A weight-gradient kernel and what it serves.
pub struct WeightGradientKernel {
    /// Element type of operands and product.
    pub dtype: DType,
    /// How it cuts the product up.
    pub tile: Tile,
    /// What to launch.
    pub kernel: Kernel<WeightGradientParams>,
}

/// How a product is computed: by which kernel, in how many parts of k.
#[derive(Clone, Copy)]
pub struct Plan {
    /// The kernel.
    pub row: &'static WeightGradientKernel,
    /// Steps of `BLOCK_K` in a part.
    pub part_k_blocks: u32,
    /// Number of parts.
    pub parts: u32,
}

impl Plan {
    const fn new(row: &'static WeightGradientKernel, k_blocks: u32, parts: u32) -> Self {
        let part_k_blocks = k_blocks.div_ceil(parts);
        Self { row, part_k_blocks, parts: k_blocks.div_ceil(part_k_blocks) }
    }

    /// Estimated cycles: those of the busiest multiprocessor, multiplying or loading as `Tile::cost`
    /// has it for the forward kernels, and with several parts a launch that reads what they have
    /// written, some 2000 bytes a cycle.
    const fn cost(&self, m: u32, n: u32, multiprocessors: u32) -> u64 {
        let TileScheduler { tiles_m, tiles_n, .. } = self.row.tile.scheduler(m, n);
        let items = tiles_m as u64 * tiles_n as u64 * self.parts as u64;
        let step = self.row.tile.cycles_per_step(self.row.tile.block_m + self.row.tile.block_n);
        let product =
            items.div_ceil(multiprocessors as u64) * (self.part_k_blocks + 2) as u64 * step as u64;
        if self.parts == 1 {
            return product;
        }
        product + 3500 + m as u64 * n as u64 * self.parts as u64 * 8 / 2000
    }
}

/// Whether there are kernels for this element type: not for f32, whose operands wgmma takes K-major
/// alone.
#[must_use]
pub const fn serves(dtype: DType) -> bool {
    matches!(dtype, DType::F16 | DType::BF16)
}

/// The plan expected to be fastest on a GPU of so many multiprocessors, of the tile that is forced
/// if one is; `None` where no kernel serves the type or has that tile.
#[must_use]
pub fn select(
    dtype: DType,
    [m, n, k]: [u32; 3],
    multiprocessors: u32,
    forced_tile: Option<[u32; 2]>,
) -> Option<Plan> {
    let k_blocks = k.div_ceil(BLOCK_K);
    let most = (k_blocks / MIN_PART).clamp(1, MAX_PARTS);
    // The first of equals: the largest tile in the fewest parts.
    KERNELS
        .iter()
        .filter(|row| row.dtype == dtype)
        .filter(|row| forced_tile.is_none_or(|tile| row.tile.extents() == tile))
        .flat_map(|row| (1..=most).map(move |parts| Plan::new(row, k_blocks, parts)))
        .min_by_key(|plan| plan.cost(m, n, multiprocessors))
}

/// One row makes a kernel's module, its host-side description and, on the device, its entry.
macro_rules! kernels {
    ($($entry:ident: $element:ident $ptx_type:literal,
        $block_m:literal x $block_n:tt, $num_stages:literal stages;)+) => {
        /// Every kernel, for each element type from the largest tile to the smallest.
        pub static KERNELS: [WeightGradientKernel; [$(stringify!($entry)),+].len()] = [$({
            let tile = Tile::new($block_m, $block_n, $num_stages);
            WeightGradientKernel {
                dtype: DType::$element,
                tile,
                kernel: hopper_kernel!($entry, tile.block_dim(), tile.smem_bytes()),
            }
        }),+];
        $(
            #[cfg(all(target_arch = "nvptx64", kasmina_tier = "hopper"))]
            device::entry!($entry, $element, $ptx_type, $block_m, $block_n, $num_stages);
        )+
    };
}

kernels! {
    wgrad_bf16_128x256x64: BF16 "bf16", 128 x 256, 4 stages;
    wgrad_bf16_128x128x64: BF16 "bf16", 128 x 128, 6 stages;
    wgrad_bf16_64x128x64: BF16 "bf16", 64 x 128, 8 stages;
    wgrad_bf16_64x64x64: BF16 "bf16", 64 x 64, 8 stages;
    wgrad_f16_128x256x64: F16 "f16", 128 x 256, 4 stages;
    wgrad_f16_128x128x64: F16 "f16", 128 x 128, 6 stages;
    wgrad_f16_64x128x64: F16 "f16", 64 x 128, 8 stages;
    wgrad_f16_64x64x64: F16 "f16", 64 x 64, 8 stages;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn selected(m: u32, n: u32, k: u32) -> ([u32; 2], u32) {
        let plan = select(DType::BF16, [m, n, k], 132, None).expect("a kernel");
        (plan.row.tile.extents(), plan.parts)
    }

    #[test]
    fn parts_cover_k_and_none_is_empty() {
        for k_blocks in 1..200 {
            for parts in 1..=MAX_PARTS.min(k_blocks) {
                let plan = Plan::new(&KERNELS[0], k_blocks, parts);
                assert!(plan.part_k_blocks * plan.parts >= k_blocks);
                assert!(plan.part_k_blocks * (plan.parts - 1) < k_blocks);
            }
        }
    }

    #[test]
    fn large_products_are_not_cut_along_k_and_small_ones_of_a_long_batch_are() {
        assert_eq!(selected(8192, 8192, 8192), ([128, 256], 1));
        assert_eq!(selected(4096, 4096, 4096), ([128, 256], 1));
        assert_eq!(selected(4096, 4096, 32).1, 1);
        let (_, parts) = selected(1024, 256, 8192);
        assert!(parts > 1, "{parts}");
        let (_, parts) = selected(64, 64, 1 << 17);
        assert_eq!(parts, MAX_PARTS);
    }

    #[test]
    fn f32_has_no_kernel_and_a_forced_tile_is_the_one_that_is_used() {
        assert!(select(DType::F32, [64; 3], 132, None).is_none());
        for tile in [[128, 256], [128, 128], [64, 128], [64, 64]] {
            let plan = select(DType::F16, [512; 3], 132, Some(tile)).expect("a kernel");
            assert_eq!(plan.row.tile.extents(), tile);
        }
        assert!(select(DType::F16, [512; 3], 132, Some([64, 32])).is_none());
    }

    #[test]
    fn entry_names_say_what_the_kernel_serves() {
        for row in &KERNELS {
            let [block_m, block_n] = row.tile.extents();
            let expected = std::format!("wgrad_{}_{block_m}x{block_n}x{BLOCK_K}", row.dtype);
            assert_eq!(row.kernel.entry, expected);
            assert_eq!(row.kernel.module.entries, [row.kernel.entry]);
        }
    }
}
