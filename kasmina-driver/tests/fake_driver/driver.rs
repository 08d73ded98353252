//! A stand-in for libcuda.so.1, compiled by the tests into a library of its own.
//!
//! It has a handful of the driver's functions. Environment variables set what they return.

use std::env;

fn setting(name: &str, default: u32) -> u32 {
    env::var(name).ok().and_then(|value| value.parse().ok()).unwrap_or(default)
}

#[unsafe(no_mangle)]
extern "C" fn cuInit(_flags: u32) -> u32 {
    setting("FAKE_CUDA_INIT", 0)
}

/// # Safety
/// `version` is valid for writing.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuDriverGetVersion(version: *mut i32) -> u32 {
    // SAFETY: this function's contract.
    unsafe { version.write(setting("FAKE_CUDA_VERSION", 13_000).cast_signed()) };
    0
}

/// # Safety
/// `count` is valid for writing.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceGetCount(count: *mut i32) -> u32 {
    // SAFETY: this function's contract.
    unsafe { count.write(setting("FAKE_CUDA_DEVICES", 1).cast_signed()) };
    0
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxSynchronize() -> u32 {
    setting("FAKE_CUDA_SYNCHRONIZE", 0)
}

/// Adds the arguments up, so that a test sees whether they arrive in order and unharmed.
#[unsafe(no_mangle)]
extern "C" fn cuMemsetD32Async(address: u64, value: u32, count: usize, stream: usize) -> u32 {
    u32::from((address, value, count, stream) != (0x7000_0000_1000, 0xdead_beef, 1 << 40, 0))
}
