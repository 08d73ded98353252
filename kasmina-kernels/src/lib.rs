//! The kernels of kasmina, compiled twice: for the device to PTX (`cargo xtask ptx`), and for the
//! host as an ordinary library, so that parameter layouts, entry names, tile sizes and index
//! arithmetic have one definition.
//!
//! | module | holds |
//! |---|---|
//! | [`abi`] | what host and device agree on: tiers, modules, kernels, parameter types |
//! | [`activation`] | the activation functions and the form the tensor-core epilogue evaluates |
//! | [`conv1d`] | one-dimensional convolution and its gradients: shapes, walks, one file of kernels per tier |
//! | [`elementary`] | exponential and error function in f32, for host and device |
//! | [`gemm`] | `Y = act(X·W + b)`: shapes, parameters, one file of kernels per tier |
//! | [`names`] | values by their names |
//! | [`persistent`] | layers that stay resident: ring protocol, plan, packed weights, kernels |
//! | [`pipeline`] | the full/empty ring between producer and consumers |
//! | [`tile_scheduler`] | which output tile a block computes, in which order |
//! | [`reduce`] | statistics of all elements: chunks, parameters, arithmetic, kernels |
//! | [`smem_layout`] | swizzles, wgmma descriptors and fragment positions |
//! | `unroll` | device only: repetition by the macro expander |
//! | `ptx` | device only: one function, one instruction |
#![no_std]
#![cfg_attr(target_arch = "nvptx64", feature(abi_ptx, asm_experimental_arch))]

#[cfg(feature = "ptx")]
extern crate alloc;
#[cfg(test)]
extern crate std;

pub mod abi;
pub mod activation;
pub mod conv1d;
pub mod elementary;
pub mod gemm;
pub mod names;
pub mod persistent;
pub mod pipeline;
#[cfg(target_arch = "nvptx64")]
pub mod ptx;
pub mod reduce;
pub mod smem_layout;
pub mod tile_scheduler;
#[cfg(target_arch = "nvptx64")]
mod unroll;

#[cfg(target_arch = "nvptx64")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    ptx::trap()
}
