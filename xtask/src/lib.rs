//! Development tasks of kasmina, run as `cargo xtask <task>`.
//!
//! | module | holds |
//! |---|---|
//! | [`ptx`] | `cargo xtask ptx`: builds the committed PTX, or checks it |
//! | [`device_toolchain`] | finds a Rust toolchain that can build for the device, and runs it |
//! | [`ptx_text`] | PTX as text: items, markers, modules |
//! | [`manifest`] | `kasmina-kernels/ptx/manifest.json` |
//! | [`source_digest`] | digests of the device sources; `build.rs` compiles it too |
//! | [`nvidia_tools`] | finds and runs ptxas and nvdisasm |
//! | [`cargo_artifacts`] | which executables a cargo command built |
//! | [`gpu_bundle`] | `cargo xtask gpu-bundle` |
//! | [`perf`] | `cargo xtask perf`: benches, reports and checks against a baseline |
//! | [`no_gpu`] | `cargo xtask no-gpu`: what must hold on a machine without a GPU |
#![forbid(unsafe_code)]

use std::path::Path;

pub mod cargo_artifacts;
pub mod device_toolchain;
pub mod gpu_bundle;
pub mod manifest;
pub mod no_gpu;
pub mod nvidia_tools;
pub mod perf;
pub mod ptx;
pub mod ptx_text;
#[path = "../../build/source_digest.rs"]
pub mod source_digest;

/// Root of the workspace this was compiled in.
#[must_use]
pub fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask lies in the workspace")
}
