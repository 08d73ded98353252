//! The few driver objects that timing needs: events, graphs, and a buffer that flushes the L2.

use std::ptr;

use kasmina::{Device, Tensor};
use kasmina_driver::cust_raw::{CUevent, CUgraphExec, CUstream};
use kasmina_driver::{self as driver, check};

use super::capture::Capture;

/// The stream that is measured.
pub(crate) struct Clock {
    device: Device,
    raw: CUstream,
    /// Larger than any L2 cache, so that writing it evicts everything else.
    eviction: Tensor<f32>,
}

/// Bytes written to flush the L2 cache; an H200 has 60 MB of it.
const EVICTION_BYTES: usize = 256 << 20;

impl Clock {
    /// Measures the stream of `device`, which is a GPU.
    pub(crate) fn new(device: &Device) -> anyhow::Result<Self> {
        let eviction = Tensor::zeros(device, [EVICTION_BYTES / size_of::<f32>()])?;
        device.synchronize()?;
        Ok(Self { device: device.clone(), raw: device.stream().as_raw() as CUstream, eviction })
    }

    /// Enqueues the write that leaves the L2 cache cold.
    pub(crate) fn flush_l2(&self) -> anyhow::Result<()> {
        // SAFETY: the buffer has that many 32-bit words, and the tensor hands its memory on only
        // to work that comes later on the same stream.
        let written = unsafe {
            let words = EVICTION_BYTES / size_of::<u32>();
            driver::cuMemsetD32Async(self.eviction.as_device_ptr(), 0, words, self.raw)
        };
        Ok(check("cuMemsetD32Async", written)?)
    }

    /// Waits for the stream.
    pub(crate) fn synchronize(&self) -> anyhow::Result<()> {
        Ok(self.device.synchronize()?)
    }

    /// A new event.
    pub(crate) fn event(&self) -> anyhow::Result<Event> {
        let mut event = ptr::null_mut();
        // SAFETY: `event` is where the new event is written; `new` made the context current.
        check("cuEventCreate", unsafe { driver::cuEventCreate(&raw mut event, 0) })?;
        Ok(Event { raw: event })
    }

    /// Enqueues the event.
    pub(crate) fn record(&self, event: &Event) -> anyhow::Result<()> {
        // SAFETY: event and stream belong to the same context, and both are alive.
        Ok(check("cuEventRecord", unsafe { driver::cuEventRecord(event.raw, self.raw) })?)
    }

    /// The time in microseconds that what `enqueue` enqueues takes on the device.
    pub(crate) fn time(&self, enqueue: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<f64> {
        let (start, end) = (self.event()?, self.event()?);
        self.record(&start)?;
        enqueue()?;
        self.record(&end)?;
        self.synchronize()?;
        start.microseconds_until(&end)
    }

    /// Records what `enqueue` enqueues into a graph instead of running it.
    pub(crate) fn capture(
        &self,
        enqueue: impl FnOnce() -> anyhow::Result<()>,
    ) -> anyhow::Result<Graph> {
        let captured = Capture::new(&self.device, enqueue)?;
        let mut executable: CUgraphExec = ptr::null_mut();
        // SAFETY: the graph is complete; `executable`, which does not need it afterwards, is where
        // the result is written.
        let instantiated = unsafe {
            driver::cuGraphInstantiateWithFlags(&raw mut executable, captured.graph(), 0)
        };
        check("cuGraphInstantiateWithFlags", instantiated)?;
        Ok(Graph { raw: executable })
    }

    /// Enqueues a captured graph.
    pub(crate) fn launch(&self, graph: &Graph) -> anyhow::Result<()> {
        // SAFETY: the graph was captured in this stream's context; its operands are kept alive by
        // whoever measures.
        Ok(check("cuGraphLaunch", unsafe { driver::cuGraphLaunch(graph.raw, self.raw) })?)
    }
}

/// A point on the stream whose time is taken.
pub(crate) struct Event {
    raw: CUevent,
}

impl Event {
    /// Microseconds from this event to a later one; both have happened.
    pub(crate) fn microseconds_until(&self, later: &Self) -> anyhow::Result<f64> {
        let mut milliseconds = 0.0;
        // SAFETY: both events are alive and were recorded with timing enabled.
        check("cuEventElapsedTime", unsafe {
            driver::cuEventElapsedTime(&raw mut milliseconds, self.raw, later.raw)
        })?;
        Ok(f64::from(milliseconds) * 1e3)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: the event was created by `Clock::event` and is destroyed once. The driver keeps
        // it until it has happened.
        unsafe { driver::cuEventDestroy_v2(self.raw) };
    }
}

/// A captured sequence of calls, ready to launch.
pub(crate) struct Graph {
    raw: CUgraphExec,
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: it was instantiated by `Clock::capture` and is destroyed once. The driver keeps
        // it until its last launch has ended.
        unsafe { driver::cuGraphExecDestroy(self.raw) };
    }
}
