//! PTX modules, loaded on first use, and the functions found in them.

use std::ffi::{CString, c_void};
use std::fs;
use std::path::{Path, PathBuf};
use std::ptr;
use std::sync::{PoisonError, RwLock};

use kasmina_driver::cust_raw::{CUfunction, CUjit_option, CUmodule};
use kasmina_driver::{DriverVersion, FunctionAttribute, RawError, required_driver_for_ptx};
use kasmina_kernels::abi::{Kernel, KernelParams, Module};

use super::once_map::OnceMap;
use super::{driver, failed};
use crate::error::{Error, Result};

/// Dynamic shared memory that needs no permission.
const DEFAULT_SMEM_BYTES: u32 = 48 << 10;
/// Room for what the driver's compiler has to say.
const LOG_BYTES: usize = 8 << 10;
/// `CUDA_ERROR_NOT_FOUND`.
const NOT_FOUND: u32 = 500;

/// The modules and functions of one context. They are never unloaded; failures are not kept.
pub(super) struct ModuleCache {
    driver: DriverVersion,
    functions: RwLock<Vec<Function>>,
    /// Compiling takes long, and only threads that want the same module wait for it.
    modules: OnceMap<ModuleKey, CUmodule>,
}

struct Function {
    /// The address of the `Kernel`, a static, so that a look-up compares no text.
    kernel: usize,
    ptx_dir: Option<PathBuf>,
    raw: CUfunction,
}

#[derive(PartialEq)]
struct ModuleKey {
    module: &'static Module,
    ptx_dir: Option<PathBuf>,
}

// SAFETY: functions and modules may be used from any thread and never change.
unsafe impl Send for ModuleCache {}
// SAFETY: as above; the lists are behind locks.
unsafe impl Sync for ModuleCache {}

impl ModuleCache {
    pub(super) const fn new(driver: DriverVersion) -> Self {
        Self { driver, functions: RwLock::new(Vec::new()), modules: OnceMap::new() }
    }

    /// The function of a kernel, from the built-in PTX or from a folder. The context is current.
    pub(super) fn function<P: KernelParams>(
        &self,
        kernel: &'static Kernel<P>,
        ptx_dir: Option<&Path>,
    ) -> Result<CUfunction> {
        let address = ptr::from_ref(kernel).addr();
        if let Some(function) = self.find(address, ptx_dir) {
            return Ok(function);
        }
        let key = ModuleKey { module: kernel.module, ptx_dir: ptx_dir.map(Path::to_owned) };
        let mut found = None;
        let module = self.modules.get_or_make(key, || {
            let raw = self.load(kernel.module, ptx_dir)?;
            // A module without its entry is not kept: the file may be replaced.
            found = Some(entry(raw, kernel).inspect_err(|_| unload(raw))?);
            Ok(raw)
        })?;
        let raw = found.map_or_else(|| entry(module, kernel), Ok)?;
        let mut functions = self.functions.write().unwrap_or_else(PoisonError::into_inner);
        // Another thread may have found it meanwhile.
        if function_of(&functions, address, ptx_dir).is_none() {
            let ptx_dir = ptx_dir.map(Path::to_owned);
            functions.push(Function { kernel: address, ptx_dir, raw });
        }
        Ok(raw)
    }

    /// Whether [`function`](Self::function) would load nothing.
    pub(super) fn has<P: KernelParams>(
        &self,
        kernel: &'static Kernel<P>,
        ptx_dir: Option<&Path>,
    ) -> bool {
        self.find(ptr::from_ref(kernel).addr(), ptx_dir).is_some()
    }

    fn find(&self, kernel: usize, ptx_dir: Option<&Path>) -> Option<CUfunction> {
        let functions = self.functions.read().unwrap_or_else(PoisonError::into_inner);
        function_of(&functions, kernel, ptx_dir)
    }

    /// Has the driver compile a module, or fetch it from the driver's own cache on disk.
    fn load(&self, module: &'static Module, ptx_dir: Option<&Path>) -> Result<CUmodule> {
        let name = module_name(module);
        let ptx = match ptx_dir {
            None => module.ptx().into_bytes(),
            Some(folder) => {
                let path = folder.join(module.tier.name()).join(format!("{}.ptx", module.name));
                match fs::read(&path) {
                    Ok(ptx) => ptx,
                    Err(source) => return Err(Error::PtxUnreadable { path, source }),
                }
            }
        };
        if let Some(required) = required_driver(&String::from_utf8_lossy(&ptx))
            && self.driver < required
        {
            return Err(Error::DriverTooOld {
                driver: (self.driver.major, self.driver.minor),
                required: (required.major, required.minor),
                what: format!("PTX module {name}"),
            });
        }
        let Ok(image) = CString::new(ptx) else {
            return Err(Error::ModuleRejected { module: name, log: "it holds a NUL byte".into() });
        };
        let _span = tracing::info_span!("load PTX module", module = %name).entered();
        compile(&image, name)
    }
}

fn function_of(
    functions: &[Function],
    kernel: usize,
    ptx_dir: Option<&Path>,
) -> Option<CUfunction> {
    functions
        .iter()
        .find(|function| function.kernel == kernel && function.ptx_dir.as_deref() == ptx_dir)
        .map(|function| function.raw)
}

