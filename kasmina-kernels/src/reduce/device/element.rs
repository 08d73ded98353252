//! Element types and statistics, the parameters of the kernels.

use crate::ptx;
use crate::reduce::Batch;

/// An element type in global memory.
pub(crate) trait Element {
    const LOG2_SIZE: u32;
    /// Elements in 16 bytes.
    const WIDTH: u32 = 16 >> Self::LOG2_SIZE;
    /// Four neighbouring elements of a vector, the first or the second four.
    fn four(vector: [u32; 4], second: bool) -> [f32; 4];
    /// # Safety
    /// As [`ptx::ld_global_u32`], for one element. Its bits are the lower ones.
    unsafe fn load(address: u64) -> u32;
    fn widen(bits: u32) -> f32;

    /// Whether the extremes and the dead of full vectors are found in [`Pairs`].
    const PAIRED: bool = false;
    /// Of no elements.
    const NO_PAIRS: Pairs = Pairs { min: 0, max: 0, dead: 0 };
    /// Twice the least number that is not below epsilon.
    fn pair_of_bounds(_: f32) -> u32 {
        0
    }
    /// Adds two elements.
    fn add_pair(_: &mut Pairs, _: u32, _: u32) {}
    /// What was found in both.
    #[cfg(kasmina_tier = "hopper")]
    fn joined(a: Pairs, _: Pairs) -> Pairs {
        a
    }
    /// Extremes and number of dead elements.
    #[cfg(kasmina_tier = "hopper")]
    fn of_pairs(_: Pairs) -> (f32, f32, f32) {
        (f32::INFINITY, f32::NEG_INFINITY, 0.0)
    }
    /// A pair of ones.
    #[cfg(kasmina_tier = "hopper")]
    const ONES: u32 = 0;
    /// As [`ptx::mma::mma_m16n8k16_bf16`], for elements of two bytes.
    ///
    /// # Safety
    /// As there.
    #[cfg(kasmina_tier = "hopper")]
    unsafe fn multiply(_: &mut [f32; 4], _: [u32; 4], _: [u32; 2]) {}
    /// Smallest, largest and number of dead in the lower and in the upper half.
    fn split(_: Pairs) -> [(f32, f32, f32); 2] {
        [(0.0, 0.0, 0.0); 2]
    }
    /// Adds what was found in pairs to what was found in f32.
    fn add_pairs(_: Pairs, _: &mut Batch) {}
}

/// Extremes and numbers of dead elements in the lower and in the upper half of words, in the
/// element's own type: half the instructions that f32 takes, which 16-bit elements need to keep up
/// with memory.
#[derive(Clone, Copy)]
#[cfg_attr(not(kasmina_tier = "hopper"), expect(dead_code, reason = "other tiers have no pairs"))]
pub(crate) struct Pairs {
    pub(super) min: u32,
    pub(super) max: u32,
    pub(super) dead: u32,
}

impl Pairs {
    /// The same extremes, and no dead elements.
    #[cfg(kasmina_tier = "hopper")]
    #[inline(always)]
    pub(in crate::reduce) fn without_dead(self) -> Self {
        Self { dead: 0, ..self }
    }
}

pub(in crate::reduce) struct F32;
pub(crate) struct F16;
pub(crate) struct BF16;

impl Element for F32 {
    const LOG2_SIZE: u32 = 2;
    #[inline(always)]
    fn four([a, b, c, d]: [u32; 4], _: bool) -> [f32; 4] {
        [f32::from_bits(a), f32::from_bits(b), f32::from_bits(c), f32::from_bits(d)]
    }
    #[inline(always)]
    unsafe fn load(address: u64) -> u32 {
        // SAFETY: the caller's contract.
        unsafe { ptx::ld_global_u32(address) }
    }
    #[inline(always)]
    fn widen(bits: u32) -> f32 {
        f32::from_bits(bits)
    }
}

