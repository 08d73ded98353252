//! The elementwise and summing parts of a linear layer's backward pass, for every GPU.
//!
//! ```text
//! dZ = dY ⊙ act'(Z)      db = Σ over rows of dZ
//! dX = dZ·Wᵀ             dW = Xᵀ·dZ
//! ```
//! The two products are kernels of `gemm`. Here are
//! - the *gradient* kernel, which computes dZ and, from the same registers, the sums of its columns;
//! - the *sum* kernel, which adds partial results, the column sums of chunks of rows or the products
//!   of parts of a long batch, in the order of their number.
//!
//! # The gradient kernel
//! dY, the saved Z or Y, and dZ are `[m, n]`, each with its own row stride. A block of 256 threads
//! takes a strip of 128 bytes of columns and a chunk of rows. Eight neighbouring threads have the
//! 16-byte vectors of a row, 32 rows at a time, four of them in flight:
//!
//! ```text
//! thread   rows r, r + 32, r + 64, … of 16 bytes of columns, added in f32 in this order
//! warp     the four threads of a column, by shuffles
//! block    its eight warps through shared memory, in order
//! chunk    one: db itself; several: partial sums [chunk, n] for the sum kernel
//! ```
//! The number of chunks follows from m and n alone, so the bits of db depend on nothing else.
//!
//! # Shape contract
//! - m, n ≥ 1; any strides; addresses and strides need only the alignment of the element. 16-byte
//!   accesses are used where all addresses and strides are multiples of 16 bytes and the columns
//!   exist; elsewhere the same elements go to the same threads one by one.
//! - dZ does not overlap the operands, which may be read through the read-only path.

use crate::abi::{DType, Kernel, KernelParams, Module, Tier, module};
use crate::tile_scheduler::TileScheduler;

/// Threads per block, of both kernels.
const THREADS: u32 = 256;
/// Threads that share a row: 128 bytes of it.
const LANES: u32 = 8;
/// Rows that a block takes at a time.
const SLOTS: u32 = THREADS / LANES;
/// Rows of a thread that are in flight.
const ROWS_IN_FLIGHT: u32 = 4;
/// The smallest chunk, and what every chunk is a multiple of.
const CHUNK_ROWS: u32 = SLOTS * ROWS_IN_FLIGHT;
/// Blocks for which rows are cut up: some eight for each multiprocessor of the largest GPUs.
const BLOCKS: u32 = 1024;
/// The sums of a strip's columns, for each warp.
const GRADIENT_SMEM: u32 = THREADS / 32 * LANES * 8 * 4;
/// Groups of threads that share the partials of a column, where there are many.
const SUM_GROUPS: u32 = 8;
const SUM_SMEM: u32 = THREADS * 4;

/// Columns of a strip.
#[must_use]
const fn strip(dtype: DType) -> u32 {
    128 / dtype.size() as u32
}

/// How the gradient kernel cuts `[m, n]` up: chunks of rows, as many as keep a GPU busy, and strips
/// of columns. Both extents are at least 1 and below 2³¹.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunks {
    /// Rows of a chunk; the last may have fewer.
    pub rows: u32,
    /// Number of chunks.
    pub count: u32,
    /// Number of strips.
    pub strips: u32,
}

impl Chunks {
    /// The chunks of an `[m, n]` matrix.
    #[must_use]
    pub const fn of(m: u32, n: u32, dtype: DType) -> Self {
        let strips = n.div_ceil(strip(dtype));
        let wanted = BLOCKS.div_ceil(strips);
        let rows = m.div_ceil(wanted).next_multiple_of(CHUNK_ROWS);
        Self { rows, count: m.div_ceil(rows), strips }
    }

    /// Blocks to launch; fits 32 bits, as a strip has at least 32 columns and many strips leave few
    /// chunks.
    #[must_use]
    pub const fn blocks(self) -> u32 {
        self.count * self.strips
    }

    /// Chunks and strips, which a block's index names one of each.
    #[must_use]
    pub const fn grid(self) -> TileScheduler {
        TileScheduler { tiles_m: self.count, tiles_n: self.strips, group_m: 1 }
    }
}

/// What a gradient kernel takes. Strides are in elements, from row to row.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct GradientParams {
    /// Device address of dY, `[m, n]`.
    pub dy: u64,
    /// Device address of Z, or of Y where that is enough, `[m, n]`; 0 without an activation.
    pub saved: u64,
    /// Device address of dZ, `[m, n]`; 0 if only the sums are wanted.
    pub dz: u64,
    /// Device address of db, `[n]`, with one chunk; else 0.
    pub db: u64,
    /// Device address of f32 sums, `[chunks, n]`; 0 for none.
    pub partials: u64,
    /// Row stride of dY.
    pub dy_stride: u64,
    /// Row stride of Z or Y.
    pub saved_stride: u64,
    /// Row stride of dZ.
    pub dz_stride: u64,
    /// Rows.
    pub m: u32,
    /// Columns.
    pub n: u32,
    /// Rows of a chunk.
    pub chunk_rows: u32,
    /// [`Activation`](crate::activation::Activation) as its discriminant.
    pub activation: u32,
    /// 1 to add to what db holds, 0 to replace it.
    pub accumulate: u32,
    /// Chunks and strips.
    pub grid: TileScheduler,
}

