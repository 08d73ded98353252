//! Whether the driver can be used on this machine, asked before anything depends on it.

use core::ffi::c_int;
use std::sync::OnceLock;

use crate::call::{Origin, RawError, check};
use crate::loader;
use crate::symbols::{cuDeviceGetCount, cuDriverGetVersion, cuInit};
use crate::version::{DriverVersion, required_driver_for_ptx};

/// `CUDA_ERROR_STUB_LIBRARY`: the library is the CUDA toolkit's stand-in for linking.
const STUB_LIBRARY: u32 = 34;
/// `CUDA_ERROR_NO_DEVICE`.
const NO_DEVICE: u32 = 100;

/// Why the GPU cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Unavailable {
    /// There is no usable driver library.
    #[error(
        "no CUDA driver: {reason}; install the NVIDIA driver, which brings libcuda.so.1, or name \
         the file in KASMINA_LIBCUDA"
    )]
    NoDriver {
        /// What is wrong with the library.
        reason: String,
    },

    /// The driver works and sees no GPU.
    #[error(
        "the CUDA driver sees no GPU; check that one is installed, that `nvidia-smi` lists it, and \
         that CUDA_VISIBLE_DEVICES does not hide it"
    )]
    NoDevice,

    /// The driver does not know what is asked of it.
    #[error(
        "the driver supports CUDA {}.{} and CUDA {}.{} is needed; update the NVIDIA driver",
        .driver.0, .driver.1, .required.0, .required.1
    )]
    DriverTooOld {
        /// The CUDA version the driver supports, major and minor.
        driver: (u32, u32),
        /// The CUDA version that is needed, major and minor.
        required: (u32, u32),
    },

    /// The PTX is newer than any this crate can vouch for.
    #[error(
        "PTX {}.{} is newer than this version of kasmina knows; update kasmina, or compile the PTX \
         for an older version",
        .version.0, .version.1
    )]
    UnknownPtx {
        /// The PTX version, major and minor.
        version: (u32, u32),
    },

    /// The driver is there and refused to start.
    #[error(
        "the CUDA driver does not start: {source}; see whether `nvidia-smi` works, and restart the \
         machine after a driver update"
    )]
    Failed {
        /// The call that failed.
        #[source]
        source: RawError,
    },
}

impl From<RawError> for Unavailable {
    fn from(error: RawError) -> Self {
        match (error.origin, error.code) {
            (Origin::NoLibrary, _) => Self::NoDriver {
                reason: loader::library().err().unwrap_or("the library was not found").to_owned(),
            },
            (Origin::NoSymbol, _) => Self::NoDriver {
                reason: format!("{} has no {}", loader::library_name().display(), error.call),
            },
            (Origin::Driver, STUB_LIBRARY) => Self::NoDriver {
                reason: format!(
                    "{} is the CUDA toolkit's stand-in for linking",
                    loader::library_name().display()
                ),
            },
            (Origin::Driver, NO_DEVICE) => Self::NoDevice,
            (Origin::Driver, _) => Self::Failed { source: error },
        }
    }
}

/// Opens and initialises the driver, once in the life of the process, and returns its version.
///
/// # Errors
///
/// [`Unavailable::NoDriver`], [`Unavailable::NoDevice`] or [`Unavailable::Failed`]; the answer
/// stays the same for the life of the process.
pub fn init() -> Result<DriverVersion, Unavailable> {
    static OUTCOME: OnceLock<Result<DriverVersion, Unavailable>> = OnceLock::new();
    OUTCOME
        .get_or_init(|| {
            // SAFETY: takes one integer, and zero is its only permitted value.
            check("cuInit", unsafe { cuInit(0) })?;
            let mut version: c_int = 0;
            // SAFETY: the pointer is valid for writing one `int` during the call.
            check("cuDriverGetVersion", unsafe { cuDriverGetVersion(&raw mut version) })?;
            Ok(DriverVersion::from_encoded(version))
        })
        .clone()
}

/// The number of GPUs the driver sees, at least one.
///
/// # Errors
///
/// Those of [`init`], and [`Unavailable::NoDevice`] where the number is zero.
pub fn device_count() -> Result<u32, Unavailable> {
    init()?;
    let mut count: c_int = 0;
    // SAFETY: the pointer is valid for writing one `int` during the call.
    check("cuDeviceGetCount", unsafe { cuDeviceGetCount(&raw mut count) })?;
    u32::try_from(count).ok().filter(|&count| count > 0).ok_or(Unavailable::NoDevice)
}

impl DriverVersion {
    /// Refuses PTX of `.version major.minor` where this driver cannot compile it.
    ///
    /// Asked before a module is loaded, because the driver itself only says
    /// `CUDA_ERROR_UNSUPPORTED_PTX_VERSION`, which names neither version.
    ///
    /// # Errors
    ///
    /// [`Unavailable::DriverTooOld`], or [`Unavailable::UnknownPtx`] for PTX newer than this crate.
    pub fn require_ptx(self, major: u32, minor: u32) -> Result<(), Unavailable> {
        let required = required_driver_for_ptx(major, minor)
            .ok_or(Unavailable::UnknownPtx { version: (major, minor) })?;
        if self >= required {
            return Ok(());
        }
        Err(Unavailable::DriverTooOld {
            driver: (self.major, self.minor),
            required: (required.major, required.minor),
        })
    }
}