macro_rules! sixteen_bit_element {
    ($name:ident, $low:expr, $high:expr, $infinity:literal, $bound:expr,
     $min:ident $max:ident $add:ident $count_if_below:ident, $ones:literal $multiply:ident) => {
        impl Element for $name {
            const LOG2_SIZE: u32 = 1;
            #[inline(always)]
            fn four([a, b, c, d]: [u32; 4], second: bool) -> [f32; 4] {
                let (first, last) = if second { (c, d) } else { (a, b) };
                [$low(first), $high(first), $low(last), $high(last)]
            }
            #[inline(always)]
            unsafe fn load(address: u64) -> u32 {
                // SAFETY: the caller's contract.
                u32::from(unsafe { ptx::ld_global_u16(address) })
            }
            #[inline(always)]
            fn widen(bits: u32) -> f32 {
                $low(bits)
            }

            #[cfg(kasmina_tier = "hopper")]
            const PAIRED: bool = true;
            #[cfg(kasmina_tier = "hopper")]
            const NO_PAIRS: Pairs = Pairs {
                min: $infinity * 0x1_0001,
                max: $infinity * 0x1_0001 | 0x8000_8000,
                dead: 0,
            };
            #[cfg(kasmina_tier = "hopper")]
            #[inline(always)]
            fn pair_of_bounds(epsilon: f32) -> u32 {
                $bound(epsilon) * 0x1_0001
            }
            #[cfg(kasmina_tier = "hopper")]
            #[inline(always)]
            fn add_pair(pairs: &mut Pairs, pair: u32, bounds: u32) {
                pairs.min = ptx::$min(pairs.min, pair);
                pairs.max = ptx::$max(pairs.max, pair);
                pairs.dead = ptx::$count_if_below(pairs.dead, pair, bounds);
            }
            #[cfg(kasmina_tier = "hopper")]
            #[inline(always)]
            fn joined(a: Pairs, b: Pairs) -> Pairs {
                Pairs {
                    min: ptx::$min(a.min, b.min),
                    max: ptx::$max(a.max, b.max),
                    dead: ptx::$add(a.dead, b.dead),
                }
            }
            #[cfg(kasmina_tier = "hopper")]
            #[inline(always)]
            fn of_pairs(pairs: Pairs) -> (f32, f32, f32) {
                (
                    $low(pairs.min).min($high(pairs.min)),
                    $low(pairs.max).max($high(pairs.max)),
                    $low(pairs.dead) + $high(pairs.dead),
                )
            }
            #[cfg(kasmina_tier = "hopper")]
            const ONES: u32 = $ones * 0x1_0001;
            #[cfg(kasmina_tier = "hopper")]
            #[inline(always)]
            unsafe fn multiply(sum: &mut [f32; 4], a: [u32; 4], b: [u32; 2]) {
                // SAFETY: the caller's contract.
                unsafe { ptx::mma::$multiply(sum, a, b) }
            }
            #[cfg(kasmina_tier = "hopper")]
            #[inline(always)]
            fn split(pairs: Pairs) -> [(f32, f32, f32); 2] {
                [
                    ($low(pairs.min), $low(pairs.max), $low(pairs.dead)),
                    ($high(pairs.min), $high(pairs.max), $high(pairs.dead)),
                ]
            }
            #[cfg(kasmina_tier = "hopper")]
            #[inline(always)]
            fn add_pairs(pairs: Pairs, batch: &mut Batch) {
                batch.min = batch.min.min($low(pairs.min)).min($high(pairs.min));
                batch.max = batch.max.max($low(pairs.max)).max($high(pairs.max));
                batch.dead += $low(pairs.dead) + $high(pairs.dead);
            }
        }
    };
}
sixteen_bit_element!(
    F16,
    |pair: u32| ptx::cvt_f32_f16(pair as u16),
    |pair: u32| ptx::cvt_f32_f16((pair >> 16) as u16),
    0x7C00,
    |epsilon: f32| u32::from(ptx::cvt_rp_f16_f32(epsilon)),
    min_f16x2 max_f16x2 add_f16x2 count_if_below_f16x2, 0x3C00 mma_m16n8k16_f16
);
sixteen_bit_element!(
    BF16,
    |pair: u32| f32::from_bits(pair << 16),
    |pair: u32| f32::from_bits(pair & 0xFFFF_0000),
    0x7F80,
    // Rounded away from zero; a negative bound holds no element either way.
    |epsilon: f32| (epsilon.to_bits() + 0xFFFF) >> 16,
    min_bf16x2 max_bf16x2 add_bf16x2 count_if_below_bf16x2, 0x3F80 mma_m16n8k16_bf16
);

/// What is computed; the fields that are not are left out of every loop and exchange.
pub(in crate::reduce) trait Statistic {
    const SUM: bool = false;
    const SQUARES: bool = false;
    const MIN: bool = false;
    const MAX: bool = false;
    const COUNTS: bool = false;
}
pub(in crate::reduce) struct Summary;
pub(in crate::reduce) struct Sum;
pub(in crate::reduce) struct Max;
pub(in crate::reduce) struct Min;
impl Statistic for Summary {
    const SUM: bool = true;
    const SQUARES: bool = true;
    const MIN: bool = true;
    const MAX: bool = true;
    const COUNTS: bool = true;
}
impl Statistic for Sum {
    const SUM: bool = true;
}
impl Statistic for Max {
    const MAX: bool = true;
}
impl Statistic for Min {
    const MIN: bool = true;
}