fn compile(image: &CString, name: String) -> Result<CUmodule> {
    let mut log = vec![0u8; LOG_BYTES];
    let mut options =
        [CUjit_option::CU_JIT_ERROR_LOG_BUFFER, CUjit_option::CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES];
    // The driver takes integers in place of pointers.
    let mut values: [*mut c_void; 2] =
        [log.as_mut_ptr().cast(), ptr::without_provenance_mut(LOG_BYTES)];
    let mut module = ptr::null_mut();
    // SAFETY: the image ends with NUL; there are two options with two values, the first a buffer
    // of as many bytes as the second says; all of them outlive the call.
    let loaded = unsafe {
        driver!(cuModuleLoadDataEx(
            &raw mut module,
            image.as_ptr().cast(),
            2,
            options.as_mut_ptr(),
            values.as_mut_ptr(),
        ))
    };
    loaded.map(|()| module).map_err(|error| {
        if !blames_module(error.code) {
            return failed(error);
        }
        let end = log.iter().position(|&byte| byte == 0).unwrap_or(log.len());
        let log = String::from_utf8_lossy(&log[..end]);
        Error::ModuleRejected { module: name, log: describe(&log, error) }
    })
}

/// Whether a code of `cuModuleLoadDataEx` says that the image is at fault: invalid image, no code
/// for this GPU, invalid PTX, unsupported PTX version, invalid source.
const fn blames_module(code: u32) -> bool {
    matches!(code, 200 | 209 | 218 | 222 | 300)
}

fn describe(log: &str, error: RawError) -> String {
    let log = log.trim();
    if log.is_empty() { error.to_string() } else { log.to_owned() }
}

/// A kernel's function in a loaded module, allowed the shared memory and the cluster it needs.
fn entry<P: KernelParams>(module: CUmodule, kernel: &'static Kernel<P>) -> Result<CUfunction> {
    let missing =
        || Error::EntryMissing { entry: kernel.entry, module: module_name(kernel.module) };
    let name = CString::new(kernel.entry).map_err(|_| missing())?;
    let mut function = ptr::null_mut();
    // SAFETY: the module is loaded in the current context, the name ends with NUL, and the pointer
    // is valid for writing one handle.
    unsafe { driver!(cuModuleGetFunction(&raw mut function, module, name.as_ptr())) }
        .map_err(|error| if error.code == NOT_FOUND { missing() } else { failed(error) })?;
    if kernel.smem_bytes > DEFAULT_SMEM_BYTES {
        let attribute = FunctionAttribute::MAX_DYNAMIC_SHARED_SIZE_BYTES;
        let bytes = kernel.smem_bytes.cast_signed();
        // SAFETY: the function was found above.
        unsafe { driver!(cuFuncSetAttribute(function, attribute, bytes)) }.map_err(failed)?;
    }
    if kernel.one_cluster {
        let attribute = FunctionAttribute::NON_PORTABLE_CLUSTER_SIZE_ALLOWED;
        // SAFETY: the function was found above.
        unsafe { driver!(cuFuncSetAttribute(function, attribute, 1)) }.map_err(failed)?;
    }
    Ok(function)
}

fn unload(module: CUmodule) {
    // SAFETY: loaded by the caller, who keeps neither it nor a function of it. A failure leaves a
    // module that nothing refers to.
    let _ = unsafe { driver!(cuModuleUnload(module)) };
}

/// The module's path without its ending, as messages show it.
fn module_name(module: &Module) -> String {
    format!("{}/{}", module.tier, module.name)
}

/// The oldest driver that compiles this PTX; `None` where it does not say or is newer than we
/// know, so that the driver has to be asked.
pub(super) fn required_driver(ptx: &str) -> Option<DriverVersion> {
    let version = ptx.lines().find_map(|line| line.trim_start().strip_prefix(".version"))?;
    let (major, minor) = version.split_whitespace().next()?.split_once('.')?;
    required_driver_for_ptx(major.parse().ok()?, minor.parse().ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use kasmina_kernels::abi::MODULES;

    #[test]
    fn the_version_line_decides_which_driver_is_needed() {
        let required = required_driver("//\n// Generated\n\n.version 8.0\n.target sm_90a\n");
        assert_eq!(required, Some(DriverVersion::new(12, 0)));
        for ptx in ["", ".target sm_90a", ".version", ".version x.y", ".version 99.0"] {
            assert_eq!(required_driver(ptx), None, "{ptx:?}");
        }
    }

    #[test]
    fn every_built_in_module_says_which_driver_it_needs() {
        for module in MODULES {
            assert!(required_driver(&module.ptx_header()).is_some(), "{}", module_name(module));
        }
    }

    #[test]
    fn the_log_is_what_the_compiler_said_or_else_the_code() {
        let error = kasmina_driver::check(
            "cuModuleLoadDataEx",
            kasmina_driver::cust_raw::CUresult::CUDA_ERROR_INVALID_PTX,
        )
        .unwrap_err();
        assert_eq!(describe(" ptxas error \n", error), "ptxas error");
        assert!(describe("", error).contains("218"));
        assert!(blames_module(error.code) && !blames_module(2));
    }
}
