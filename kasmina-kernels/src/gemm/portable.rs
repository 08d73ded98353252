//! `Y = act(X·W + b)` on any GPU: shared-memory tiles and f32 arithmetic, no tensor cores.
//!
//! Every element type is widened to f32 on its way into shared memory, multiplied and added there
//! with fused multiply-adds in the order of k, and rounded once at the end.
//!
//! # Layout
//! A block computes a tile of 128 × 128 of Y with 256 threads. In global memory X is `[m, k]`, or
//! `[k, m]` ("km") in the product of the weight gradient, W is `[k, n]` ("kn") or `[n, k]` ("nk"),
//! Y is `[m, n]`, each with its own row stride. In shared
//! memory both operands are f32 tiles of 16 k × 128 with k slowest ([`tile_offset`]), two stages
//! of each:
//!
//! ```text
//! bytes      0 .. 16384   X, stages 0 and 1
//! bytes  16384 .. 32768   W, stages 0 and 1
//! bytes  32768 .. 32776   the tile's first row and column
//! afterwards: half a tile of results, 64 × 128 f32
//! ```
//!
//! # Roles
//! All threads do the same. A thread owns 8 × 8 results: rows `r + {0..3}` and `r + 64 + {0..3}`,
//! columns likewise ([`thread_tile`]). Per k it reads four 16-byte vectors for 64 multiply-adds.
//!
//! ```text
//! X and W of tile 0 → stage 0                                         bar
//! loop: registers ← X of tile t + 1
//!       multiply k 0..8 of stage t % 2
//!       registers → X's stage (t + 1) % 2; registers ← W of tile t + 1
//!       multiply k 8..16 of stage t % 2
//!       registers → W's stage (t + 1) % 2                             bar
//! ```
//!
//! The bar at the end of a turn says both that the next stage is written and that all have left the
//! present one.
//!
//! Results leave through shared memory, so that one loop, which is not unrolled, holds the bias,
//! the activation, the rounding and the stores, and neighbouring threads store neighbouring bytes.
//!
//! # Shape contract
//! - m, n, k ≥ 1; any strides; addresses and strides need only the alignment of the element.
//! - 16-byte loads are used for an operand whose address and row stride are multiples of 16 bytes,
//!   except in the last, partial tile of k and, for W as `[k, n]`, the last, partial tile of n;
//!   elsewhere elements are loaded one by one behind a bounds check.
//! - Rows of X beyond m (and of W as `[n, k]` beyond n) repeat the last row: their results are
//!   never stored. Beyond k both operands are zero, as 0 · NaN would be NaN.
//! - Rows may not overlap in Y, and Y may not overlap the operands, as those are read through the
//!   read-only path.

use crate::abi::{DType, Kernel, KernelParams, Module, module};
use crate::gemm::{InputLayout, WeightLayout};
use crate::tile_scheduler::TileScheduler;

/// f32, both weight layouts.
pub static F32: Module =
    module!(Portable, "portable", "gemm_f32", ["gemm_f32_kn_128x128x16", "gemm_f32_nk_128x128x16"]);
/// f16, both weight layouts.
pub static F16: Module =
    module!(Portable, "portable", "gemm_f16", ["gemm_f16_kn_128x128x16", "gemm_f16_nk_128x128x16"]);
/// bf16, both weight layouts.
pub static BF16: Module = module!(
    Portable,
    "portable",
    "gemm_bf16",
    ["gemm_bf16_kn_128x128x16", "gemm_bf16_nk_128x128x16"]
);
/// f32, the weight gradient's product.
pub static TRANSPOSED_F32: Module =
    module!(Portable, "portable", "gemm_f32_km_kn", ["gemm_f32_km_kn_128x128x16"]);
/// f16, the weight gradient's product.
pub static TRANSPOSED_F16: Module =
    module!(Portable, "portable", "gemm_f16_km_kn", ["gemm_f16_km_kn_128x128x16"]);
