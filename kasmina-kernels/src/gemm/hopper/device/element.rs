//! 16-bit element types on the device.

use crate::ptx;

/// A 16-bit element type: how it leaves and enters f32.
pub(crate) trait Element {
    fn pack(high: f32, low: f32) -> u32;
    fn widen(bits: u16) -> f32;
    /// The two elements of a pair, the one in the lower half first.
    fn widen_pair(bits: u32) -> (f32, f32);
}

pub(crate) struct BF16;
impl Element for BF16 {
    #[inline(always)]
    fn pack(high: f32, low: f32) -> u32 {
        ptx::cvt_rn_bf16x2_f32(high, low)
    }
    #[inline(always)]
    fn widen(bits: u16) -> f32 {
        ptx::cvt_f32_bf16(bits)
    }
    #[inline(always)]
    fn widen_pair(bits: u32) -> (f32, f32) {
        (f32::from_bits(bits << 16), f32::from_bits(bits & 0xFFFF_0000))
    }
}

pub(crate) struct F16;
impl Element for F16 {
    #[inline(always)]
    fn pack(high: f32, low: f32) -> u32 {
        ptx::cvt_rn_f16x2_f32(high, low)
    }
    #[inline(always)]
    fn widen(bits: u16) -> f32 {
        ptx::cvt_f32_f16(bits)
    }
    #[inline(always)]
    fn widen_pair(bits: u32) -> (f32, f32) {
        (Self::widen(bits as u16), Self::widen((bits >> 16) as u16))
    }
}
