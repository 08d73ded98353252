//! `Y = act(X·W + b)` in f32 on Hopper's tensor cores: both operands as sums of bf16 parts
//! ([`parts`](crate::gemm::parts)), their products added up with the accuracy of f32.
//!
//! Three kernels follow each other:
//!
//! ```text
//! split    X, W ──▶ parts of X and of W, each a bf16 matrix; what was noticed, one word per block
//! product  parts ──▶ Y                                            on tensor cores, below
//! repair   if parts could not express X or W: X, W ──▶ Y again, in plain f32 (`portable`)
//! ```
//!
//! The second is built as the 16-bit kernels are (`hopper.rs`): a producer, a ring, one or two
//! consumer warpgroups of 64 rows. A stage holds 32 k of all parts of both operands, so that six
//! products are made from six loads, and four stages fit:
//!
//! ```text
//! consumer   wait full[s] ─ 6 × 2 wgmma m64n128k16 into c ─ commit ─ d complete ─ release s−1 ─ s += d
//!            wait full[s] ─ 6 × 2 wgmma m64n128k16 into d ─ commit ─ c complete ─ release s−1 ─ s += c
//! ```
//!
//! Tensor cores add with truncation, whose errors all have one sign. So each batch of 32 k starts
//! from zero, with its smallest products first, and is added to the sum `s` in f32, rounded to
//! nearest, while the tensor cores fill the other accumulator.
//!
//! # Layouts
//! Parts lie one below the other, rows padded to 128 bytes: X as `[parts·m, k]`, W as
//! `[parts·n, k]` or `[parts·k, n]`. One tensor map describes all parts of an operand. A box that
//! crosses the end of a part reads rows of the next, which is harmless: they belong to rows or
//! columns beyond Y, or to k beyond the end, where X's box holds zeros.
//!
//! # Shape contract
//! - m, n, k ≥ 1; any strides, addresses aligned as f32: the split reads and the epilogue writes
//!   element by element where 16 bytes are not possible.
//! - `parts · (rows + a tile)` of either operand fits 31 bits, the range of TMA's coordinates, and
//!   so do the chunks of eight elements of each operand ([`fits`]).
//! - The number of tiles plus a grid fits 32 bits.

use super::{CONSUMER_M, SLAB_N, WARPGROUP};
use crate::abi::{Kernel, KernelParams, Module, TensorMap, hopper_kernel, module};
use crate::gemm::{F32Products, WeightLayout, portable};
use crate::pipeline::RingBarriers;
use crate::tile_scheduler::TileScheduler;

#[cfg(all(target_arch = "nvptx64", kasmina_tier = "hopper"))]
pub(crate) mod device;

/// Depth of one stage. Two stages of twice as many k leave the loads too little time (545 TFLOP/s
/// of bf16 products at 4096³ on an H200).
pub const BLOCK_K: u32 = 32;
const _: () = assert!(BLOCK_N == 2 * SLAB_N, "an MN-major W is loaded as two slabs");
/// Columns of Y per tile: two accumulators and a sum of 64 × 128 fill a warpgroup's registers.
pub const BLOCK_N: u32 = 128;
/// Elements of a row of parts are padded to a multiple of this: 128 bytes, a line of the L2.
pub const ROW_ALIGN: usize = 64;
/// Consecutive elements of a row that a thread splits at once.
pub const CHUNK: u32 = 8;
/// Threads per block of the split.
const SPLIT_THREADS: u32 = 512;
/// Blocks of the split that a multiprocessor holds at once.
const SPLIT_BLOCKS: u32 = 4;

/// Columns that the epilogue stages at a time, and the bytes of 16 such rows: one warp's share.
pub(crate) const STAGED_N: u32 = 64;
const STAGED_BYTES: u32 = 16 * STAGED_N * 4;

