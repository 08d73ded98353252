//! What a stream would run, recorded instead of run.

use std::ptr;

use kasmina::Device;
use kasmina_driver::cust_raw::{CUgraph, CUstream, CUstreamCaptureMode};
use kasmina_driver::{self as driver, check};

/// A captured sequence of operations.
pub(crate) struct Capture {
    graph: CUgraph,
}

impl Capture {
    /// Captures what `enqueue` enqueues on the stream of `device`, a GPU.
    pub(crate) fn new(
        device: &Device,
        enqueue: impl FnOnce() -> anyhow::Result<()>,
    ) -> anyhow::Result<Self> {
        let stream = device.stream().as_raw() as CUstream;
        let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream lives as long as its handle.
        check("cuStreamBeginCapture_v2", unsafe { driver::cuStreamBeginCapture_v2(stream, mode) })?;
        let enqueued = enqueue();
        let mut graph = ptr::null_mut();
        // SAFETY: this thread began the capture; `graph` is where the result is written.
        let ended = unsafe { driver::cuStreamEndCapture(stream, &raw mut graph) };
        // The capture must have ended before an error of `enqueue` leaves.
        enqueued?;
        check("cuStreamEndCapture", ended)?;
        Ok(Self { graph })
    }

    pub(crate) const fn graph(&self) -> CUgraph {
        self.graph
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        // SAFETY: the graph came from a capture that ended, and is destroyed once.
        unsafe { driver::cuGraphDestroy(self.graph) };
    }
}
