//! What a stream would run, recorded once and run many times.

use std::ptr;

use kasmina::Device;
use kasmina_driver::cust_raw::{CUgraph, CUgraphExec, CUstream, CUstreamCaptureMode};
use kasmina_driver::{self as driver, check};
use libtest_mimic::Failed;

/// A captured sequence of operations, ready to run.
pub(crate) struct Graph {
    executable: CUgraphExec,
}

impl Graph {
    pub(crate) fn of(
        device: &Device,
        enqueue: impl FnOnce() -> Result<(), Failed>,
    ) -> Result<Self, Failed> {
        let stream = device.stream().as_raw() as CUstream;
        let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream lives as long as its handle.
        check("cuStreamBeginCapture_v2", unsafe { driver::cuStreamBeginCapture_v2(stream, mode) })?;
        let enqueued = enqueue();
        let mut graph: CUgraph = ptr::null_mut();
        // SAFETY: this thread began the capture; `graph` is where the result is written.
        let ended = unsafe { driver::cuStreamEndCapture(stream, &raw mut graph) };
        // The capture must have ended before an error of `enqueue` leaves.
        enqueued?;
        check("cuStreamEndCapture", ended)?;
        let mut executable: CUgraphExec = ptr::null_mut();
        // SAFETY: the graph is complete and destroyed once; `executable`, which does not need it
        // afterwards, is where the result is written.
        let instantiated = unsafe {
            let instantiated = driver::cuGraphInstantiateWithFlags(&raw mut executable, graph, 0);
            driver::cuGraphDestroy(graph);
            instantiated
        };
        check("cuGraphInstantiateWithFlags", instantiated)?;
        Ok(Self { executable })
    }

    pub(crate) fn launch(&self, device: &Device) -> Result<(), Failed> {
        let stream = device.stream().as_raw() as CUstream;
        // SAFETY: the graph was captured on this stream; whoever replays it holds its operands.
        Ok(check("cuGraphLaunch", unsafe { driver::cuGraphLaunch(self.executable, stream) })?)
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: instantiated once and destroyed once. The driver keeps it until its last launch
        // has ended.
        unsafe { driver::cuGraphExecDestroy(self.executable) };
    }
}
