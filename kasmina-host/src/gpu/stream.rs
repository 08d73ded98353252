//! A driver stream with the memory that is freed and reused in its order.

use std::ptr;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex};

use kasmina_driver::RawError;
use kasmina_driver::cust_raw::{CUevent, CUstream};

use super::context::lock;
use super::pinned::Release;
use super::pool::{FreeLists, SizeClass};
use super::{Buffer, Gpu, NOT_READY, OUT_OF_MEMORY, driver, failed, failed_after};
use crate::device::{DeviceId, MemoryStats};
use crate::error::{Error, Result};
use crate::stream::Operation;

/// `CU_STREAM_NON_BLOCKING`: not ordered with the legacy default stream of other libraries.
const NON_BLOCKING: u32 = 1;
/// `CU_EVENT_DISABLE_TIMING`: such an event costs less.
const DISABLE_TIMING: u32 = 2;

pub(crate) struct Stream {
    gpu: &'static Gpu,
    raw: CUstream,
    /// Recorded wherever another stream is to wait for this one. A later record only makes a
    /// waiter that raced with it wait for more, so one event serves all.
    event: CUevent,
    free_blocks: Mutex<FreeLists>,
    /// The `Operation` enqueued last, 0 for none.
    last: AtomicU8,
}

// SAFETY: the driver's functions may be called on a stream or an event from any thread at any
// time; the handles themselves never change.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Sync for Stream {}

impl Stream {
    /// The stream that handles of this GPU share.
    pub(crate) fn open(ordinal: u32) -> Result<Arc<Self>> {
        let gpu = Gpu::open(ordinal)?;
        gpu.default_stream(|| Self::new(gpu))
    }

    /// A new stream of the same GPU.
    pub(crate) fn another(&self) -> Result<Arc<Self>> {
        Self::new(self.gpu)
    }

    fn new(gpu: &'static Gpu) -> Result<Arc<Self>> {
        gpu.bind()?;
        let mut raw = ptr::null_mut();
        // SAFETY: the pointer is valid for writing one handle during the call.
        unsafe { driver!(cuStreamCreate(&raw mut raw, NON_BLOCKING)) }.map_err(failed)?;
        let mut event = ptr::null_mut();
        // SAFETY: the pointer is valid for writing one handle during the call.
        let created = unsafe { driver!(cuEventCreate(&raw mut event, DISABLE_TIMING)) };
        let stream = Self {
            gpu,
            raw,
            event,
            free_blocks: Mutex::new(FreeLists::new()),
            last: AtomicU8::new(0),
        };
        // Only now, so that a failure drops the stream made above.
        created.map_err(failed)?;
        let stream = Arc::new(stream);
        gpu.register(&stream);
        Ok(stream)
    }

