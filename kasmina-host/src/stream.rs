//! The queue that a device handle's operations go to.
#![forbid(unsafe_code)]

use std::sync::Arc;

use crate::error::Result;
use crate::gpu;

/// The queue of a [`Device`](crate::Device) handle: operations run in the order in which they were
/// enqueued.
///
/// On the CPU an operation has run when the call returns, so there is nothing to wait for.
#[derive(Debug)]
pub struct Stream {
    backend: Backend,
}

#[derive(Debug)]
enum Backend {
    Host,
    Gpu(Arc<gpu::Stream>),
}

impl Stream {
    pub(crate) const fn host() -> Self {
        Self { backend: Backend::Host }
    }

    pub(crate) const fn on_gpu(stream: Arc<gpu::Stream>) -> Self {
        Self { backend: Backend::Gpu(stream) }
    }

    pub(crate) fn gpu(&self) -> Option<&Arc<gpu::Stream>> {
        match &self.backend {
            Backend::Host => None,
            Backend::Gpu(stream) => Some(stream),
        }
    }

    /// Waits until everything enqueued so far has run.
    ///
    /// # Errors
    /// [`Error::Driver`](crate::Error::Driver), naming the last operation, if one of them failed.
    pub fn synchronize(&self) -> Result<()> {
        self.gpu().map_or(Ok(()), |stream| stream.synchronize())
    }

    /// Makes whatever is enqueued here from now on run after everything enqueued on `other` so
    /// far. The calling thread does not wait.
    ///
    /// Tensors do this by themselves; it is needed only where memory is shared with other
    /// libraries. Streams of different GPUs may wait for each other.
    ///
    /// # Errors
    /// [`Error::Driver`](crate::Error::Driver) if the driver refuses.
    pub fn wait(&self, other: &Self) -> Result<()> {
        match (self.gpu(), other.gpu()) {
            (Some(stream), Some(other)) if !Arc::ptr_eq(stream, other) => stream.wait(other),
            _ => Ok(()),
        }
    }

    /// The `CUstream` as an address, for other CUDA libraries; 0 on the CPU.
    ///
    /// It is valid as long as a device handle or a tensor of this stream is.
    #[must_use]
    pub fn as_raw(&self) -> u64 {
        self.gpu().map_or(0, |stream| stream.as_raw())
    }
}

/// What was enqueued last on a stream: an error that surfaces later names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Operation {
    Fill = 1,
    GemmForward = 2,
    Reduce = 3,
    GemmBackward = 10,
    Conv1dForward = 11,
    Conv1dBackward = 12,
    ActivationGrad = 13,
    Copy = 14,
}

impl Operation {
    /// The operation of this number; `None` for 0, which stands for none.
    pub(crate) const fn from_number(number: u8) -> Option<Self> {
        match number {
            1 => Some(Self::Fill),
            2 => Some(Self::GemmForward),
            3 => Some(Self::Reduce),
            10 => Some(Self::GemmBackward),
            11 => Some(Self::Conv1dForward),
            12 => Some(Self::Conv1dBackward),
            13 => Some(Self::ActivationGrad),
            14 => Some(Self::Copy),
            _ => None,
        }
    }

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Fill => "fill",
            Self::GemmForward => "gemm forward",
            Self::Reduce => "reduce",
            Self::GemmBackward => "gemm backward",
            Self::Conv1dForward => "conv1d forward",
            Self::Conv1dBackward => "conv1d backward",
            Self::ActivationGrad => "activation gradient",
            Self::Copy => "copy",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operations_keep_their_numbers() {
        for operation in [
            Operation::Fill,
            Operation::GemmForward,
            Operation::Reduce,
            Operation::GemmBackward,
            Operation::Conv1dForward,
            Operation::Conv1dBackward,
            Operation::ActivationGrad,
            Operation::Copy,
        ] {
            assert_eq!(Operation::from_number(operation as u8), Some(operation));
        }
        assert_eq!(Operation::from_number(0), None);
    }
}
