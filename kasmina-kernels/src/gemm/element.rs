//! Element types in global memory, for the kernels that use no tensor cores.

use super::portable::bf16_from_f32;
use crate::ptx;

/// Whether grids start before their predecessor has ended. What that one wrote meanwhile may not
/// be read through the read-only path.
pub(crate) const OVERLAPS: bool = cfg!(kasmina_tier = "hopper");

/// An element type in global memory. Bits travel in the lower end of a `u32`.
pub(crate) trait Element {
    const SIZE: u32;
    fn widen(bits: u32) -> f32;
    fn round(value: f32) -> u32;
    /// Loads through the read-only path, but for the kernels that overlap their predecessor.
    ///
    /// # Safety
    /// As [`ptx::ld_global_nc_u32`], for `SIZE` bytes.
    unsafe fn load(address: u64) -> u32;
    /// # Safety
    /// As [`ptx::st_global_u32`], for `SIZE` bytes.
    unsafe fn store(address: u64, bits: u32);
}

pub(crate) struct F32;
pub(crate) struct F16;
pub(crate) struct BF16;

impl Element for F32 {
    const SIZE: u32 = 4;
    #[inline(always)]
    fn widen(bits: u32) -> f32 {
        f32::from_bits(bits)
    }
    #[inline(always)]
    fn round(value: f32) -> u32 {
        value.to_bits()
    }
    #[inline(always)]
    unsafe fn load(address: u64) -> u32 {
        // SAFETY: the caller's contract.
        unsafe {
            if OVERLAPS { ptx::ld_global_u32(address) } else { ptx::ld_global_nc_u32(address) }
        }
    }
    #[inline(always)]
    unsafe fn store(address: u64, bits: u32) {
        // SAFETY: the caller's contract.
        unsafe { ptx::st_global_u32(address, bits) }
    }
}

macro_rules! sixteen_bit_element {
    ($name:ident, $widen:expr, $round:expr) => {
        impl Element for $name {
            const SIZE: u32 = 2;
            #[inline(always)]
            fn widen(bits: u32) -> f32 {
                $widen(bits)
            }
            #[inline(always)]
            fn round(value: f32) -> u32 {
                u32::from($round(value))
            }
            #[inline(always)]
            unsafe fn load(address: u64) -> u32 {
                // SAFETY: the caller's contract.
                u32::from(unsafe {
                    if OVERLAPS {
                        ptx::ld_global_u16(address)
                    } else {
                        ptx::ld_global_nc_u16(address)
                    }
                })
            }
            #[inline(always)]
            unsafe fn store(address: u64, bits: u32) {
                // SAFETY: the caller's contract.
                unsafe { ptx::st_global_u16(address, bits as u16) }
            }
        }
    };
}
sixteen_bit_element!(F16, |bits| ptx::cvt_f32_f16(bits as u16), ptx::cvt_rn_f16_f32);
sixteen_bit_element!(BF16, |bits: u32| f32::from_bits(bits << 16), bf16_from_f32);
