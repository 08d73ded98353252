//! Element types and statistics, the parameters of the kernels.

use crate::ptx;

/// An element type in global memory.
pub(in crate::reduce) trait Element {
    const LOG2_SIZE: u32;
    /// Elements in 16 bytes.
    const WIDTH: u32 = 16 >> Self::LOG2_SIZE;
    /// Four neighbouring elements of a vector, the first or the second four.
    fn four(vector: [u32; 4], second: bool) -> [f32; 4];
    /// # Safety
    /// As [`ptx::ld_global_u32`], for one element. Its bits are the lower ones.
    unsafe fn load(address: u64) -> u32;
    fn widen(bits: u32) -> f32;
}

pub(in crate::reduce) struct F32;
pub(in crate::reduce) struct F16;
pub(in crate::reduce) struct BF16;

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
    ($name:ident, $low:expr, $high:expr) => {
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
        }
    };
}
sixteen_bit_element!(F16, |pair: u32| ptx::cvt_f32_f16(pair as u16), |pair: u32| ptx::cvt_f32_f16(
    (pair >> 16) as u16
));
sixteen_bit_element!(BF16, |pair: u32| f32::from_bits(pair << 16), |pair: u32| f32::from_bits(
    pair & 0xFFFF_0000
));

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
