//! The result of one driver call: what went wrong, in the driver's own number.

use core::cell::Cell;
use core::fmt;

use cust_raw::CUresult;

use crate::code;
use crate::loader;

/// Where a failure arose.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Origin {
    /// The driver ran the function, which returned the code.
    Driver,
    /// The driver's library could not be opened. The code is `CUDA_ERROR_NOT_INITIALIZED`.
    NoLibrary,
    /// The driver has no such function: it is too old. The code is `CUDA_ERROR_NOT_FOUND`.
    NoSymbol,
}

/// A driver call that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RawError {
    /// The function, by the driver's name for it.
    pub call: &'static str,
    /// The driver's code, also where `cust_raw` has no name for it.
    pub code: u32,
    /// Whether the driver gave that code or could not be reached.
    pub origin: Origin,
}

impl RawError {
    /// The driver's name for the code, or `CUDA_ERROR_UNRECOGNIZED` for one newer than this crate.
    #[must_use]
    pub fn name(&self) -> &'static str {
        code::describe(self.code).map_or("CUDA_ERROR_UNRECOGNIZED", |description| description.name)
    }
}

impl fmt::Display for RawError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { call, code, origin } = self;
        match origin {
            Origin::Driver => {
                write!(f, "{call} failed with {} ({code}): ", self.name())?;
                match code::describe(*code) {
                    Some(description) => f.write_str(&description.meaning.to_string_lossy()),
                    None => f.write_str(
                        "the code is newer than this crate; look it up in the CUDA Driver API \
                         reference",
                    ),
                }
            }
            Origin::NoLibrary => {
                let reason = loader::library().err().unwrap_or("the library was not found");
                write!(f, "{call} cannot be called: {reason}; install the NVIDIA driver")
            }
            Origin::NoSymbol => {
                write!(f, "the CUDA driver has no {call}; update the NVIDIA driver")
            }
        }
    }
}

impl core::error::Error for RawError {}

thread_local! {
    static LAST_ERROR: Cell<Option<RawError>> = const { Cell::new(None) };
}

/// The last failure of a driver call on this thread, whoever made the call.
///
/// `cust` reports codes it does not know, and some that it does, as `UnknownError`; this tells
/// which it was. Calls that succeed leave it as it is, so it means something only after a failure.
#[must_use]
pub fn last_error() -> Option<RawError> {
    LAST_ERROR.get()
}

/// Turns the result of the driver function `call` into a `Result`, with the driver's own code.
///
/// To be called on the thread that made the call, before it makes another.
///
/// ```
/// use kasmina_driver::{check, cuCtxSynchronize};
///
/// // SAFETY: takes no argument.
/// let synchronized = check("cuCtxSynchronize", unsafe { cuCtxSynchronize() });
/// if let Err(error) = synchronized {
///     eprintln!("{error}");
/// }
/// ```
///
/// # Errors
///
/// The failure, where `result` is one.
pub fn check(call: &'static str, result: CUresult) -> Result<(), RawError> {
    if result == CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    // The result has lost codes that `CUresult` lacks; the record has them.
    let recorded =
        last_error().filter(|error| error.call == call && code::fold(error.code) == result);
    Err(recorded.unwrap_or(RawError { call, code: code::number(result), origin: Origin::Driver }))
}

/// What a forwarding function returns for the driver's `code`.
#[inline]
pub(crate) fn conclude(call: &'static str, code: u32) -> CUresult {
    if code == 0 { CUresult::CUDA_SUCCESS } else { record(call, code, Origin::Driver) }
}

/// What a forwarding function returns when there is nothing to forward to.
#[cold]
pub(crate) fn unreachable_driver(call: &'static str, origin: Origin) -> CUresult {
    let result = match origin {
        Origin::NoSymbol => CUresult::CUDA_ERROR_NOT_FOUND,
        Origin::NoLibrary | Origin::Driver => CUresult::CUDA_ERROR_NOT_INITIALIZED,
    };
    record(call, code::number(result), origin)
}

#[cold]
fn record(call: &'static str, code: u32, origin: Origin) -> CUresult {
    LAST_ERROR.set(Some(RawError { call, code, origin }));
    code::fold(code)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_code_cust_does_not_know_becomes_unknown_and_is_kept() {
        let result = conclude("cuLaunchKernelEx", 912);
        assert_eq!(result, CUresult::CUDA_ERROR_UNKNOWN);
        let kept = RawError { call: "cuLaunchKernelEx", code: 912, origin: Origin::Driver };
        assert_eq!(last_error(), Some(kept));
        assert_eq!(check("cuLaunchKernelEx", result), Err(kept));
        assert_eq!(kept.name(), "CUDA_ERROR_INVALID_CLUSTER_SIZE");
    }

    #[test]
    fn a_code_nobody_knows_is_kept_too() {
        let result = conclude("cuInit", 4321);
        assert_eq!(result, CUresult::CUDA_ERROR_UNKNOWN);
        let error = check("cuInit", result).unwrap_err();
        assert_eq!((error.code, error.name()), (4321, "CUDA_ERROR_UNRECOGNIZED"));
        assert!(error.to_string().contains("4321"));
    }

    #[test]
    fn check_ignores_the_record_of_another_call() {
        let _ = conclude("cuInit", 912);
        let error = check("cuCtxSynchronize", CUresult::CUDA_ERROR_UNKNOWN).unwrap_err();
        assert_eq!((error.call, error.code), ("cuCtxSynchronize", 999));
    }

    #[test]
    fn success_is_no_error_and_leaves_the_record() {
        let _ = conclude("cuInit", 100);
        assert_eq!(check("cuInit", conclude("cuInit", 0)), Ok(()));
        assert_eq!(last_error().map(|error| error.code), Some(100));
    }

    #[test]
    fn the_record_belongs_to_the_thread() {
        let _ = conclude("cuInit", 100);
        assert_eq!(std::thread::spawn(last_error).join().unwrap(), None);
    }
}
