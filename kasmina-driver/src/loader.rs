//! Opens the driver's library once and finds its functions one by one.

use core::ffi::c_void;
use core::ptr::{self, NonNull};
use core::sync::atomic::{AtomicPtr, Ordering};
use std::env;
use std::ffi::OsString;
use std::sync::OnceLock;

use libloading::Library;

use crate::call::Origin;

/// The name under which the driver installs its library.
const DEFAULT_LIBRARY: &str = "libcuda.so.1";

/// Overrides [`DEFAULT_LIBRARY`].
const LIBRARY_VARIABLE: &str = "KASMINA_LIBCUDA";

/// The file asked for: `KASMINA_LIBCUDA` where it is set and not empty, else `libcuda.so.1`.
pub(crate) fn library_name() -> OsString {
    env::var_os(LIBRARY_VARIABLE)
        .filter(|name| !name.is_empty())
        .unwrap_or_else(|| DEFAULT_LIBRARY.into())
}

/// The driver's library, opened by the first call and never closed, or why it could not be.
pub(crate) fn library() -> Result<&'static Library, &'static str> {
    static LIBRARY: OnceLock<Result<Library, String>> = OnceLock::new();
    LIBRARY
        .get_or_init(|| {
            let name = library_name();
            // SAFETY: opening a library runs its initialisers. Those of the CUDA driver are made to
            // run in any process at any time; whoever names another file vouches for it.
            unsafe { Library::new(&name) }
                .map_err(|error| format!("cannot open {}: {}", name.display(), cause(&error)))
        })
        .as_ref()
        .map_err(String::as_str)
}

/// The dynamic linker's own words, which `libloading` keeps as the source of its error.
fn cause(error: &libloading::Error) -> String {
    std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string)
}

/// A function of the driver, looked up when first called.
pub(crate) struct Symbol {
    name: &'static str,
    /// Null until the function has been found.
    address: AtomicPtr<c_void>,
}

impl Symbol {
    pub(crate) const fn new(name: &'static str) -> Self {
        Self { name, address: AtomicPtr::new(ptr::null_mut()) }
    }

    pub(crate) const fn name(&self) -> &'static str {
        self.name
    }

    /// Its address, or what is missing.
    #[inline]
    pub(crate) fn address(&self) -> Result<NonNull<c_void>, Origin> {
        NonNull::new(self.address.load(Ordering::Acquire)).map_or_else(|| self.find(), Ok)
    }

    /// Threads that race here store the same address.
    #[cold]
    fn find(&self) -> Result<NonNull<c_void>, Origin> {
        let library = library().map_err(|_| Origin::NoLibrary)?;
        // SAFETY: the symbol is read as a bare address, which any symbol has; its type is stated by
        // the table row that calls it.
        let symbol = unsafe { library.get::<*mut c_void>(self.name) };
        // SAFETY: the library is never closed, so the address stays valid without the borrow.
        let address = symbol.ok().and_then(|symbol| unsafe { symbol.try_as_raw_ptr() });
        let address = address.and_then(NonNull::new).ok_or(Origin::NoSymbol)?;
        self.address.store(address.as_ptr(), Ordering::Release);
        Ok(address)
    }
}