// SAFETY: repr(C); eight u64 and eight 32-bit fields: no padding.
unsafe impl KernelParams for GradientParams {}
const _: () = assert!(size_of::<GradientParams>() == 8 * 8 + 8 * 4);

/// One sum of partial results: `out = Σ partials`, `[rows, columns]`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct SumJob {
    /// Device address of f32 `[count, rows, columns]` without gaps.
    pub partials: u64,
    /// Device address of the result.
    pub out: u64,
    /// Row stride of the result, in elements.
    pub out_stride: u64,
    /// How many partial results there are; with 0 the sum is 0.
    pub count: u32,
    /// Columns of the result.
    pub columns: u32,
    /// 1 to add to what the result holds, 0 to replace it.
    pub accumulate: u32,
    /// 1 where several threads share a column's partials.
    pub shared: u32,
    /// Rows and blocks per row.
    pub grid: TileScheduler,
    /// Keeps the size a multiple of 8 without padding.
    pub reserved: u32,
}

impl SumJob {
    /// A sum of `count` partials into an `[rows, columns]` result whose rows are `out_stride`
    /// elements apart.
    #[must_use]
    pub const fn new(
        partials: u64,
        count: u32,
        [rows, columns]: [u32; 2],
        out: u64,
        out_stride: u64,
        accumulate: bool,
    ) -> Self {
        // Few results with many partials would leave a GPU idle, and each thread waiting.
        let shared = rows == 1 && count >= SUM_GROUPS;
        let block_columns = if shared { THREADS / SUM_GROUPS } else { THREADS };
        let tiles_n = columns.div_ceil(block_columns);
        let grid = TileScheduler { tiles_m: rows, tiles_n, group_m: 1 };
        let (accumulate, shared) = (accumulate as u32, shared as u32);
        Self { partials, out, out_stride, count, columns, accumulate, shared, grid, reserved: 0 }
    }

    /// A job that does nothing.
    pub const NONE: Self = Self::new(0, 0, [0, 0], 0, 0, false);
}

/// What a sum kernel takes: two jobs, the second in the blocks after the first's.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct SumParams {
    /// The jobs.
    pub jobs: [SumJob; 2],
}

// SAFETY: repr(C); three u64 and eight 32-bit fields a job: no padding.
unsafe impl KernelParams for SumParams {}
const _: () = assert!(size_of::<SumParams>() == 2 * (3 * 8 + 8 * 4));

/// Blocks to launch for two jobs.
#[must_use]
pub const fn blocks(jobs: &[SumJob; 2]) -> u32 {
    jobs[0].grid.num_tiles() + jobs[1].grid.num_tiles()
}

/// One row per module: for a tier and an element type, the module, the constants the host launches
/// and the device entries.
macro_rules! kernels {
    ($($tier:ident $folder:literal $module:ident $dtype:ident $name:literal:
        $gradient:ident, $sum:ident;)+) => {
        $(
            /// The gradient and the sum kernel of this tier and element type.
            pub static $module: Module =
                module!($tier, $folder, $name, [stringify!($gradient), stringify!($sum)]);
        )+

        /// The gradient kernel of a tier and an element type; `None` for the CPU.
        #[must_use]
        pub const fn gradient_kernel(
            tier: Tier,
            dtype: DType,
        ) -> Option<&'static Kernel<GradientParams>> {
            match (tier, dtype) {
                $((Tier::$tier, DType::$dtype) => {
                    static KERNEL: Kernel<GradientParams> = launched(Tier::$tier,
                        Kernel::new(&$module, stringify!($gradient), THREADS, GRADIENT_SMEM));
                    Some(&KERNEL)
                })+
                (Tier::Cpu, _) => None,
            }
        }

        /// The sum kernel of a tier and an element type; `None` for the CPU.
        #[must_use]
        pub const fn sum_kernel(tier: Tier, dtype: DType) -> Option<&'static Kernel<SumParams>> {
            match (tier, dtype) {
                $((Tier::$tier, DType::$dtype) => {
                    static KERNEL: Kernel<SumParams> = launched(Tier::$tier,
                        Kernel::new(&$module, stringify!($sum), THREADS, SUM_SMEM));
                    Some(&KERNEL)
                })+
                (Tier::Cpu, _) => None,
            }
        }

        $(
            #[cfg(all(target_arch = "nvptx64", kasmina_tier = $folder))]
            #[expect(non_snake_case, reason = "a module for each element type, named by it")]
            mod $dtype {
                use super::{GradientParams, SumParams, device};
                use crate::gemm::element::$dtype;

                /// # Safety
                /// Addresses, strides and extents describe memory that is valid on the device, and
                /// the grid has the blocks of the parameters (`gemm::Backward` on the host).
                #[unsafe(no_mangle)]
                pub(super) unsafe extern "ptx-kernel" fn $gradient(params: GradientParams) {
                    // SAFETY: the host checks every shape and stride against its allocation.
                    unsafe { device::gradient::<$dtype>(&params) }
                }

                /// # Safety
                /// As the gradient kernel's.
                #[unsafe(no_mangle)]
                pub(super) unsafe extern "ptx-kernel" fn $sum(params: SumParams) {
                    // SAFETY: the host made the partials and checked the result.
                    unsafe { device::sum::<$dtype>(&params) }
                }
            }
        )+
    };
}

