//! Depthwise forward and dgrad of 16-bit types along contiguous positions, as in
//! [`depthwise`](crate::conv1d::depthwise), where every warp has a whole run of its row.
//!
//! ```text
//! out[8v + i] = act(bias + Σ_t in[8v + i + first + t] · w[t])      i in 0..8, t below taps
//! ```
//! A warp makes 64 vectors of a row, so that the warps of a block read a stretch without gaps. Each
//! thread loads all it needs before it computes anything: of the three vectors that results are made
//! from the second, for two vectors of results. The first and the third are its neighbours' second
//! ones and come by shuffles, those beyond the warp's own by loads of the first and the last lane.
//! Many short blocks that are always at different stages keep the memory busy better than few long
//! ones. Walks over the taps are compiled for every number of them and every position of the first
//! in its vector, so that products follow each other without branches; two results are rounded by
//! one instruction.
//!
//! # Shape contract
//! [`serves`], and that of [`depthwise::serves_ncl`](crate::conv1d::depthwise::serves_ncl).

use crate::abi::{DType, Kernel, Module, module};
use crate::conv1d::depthwise::{DepthwiseParams, RUN};
use crate::conv1d::portable::THREADS;

#[cfg(all(target_arch = "nvptx64", kasmina_tier = "hopper"))]
mod device;

/// Threads of a warp.
const WARP: u32 = 32;

/// Vectors that a thread makes.
const UNITS: u32 = 2;

/// Threads that would share a row of the shortest length that is served: half as many vectors would
/// leave most of a warp idle.
const LOG2_LEAST_ROW_THREADS: u32 = 5;

/// Whether rows are long enough for whole warps, and no more than can be numbered.
#[must_use]
pub const fn serves(params: &DepthwiseParams) -> bool {
    params.log2_row_threads >= LOG2_LEAST_ROW_THREADS
        && blocks(params) <= (u32::MAX / (THREADS / WARP)) as u64
}

/// Warps that share a row of `length` results.
#[must_use]
#[inline(always)]
pub const fn parts_of_row(length: u32) -> u32 {
    length.div_ceil(RUN * UNITS * WARP)
}

/// Blocks of the launch; `u64::MAX` stands for more.
#[must_use]
pub const fn blocks(params: &DepthwiseParams) -> u64 {
    let rows = params.batch as u64 * params.channels as u64;
    rows.saturating_mul(parts_of_row(params.out_length) as u64).div_ceil((THREADS / WARP) as u64)
}

/// The kernel for an element type; `None` for f32, of which half as many fit a vector.
#[must_use]
pub fn kernel(dtype: DType) -> Option<&'static Kernel<DepthwiseParams>> {
    match dtype {
        DType::F16 => Some(&F16_KERNEL),
        DType::BF16 => Some(&BF16_KERNEL),
        DType::F32 => None,
    }
}

macro_rules! kernels {
    ($($element:ident, $kernel:ident, $entry:ident;)+) => {
        $(
            #[doc = concat!("The kernel for ", stringify!($element), ".")]
            pub static $element: Module =
                module!(Hopper, "hopper", stringify!($entry), [stringify!($entry)]);
            static $kernel: Kernel<DepthwiseParams> =
                Kernel::new(&$element, stringify!($entry), THREADS, 0);
        )+

        #[cfg(all(target_arch = "nvptx64", kasmina_tier = "hopper"))]
        mod entries {
            use super::{DepthwiseParams, device};
            use crate::gemm::element;

            $(
                /// # Safety
                /// Launched by `launch` on the host with the geometry of its `Kernel`; the shape
                /// contract holds, and tensors and filter are as the strides say (the host's
                /// `conv1d/hopper.rs`).
                #[unsafe(no_mangle)]
                pub(crate) unsafe extern "ptx-kernel" fn $entry(params: DepthwiseParams) {
                    // SAFETY: the caller's contract.
                    unsafe { device::rows::<element::$element>(&params) }
                }
            )+
        }
    };
}

kernels! {
    F16, F16_KERNEL, conv1d_depthwise_f16;
    BF16, BF16_KERNEL, conv1d_depthwise_bf16;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warps_of_a_row_make_all_of_its_vectors() {
        for (vectors, parts) in [(0, 0), (1, 1), (63, 1), (64, 1), (65, 2), (128, 2), (4099, 65)] {
            assert_eq!(parts_of_row(RUN * vectors), parts);
        }
    }
}
