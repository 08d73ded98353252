//! Statistics of a tensor's elements in one pass: count, sum, mean, centred second moment,
//! extremes, elements that are not finite and elements near zero.
//!
//! The elements are cut into chunks by their index ([`Chunks`]), the chunks are summarised each in
//! a fixed order ([`Partial`]), and the chunks' summaries are merged in a fixed order, so that the
//! result depends on the elements alone: not on the grid, nor on which block finishes first. A
//! matrix may also be cut into segments, each with statistics of its own ([`Segments`]); where each
//! column is one and the rows are wide, by a kernel that has as many sums as columns ([`Columns`]), and
//! where it is a wide chunk of columns, by one whose blocks take all of its columns ([`Bands`]).
//!
//! A block of 256 threads takes chunk after chunk. Per batch a thread holds four vectors of 16
//! bytes, neighbouring threads neighbouring vectors, while the next four are on their way:
//!
//! ```text
//! thread    16 or 32 elements ─ f32 sums relative to a pivot ─ f64 sums    per batch
//! warp      rebase to the first lane's pivot ─ sum over lanes           ┐
//! block     8 warps in shared memory ─ the first warp does the same     ┘ per chunk → its slot
//! grid      the block that was the last to start merges all slots and writes the result
//! ```
//! The first chunk of a block is given by its number, the others are drawn from a counter, so that
//! all blocks finish at about the same time. The block with the highest number has no chunk, as it
//! mostly is the one to merge. With one chunk there are no slots.
//!
//! Of few elements that way through the L2 cache would be most of the time. On Hopper one cluster
//! of blocks of 256 threads takes up to 1 MiB, a chunk for each block and one pivot for all: every
//! warp sends its sums to the shared memory of the first block, whose first warp adds them up
//! (`device/cluster.rs`).
//!
//! From there on to 128 MiB, on Hopper, summary and sum are found by a block of 512 threads for each
//! chunk, with a pivot for each chunk instead of each thread, so that there is nothing to rebase, and
//! slots relative to a pivot of the whole tensor (`device/rows.rs`).
//!
//! No block waits for another but the merging one. It reads a slot until none of its words is
//! [`Partial::UNWRITTEN`], and makes it so again. So what one block tells another crosses the L2
//! cache once, without a fence or a counter of arrivals between. Every block draws a ticket as it
//! starts, and the one with the highest merges: all others are running or done by then, whatever
//! else keeps the GPU busy. It draws no chunks and merges while the others work. A multiprocessor
//! that has not merged lately takes microseconds to fetch the instructions, more than the merging
//! itself, so the block without a chunk runs through them once before it has to.
//!
//! # Errors
//! Rounding happens in a batch and is relative to it; everything else is f64. With u = 2⁻²⁴ and
//! r = elements per thread and chunk divided by elements per batch (at most 16 below 2³² elements, and
//! in segments):
//! - m2, so the variance too: relative error at most 12·(1 + r)·u, whatever the mean.
//! - sum with [`Statistic::Summary`]: at most 10·(1 + r)·u·Σ|x|, and far less unless single elements
//!   dwarf the rest; with [`Statistic::Sum`]: at most 10·u·Σ|x|. Where a chunk or all share a pivot
//!   it is at most 40·u·√(n·Σx²), and m2 is within 200·u.
//! - A batch whose squares leave the range of f32 (an element beyond 10¹⁹, all differences below
//!   10⁻¹⁸, infinities, NaN) is summed again in f64, so finite data of any size are right. So are
//!   all that follow a first batch without a finite mean, which leaves them without a pivot.
//! - Sum and mean of infinities and NaN are what IEEE addition gives, m2 is then NaN. The extremes
//!   are NaN if any element is. These elements are counted. If NaN are to be skipped, they are
//!   counted and the rest is as if they were not there.
//!
//! # Shape contract
//! - At least one element; the address is aligned to the element.
//! - 16-byte loads are used if the address (of a row, in a matrix) is a multiple of 16. Otherwise
//!   the same elements go to the same threads one by one, so the result has the same bits.
//! - Nothing writes the elements between the end of the grid before and that of this one.