/// How a kernel cuts the problem up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SplitTile {
    /// Rows of Y per tile: 64 or 128, one consumer warpgroup for each 64.
    pub block_m: u32,
    /// Stages of the ring.
    pub num_stages: u32,
    /// Parts of an element: 2 or 3.
    pub parts: u32,
}

impl SplitTile {
    pub(crate) const fn num_consumers(self) -> u32 {
        self.block_m / CONSUMER_M
    }

    pub(crate) const fn block_dim(self) -> u32 {
        WARPGROUP * (1 + self.num_consumers())
    }

    /// Bytes of one part of X in a stage.
    pub(crate) const fn x_part_bytes(self) -> u32 {
        self.block_m * BLOCK_K * 2
    }

    /// Bytes of one part of W in a stage.
    pub(crate) const fn w_part_bytes() -> u32 {
        BLOCK_N * BLOCK_K * 2
    }

    const fn x_stage_bytes(self) -> u32 {
        self.parts * self.x_part_bytes()
    }

    pub(crate) const fn stage_bytes(self) -> u32 {
        self.x_stage_bytes() + self.parts * Self::w_part_bytes()
    }

    const fn staged_offset(self) -> u32 {
        self.num_stages * self.stage_bytes()
    }

    const fn barrier_offset(self) -> u32 {
        self.staged_offset() + self.num_consumers() * 4 * STAGED_BYTES
    }

    pub(crate) const fn smem_bytes(self) -> u32 {
        self.barrier_offset() + RingBarriers::bytes(self.num_stages)
    }

    /// `[block_m, block_n]`.
    #[must_use]
    pub const fn extents(self) -> [u32; 2] {
        [self.block_m, BLOCK_N]
    }

    /// The tiles of an `[m, n]` output.
    #[must_use]
    pub const fn scheduler(self, m: u32, n: u32) -> TileScheduler {
        TileScheduler {
            tiles_m: m.div_ceil(self.block_m),
            tiles_n: n.div_ceil(BLOCK_N),
            group_m: 16,
        }
    }

    /// Estimated cycles of the busiest multiprocessor, as `Tile::cost`. A single consumer adds up its
    /// batches while nobody multiplies; the epilogue moves four bytes for each element and nothing
    /// overlaps it.
    const fn cost(self, products: u32, [m, n, k]: [u32; 3], multiprocessors: u32) -> u64 {
        let TileScheduler { tiles_m, tiles_n, .. } = self.scheduler(m, n);
        let waves = (tiles_m as u64 * tiles_n as u64).div_ceil(multiprocessors as u64);
        let multiply = products * self.block_m * BLOCK_N / 64;
        let load = self.parts * (self.block_m + BLOCK_N) * 4 / 5;
        let add = if self.num_consumers() == 1 { 64 } else { 0 };
        let step = if multiply > load { multiply } else { load };
        waves * (k.div_ceil(BLOCK_K) as u64 * (step + add) as u64 + 5000)
    }
}

/// A kernel that multiplies operands in parts, and what it serves.
pub struct SplitGemmKernel {
    /// Which products it adds up.
    pub products: F32Products,
    /// Layout of W.
    pub layout: WeightLayout,
    /// How it cuts the problem up.
    pub tile: SplitTile,
    /// What to launch.
    pub kernel: Kernel<SplitGemmParams>,
}

/// The kernel expected to be fastest for this problem on a GPU of so many multiprocessors, or the
/// one of the tile, `[block_m, block_n]`, that is forced; `None` where no kernel has that tile.
#[must_use]
pub fn select(
    products: F32Products,
    layout: WeightLayout,
    shape: [u32; 3],
    multiprocessors: u32,
    forced_tile: Option<[u32; 2]>,
) -> Option<&'static SplitGemmKernel> {
    KERNELS
        .iter()
        .filter(|row| (row.products, row.layout) == (products, layout))
        .filter(|row| forced_tile.is_none_or(|tile| row.tile.extents() == tile))
        .min_by_key(|row| row.tile.cost(products.count(), shape, multiprocessors))
}

