//! CUB's device-wide sum.
//!
//! CUB is a library of C++ templates, so a GPU machine compiles the few functions of `cub.cu`
//! beside this file, whose head says how, into a library that is opened at run time.

use std::ffi::{c_int, c_void};
use std::ptr;

use anyhow::{Context, ensure};
use kasmina::{DType, Device, Element, Tensor};
use libloading::Library;

use super::library::symbol;

/// The file made from `cub.cu`.
const PATH_VARIABLE: &str = "KASMINA_CUB";

/// Temporary storage and its size in bytes, data and their number of words, where the sum goes,
/// stream; the result is a `cudaError_t`, 0 for success.
type SumFunction = unsafe extern "C" fn(
    *mut c_void,
    *mut usize,
    *const c_void,
    *mut f32,
    c_int,
    *mut c_void,
) -> c_int;
type Version = unsafe extern "C" fn() -> c_int;

/// The library, opened.
pub(crate) struct Cub {
    sum_f32: SumFunction,
    sum_bf16: SumFunction,
    /// Its name and version.
    pub(crate) name: String,
    /// Keeps the functions above mapped.
    _library: Library,
}

impl Cub {
    /// Opens the library.
    pub(crate) fn open() -> anyhow::Result<Self> {
        let path = std::env::var_os(PATH_VARIABLE).with_context(|| {
            format!("compile benches/peer/cub.cu and name the result in {PATH_VARIABLE}")
        })?;
        // SAFETY: its initialisers only register CUB's kernels with the CUDA runtime.
        let library = unsafe { Library::new(&path) }
            .with_context(|| format!("{PATH_VARIABLE} names {}", path.display()))?;
        // SAFETY: the types are those of cub.cu, and the pointers are used only while `library`,
        // stored beside them, stays open.
        let (version, sum_f32, sum_bf16) = unsafe {
            let version = symbol::<Version>(&library, "kasmina_cub_version")?();
            let sum_f32 = symbol(&library, "kasmina_cub_sum_f32")?;
            (version, sum_f32, symbol(&library, "kasmina_cub_sum_bf16")?)
        };
        let (major, minor) = (version / 100_000, version / 100 % 1000);
        let name = format!("CUB {major}.{minor}.{}", version % 100);
        Ok(Self { sum_f32, sum_bf16, name, _library: library })
    }

    /// Prepares sums of `len` elements on the stream of `device`; `None` for what `cub.cu` does
    /// not offer.
    pub(crate) fn sum(
        &self,
        device: &Device,
        len: usize,
        dtype: DType,
    ) -> anyhow::Result<Option<Sum<'_>>> {
        let (function, words) = match dtype {
            DType::F32 => (self.sum_f32, len),
            DType::BF16 if len.is_multiple_of(2) => (self.sum_bf16, len / 2),
            _ => return Ok(None),
        };
        let Ok(words) = c_int::try_from(words) else {
            return Ok(None);
        };
        let mut temp_bytes = 0;
        // SAFETY: without temporary storage, the function only writes its size.
        let status = unsafe {
            let (data, stream) = (ptr::null(), ptr::null_mut());
            function(ptr::null_mut(), &raw mut temp_bytes, data, ptr::null_mut(), words, stream)
        };
        check(status)?;
        Ok(Some(Sum {
            _library: self,
            function,
            words,
            len,
            dtype,
            // Not empty: without an address the function would not compute anything.
            temp: Tensor::zeros(device, [temp_bytes.div_ceil(size_of::<f32>()).max(1)])?,
            temp_bytes,
            result: Tensor::full(device, [1], f32::NAN)?,
        }))
    }
}

/// A sum that CUB is ready to compute, again and again on one stream.
pub(crate) struct Sum<'a> {
    /// Keeps the function mapped.
    _library: &'a Cub,
    function: SumFunction,
    words: c_int,
    len: usize,
    dtype: DType,
    temp: Tensor<f32>,
    temp_bytes: usize,
    result: Tensor<f32>,
}

impl Sum<'_> {
    /// Enqueues the sum of `data`.
    pub(crate) fn enqueue<T: Element>(&self, data: &Tensor<T>) -> anyhow::Result<()> {
        ensure!((data.len(), T::DTYPE) == (self.len, self.dtype), "another kind of data");
        let mut temp_bytes = self.temp_bytes;
        // SAFETY: `data` has the length and type that the function was chosen for and lies on the
        // device of the stream; temporary storage has the size that it asked for. All of them hand
        // their memory on only to work that comes later on this one stream.
        check(unsafe {
            (self.function)(
                self.temp.as_device_ptr() as *mut c_void,
                &raw mut temp_bytes,
                data.as_device_ptr() as *const c_void,
                self.result.as_device_ptr() as *mut f32,
                self.words,
                self.result.device().stream().as_raw() as *mut c_void,
            )
        })
    }

    /// Waits for the sum that was enqueued last.
    pub(crate) fn read(&self) -> anyhow::Result<f32> {
        Ok(self.result.to_vec()?[0])
    }
}

fn check(status: c_int) -> anyhow::Result<()> {
    ensure!(status == 0, "CUB returned the CUDA error {status}");
    Ok(())
}