/// bf16, the weight gradient's product.
pub static TRANSPOSED_BF16: Module =
    module!(Portable, "portable", "gemm_bf16_km_kn", ["gemm_bf16_km_kn_128x128x16"]);
/// f32, both weight layouts, computed only where parts could not express the operands.
pub static F32_REPAIR: Module = module!(
    Portable,
    "portable",
    "repair_f32",
    ["repair_f32_kn_128x128x16", "repair_f32_nk_128x128x16"]
);

/// Rows of Y per tile.
pub const BLOCK_M: u32 = 128;
/// Columns of Y per tile.
pub const BLOCK_N: u32 = 128;
/// Depth of one stage.
pub const BLOCK_K: u32 = 16;

/// Threads per block: one per 8 × 8 results.
const THREADS: u32 = BLOCK_M * BLOCK_N / 64;
/// Bytes of one stage of one operand.
const STAGE_BYTES: u32 = BLOCK_K * ROW_BYTES;
/// Bytes of the f32 values of one k, or of one row of results.
const ROW_BYTES: u32 = BLOCK_M * 4;
/// Where the tile's first row and column wait for the end, so as not to occupy registers: behind
/// two stages of two operands. The half tile of results fits in the stages.
const PARKED: u32 = 4 * STAGE_BYTES;
const SMEM_BYTES: u32 = PARKED + 8;
const _: () = assert!(BLOCK_M == BLOCK_N && BLOCK_M / 2 * ROW_BYTES <= PARKED);

/// Tile rows that run side by side to share tiles of W in L2.
const GROUP_M: u32 = 8;

/// What a portable kernel takes. Strides are in elements, from row to row.
///
/// A kernel whose X is transposed, that of the weight gradient, takes no bias and no activation.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct PortableGemmParams {
    /// Device address of X, `[m, k]` or `[k, m]`.
    pub x: u64,
    /// Device address of W, `[k, n]` or `[n, k]`.
    pub w: u64,
    /// Device address of the bias, `[n]`; 0 for none.
    pub bias: u64,
    /// Device address of Y, `[m, n]`.
    pub y: u64,
    /// Row stride of X.
    pub x_stride: u64,
    /// Row stride of W.
    pub w_stride: u64,
    /// Row stride of Y.
    pub y_stride: u64,
    /// Rows of X and Y.
    pub m: u32,
    /// Columns of Y.
    pub n: u32,
    /// Columns of X.
    pub k: u32,
    /// [`Activation`](crate::activation::Activation) as its discriminant.
    pub activation: u32,
    /// 1 to add to what Y holds, where X is transposed; else 0.
    pub accumulate: u32,
    /// Keeps the size a multiple of 8 without padding.
    pub reserved: u32,
}

// SAFETY: repr(C), fixed-width fields, seven u64 and six u32 without padding.
unsafe impl KernelParams for PortableGemmParams {}

/// What a kernel that repairs a product of parts takes.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct RepairParams {
    /// The product.
    pub gemm: PortableGemmParams,
    /// Device address of the findings of the split's blocks, one word each.
    pub findings: u64,
    /// How many there are.
    pub num_findings: u32,
    /// Keeps the size a multiple of 8 without padding.
    pub reserved: u32,
}

// SAFETY: repr(C); a struct without padding whose size is a multiple of 8, a u64 and two u32.
unsafe impl KernelParams for RepairParams {}
const _: () = assert!(size_of::<RepairParams>() == size_of::<PortableGemmParams>() + 16);

static REPAIR_IN_OUT: Kernel<RepairParams> =
    Kernel::new(&F32_REPAIR, "repair_f32_kn_128x128x16", THREADS, SMEM_BYTES);
static REPAIR_OUT_IN: Kernel<RepairParams> =
    Kernel::new(&F32_REPAIR, "repair_f32_nk_128x128x16", THREADS, SMEM_BYTES);