/// Whether there are kernels of this tile, `[block_m, block_n]`.
#[must_use]
pub fn has_tile(tile: [u32; 2]) -> bool {
    KERNELS.iter().any(|row| row.tile.extents() == tile)
}

/// Whether the way through parts is expected to be faster than [`portable`]'s kernel for this
/// problem, `[m, n, k]`. It never is where k is so small that plain f32 would err less.
#[must_use]
pub fn pays(
    products: F32Products,
    layout: WeightLayout,
    shape: [u32; 3],
    multiprocessors: u32,
) -> bool {
    cost(products, layout, shape, multiprocessors) < portable::f32_cost(shape, multiprocessors)
}

/// Estimated cycles of all three kernels; the most there is where none serves these products.
#[must_use]
pub fn cost(
    products: F32Products,
    layout: WeightLayout,
    shape @ [m, n, k]: [u32; 3],
    multiprocessors: u32,
) -> u64 {
    let Some(row) = select(products, layout, shape, multiprocessors, None) else { return u64::MAX };
    // Each operand is read in f32 and written in parts, at 2400 bytes a cycle; the two launches
    // more take about 5 µs.
    let bytes = (m as u64 + n as u64) * k as u64 * (4 + 2 * row.tile.parts as u64);
    row.tile.cost(products.count(), shape, multiprocessors) + bytes / 2400 + 9000
}

/// Whether the parts of an operand of so many rows and columns can be numbered.
#[must_use]
pub const fn fits(rows: u32, columns: u32) -> bool {
    const LIMIT: u64 = i32::MAX as u64;
    let (rows, columns) = (rows as u64, columns as u64);
    // The slowest to overflow is TMA's coordinate of the last row of a box.
    3 * rows + 256 <= LIMIT && rows * columns.div_ceil(CHUNK as u64) <= LIMIT
}

/// Where an operand's parts lie, in bytes from the start of the workspace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Workspace {
    /// Parts of X.
    pub x: u64,
    /// Parts of W.
    pub w: u64,
    /// All bytes; the findings of the split's blocks stand first.
    pub bytes: u64,
}

impl Workspace {
    /// For operands of so many rows and columns, in `parts` parts, split by `blocks` blocks.
    #[must_use]
    pub const fn new(x: [usize; 2], w: [usize; 2], parts: u32, blocks: u32) -> Self {
        const fn bytes_of([rows, columns]: [usize; 2], parts: u32) -> u64 {
            parts as u64 * rows as u64 * columns.next_multiple_of(ROW_ALIGN) as u64 * 2
        }
        let x_at = (blocks as u64 * 4).next_multiple_of(1024);
        let w_at = x_at + bytes_of(x, parts).next_multiple_of(1024);
        Self { x: x_at, w: w_at, bytes: w_at + bytes_of(w, parts) }
    }
}

/// A matrix and where its parts go.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct SplitOperand {
    /// Device address of the matrix.
    pub source: u64,
    /// Device address of its parts, 16-aligned; rows of `columns` padded to [`ROW_ALIGN`].
    pub parts: u64,
    /// From row to row of the source, in elements.
    pub row_stride: u64,
    /// Rows.
    pub rows: u32,
    /// Columns.
    pub columns: u32,
}

/// What the split takes.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct SplitParams {
    /// X.
    pub x: SplitOperand,
    /// W as it lies in memory.
    pub w: SplitOperand,
    /// Device address of one word per block, for its findings.
    pub findings: u64,
    /// Parts to write, 2 or 3.
    pub parts: u32,
    /// Keeps the size a multiple of 8 without padding.
    pub reserved: u32,
}

// SAFETY: repr(C); two structs of three u64 and two u32, a u64 and two u32: no padding.
unsafe impl KernelParams for SplitParams {}
const _: () = assert!(size_of::<SplitParams>() == 2 * 32 + 16);

/// The pass that splits f32 operands into parts.
pub static SPLIT_MODULE: Module = module!(Hopper, "hopper", "split_f32", ["split_f32"]);