mod bands;
mod chunks;
mod columns;
#[cfg(target_arch = "nvptx64")]
pub(crate) mod device;
mod moments;
mod rows;
mod segments;

pub use bands::{BandParams, Bands};
pub use chunks::{Chunks, Counts, Partial, share};
pub use columns::{ColumnParams, Columns};
pub use moments::{Accumulator, Batch, Moments, Rule};
pub use rows::RowParams;
pub use segments::{MOST_EXTENT, SegmentParams, Segments, Strip};

use rows::{ROW_SMEM_BYTES, ROW_THREADS};
use segments::SEGMENT_THREADS;

use crate::abi::{DType, Kernel, KernelParams, Module, Tier, module};

/// What is computed. Fields of the result that it does not name are as in [`Moments::EMPTY`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Statistic {
    /// Every field.
    Summary,
    /// `count`, `sum` and `mean`.
    Sum,
    /// `count` and `max`.
    Max,
    /// `count` and `min`.
    Min,
}

impl Statistic {
    /// Every statistic.
    pub const ALL: [Self; 4] = [Self::Summary, Self::Sum, Self::Max, Self::Min];

    /// Lower-case name, as it stands in entry names.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Summary => "summary",
            Self::Sum => "sum",
            Self::Max => "max",
            Self::Min => "min",
        }
    }
}

/// Threads per block.
const THREADS: u32 = 256;
/// Warps per block.
const WARPS: u32 = THREADS / 32;
/// Vectors of 16 bytes that a thread has in one batch.
const VECTORS: u32 = 4;
/// Blocks that share a multiprocessor, which leaves 80 registers a thread.
const BLOCKS_PER_MULTIPROCESSOR: u32 = 3;
/// Batches of a lane that share a pivot, in segments.
#[cfg(target_arch = "nvptx64")]
const BATCHES_PER_PIVOT: u32 = 8;
/// Blocks of the kernel for bands that share a multiprocessor, which leaves 64 registers a thread.
#[cfg(target_arch = "nvptx64")]
const BAND_BLOCKS_PER_MULTIPROCESSOR: u32 = 4;
/// Blocks of the kernel for columns that share a multiprocessor, which leaves 128 registers a thread.
#[cfg(target_arch = "nvptx64")]
const COLUMN_BLOCKS_PER_MULTIPROCESSOR: u32 = 2;
/// Its shared memory: 32 bytes for each of four columns of every lane.
const COLUMN_SMEM_BYTES: u32 = THREADS * 4 * 32;
/// Bytes a warp hands to the block.
const WARP_BYTES: u32 = 64;
/// Shared memory of the kernel for bands.
const BAND_SMEM_BYTES: u32 = WARPS * WARP_BYTES;
/// Bytes of a set: the records of all warps, and the chunk that thread 0 drew.
const SET_BYTES: u32 = WARPS * WARP_BYTES + 16;
/// Two sets, used in turn, and the block's ticket.
const SMEM_BYTES: u32 = 2 * SET_BYTES + 16;

/// Most blocks of the cluster for few elements, and their threads.
const CLUSTER_BLOCKS: u32 = 16;
const CLUSTER_THREADS: u32 = 256;
const CLUSTER_WARPS: u32 = CLUSTER_THREADS / 32;
/// Where what the warps of a cluster send lies in its first block: behind the barrier, in two halves.
const CLUSTER_RECORDS_AT: u32 = 16;
const CLUSTER_HALF_BYTES: u32 = CLUSTER_BLOCKS * CLUSTER_WARPS * 16;
const CLUSTER_SMEM_BYTES: u32 = CLUSTER_RECORDS_AT + 2 * CLUSTER_HALF_BYTES;