/// The kernel that computes an f32 product where [`needs_repair`](crate::gemm::parts::needs_repair)
/// says so, and else does nothing; launched as [`kernel`]'s.
#[must_use]
pub const fn repair(layout: WeightLayout) -> &'static Kernel<RepairParams> {
    match layout {
        WeightLayout::InOut => &REPAIR_IN_OUT,
        WeightLayout::OutIn => &REPAIR_OUT_IN,
    }
}

/// Estimated cycles of the busiest multiprocessor for an f32 product, `[m, n, k]`: one product a
/// lane and cycle, of which 72 % are reached (45 to 48 TFLOP/s at 4096³ on an H200).
#[must_use]
pub const fn f32_cost([m, n, k]: [u32; 3], multiprocessors: u32) -> u64 {
    let TileScheduler { tiles_m, tiles_n, .. } = tiles(m, n);
    let waves = (tiles_m as u64 * tiles_n as u64).div_ceil(multiprocessors as u64);
    waves * (k as u64 * 178 + 2000)
}

/// The tiles of Y; the kernel is launched with one block for each. m and n are at least 1.
#[must_use]
#[inline(always)]
pub const fn tiles(m: u32, n: u32) -> TileScheduler {
    TileScheduler { tiles_m: m.div_ceil(BLOCK_M), tiles_n: n.div_ceil(BLOCK_N), group_m: GROUP_M }
}

/// One row per kernel: the constant the host launches, the entry on the device, and the element
/// type and layout that [`kernel`] selects it by.
macro_rules! portable_kernels {
    ($($constant:ident, $entry:ident, $dtype:ident, $module:ident, $x_layout:ident,
        $layout:ident;)+) => {
        $(static $constant: Kernel<PortableGemmParams> =
            Kernel::new(&$module, stringify!($entry), THREADS, SMEM_BYTES);)+

        /// The kernel for an element type and the layouts of its operands; `None` for the one pair
        /// of layouts that no operation has.
        #[must_use]
        pub const fn kernel(
            dtype: DType,
            x_layout: InputLayout,
            layout: WeightLayout,
        ) -> Option<&'static Kernel<PortableGemmParams>> {
            match (dtype, x_layout, layout) {
                $((DType::$dtype, InputLayout::$x_layout, WeightLayout::$layout) => {
                    Some(&$constant)
                })+
                (_, InputLayout::Transposed, WeightLayout::OutIn) => None,
            }
        }

        #[cfg(all(target_arch = "nvptx64", kasmina_tier = "portable"))]
        mod entries {
            use super::{PortableGemmParams, RepairParams, device};

            /// # Safety
            /// As the entries below, and the findings are readable.
            #[unsafe(no_mangle)]
            pub(crate) unsafe extern "ptx-kernel" fn repair_f32_kn_128x128x16(
                params: RepairParams,
            ) {
                // SAFETY: the host checks every shape and stride against its allocation.
                unsafe { device::repair::<device::InOut>(&params) }
            }

            /// # Safety
            /// As the entries below, and the findings are readable.
            #[unsafe(no_mangle)]
            pub(crate) unsafe extern "ptx-kernel" fn repair_f32_nk_128x128x16(
                params: RepairParams,
            ) {
                // SAFETY: the host checks every shape and stride against its allocation.
                unsafe { device::repair::<device::OutIn>(&params) }
            }

            $(
                /// # Safety
                /// Addresses, strides and extents describe memory that is valid on the device, and
                /// the grid has `tiles(m, n).num_tiles()` blocks (the host's `gemm::Forward`).
                #[unsafe(no_mangle)]
                pub(crate) unsafe extern "ptx-kernel" fn $entry(params: PortableGemmParams) {
                    // SAFETY: the host checks every shape and stride against its allocation.
                    unsafe { device::product::<device::$dtype, device::$x_layout, device::$layout>(&params) }
                }
            )+
        }
    };
}