    pub(crate) const fn gpu(&self) -> &'static Gpu {
        self.gpu
    }

    pub(super) const fn raw(&self) -> CUstream {
        self.raw
    }

    pub(crate) fn as_raw(&self) -> u64 {
        self.raw.expose_provenance() as u64
    }

    /// Remembers what was enqueued, for errors that surface later.
    pub(super) fn note(&self, operation: Operation) {
        self.last.store(operation as u8, Ordering::Relaxed);
    }

    /// A failure of a call on this stream, which may stem from what was enqueued before.
    pub(super) fn failed(&self, error: RawError) -> Error {
        let last = Operation::from_number(self.last.load(Ordering::Relaxed));
        failed_after(error, last.map(Operation::name))
    }

    pub(crate) fn synchronize(&self) -> Result<()> {
        self.gpu.bind()?;
        // SAFETY: the stream lives as long as `self`.
        unsafe { driver!(cuStreamSynchronize(self.raw)) }.map_err(|error| self.failed(error))
    }

    /// Whether everything enqueued so far has run; does not wait for it.
    pub(crate) fn is_idle(&self) -> Result<bool> {
        self.gpu.bind()?;
        // SAFETY: the stream lives as long as `self`.
        match unsafe { driver!(cuStreamQuery(self.raw)) } {
            Ok(()) => Ok(true),
            Err(RawError { code: NOT_READY, .. }) => Ok(false),
            Err(error) => Err(self.failed(error)),
        }
    }

    /// Orders what is enqueued here from now on after what is enqueued on `other` so far.
    pub(crate) fn wait(&self, other: &Self) -> Result<()> {
        other.gpu.bind()?;
        // SAFETY: event and stream are of one context and live as long as `other`.
        unsafe { driver!(cuEventRecord(other.event, other.raw)) }
            .map_err(|error| other.failed(error))?;
        self.gpu.bind()?;
        // SAFETY: the driver takes note of the recorded point; the event may be recorded again or
        // destroyed after the call. The stream lives as long as `self`.
        unsafe { driver!(cuStreamWaitEvent(self.raw, other.event, 0)) }
            .map_err(|error| self.failed(error))
    }

    pub(crate) fn memory(&self) -> MemoryStats {
        lock(&self.free_blocks).stats()
    }

    /// Device memory of at least this many bytes; what it holds is arbitrary.
    pub(crate) fn allocate(self: &Arc<Self>, bytes: usize) -> Result<Buffer> {
        if bytes == 0 {
            return Ok(Buffer::empty(Arc::clone(self)));
        }
        let class = SizeClass::of(bytes).ok_or_else(|| self.out_of_memory(bytes))?;
        let reused = lock(&self.free_blocks).take(class);
        let address = match reused {
            Some(address) => address,
            None => {
                let address = self.allocate_block(class)?;
                lock(&self.free_blocks).add(class);
                address
            }
        };
        Ok(Buffer::pooled(Arc::clone(self), address, bytes, class))
    }

    /// A block from the driver; when there is none, a second try after all streams of the GPU
    /// have given back what they keep.
    fn allocate_block(&self, class: SizeClass) -> Result<u64> {
        self.gpu.bind()?;
        match allocate_from_driver(class.bytes()) {
            Err(error) if error.code == OUT_OF_MEMORY => {}
            outcome => return outcome.map_err(|error| self.failed(error)),
        }
        for stream in self.gpu.streams() {
            // One that cannot be waited for now, as while it is captured, keeps what it has.
            if let Err(error) = stream.trim() {
                tracing::warn!(%error, "a stream could not give memory back");
            }
        }
        allocate_from_driver(class.bytes()).map_err(|error| match error.code {
            OUT_OF_MEMORY => self.out_of_memory(class.bytes()),
            _ => self.failed(error),
        })
    }

    fn out_of_memory(&self, bytes: usize) -> Error {
        Error::OutOfMemory {
            device: DeviceId::Cuda(self.gpu.ordinal()),
            requested: bytes as u64,
            free: self.gpu.bind().ok().and_then(|()| self.gpu.free_memory()),
        }
    }

    /// Takes back a block that nothing enqueued from now on uses, unless it was allocated anew.
    pub(super) fn recycle(&self, class: SizeClass, address: u64) {
        lock(&self.free_blocks).give(class, address);
    }

    /// Gives the driver back what is kept for reuse.
    pub(crate) fn trim(&self) -> Result<()> {
        // Taken before waiting: a block that is freed meanwhile may still be in use by something
        // enqueued meanwhile.
        let blocks = lock(&self.free_blocks).drain();
        if blocks.is_empty() {
            // Waiting would gain nothing, and for the stream of a grid that stays never end.
            return Ok(());
        }
        if let Err(error) = self.synchronize() {
            lock(&self.free_blocks).undrain(blocks);
            return Err(error);
        }
        for (_, address) in blocks {
            // In no list any more, and everything that used it has run.
            self.gpu.release(Release::Device(address));
        }
        Ok(())
    }
}

fn allocate_from_driver(bytes: usize) -> std::result::Result<u64, RawError> {
    let mut address = 0;
    // SAFETY: the pointer is valid for writing one address during the call.
    unsafe { driver!(cuMemAlloc_v2(&raw mut address, bytes)) }?;
    Ok(address)
}

impl Drop for Stream {
    fn drop(&mut self) {
        // Every buffer holds the stream, so all blocks are back. Errors have nowhere to go, and
        // after one the context is lost anyway.
        if let Err(error) = self.synchronize().and_then(|()| self.trim()) {
            tracing::warn!(%error, "a stream was dropped with its work failed");
        }
        if !self.event.is_null() {
            // SAFETY: made by `new` and destroyed once; waits on it have been noted already.
            let _ = unsafe { driver!(cuEventDestroy_v2(self.event)) };
        }
        // SAFETY: made by `new` and destroyed once; nobody else has the handle any more.
        let _ = unsafe { driver!(cuStreamDestroy_v2(self.raw)) };
    }
}

impl std::fmt::Debug for Stream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stream").field("gpu", &self.gpu.ordinal()).field("raw", &self.raw).finish()
    }
}
