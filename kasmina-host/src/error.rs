//! What can go wrong, with the values involved and the remedy in each message.

mod session;

use std::path::PathBuf;
use std::time::Duration;

use kasmina_kernels::abi::{DType, Tier};
use kasmina_kernels::activation::Activation;
use kasmina_kernels::conv1d::Conv1dFault;
use kasmina_kernels::gemm::hopper::comparison::Without;
use kasmina_kernels::names::UnknownName;

pub use session::SessionFault;

use crate::device::DeviceId;
use crate::shape::Shape;

/// Shorthand for a result with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// Everything that can go wrong.
///
/// Wrong arguments are reported before anything is enqueued, so whatever was involved stays
/// usable.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The CUDA driver cannot be used at all.
    #[error(
        "no CUDA driver: {reason}; install the NVIDIA driver, or use `Device::auto()` or \
         `Device::cpu()`, which need none"
    )]
    NoDriver {
        /// What the loader or the driver said.
        reason: String,
    },

    /// The driver works but has no such GPU.
    #[error(
        "GPU {requested} does not exist, the driver sees {available}; check the ordinal and \
         CUDA_VISIBLE_DEVICES, or use `Device::auto()`, which falls back to the CPU"
    )]
    NoDevice {
        /// The ordinal that was asked for.
        requested: u32,
        /// How many GPUs the driver sees.
        available: u32,
    },

    /// The driver is older than what is asked of it.
    #[error(
        "the driver supports CUDA {}.{} and {what} needs {}.{}; update the NVIDIA driver, or \
         choose a less demanding tier with KASMINA_TIER",
        .driver.0, .driver.1, .required.0, .required.1
    )]
    DriverTooOld {
        /// The CUDA version the driver supports, major and minor.
        driver: (u32, u32),
        /// The CUDA version that is needed, major and minor.
        required: (u32, u32),
        /// What needs it: a PTX module or a driver function.
        what: String,
    },

    /// The driver reported an error.
    #[error("{}", driver_message(.detail, *.code, *.op))]
    Driver {
        /// The driver function that reported it.
        call: &'static str,
        /// Its `CUresult`.
        code: u32,
        /// The name of that code, such as `CUDA_ERROR_ILLEGAL_ADDRESS`.
        name: &'static str,
        /// All of this in words, with the remedy where there is one.
        detail: String,
        /// The operation that was enqueued last on the stream, where the error may stem from it.
        op: Option<&'static str>,
    },

    /// There is not enough memory, even after cached blocks were given back.
    #[error(
        "{device} is out of memory: {requested} bytes requested, {} free; use smaller batches, \
         drop tensors, or call `Device::trim` on other handles",
        .free.map_or_else(|| "unknown".to_owned(), |bytes| bytes.to_string())
    )]
    OutOfMemory {
        /// Where.
        device: DeviceId,
        /// The size of the request in bytes.
        requested: u64,
        /// Free bytes on the device after trimming, where it can tell.
        free: Option<u64>,
    },

    /// An operand has the wrong shape.
    #[error("{op}: {operand} has shape {got}, expected {expected}")]
    Shape {
        /// The operation.
        op: &'static str,
        /// Which operand.
        operand: &'static str,
        /// The shape that fits the other operands.
        expected: Shape,
        /// The shape it has.
        got: Shape,
    },

    /// A shape has more axes than a tensor can have.
    #[error("a shape of {got} axes was given, a tensor has 1 to {}; merge axes", Shape::MAX_RANK)]
    Rank {
        /// The number of axes.
        got: usize,
    },

    /// A range of rows or columns reaches beyond the tensor.
    #[error("{op}: {start}..{end} is not a range within 0..{len}")]
    OutOfRange {
        /// The operation.
        op: &'static str,
        /// First index.
        start: usize,
        /// One past the last index.
        end: usize,
        /// How many there are.
        len: usize,
    },

    /// An operand has the wrong element type.
    #[error(
        "{op}: elements of type {got}, expected {expected}; convert the tensor or \
         build the layer with `.dtype(DType::{got:?})`"
    )]
    DType {
        /// The operation.
        op: &'static str,
        /// The element type that fits.
        expected: DType,
        /// The element type it has.
        got: DType,
    },

    /// Operands live on different devices.
    #[error(
        "{op}: {operand} is on {got}, expected {expected}; copy it over with \
         `to_vec` and `from_slice`"
    )]
    DeviceMismatch {
        /// The operation.
        op: &'static str,
        /// Which operand.
        operand: &'static str,
        /// The device of the other operands.
        expected: DeviceId,
        /// The device it is on.
        got: DeviceId,
    },

    /// An output shares memory with an input, which a kernel reads while it writes, or with another
    /// output.
    #[error("{op}: the output overlaps {operand} in memory; write to another tensor")]
    Overlap {
        /// The operation.
        op: &'static str,
        /// The operand it overlaps.
        operand: &'static str,
    },

    /// What was kept of the forward pass does not tell the activation's gradient.
    #[error(
        "{op}: the gradient of {activation} needs {needed}; keep it from the forward pass, or use \
         the layer's `backward`, which computes it anew"
    )]
    Saved {
        /// The operation.
        op: &'static str,
        /// The activation.
        activation: Activation,
        /// What tells its gradient.
        needed: &'static str,
    },

    /// The rows of an operand have gaps between them, and the operation takes none.
    #[error(
        "{op}: the rows of {operand} have {columns} elements and are {row_stride} apart; use the \
         tensor it is a view of, single rows, or a copy by `to_vec` and `from_slice`"
    )]
    Strided {
        /// The operation.
        op: &'static str,
        /// Which operand.
        operand: &'static str,
        /// Elements per row.
        columns: usize,
        /// Elements from row to row.
        row_stride: usize,
    },

    /// A matrix cannot be cut into so many chunks of columns.
    #[error(
        "{op}: {columns} columns cannot be cut into {chunks} chunks; ask for at least one chunk, \
         and for no more than there are columns"
    )]
    Chunks {
        /// The operation.
        op: &'static str,
        /// The number of chunks that was asked for.
        chunks: usize,
        /// The number of columns.
        columns: usize,
    },

    /// A size exceeds what can be addressed.
    #[error("{op}: {quantity} exceeds {limit}; split the operation")]
    Overflow {
        /// The operation.
        op: &'static str,
        /// What is too large.
        quantity: &'static str,
        /// The largest value that works.
        limit: u64,
    },

    /// There is no such convolution.
    #[error("{op}: {fault}")]
    Convolution {
        /// The operation.
        op: &'static str,
        /// Why not, with the remedy.
        fault: Conv1dFault,
    },

    /// The tier that was asked for cannot serve this call.
    #[error(
        "{op}: tier {tier} cannot serve this call: {reason}; leave the tier open to get the \
         best one that can"
    )]
    Unsupported {
        /// The operation.
        op: &'static str,
        /// The tier that was asked for.
        tier: Tier,
        /// Why it cannot.
        reason: Obstacle,
    },

    /// No tier has this name.
    #[error("KASMINA_TIER={name}: {fault}")]
    UnknownTier {
        /// The name that was given.
        name: String,
        /// The names there are.
        fault: UnknownName,
    },

    /// The driver refused a PTX module.
    #[error(
        "the driver rejected PTX module {module}: {log}; rebuild it with `cargo xtask ptx`, \
         or unset the PTX override"
    )]
    ModuleRejected {
        /// The module, as `tier/name`.
        module: String,
        /// What the driver's compiler said.
        log: String,
    },

    /// A PTX module lacks a kernel.
    #[error(
        "PTX module {module} has no entry {entry}; it is stale: rebuild it with \
         `cargo xtask ptx`, or unset the PTX override"
    )]
    EntryMissing {
        /// The kernel.
        entry: &'static str,
        /// The module, as `tier/name`.
        module: String,
    },

    /// A file of the PTX override cannot be read.
    #[error(
        "cannot read {}; point KASMINA_PTX_DIR at a folder laid out like kasmina-kernels/ptx, or \
         unset it",
        .path.display()
    )]
    PtxUnreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },

    /// A stream session cannot begin, or has ended.
    #[error("{op}: {fault}")]
    Session {
        /// The operation.
        op: &'static str,
        /// Why.
        fault: SessionFault,
    },

    /// A stream session has no room for another batch.
    #[error(
        "{op}: {in_flight} parts of batches are in flight or unread, and {capacity} is what this \
         logical stream may have; wait for a ticket, use `submit_blocking`, or open the session \
         with a larger `depth`"
    )]
    QueueFull {
        /// The operation.
        op: &'static str,
        /// Parts that hold a slot now.
        in_flight: usize,
        /// Parts that may.
        capacity: usize,
    },

    /// Something did not happen in the time it was given.
    #[error("{op}: nothing happened for {after:?}; the ticket stays valid, wait again")]
    Timeout {
        /// The operation.
        op: &'static str,
        /// The time it was given.
        after: Duration,
    },

    /// A pointer from elsewhere cannot become a tensor.
    #[error("foreign pointer refused: {reason}")]
    ForeignPointer {
        /// Why.
        reason: ForeignPointerFault,
    },
}