/// What a reduction kernel takes.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ReduceParams {
    /// Device address of the elements.
    pub data: u64,
    /// How they are cut up; at least one chunk.
    pub chunks: Chunks,
    /// Device address of `chunks.count` slots for a [`Partial`], 16-aligned, whose words are
    /// [`Partial::UNWRITTEN`] before and after; unused with one chunk.
    pub partials: u64,
    /// Device address of two u32 that are 0 before and after: how many blocks have started, and
    /// how many chunks were drawn. Unused with one chunk.
    pub counters: u64,
    /// Device address of one [`Moments`], which is written.
    pub result: u64,
    /// Elements of smaller absolute value count as dead.
    pub epsilon: f32,
    /// 1 to count NaN and leave them out of everything else, or 0.
    pub skip_nan: u32,
}

// SAFETY: repr(C); u64 at 0, chunks of 24 bytes, three u64 and two 32-bit fields: no padding.
unsafe impl KernelParams for ReduceParams {}
const _: () = assert!(size_of::<ReduceParams>() == 64);

impl ReduceParams {
    /// What the elements are measured by.
    #[must_use]
    #[inline(always)]
    pub const fn rule(&self) -> Rule {
        Rule { epsilon: self.epsilon, skip_nan: self.skip_nan != 0 }
    }
}

/// What the naive kernel takes.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct NaiveReduceParams {
    /// Device address of the elements.
    pub data: u64,
    /// Number of elements.
    pub len: u64,
    /// Device address of an f32 that is 0 before; the sum is added to it.
    pub result: u64,
}

// SAFETY: repr(C); three u64.
unsafe impl KernelParams for NaiveReduceParams {}

/// Blocks to launch: one for each chunk and one that merges, as far as the GPU runs them at the
/// same time.
#[must_use]
pub const fn blocks(chunks: Chunks, multiprocessors: u32) -> u32 {
    let resident = multiprocessors * BLOCKS_PER_MULTIPROCESSOR;
    if chunks.count == 1 {
        1
    } else if chunks.count < resident {
        chunks.count + 1
    } else {
        resident
    }
}

/// Blocks of the one cluster that serves these few chunks, some of them idle.
#[must_use]
pub const fn cluster_blocks(chunks: Chunks) -> u32 {
    chunks.count.next_power_of_two()
}

/// Blocks of the naive kernel: one for each 256 elements, as far as a grid may have them; the
/// threads then take several.
#[must_use]
pub const fn naive_blocks(len: u64) -> u32 {
    let blocks = len.div_ceil(THREADS as u64);
    if blocks < i32::MAX as u64 { blocks as u32 } else { i32::MAX as u32 }
}