portable_kernels! {
    F32_IN_OUT, gemm_f32_kn_128x128x16, F32, F32, Plain, InOut;
    F32_OUT_IN, gemm_f32_nk_128x128x16, F32, F32, Plain, OutIn;
    F16_IN_OUT, gemm_f16_kn_128x128x16, F16, F16, Plain, InOut;
    F16_OUT_IN, gemm_f16_nk_128x128x16, F16, F16, Plain, OutIn;
    BF16_IN_OUT, gemm_bf16_kn_128x128x16, BF16, BF16, Plain, InOut;
    BF16_OUT_IN, gemm_bf16_nk_128x128x16, BF16, BF16, Plain, OutIn;
    F32_KM, gemm_f32_km_kn_128x128x16, F32, TRANSPOSED_F32, Transposed, InOut;
    F16_KM, gemm_f16_km_kn_128x128x16, F16, TRANSPOSED_F16, Transposed, InOut;
    BF16_KM, gemm_bf16_km_kn_128x128x16, BF16, TRANSPOSED_BF16, Transposed, InOut;
}

/// XORed into the offset of the values of depth `k`.
///
/// An operand that is contiguous in k is stored one f32 at a time; without it the lanes that hold
/// different k of neighbouring rows would store to the same banks.
#[must_use]
#[inline(always)]
pub const fn swizzle(k: u32) -> u32 {
    k / 4 % 4 * 32
}

/// Byte offset of the value at depth `k` and row (of X) or column (of W) `index` in a stage.
///
/// Besides [`swizzle`], 16-byte groups change places in every other 32 columns, so that the lanes
/// that store eight neighbouring columns each do not meet on a bank. Groups of four stay whole.
#[must_use]
#[inline(always)]
pub const fn tile_offset(k: u32, index: u32) -> u32 {
    k * ROW_BYTES + ((index * 4) ^ (index / 32 % 2 * 16) ^ swizzle(k))
}

/// First row and first column of a thread's results in the tile.
///
/// A warp covers 16 × 32 in each quadrant of 64 × 64, lanes in pairs of rows, so that any eight
/// lanes that the hardware serves together read at most 64 bytes of W and 32 of X.
#[must_use]
#[inline(always)]
pub const fn thread_tile(thread: u32) -> (u32, u32) {
    let (warp, lane) = (thread / 32, thread % 32);
    let row = warp % 4 * 16 + lane / 16 * 8 + lane % 2 * 4;
    let column = warp / 4 * 32 + lane / 2 % 8 * 4;
    (row, column)
}

/// Where the eight elements that a thread moves start in an operand's tile, as `(index, k)`: eight
/// neighbouring k of a row, for an operand that is contiguous in k.
#[must_use]
#[inline(always)]
pub const fn k_major_share(thread: u32) -> (u32, u32) {
    (thread / 2, thread % 2 * 8)
}

/// As [`k_major_share`] for W as `[k, n]` and X as `[k, m]`: eight neighbouring columns of one k.
#[must_use]
#[inline(always)]
pub const fn n_major_share(thread: u32) -> (u32, u32) {
    (thread % 16 * 8, thread / 16)
}

/// Byte offset of the result at `row` (of 64) and `column` on its way out. The XOR keeps lanes
/// four rows apart on different banks.
#[must_use]
#[inline(always)]
pub const fn result_offset(row: u32, column: u32) -> u32 {
    row * ROW_BYTES + ((column * 4) ^ (row / 4 % 2 * 64))
}

/// The bits of an f32 rounded to bfloat16: to nearest, ties to even; NaN stays NaN. Compute
/// capability 7.5 has no instruction for it.
#[must_use]
#[inline(always)]
pub const fn bf16_from_f32(value: f32) -> u16 {
    let bits = value.to_bits();
    if value.is_nan() {
        // Quiet, so that dropping the lower half cannot leave an infinity.
        return (bits >> 16) as u16 | 0x40;
    }
    let ties_to_even = bits >> 16 & 1;
    // No finite value overflows: the largest exponent carries into infinity's pattern.
    (bits.wrapping_add(0x7FFF + ties_to_even) >> 16) as u16
}