/// Splits both operands.
pub static SPLIT: Kernel<SplitParams> =
    Kernel::new(&SPLIT_MODULE, "split_f32", SPLIT_THREADS, 0).waiting_for_predecessors();

/// Blocks to launch [`SPLIT`] with, for operands of so many rows and columns.
#[must_use]
pub fn split_blocks(x: [u32; 2], w: [u32; 2], multiprocessors: u32) -> u32 {
    let chunks = |[rows, columns]: [u32; 2]| u64::from(rows) * u64::from(columns.div_ceil(CHUNK));
    let needed = chunks(x).max(chunks(w)).div_ceil(u64::from(SPLIT_THREADS));
    let most = multiprocessors * SPLIT_BLOCKS;
    u32::try_from(needed).map_or(most, |needed| needed.clamp(1, most))
}

/// What a kernel that multiplies operands in parts takes.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct SplitGemmParams {
    /// The parts of X, `[parts·m, k]` bf16, box `[block_m, BLOCK_K]`, 64-byte swizzle.
    pub x_map: TensorMap,
    /// The parts of W, bf16: `[parts·n, k]` with box `[BLOCK_N, BLOCK_K]` and 64-byte swizzle, or
    /// `[parts·k, n]` with box `[BLOCK_K, SLAB_N]` and 128-byte swizzle.
    pub w_map: TensorMap,
    /// Device address of the bias, `[n]`; 0 for none.
    pub bias: u64,
    /// Device address of Y, `[m, n]`.
    pub y: u64,
    /// From row to row of Y, in elements.
    pub y_stride: u64,
    /// Rows of X and Y.
    pub m: u32,
    /// Columns of Y.
    pub n: u32,
    /// Columns of X.
    pub k: u32,
    /// The tiles of Y.
    pub tiles: TileScheduler,
    /// [`Activation`](crate::activation::Activation) as its discriminant.
    pub activation: u32,
    /// Keeps the size a multiple of 8 without padding.
    pub reserved: u32,
}

// SAFETY: repr(C); 256 bytes of maps, three u64 and eight 32-bit fields: no padding.
unsafe impl KernelParams for SplitGemmParams {}
const _: () = assert!(size_of::<SplitGemmParams>() == 2 * 128 + 3 * 8 + 8 * 4);

/// One row makes a kernel's module, its host-side description and, on the device, its entry.
macro_rules! kernels {
    ($($entry:ident: $products:ident $list:ident $parts:literal parts, $layout:ident $w_major:ident,
        $block_m:literal x 128, $num_stages:literal stages;)+) => {
        /// Every kernel, for each set of products and layout from the larger tile to the smaller.
        pub static KERNELS: [SplitGemmKernel; [$(stringify!($entry)),+].len()] = [$({
            let tile =
                SplitTile { block_m: $block_m, num_stages: $num_stages, parts: $parts };
            SplitGemmKernel {
                products: F32Products::$products,
                layout: WeightLayout::$layout,
                tile,
                kernel: hopper_kernel!($entry, tile.block_dim(), tile.smem_bytes()),
            }
        }),+];
        $(
            #[cfg(all(target_arch = "nvptx64", kasmina_tier = "hopper"))]
            device::entry!($entry, $list, $parts, $w_major, $block_m, $num_stages);
        )+
    };
}