/// Why a tier cannot serve a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Obstacle {
    /// The tensors are in host memory and the tier runs on a GPU.
    #[error("the tensors are in host memory; use a `Device::cuda` handle")]
    HostMemory,
    /// The tensors are in GPU memory and the tier runs on the CPU.
    #[error("the tensors are in GPU memory; use `Device::cpu()`")]
    GpuMemory,
    /// The GPU lacks the hardware.
    #[error("the GPU has compute capability {major}.{minor}")]
    Capability {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// The driver cannot load the tier's PTX.
    #[error(
        "its PTX needs a driver for CUDA {}.{}, this one supports {}.{}",
        .required.0, .required.1, .driver.0, .driver.1
    )]
    Driver {
        /// The CUDA version the driver supports.
        driver: (u32, u32),
        /// The CUDA version the tier needs.
        required: (u32, u32),
    },
    /// The tier has no kernel for this element type.
    #[error("it has no kernel for {0}")]
    DType(DType),
    /// An operand does not start on a multiple of 16 bytes, which TMA needs.
    #[error("{operand} does not start on a multiple of 16 bytes")]
    Address {
        /// Which operand.
        operand: &'static str,
    },
    /// An operand's rows are not a multiple of 16 bytes (and less than 2^40) apart, which TMA
    /// needs.
    #[error("the rows of {operand} are {bytes} bytes apart, not a multiple of 16 below 2^40")]
    RowStride {
        /// Which operand.
        operand: &'static str,
        /// The distance from row to row.
        bytes: u64,
    },
    /// Rows are not a multiple of 16 bytes long: those of an output, as TMA stores in pieces of 16
    /// bytes and would overwrite what follows, or the part of a group in a row of channels.
    #[error("the rows of {operand} are {bytes} bytes long, not a multiple of 16")]
    RowLength {
        /// Which operand.
        operand: &'static str,
        /// The length of a row.
        bytes: u64,
    },
    /// The tier has no kernel of the tile that `KernelConfig::hopper_tile` forces.
    #[error("it has no kernel of {}×{} output tiles, which the KernelConfig forces", .0[0], .0[1])]
    Tile([u32; 2]),
    /// The tier has no kernel of the forced tile that so many blocks share, as
    /// `KernelConfig::hopper_split_k` forces.
    #[error("it has no kernel whose output tiles {0} blocks share, which the KernelConfig forces")]
    SplitK(u32),
    /// The tier has no kernel of the forced tile that loads W into so many blocks, as
    /// `KernelConfig::hopper_multicast` forces.
    #[error("it has no kernel that loads W into {0} blocks, which the KernelConfig forces")]
    Multicast(u32),
    /// The tier has no kernel of what is forced whose consumers have a tile each, as
    /// `KernelConfig::hopper_ping_pong` forces.
    #[error("it has no such kernel whose consumers take turns, which the KernelConfig forces")]
    PingPong,
    /// The tier has no kernel that goes without the part `KernelConfig::hopper_without` names.
    #[error("it has no such kernel without {0}, which the KernelConfig leaves out")]
    Without(Without),
    /// The tier has no kernel for this operation.
    #[error("it has no kernel for this operation")]
    Operation,
    /// `KernelConfig::enable_tma(false)` rules it out.
    #[error("it is built on TMA, which the KernelConfig turns off")]
    TmaDisabled,
}

