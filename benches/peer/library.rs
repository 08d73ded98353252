//! Functions of a library that was opened at run time.

use anyhow::Context;
use libloading::Library;

/// A function of a library.
///
/// # Safety
/// `T` must be the function's type, and the result must not outlive `library`.
pub(crate) unsafe fn symbol<T: Copy>(library: &Library, name: &str) -> anyhow::Result<T> {
    // SAFETY: the caller vouches for `T` and for the lifetime.
    let symbol = unsafe { library.get::<T>(name.as_bytes()) };
    symbol.map(|symbol| *symbol).with_context(|| format!("the library has no {name}"))
}