/// The kernel as its tier's grids are launched: those of Hopper overlap.
const fn launched<P: KernelParams>(tier: Tier, kernel: Kernel<P>) -> Kernel<P> {
    match tier {
        Tier::Hopper => kernel.waiting_for_predecessors(),
        _ => kernel,
    }
}

kernels! {
    Portable "portable" PORTABLE_F32 F32 "backward_f32": backward_f32_gradient, backward_f32_sum;
    Portable "portable" PORTABLE_F16 F16 "backward_f16": backward_f16_gradient, backward_f16_sum;
    Portable "portable" PORTABLE_BF16 BF16 "backward_bf16":
        backward_bf16_gradient, backward_bf16_sum;
    Hopper "hopper" HOPPER_F32 F32 "backward_f32": backward_f32_gradient, backward_f32_sum;
    Hopper "hopper" HOPPER_F16 F16 "backward_f16": backward_f16_gradient, backward_f16_sum;
    Hopper "hopper" HOPPER_BF16 BF16 "backward_bf16": backward_bf16_gradient, backward_bf16_sum;
}

#[cfg(target_arch = "nvptx64")]
mod device;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_and_strips_cover_the_matrix_and_none_is_empty() {
        for dtype in DType::ALL {
            for m in [1, 31, 127, 128, 129, 4097, 1 << 20, i32::MAX as u32] {
                for n in [1, 31, 32, 33, 65, 4096, 1 << 24, i32::MAX as u32] {
                    let chunks = Chunks::of(m, n, dtype);
                    assert!(u64::from(chunks.rows) * u64::from(chunks.count) >= u64::from(m));
                    assert!(u64::from(chunks.rows) * u64::from(chunks.count - 1) < u64::from(m));
                    assert!(u64::from(chunks.strips) * u64::from(strip(dtype)) >= u64::from(n));
                    assert!(u64::from(chunks.count) * u64::from(chunks.strips) < 1 << 31);
                }
            }
        }
    }

    #[test]
    fn a_small_batch_is_one_chunk_and_a_large_one_keeps_a_gpu_busy() {
        assert_eq!(Chunks::of(128, 64, DType::BF16).count, 1);
        for (m, n) in [(8192, 8192), (8192, 1024), (1 << 17, 64)] {
            let blocks = Chunks::of(m, n, DType::BF16).blocks();
            assert!((512..=2048).contains(&blocks), "{m} x {n}: {blocks}");
        }
    }

    #[test]
    fn partials_of_one_row_are_shared_by_threads_once_there_are_many() {
        let few = SumJob::new(0, 7, [1, 1000], 0, 1000, false);
        assert_eq!((few.shared, few.grid.num_tiles()), (0, 4));
        let many = SumJob::new(0, 8, [1, 1000], 0, 1000, false);
        assert_eq!((many.shared, many.grid.num_tiles()), (1, 32));
        let matrix = SumJob::new(0, 8, [10, 300], 0, 300, true);
        assert_eq!((matrix.shared, matrix.grid.num_tiles()), (0, 20));
        assert_eq!(SumJob::NONE.grid.num_tiles(), 0);
    }

    #[test]
    fn every_kernel_is_in_the_module_of_its_dtype_under_its_own_name() {
        for (tier, dtype) in [Tier::Portable, Tier::Hopper]
            .into_iter()
            .flat_map(|tier| DType::ALL.map(|dtype| (tier, dtype)))
        {
            let entries =
                [std::format!("backward_{dtype}_gradient"), std::format!("backward_{dtype}_sum")];
            let gradient = gradient_kernel(tier, dtype).expect("a kernel");
            let sum = sum_kernel(tier, dtype).expect("a kernel");
            assert_eq!([gradient.entry, sum.entry], entries);
            assert_eq!(gradient.module.entries, entries);
            assert_eq!((gradient.module.tier, sum.module), (tier, gradient.module));
        }
    }
}
