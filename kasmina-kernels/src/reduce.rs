//! Statistics of a tensor's elements in one pass: count, sum, mean, centred second moment,
//! extremes, elements that are not finite and elements near zero.
//!
//! The elements are cut into chunks by their index ([`Chunks`]), the chunks are summarised each in
//! a fixed order ([`Partial`]), and the chunks' summaries are merged in a fixed order, so that the
//! result depends on the elements alone: not on the grid, nor on which block finishes first.
//!
//! A block of 512 threads takes the chunks `block, block + grid, …`. Per batch a thread holds four
//! vectors of 16 bytes, neighbouring threads neighbouring vectors, while the next four are on their
//! way:
//!
//! ```text
//! thread    16 or 32 elements ─ f32 sums relative to a pivot ─ f64 sums ┐ per batch
//! warp      rebase to the first lane's pivot ─ shuffle tree             ┐
//! block     16 warps in shared memory ─ the first warp does the same    ┘ per chunk → its slot
//! grid      a ticket per block; the last block merges all slots, writes the result and puts the
//!           ticket back to 0
//! ```
//! With one chunk there are no slots and no ticket.
//!
//! # Errors
//! Rounding happens in a batch and is relative to it; everything else is f64. With u = 2⁻²⁴ and
//! r = elements per thread and chunk divided by elements per batch (at most 8 below 2³⁰ elements):
//! - m2, so the variance too: relative error at most 12·(1 + r)·u, whatever the mean.
//! - sum with [`Statistic::Summary`]: at most 10·(1 + r)·u·Σ|x|, and far less unless single elements
//!   dwarf the rest; with [`Statistic::Sum`]: at most 10·u·Σ|x|.
//! - A batch whose squares leave the range of f32 (an element beyond 10¹⁹, all differences below
//!   10⁻¹⁸, infinities, NaN) is summed again in f64, so finite data of any size are right.
//! - Sum and mean of infinities and NaN are what IEEE addition gives, m2 is then NaN. The extremes
//!   are NaN if any element is. These elements are counted.
//!
//! # Shape contract
//! - At least one element; the address is aligned to the element.
//! - 16-byte loads are used if the address is a multiple of 16. Otherwise the same elements go to
//!   the same threads one by one, so the result has the same bits.
//! - Nothing writes the elements between the end of the grid before and that of this one.

#[cfg(target_arch = "nvptx64")]
mod device;
mod moments;

pub use moments::{Accumulator, Batch, Moments};

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
const THREADS: u32 = 512;
/// Warps per block.
const WARPS: u32 = THREADS / 32;
/// Vectors of 16 bytes that a thread has in one batch.
const VECTORS: u32 = 4;
/// Blocks that share a multiprocessor, which leaves 64 registers a thread.
const BLOCKS_PER_MULTIPROCESSOR: u32 = 2;
/// Bytes a warp hands to the block: a [`Partial`] and its pivot.
const WARP_BYTES: u32 = 48;
/// Two sets of warp records, used in turn, and what thread 0 learnt from the ticket.
const SMEM_BYTES: u32 = 2 * WARPS * WARP_BYTES + 16;

/// log2 of the bytes in the smallest chunk: one batch of a block.
const LOG2_BATCH_BYTES: u32 = (THREADS * VECTORS * 16).ilog2();
/// log2 of the bytes that one block summarises faster than several could tell each other.
const LOG2_ALONE_BYTES: u32 = LOG2_BATCH_BYTES + 1;
/// log2 of the bytes beyond which larger chunks no longer save time.
const LOG2_CHUNK_BYTES: u32 = LOG2_BATCH_BYTES + 3;
/// log2 of the number of chunks at which they begin to grow, and of the most there may be.
const LOG2_FEW: u32 = 8;
const LOG2_MOST: u32 = 14;

/// How a run of elements is cut up: into chunks of a power of two, the last one shorter.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunks {
    /// Elements in all.
    pub len: u64,
    /// log2 of the elements in a chunk.
    pub log2_chunk: u32,
    /// Number of chunks, at most 16384; 0 for no elements.
    pub count: u32,
}

impl Chunks {
    /// The chunks of `len` elements of this type, fewer than 2⁴²: one up to 64 KiB, then chunks of
    /// at least 32 KiB that grow to 256 KiB while there are more than 256, and beyond that once
    /// there are more than 16384.
    #[must_use]
    pub const fn of(len: u64, dtype: DType) -> Self {
        let log2_size = dtype.size().ilog2();
        let alone = LOG2_ALONE_BYTES - log2_size;
        let log2_chunk = if len <= 1 << alone {
            alone
        } else {
            let smallest = LOG2_BATCH_BYTES - log2_size;
            let few = max(ceil_log2(len).saturating_sub(LOG2_FEW), smallest);
            let largest =
                max(LOG2_CHUNK_BYTES - log2_size, ceil_log2(len).saturating_sub(LOG2_MOST));
            if few < largest { few } else { largest }
        };
        Self { len, log2_chunk, count: ((len + (1 << log2_chunk) - 1) >> log2_chunk) as u32 }
    }