#[cfg(all(target_arch = "nvptx64", kasmina_tier = "portable"))]
pub(crate) mod device;

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;
    use std::vec::Vec;

    type Share = fn(u32) -> (u32, u32);

    /// The most lanes of a quarter warp's 16-byte accesses, or of a warp's 4-byte ones, that meet
    /// on one bank with different addresses.
    fn conflicts(offsets: &[u32], bytes: u32) -> usize {
        let phases = offsets.chunks((128 / bytes) as usize);
        let worst = phases.map(|phase| {
            let distinct: HashSet<_> = phase.iter().copied().collect();
            let banks: HashSet<_> =
                distinct.iter().map(|offset| offset / bytes % (128 / bytes)).collect();
            distinct.len() - banks.len()
        });
        worst.max().expect("a warp")
    }

    #[test]
    fn a_stage_holds_every_value_at_a_place_of_its_own() {
        let offsets: HashSet<_> = (0..BLOCK_K)
            .flat_map(|k| (0..BLOCK_M).map(move |index| tile_offset(k, index)))
            .collect();
        assert_eq!(offsets.len(), (BLOCK_K * BLOCK_M) as usize);
        assert!(offsets.iter().all(|&offset| offset % 4 == 0 && offset < STAGE_BYTES));
    }

    #[test]
    fn four_neighbours_stay_together_and_the_other_half_is_an_immediate_away() {
        for k in 0..BLOCK_K {
            for index in (0..BLOCK_M).step_by(4) {
                assert_eq!(tile_offset(k, index) % 16, 0);
                assert_eq!(tile_offset(k, index + 3), tile_offset(k, index) + 12);
                let at_zero = tile_offset(0, index);
                assert_eq!(tile_offset(k, index), (at_zero ^ swizzle(k)) + k * ROW_BYTES);
            }
            for index in 0..BLOCK_M / 2 {
                assert_eq!(tile_offset(k, index + BLOCK_M / 2), tile_offset(k, index) + 256);
            }
        }
    }

    #[test]
    fn second_four_elements_follow_from_the_address_of_the_first() {
        for thread in 0..THREADS {
            let (index, k) = k_major_share(thread);
            let first = tile_offset(k, index);
            assert_eq!(tile_offset(k + 4, index), (first ^ swizzle(4)) + 4 * ROW_BYTES);
            let (index, k) = n_major_share(thread);
            assert_eq!(tile_offset(k, index + 4), tile_offset(k, index) ^ 16);
        }
    }

    #[test]
    fn threads_share_an_operand_tile_without_overlap() {
        let shares: [(Share, bool); 2] = [(k_major_share, true), (n_major_share, false)];
        for (share, k_major) in shares {
            let elements: HashSet<_> = (0..THREADS)
                .flat_map(|thread| {
                    let (index, k) = share(thread);
                    (0..8).map(move |i| if k_major { (index, k + i) } else { (index + i, k) })
                })
                .collect();
            assert_eq!(elements.len(), (BLOCK_K * BLOCK_M) as usize);
            assert!(elements.iter().all(|&(index, k)| index < BLOCK_M && k < BLOCK_K));
        }
    }

    #[test]
    fn threads_share_the_results_without_overlap() {
        let results: HashSet<_> = (0..THREADS)
            .flat_map(|thread| {
                let (row, column) = thread_tile(thread);
                let of_eight = |i: u32| i % 4 + i / 4 * 64;
                (0..64).map(move |i| (row + of_eight(i / 8), column + of_eight(i % 8)))
            })
            .collect();
        assert_eq!(results.len(), (BLOCK_M * BLOCK_N) as usize);
        assert!(results.iter().all(|&(row, column)| row < BLOCK_M && column < BLOCK_N));
    }

    #[test]
    fn operand_reads_have_no_bank_conflicts() {
        for k in 0..BLOCK_K {
            for warp in 0..THREADS / 32 {
                let tiles: Vec<_> = (0..32).map(|lane| thread_tile(32 * warp + lane)).collect();
                let x: Vec<_> = tiles.iter().map(|&(row, _)| tile_offset(k, row)).collect();
                let w: Vec<_> = tiles.iter().map(|&(_, column)| tile_offset(k, column)).collect();
                assert_eq!((conflicts(&x, 16), conflicts(&w, 16)), (0, 0));
            }
        }
    }

    #[test]
    fn operand_stores_have_no_bank_conflicts() {
        for warp in 0..THREADS / 32 {
            let lanes = 32 * warp..32 * warp + 32;
            for element in 0..8 {
                let offsets: Vec<_> = lanes
                    .clone()
                    .map(k_major_share)
                    .map(|(index, k)| tile_offset(k + element, index))
                    .collect();
                assert_eq!(conflicts(&offsets, 4), 0);
            }
            for four in [0, 4] {
                let offsets: Vec<_> = lanes
                    .clone()
                    .map(n_major_share)
                    .map(|(index, k)| tile_offset(k, index + four))
                    .collect();
                assert_eq!(conflicts(&offsets, 16), 0);
            }
        }
    }

    #[test]
    fn results_leave_through_places_of_their_own_without_bank_conflicts() {
        let offsets: HashSet<_> = (0..BLOCK_M / 2)
            .flat_map(|row| (0..BLOCK_N).map(move |column| result_offset(row, column)))
            .collect();
        assert_eq!(offsets.len(), (BLOCK_M / 2 * BLOCK_N) as usize);
        assert!(offsets.iter().all(|&offset| offset < PARKED));
        for warp in 0..THREADS / 32 {
            for i in 0..4 {
                let stores: Vec<_> = (32 * warp..32 * warp + 32)
                    .map(thread_tile)
                    .map(|(row, column)| result_offset(row + i, column))
                    .collect();
                assert_eq!(conflicts(&stores, 16), 0);
            }
        }
        for row in 0..BLOCK_M / 2 {
            let loads: Vec<_> = (0..32).map(|lane| result_offset(row, lane * 4)).collect();
            assert_eq!(conflicts(&loads, 16), 0);
        }
    }

    #[test]
    fn every_kernel_is_in_the_module_of_its_dtype_under_its_own_name() {
        for dtype in DType::ALL {
            let (plain, transposed) = (InputLayout::Plain, InputLayout::Transposed);
            for (x_layout, layout, name, module) in [
                (plain, WeightLayout::InOut, "kn", ""),
                (plain, WeightLayout::OutIn, "nk", ""),
                (transposed, WeightLayout::InOut, "km_kn", "_km_kn"),
            ] {
                let kernel = kernel(dtype, x_layout, layout).expect("a kernel");
                let entry = std::format!("gemm_{dtype}_{name}_{BLOCK_M}x{BLOCK_N}x{BLOCK_K}");
                assert_eq!(kernel.entry, entry);
                assert!(kernel.module.entries.contains(&kernel.entry));
                assert_eq!(kernel.module.name, std::format!("gemm_{dtype}{module}"));
            }
            assert!(kernel(dtype, transposed, WeightLayout::OutIn).is_none());
        }
    }

    #[test]
    fn bf16_rounds_to_nearest_even_and_keeps_nan_and_infinity() {
        for (value, bits) in [
            (1.0, 0x3F80),
            (-0.0, 0x8000),
            (f32::from_bits(0x3F80_8000), 0x3F80),
            (f32::from_bits(0x3F80_8001), 0x3F81),
            (f32::from_bits(0x3F81_8000), 0x3F82),
            (f32::MAX, 0x7F80),
            (f32::NEG_INFINITY, 0xFF80),
            (f32::from_bits(1), 0),
        ] {
            assert_eq!(bf16_from_f32(value), bits, "{value:e}");
        }
        for bits in [0x7F80_0001, 0xFFC0_0000, 0x7FFF_FFFF] {
            let rounded = bf16_from_f32(f32::from_bits(bits));
            assert!(f32::from_bits(u32::from(rounded) << 16).is_nan(), "{bits:x}");
        }
    }
}