kernels! {
    gemm_f32_six_kn_128x128x32: Six six 3 parts, InOut MN, 128 x 128, 4 stages;
    gemm_f32_six_kn_64x128x32: Six six 3 parts, InOut MN, 64 x 128, 5 stages;
    gemm_f32_six_nk_128x128x32: Six six 3 parts, OutIn K, 128 x 128, 4 stages;
    gemm_f32_six_nk_64x128x32: Six six 3 parts, OutIn K, 64 x 128, 5 stages;
    gemm_f32_three_kn_128x128x32: Three three 2 parts, InOut MN, 128 x 128, 6 stages;
    gemm_f32_three_kn_64x128x32: Three three 2 parts, InOut MN, 64 x 128, 8 stages;
    gemm_f32_three_nk_128x128x32: Three three 2 parts, OutIn K, 128 x 128, 6 stages;
    gemm_f32_three_nk_64x128x32: Three three 2 parts, OutIn K, 64 x 128, 8 stages;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn selected(shape: [u32; 3], products: F32Products) -> [u32; 2] {
        let row = select(products, WeightLayout::OutIn, shape, 132, None).expect("a kernel");
        row.tile.extents()
    }

    /// Timed on an H200, each was the faster of the two.
    #[test]
    fn tiles_are_chosen_as_they_were_timed() {
        for products in [F32Products::Six, F32Products::Three] {
            for shape in [[8192; 3], [4096; 3], [4096, 14336, 4096], [8192, 1024, 256]] {
                assert_eq!(selected(shape, products), [128, 128], "{shape:?}");
            }
            for shape in [[1024; 3], [512; 3], [128, 4096, 4096], [32, 4096, 4096], [128; 3]] {
                assert_eq!(selected(shape, products), [64, 128], "{shape:?}");
            }
        }
        assert_eq!(selected([2048; 3], F32Products::Six), [128, 128]);
    }

    /// Timed on an H200 down to 128³; below, launches are what counts.
    #[test]
    fn parts_pay_unless_there_is_little_to_multiply() {
        let pays = |shape| pays(F32Products::Six, WeightLayout::InOut, shape, 132);
        for shape in [[8192; 3], [1024; 3], [128; 3], [32, 4096, 4096], [1024, 1024, 128]] {
            assert!(pays(shape), "{shape:?}");
        }
        for shape in [[64; 3], [1, 1, 1], [1024, 1024, 16], [0, 512, 512]] {
            assert!(!pays(shape), "{shape:?}");
        }
    }

    #[test]
    fn a_forced_tile_is_the_one_that_is_used_or_none_is() {
        let forced =
            |tile| select(F32Products::Six, WeightLayout::InOut, [8192; 3], 132, Some(tile));
        assert_eq!(forced([64, 128]).expect("a kernel").tile.extents(), [64, 128]);
        assert!(has_tile([128, 128]) && !has_tile([128, 256]));
        assert!(forced([128, 256]).is_none());
    }

    #[test]
    fn every_set_of_products_has_kernels_for_both_layouts_whose_stages_hold_its_parts() {
        for products in [F32Products::Six, F32Products::Three] {
            for layout in WeightLayout::ALL {
                let row = select(products, layout, [1; 3], 132, None).expect("a kernel");
                assert_eq!((row.products, row.layout), (products, layout));
                assert_eq!(row.tile.parts, if products == F32Products::Six { 3 } else { 2 });
            }
        }
    }

    #[test]
    fn workspace_holds_findings_and_parts_without_overlap_and_aligned() {
        let at = Workspace::new([3, 65], [7, 64], 3, 300);
        assert_eq!(at.x, 2048);
        assert_eq!(at.w, 2048 + 3072);
        assert!(at.w - at.x >= 3 * 3 * 128 * 2);
        assert_eq!(at.bytes, at.w + 3 * 7 * 64 * 2);
    }

    #[test]
    fn operands_fit_while_coordinates_and_chunks_do() {
        assert!(fits(1 << 20, 8192));
        assert!(!fits(i32::MAX as u32 / 3, 1));
        assert!(!fits(1 << 28, 65));
        assert!(fits(1 << 27, 8));
    }

    #[test]
    fn a_split_fills_the_gpu_at_most_and_has_a_block_at_least() {
        assert_eq!(split_blocks([4096, 4096], [64, 64], 132), 528);
        assert_eq!(split_blocks([1, 1], [1, 1], 132), 1);
        assert_eq!(split_blocks([512, 16], [2, 8], 132), 2);
    }
}