    /// Index of the first element of chunk `index`, and how many it has.
    #[must_use]
    #[inline(always)]
    pub const fn range(self, index: u32) -> (u64, u32) {
        let first = (index as u64) << self.log2_chunk;
        let (left, chunk) = (self.len - first, 1 << self.log2_chunk);
        (first, if left < chunk { left as u32 } else { chunk as u32 })
    }
}

/// How many of `len` elements part `part` gets when runs of `width` are dealt to `parts` in turn.
/// The product of the two is a power of two.
#[must_use]
#[inline(always)]
pub const fn share(len: u32, width: u32, parts: u32, part: u32) -> u32 {
    let round = width * parts;
    let rest = (len % round) as i32 - (part * width) as i32;
    let rest = if rest < 0 { 0 } else { rest as u32 };
    len / round * width + if rest < width { rest } else { width }
}

const fn max(a: u32, b: u32) -> u32 {
    if a > b { a } else { b }
}

/// The least n with `2ⁿ ≥ value`; 0 for 0.
const fn ceil_log2(value: u64) -> u32 {
    if value <= 1 { 0 } else { u64::BITS - (value - 1).leading_zeros() }
}

/// Summary of one chunk, as it lies in its slot. The chunk's number says how many elements.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Partial {
    /// Sum of the elements.
    pub sum: f64,
    /// Sum of the squared distances from their mean.
    pub m2: f64,
    /// Smallest element; NaN if any is.
    pub min: f32,
    /// Largest element; NaN if any is.
    pub max: f32,
    /// Elements that are NaN or infinite.
    pub non_finite: u32,
    /// Elements of absolute value below epsilon.
    pub dead: u32,
}

impl Partial {
    /// Of no elements.
    pub const EMPTY: Self = Self {
        sum: 0.0,
        m2: 0.0,
        min: f32::INFINITY,
        max: f32::NEG_INFINITY,
        non_finite: 0,
        dead: 0,
    };

    /// The statistics of the chunk, which has `count` elements, at least 1.
    #[must_use]
    #[inline(always)]
    pub const fn moments(&self, count: u64) -> Moments {
        Moments {
            count,
            sum: self.sum,
            mean: self.sum / count as f64,
            m2: self.m2,
            non_finite: self.non_finite as u64,
            dead: self.dead as u64,
            min: self.min,
            max: self.max,
        }
    }
}

/// What a reduction kernel takes.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ReduceParams {
    /// Device address of the elements.
    pub data: u64,
    /// How they are cut up; at least one chunk.
    pub chunks: Chunks,
    /// Device address of `chunks.count` [`Partial`]s, 16-aligned; unused with one chunk.
    pub partials: u64,
    /// Device address of a u32 that is 0 before and after; unused with one chunk.
    pub ticket: u64,
    /// Device address of one [`Moments`], which is written.
    pub result: u64,
    /// Elements of smaller absolute value count as dead.
    pub epsilon: f32,
    /// Keeps the size a multiple of 8 without padding.
    pub reserved: u32,
}

// SAFETY: repr(C); u64 at 0, chunks of 16 bytes, three u64 and two 32-bit fields: no padding.
unsafe impl KernelParams for ReduceParams {}
const _: () = assert!(size_of::<ReduceParams>() == 56 && size_of::<Partial>() == 32);

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

/// Blocks to launch: one for each chunk, as far as the GPU runs them at the same time.
#[must_use]
pub const fn blocks(chunks: Chunks, multiprocessors: u32) -> u32 {
    let resident = multiprocessors * BLOCKS_PER_MULTIPROCESSOR;
    if chunks.count < resident { chunks.count } else { resident }
}