/// One row per module: for an element type, the module, the constants the host launches and the
/// entries on the device.
macro_rules! kernels {
    ($($tier:ident $folder:literal $module:ident $dtype:ident $name:literal:
        $($statistic:ident $entry:ident $(few $few:ident)? $(rows $rows:ident)?),+;
        segments $segments:ident; bands $bands:ident; columns $columns:ident; naive $naive:ident;)+) => {
        $(
            /// Every reduction of this element type and tier.
            pub static $module: Module =
                module!($tier, $folder, $name, [
                    $(stringify!($entry), $(stringify!($few),)? $(stringify!($rows),)?)+
                    stringify!($segments), stringify!($bands), stringify!($columns),
                    stringify!($naive)
                ]);
        )+

        /// The kernel for a tier, an element type and a statistic; `None` for the CPU.
        #[must_use]
        pub fn kernel(
            tier: Tier,
            dtype: DType,
            statistic: Statistic,
        ) -> Option<&'static Kernel<ReduceParams>> {
            match (tier, dtype, statistic) {
                $($((Tier::$tier, DType::$dtype, Statistic::$statistic) => {
                    static KERNEL: Kernel<ReduceParams> = launched(Tier::$tier,
                        Kernel::new(&$module, stringify!($entry), THREADS, SMEM_BYTES));
                    Some(&KERNEL)
                })+)+
                (Tier::Cpu, ..) => None,
            }
        }

        /// The kernel of one cluster for few elements; `None` where the tier has none.
        #[must_use]
        pub fn few_kernel(
            tier: Tier,
            dtype: DType,
            statistic: Statistic,
        ) -> Option<&'static Kernel<RowParams>> {
            match (tier, dtype, statistic) {
                $($($((Tier::$tier, DType::$dtype, Statistic::$statistic) => {
                    static KERNEL: Kernel<RowParams> = launched(Tier::$tier,
                        Kernel::new(&$module, stringify!($few), CLUSTER_THREADS, CLUSTER_SMEM_BYTES)
                            .as_one_cluster());
                    Some(&KERNEL)
                })?)+)+
                _ => None,
            }
        }

        /// The kernel of one chunk per block, for runs of a middling size; `None` where the tier or
        /// the statistic has none.
        #[must_use]
        pub fn rows_kernel(
            tier: Tier,
            dtype: DType,
            statistic: Statistic,
        ) -> Option<&'static Kernel<RowParams>> {
            match (tier, dtype, statistic) {
                $($($((Tier::$tier, DType::$dtype, Statistic::$statistic) => {
                    static KERNEL: Kernel<RowParams> = launched(Tier::$tier,
                        Kernel::new(&$module, stringify!($rows), ROW_THREADS, ROW_SMEM_BYTES));
                    Some(&KERNEL)
                })?)+)+
                _ => None,
            }
        }

        /// The kernel that gives every statistic of each segment of a matrix; `None` for the CPU.
        #[must_use]
        pub fn segment_kernel(tier: Tier, dtype: DType) -> Option<&'static Kernel<SegmentParams>> {
            match (tier, dtype) {
                $((Tier::$tier, DType::$dtype) => {
                    static KERNEL: Kernel<SegmentParams> = launched(Tier::$tier,
                        Kernel::new(&$module, stringify!($segments), SEGMENT_THREADS, 0));
                    Some(&KERNEL)
                })+
                (Tier::Cpu, _) => None,
            }
        }

        /// The kernel that gives every statistic of each of a few wide chunks of columns; `None` for
        /// the CPU.
        #[must_use]
        pub fn band_kernel(tier: Tier, dtype: DType) -> Option<&'static Kernel<BandParams>> {
            match (tier, dtype) {
                $((Tier::$tier, DType::$dtype) => {
                    static KERNEL: Kernel<BandParams> = launched(Tier::$tier,
                        Kernel::new(&$module, stringify!($bands), THREADS, BAND_SMEM_BYTES));
                    Some(&KERNEL)
                })+
                (Tier::Cpu, _) => None,
            }
        }

        /// The kernel that gives every statistic of each column of a matrix of wide rows; `None` for
        /// the CPU.
        #[must_use]
        pub fn column_kernel(tier: Tier, dtype: DType) -> Option<&'static Kernel<ColumnParams>> {
            match (tier, dtype) {
                $((Tier::$tier, DType::$dtype) => {
                    static KERNEL: Kernel<ColumnParams> = launched(Tier::$tier,
                        Kernel::new(&$module, stringify!($columns), THREADS, COLUMN_SMEM_BYTES));
                    Some(&KERNEL)
                })+
                (Tier::Cpu, _) => None,
            }
        }

        /// The single-stage sum that others are measured against; `None` for the CPU. Each block
        /// adds its sum to the result with an atomic, in whichever order they arrive.
        #[must_use]
        pub fn naive_kernel(tier: Tier, dtype: DType) -> Option<&'static Kernel<NaiveReduceParams>> {
            match (tier, dtype) {
                $((Tier::$tier, DType::$dtype) => {
                    static KERNEL: Kernel<NaiveReduceParams> = launched(Tier::$tier,
                        Kernel::new(&$module, stringify!($naive), THREADS, SMEM_BYTES));
                    Some(&KERNEL)
                })+
                (Tier::Cpu, _) => None,
            }
        }

        $(
            #[cfg(all(target_arch = "nvptx64", kasmina_tier = $folder))]
            #[expect(non_snake_case, reason = "a module for each element type, named by it")]
            mod $dtype {
                use super::{
                    BandParams, ColumnParams, NaiveReduceParams, ReduceParams, SegmentParams,
                    device,
                };
                #[cfg(kasmina_tier = "hopper")]
                use super::RowParams;

                $(
                    /// # Safety
                    /// The elements are readable, what else the parameters name is writable, the
                    /// counters are 0, the slots are unwritten, and there is a chunk (`reduce.rs`
                    /// on the host: the tensor is not empty, the workspace is its stream's).
                    #[unsafe(no_mangle)]
                    pub(super) unsafe extern "ptx-kernel" fn $entry(params: ReduceParams) {
                        // SAFETY: as above.
                        unsafe { device::reduce::<device::$dtype, device::$statistic>(&params) }
                    }

                    $(
                        /// # Safety
                        /// As above, where the grid is one cluster with a block for each chunk.
                        #[unsafe(no_mangle)]
                        pub(super) unsafe extern "ptx-kernel" fn $few(params: RowParams) {
                            // SAFETY: as above.
                            unsafe { device::few::<device::$dtype, device::$statistic>(&params) }
                        }
                    )?

                    $(
                        /// # Safety
                        /// As above, where the chunks are those of `Chunks::rows`, with a block for
                        /// each.
                        #[unsafe(no_mangle)]
                        pub(super) unsafe extern "ptx-kernel" fn $rows(params: RowParams) {
                            // SAFETY: as above.
                            unsafe { device::rows::<device::$dtype, device::$statistic>(&params) }
                        }
                    )?
                )+

                /// # Safety
                /// The elements are readable, what else the parameters name is writable, nobody
                /// has arrived, and the grid is that of the segments (`reduce/segmented.rs` on the
                /// host: the tensor is not empty, the workspace is its stream's).
                #[unsafe(no_mangle)]
                pub(super) unsafe extern "ptx-kernel" fn $segments(params: SegmentParams) {
                    // SAFETY: as above.
                    unsafe { device::segments::<device::$dtype>(&params) }
                }

                /// # Safety
                /// As for segments, where the grid is that of the bands.
                #[unsafe(no_mangle)]
                pub(super) unsafe extern "ptx-kernel" fn $bands(params: BandParams) {
                    // SAFETY: as above.
                    unsafe { device::bands::<device::$dtype>(&params) }
                }

                /// # Safety
                /// As for segments, where the grid is that of the columns.
                #[unsafe(no_mangle)]
                pub(super) unsafe extern "ptx-kernel" fn $columns(params: ColumnParams) {
                    // SAFETY: as above.
                    unsafe { device::columns::<device::$dtype>(&params) }
                }

                /// # Safety
                /// The elements are readable and the result is writable (`reduce.rs` on the host).
                #[unsafe(no_mangle)]
                pub(super) unsafe extern "ptx-kernel" fn $naive(params: NaiveReduceParams) {
                    // SAFETY: as above.
                    unsafe { device::naive::<device::$dtype>(&params) }
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
    Portable "portable" PORTABLE_F32 F32 "reduce_f32":
        Summary reduce_f32_summary, Sum reduce_f32_sum, Max reduce_f32_max, Min reduce_f32_min;
        segments reduce_f32_segments; bands reduce_f32_bands;
        columns reduce_f32_columns; naive reduce_f32_naive;
    Portable "portable" PORTABLE_F16 F16 "reduce_f16":
        Summary reduce_f16_summary, Sum reduce_f16_sum, Max reduce_f16_max, Min reduce_f16_min;
        segments reduce_f16_segments; bands reduce_f16_bands;
        columns reduce_f16_columns; naive reduce_f16_naive;
    Portable "portable" PORTABLE_BF16 BF16 "reduce_bf16":
        Summary reduce_bf16_summary, Sum reduce_bf16_sum, Max reduce_bf16_max,
        Min reduce_bf16_min; segments reduce_bf16_segments; bands reduce_bf16_bands;
        columns reduce_bf16_columns; naive reduce_bf16_naive;
    Hopper "hopper" HOPPER_F32 F32 "reduce_f32":
        Summary reduce_f32_summary few reduce_f32_few_summary rows reduce_f32_rows_summary,
        Sum reduce_f32_sum few reduce_f32_few_sum rows reduce_f32_rows_sum,
        Max reduce_f32_max few reduce_f32_few_max,
        Min reduce_f32_min few reduce_f32_few_min;
        segments reduce_f32_segments; bands reduce_f32_bands;
        columns reduce_f32_columns; naive reduce_f32_naive;
    Hopper "hopper" HOPPER_F16 F16 "reduce_f16":
        Summary reduce_f16_summary few reduce_f16_few_summary rows reduce_f16_rows_summary,
        Sum reduce_f16_sum few reduce_f16_few_sum rows reduce_f16_rows_sum,
        Max reduce_f16_max few reduce_f16_few_max,
        Min reduce_f16_min few reduce_f16_few_min;
        segments reduce_f16_segments; bands reduce_f16_bands;
        columns reduce_f16_columns; naive reduce_f16_naive;
    Hopper "hopper" HOPPER_BF16 BF16 "reduce_bf16":
        Summary reduce_bf16_summary few reduce_bf16_few_summary rows reduce_bf16_rows_summary,
        Sum reduce_bf16_sum few reduce_bf16_few_sum rows reduce_bf16_rows_sum,
        Max reduce_bf16_max few reduce_bf16_few_max,
        Min reduce_bf16_min few reduce_bf16_few_min;
        segments reduce_bf16_segments; bands reduce_bf16_bands;
        columns reduce_bf16_columns; naive reduce_bf16_naive;
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::format;

    #[test]
    fn entry_names_say_what_the_kernel_serves() {
        for tier in [Tier::Portable, Tier::Hopper] {
            for dtype in DType::ALL {
                for statistic in Statistic::ALL {
                    let kernel = kernel(tier, dtype, statistic).expect("a kernel");
                    assert_eq!(kernel.entry, format!("reduce_{dtype}_{}", statistic.name()));
                    assert_eq!(kernel.module.name, format!("reduce_{dtype}"));
                    assert_eq!(kernel.module.tier, tier);
                    assert_eq!(kernel.waits_for_predecessors, tier == Tier::Hopper);
                }
                for statistic in [Statistic::Summary, Statistic::Sum] {
                    let rows = rows_kernel(tier, dtype, statistic).map(|kernel| kernel.entry);
                    let name = format!("reduce_{dtype}_rows_{}", statistic.name());
                    assert_eq!(rows, (tier == Tier::Hopper).then_some(&*name));
                }
                let segments = segment_kernel(tier, dtype).expect("a kernel");
                assert_eq!(segments.entry, format!("reduce_{dtype}_segments"));
                assert_eq!(segments.waits_for_predecessors, tier == Tier::Hopper);
                let bands = band_kernel(tier, dtype).expect("a kernel");
                assert_eq!(bands.entry, format!("reduce_{dtype}_bands"));
                assert_eq!(bands.waits_for_predecessors, tier == Tier::Hopper);
                let columns = column_kernel(tier, dtype).expect("a kernel");
                assert_eq!(columns.entry, format!("reduce_{dtype}_columns"));
                assert_eq!(columns.waits_for_predecessors, tier == Tier::Hopper);
                let naive = naive_kernel(tier, dtype).expect("a kernel");
                assert_eq!(naive.entry, format!("reduce_{dtype}_naive"));
            }
        }
        assert!(kernel(Tier::Cpu, DType::F32, Statistic::Sum).is_none());
    }

    #[test]
    fn grids_have_a_chunk_for_every_block() {
        assert_eq!(blocks(Chunks::of(1, DType::F32), 132), 1);
        assert_eq!(blocks(Chunks::of(1 << 18, DType::F32), 132), 129);
        assert_eq!(blocks(Chunks::of(1 << 30, DType::F32), 132), 396);
        for len in (1..1 << 20).step_by(997) {
            for chunks in DType::ALL.map(|dtype| Chunks::few(len, dtype)).into_iter().flatten() {
                let blocks = cluster_blocks(chunks);
                assert!(blocks >= chunks.count && blocks <= CLUSTER_BLOCKS, "{len}");
            }
        }
        assert_eq!(
            (naive_blocks(1), naive_blocks(257), naive_blocks(u64::MAX)),
            (1, 2, i32::MAX as u32)
        );
    }
}