impl Obstacle {
    /// The error of a call that insists on the tier.
    pub(crate) fn refuse(self, op: &'static str, tier: Tier) -> Error {
        match self {
            Self::Driver { driver, required } => {
                Error::DriverTooOld { driver, required, what: format!("tier {tier}") }
            }
            reason => Error::Unsupported { op, tier, reason },
        }
    }
}

/// Why a foreign pointer cannot become a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ForeignPointerFault {
    /// It is null, and the shape is not empty.
    #[error("it is null")]
    Null,
    /// It is not aligned for the element type.
    #[error("address {address:#x} is not a multiple of {align}, the element size")]
    Misaligned {
        /// The address.
        address: u64,
        /// The alignment it needs.
        align: usize,
    },
    /// The rows overlap: the row stride is less than the number of columns.
    #[error("a row stride of {row_stride} elements is less than the {columns} columns")]
    RowStride {
        /// The row stride in elements.
        row_stride: usize,
        /// The elements per row.
        columns: usize,
    },
    /// The device is the CPU.
    #[error("it was given with the CPU as its device; copy host memory with `from_slice`")]
    HostDevice,
}

/// Whether a context is lost once the driver has reported `code`.
const fn loses_context(code: u32) -> bool {
    // Illegal address, timeout, destroyed context, assertion, and the hardware's own exceptions.
    matches!(code, 226 | 700 | 702 | 709 | 710 | 714..=719 | 721)
}

