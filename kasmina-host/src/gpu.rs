//! Everything that calls the driver: contexts, streams, memory, modules, tensor maps, launches.
//!
//! Contexts come from `cust` (the primary context, which other CUDA libraries share); what it
//! lacks goes straight through `kasmina-driver`. Its errors are never shown: the driver's own
//! numbers are.

mod buffer;
mod context;
mod launch;
mod module_cache;
mod once_map;
mod pinned;
mod pool;
mod resident;
mod stream;
mod tensor_map;

pub(crate) use buffer::Buffer;
pub(crate) use context::Gpu;
pub(crate) use launch::Launch;
pub(crate) use pinned::{PinnedSlot, PinnedWords};
pub(crate) use resident::{Resident, Setup, check_device};
pub(crate) use stream::Stream;
pub(crate) use tensor_map::encode_sequence_map;

use kasmina_driver::RawError;

use crate::error::Error;

/// `CUDA_ERROR_OUT_OF_MEMORY`.
const OUT_OF_MEMORY: u32 = 2;
/// `CUDA_ERROR_NOT_READY`.
const NOT_READY: u32 = 600;

/// Calls a driver function, giving its failure the function's name.
macro_rules! driver {
    ($function:ident($($argument:expr),* $(,)?)) => {
        kasmina_driver::check(stringify!($function), kasmina_driver::$function($($argument),*))
    };
}
use driver;

/// A failure that no operation on a stream has to do with.
fn failed(error: RawError) -> Error {
    failed_after(error, None)
}

/// A failure that may stem from the operation enqueued before.
fn failed_after(error: RawError, op: Option<&'static str>) -> Error {
    let RawError { call, code, .. } = error;
    Error::Driver { call, code, name: error.name(), detail: error.to_string(), op }
}
