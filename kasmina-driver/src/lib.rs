//! The CUDA driver API, opened at run time.
//!
//! `cust` declares the driver's functions as foreign symbols, which normally makes a program link
//! against `libcuda.so.1`, so that it neither builds without a CUDA installation nor starts without
//! an NVIDIA driver. This crate defines those symbols itself. Each forwards to the function of the
//! same name in `libcuda.so.1`, which is opened when the first one is called. One program thus runs
//! on every machine, and finds out there whether it has a GPU.
//!
//! ```
//! match kasmina_driver::device_count() {
//!     Ok(count) => println!("{count} GPUs"),
//!     Err(unavailable) => println!("{unavailable}"),
//! }
//! ```
//!
//! # What it adds to the driver
//!
//! - **Old drivers work.** Functions are looked up one by one, when first called. A driver that
//!   lacks one fails only the calls to that one, with `CUDA_ERROR_NOT_FOUND`; without a driver
//!   every call fails with `CUDA_ERROR_NOT_INITIALIZED`. [`RawError::origin`] tells these from
//!   failures of the driver's own.
//! - **New drivers are safe.** `cust_raw` reads results as a Rust enum that ends with CUDA 11.4,
//!   and a code outside it would be undefined behaviour. Such codes are returned as
//!   `CUDA_ERROR_UNKNOWN`; [`last_error`] and [`check`] give the real one.
//! - **Newer functions.** Those that `cust` does not call, such as [`cuTensorMapEncodeTiled`] and
//!   [`cuLaunchKernelEx`], are reached through the same table.
//! - **A preflight.** [`init`] and [`device_count`] tell no driver, no GPU and a driver that does
//!   not start apart, and [`DriverVersion::require_ptx`] one that is too old for a PTX module; each
//!   error names its remedy.
//!
//! # Linking
//!
//! A program gets the definitions by using anything of this crate. The build script of `cust` still
//! wants a CUDA folder: set `CUDA_LIBRARY_PATH` to one whose `lib64` holds an empty `libcuda.a`.
//!
//! # Environment
//!
//! `KASMINA_LIBCUDA` names the library to open in place of `libcuda.so.1`, when the first function
//! is called.

mod call;
mod code;
mod launch;
mod loader;
mod probe;
mod symbols;
mod tensor_map;
mod version;

pub use call::{Origin, RawError, check, last_error};
/// The types in the functions' signatures.
pub use cust_raw;
pub use launch::{CUlaunchAttribute, CUlaunchConfig, FunctionAttribute};
pub use probe::{Unavailable, device_count, init};
pub use symbols::*;
pub use tensor_map::{
    CUtensorMap, CUtensorMapDataType, CUtensorMapFloatOOBfill, CUtensorMapInterleave,
    CUtensorMapL2promotion, CUtensorMapSwizzle,
};
pub use version::{DriverVersion, required_driver_for_ptx};