fn driver_message(detail: &str, code: u32, op: Option<&str>) -> String {
    let after = op.map_or_else(String::new, |op| format!("; enqueued last: {op}"));
    let remedy = if loses_context(code) {
        "; restart the process, and run it under compute-sanitizer to find the cause"
    } else {
        ""
    };
    format!("{detail}{after}{remedy}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_late_driver_error_names_the_operation_and_the_loss_of_the_context() {
        let error = Error::Driver {
            call: "cuStreamSynchronize",
            code: 700,
            name: "CUDA_ERROR_ILLEGAL_ADDRESS",
            detail: "cuStreamSynchronize failed".into(),
            op: Some("gemm forward"),
        };
        let message = error.to_string();
        assert!(message.contains("gemm forward") && message.contains("restart the process"));
    }

    #[test]
    fn a_launch_without_resources_leaves_the_context_usable() {
        assert!(!driver_message("cuLaunchKernel failed", 701, None).contains("restart"));
    }

    #[test]
    fn a_shape_error_gives_both_shapes() {
        let error = Error::Shape {
            op: "gemm forward",
            operand: "x",
            expected: [3, 4].into(),
            got: [3, 5].into(),
        };
        assert_eq!(error.to_string(), "gemm forward: x has shape [3, 5], expected [3, 4]");
    }

    #[test]
    fn errors_are_send_sync_and_small() {
        fn send_sync<T: Send + Sync>() {}
        send_sync::<Error>();
        assert!(size_of::<Error>() <= 128);
    }
}