/// Blocks of the naive kernel: one for each 512 elements, as far as a grid may have them; the
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
        $($statistic:ident $entry:ident),+; naive $naive:ident;)+) => {
        $(
            /// Every reduction of this element type and tier.
            pub static $module: Module =
                module!($tier, $folder, $name, [$(stringify!($entry),)+ stringify!($naive)]);
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
                use super::{NaiveReduceParams, ReduceParams, device};

                $(
                    /// # Safety
                    /// The elements are readable, what else the parameters name is writable, the
                    /// ticket is 0, and there is a chunk (`reduce.rs` on the host: the tensor is
                    /// not empty, the workspace is its stream's).
                    #[unsafe(no_mangle)]
                    pub(super) unsafe extern "ptx-kernel" fn $entry(params: ReduceParams) {
                        // SAFETY: as above.
                        unsafe { device::reduce::<device::$dtype, device::$statistic>(&params) }
                    }
                )+

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
        naive reduce_f32_naive;
    Portable "portable" PORTABLE_F16 F16 "reduce_f16":
        Summary reduce_f16_summary, Sum reduce_f16_sum, Max reduce_f16_max, Min reduce_f16_min;
        naive reduce_f16_naive;
    Portable "portable" PORTABLE_BF16 BF16 "reduce_bf16":
        Summary reduce_bf16_summary, Sum reduce_bf16_sum, Max reduce_bf16_max,
        Min reduce_bf16_min; naive reduce_bf16_naive;
    Hopper "hopper" HOPPER_F32 F32 "reduce_f32":
        Summary reduce_f32_summary, Sum reduce_f32_sum, Max reduce_f32_max, Min reduce_f32_min;
        naive reduce_f32_naive;
    Hopper "hopper" HOPPER_F16 F16 "reduce_f16":
        Summary reduce_f16_summary, Sum reduce_f16_sum, Max reduce_f16_max, Min reduce_f16_min;
        naive reduce_f16_naive;
    Hopper "hopper" HOPPER_BF16 BF16 "reduce_bf16":
        Summary reduce_bf16_summary, Sum reduce_bf16_sum, Max reduce_bf16_max,
        Min reduce_bf16_min; naive reduce_bf16_naive;
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::format;
    use std::vec::Vec;

    #[test]
    fn chunks_cover_every_element_once_in_order() {
        for dtype in DType::ALL {
            for len in [0, 1, 8191, 16_384, 16_385, 32_768, 32_769, 1_000_003, (1 << 24) + 1] {
                let chunks = Chunks::of(len, dtype);
                let mut next = 0;
                for index in 0..chunks.count {
                    let (first, len) = chunks.range(index);
                    assert_eq!(first, next);
                    assert!(len > 0 && len <= 1 << chunks.log2_chunk);
                    assert!(len == 1 << chunks.log2_chunk || index + 1 == chunks.count);
                    next += u64::from(len);
                }
                assert_eq!(next, len);
            }
        }
    }

    #[test]
    fn small_tensors_are_one_chunk_and_large_ones_never_more_than_the_workspace_holds() {
        let count = |log2: u32, dtype| Chunks::of(1 << log2, dtype).count;
        assert_eq!([10, 13, 14, 15, 20].map(|log2| count(log2, DType::F32)), [1, 1, 1, 4, 128]);
        assert_eq!([21, 24, 26, 30].map(|log2| count(log2, DType::F32)), [256, 256, 1024, 16384]);
        assert_eq!([15, 16, 25, 30].map(|log2| count(log2, DType::BF16)), [1, 4, 256, 8192]);
        for len in (10..41).flat_map(|log2| [(1 << log2) - 1, 1 << log2, (1 << log2) + 1]) {
            assert!(Chunks::of(len, DType::F32).count <= 1 << LOG2_MOST, "{len}");
        }
    }

    #[test]
    fn every_chunk_but_the_last_is_whole_batches_of_whole_aligned_vectors() {
        for dtype in DType::ALL {
            for log2 in 0..40 {
                let bytes = (dtype.size() as u64) << Chunks::of(1 << log2, dtype).log2_chunk;
                assert_eq!(bytes % u64::from(THREADS * VECTORS * 16), 0);
            }
        }
    }

    #[test]
    fn shares_are_what_dealing_the_elements_in_turn_gives() {
        for (width, parts) in [(4, 512), (8, 512), (128, 16), (256, 16)] {
            for len in [0, 1, 3, 4, 5, 127, 128, 2047, 2048, 2049, 5000, 16_384, 40_001] {
                let mut dealt: Vec<u32> = std::vec![0; parts as usize];
                (0..len).for_each(|element| dealt[(element / width % parts) as usize] += 1);
                for part in 0..parts {
                    assert_eq!(share(len, width, parts, part), dealt[part as usize]);
                }
            }
        }
    }

    #[test]
    fn a_warp_has_what_its_threads_have() {
        for len in [1, 129, 2049, 5000, 16_383] {
            for warp in 0..WARPS {
                let threads = 32 * warp..32 * (warp + 1);
                let sum: u32 = threads.map(|thread| share(len, 4, THREADS, thread)).sum();
                assert_eq!(share(len, 4 * 32, WARPS, warp), sum);
            }
        }
    }

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
                let naive = naive_kernel(tier, dtype).expect("a kernel");
                assert_eq!(naive.entry, format!("reduce_{dtype}_naive"));
            }
        }
        assert!(kernel(Tier::Cpu, DType::F32, Statistic::Sum).is_none());
    }

    #[test]
    fn grids_have_a_chunk_for_every_block() {
        assert_eq!(blocks(Chunks::of(1, DType::F32), 132), 1);
        assert_eq!(blocks(Chunks::of(1 << 20, DType::F32), 132), 128);
        assert_eq!(blocks(Chunks::of(1 << 30, DType::F32), 132), 264);
        assert_eq!(
            (naive_blocks(1), naive_blocks(513), naive_blocks(u64::MAX)),
            (1, 2, i32::MAX as u32)
        );
    }
}
