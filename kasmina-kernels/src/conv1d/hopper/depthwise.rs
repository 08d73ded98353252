//! Depthwise forward and dgrad of 16-bit types along contiguous positions, as in
//! [`depthwise`](crate::conv1d::depthwise), where every warp has a whole run of its row.
//!
//! ```text
//! out[8v + i] = act(bias + Σ_t in[8v + i + first + t] · w[t])      i in 0..8, t below taps
//! ```
//! A warp walks along its run by 32 vectors of eight elements. A thread makes eight results from its
//! vector and the next two, which its neighbours hold: they come by shuffles, those beyond the
//! warp's from the step after, which is on its way in any case. So nothing is loaded twice, and no
//! load is waited for but that of four steps ago. Two results are rounded by one instruction.
//!
//! # Shape contract
//! [`serves`], and that of [`depthwise::serves_ncl`](crate::conv1d::depthwise::serves_ncl).

use crate::abi::{DType, Kernel, Module, module};
use crate::conv1d::depthwise::DepthwiseParams;
use crate::conv1d::portable::THREADS;

#[cfg(all(target_arch = "nvptx64", kasmina_tier = "hopper"))]
mod device;

/// log₂ of the fewest threads of a row: a warp.
pub const LOG2_WARP: u32 = 5;

/// Whether rows are long enough: each occupies whole warps.
#[must_use]
pub const fn serves(params: &DepthwiseParams) -> bool {
    params.log2_row_threads >= LOG2_WARP
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

/// Vectors of a row that a warp makes, of `vectors` that `1 << log2_row_threads` threads share:
/// whole steps of 32, and zero or fewer than elsewhere for the last warps.
#[must_use]
#[inline(always)]
pub const fn run_of_warp(vectors: u32, log2_row_threads: u32) -> u32 {
    let warps = 1 << (log2_row_threads - LOG2_WARP);
    let steps = vectors.div_ceil(32);
    ((steps + warps - 1) >> (log2_row_threads - LOG2_WARP)) * 32
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
    use crate::conv1d::depthwise::log2_row_threads;

    #[test]
    fn runs_of_a_rows_warps_cover_its_vectors_in_whole_steps() {
        for vectors in [1, 17, 31, 32, 33, 64, 65, 255, 256, 257, 1000, 1024, 4099] {
            let log2 = log2_row_threads(8 * vectors).max(LOG2_WARP);
            let run = run_of_warp(vectors, log2);
            let warps = 1 << (log2 - LOG2_WARP);
            assert!(run.is_multiple_of(32) && run * warps >= vectors);
            assert!(run < vectors.div_ceil(warps) + 32 * warps);
        }
    }
}
