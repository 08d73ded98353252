//! Pinned host memory that a kernel reads and writes while it runs.

use std::ptr::{self, NonNull};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use super::{Gpu, Stream, driver, failed};
use crate::error::Result;

/// `CU_MEMHOSTALLOC_PORTABLE | CU_MEMHOSTALLOC_DEVICEMAP`. Not write-combined: the host reads what
/// the device writes, and write-combined memory answers a poll later.
const PORTABLE_MAPPED: u32 = 1 | 2;

/// A block of pinned memory, zeroed, mapped into the device's address space.
pub(crate) struct Pinned {
    gpu: &'static Gpu,
    host: NonNull<u8>,
    device: u64,
    bytes: usize,
}

// SAFETY: the memory belongs to this value; `words` hands it out as atomics, and other parts only
// through `PinnedSlot`s, each of which is alone with its part.
unsafe impl Send for Pinned {}
// SAFETY: as above.
unsafe impl Sync for Pinned {}

impl Pinned {
    fn new(stream: &Stream, bytes: usize) -> Result<Self> {
        let gpu = stream.gpu();
        gpu.bind()?;
        let mut host = ptr::null_mut();
        // SAFETY: the pointer is valid for writing one pointer during the call.
        unsafe { driver!(cuMemHostAlloc(&raw mut host, bytes, PORTABLE_MAPPED)) }
            .map_err(failed)?;
        let mut device = 0;
        // SAFETY: the block was just allocated, mapped; the pointer is valid for one address.
        let mapped = unsafe { driver!(cuMemHostGetDevicePointer_v2(&raw mut device, host, 0)) };
        let host = NonNull::new(host.cast()).expect("the driver gave memory");
        let pinned = Self { gpu, host, device, bytes };
        mapped.map_err(failed)?;
        // SAFETY: the block has so many bytes, and nobody else knows of it yet.
        unsafe { ptr::write_bytes(pinned.host.as_ptr(), 0, bytes) };
        Ok(pinned)
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        self.gpu.release(Release::Host(self.host.as_ptr().expose_provenance()));
    }
}

/// Memory to give back to the driver, which may wait for every kernel when it takes it.
#[derive(Clone, Copy, Debug)]
pub(super) enum Release {
    Device(u64),
    Host(usize),
}

/// The ring's words in pinned memory.
pub(crate) struct PinnedWords {
    memory: Pinned,
}

impl PinnedWords {
    /// So many words of 64 bits, all zero.
    pub(crate) fn new(stream: &Stream, words: usize) -> Result<Self> {
        Ok(Self { memory: Pinned::new(stream, words * size_of::<u64>())? })
    }

    pub(crate) const fn address(&self) -> u64 {
        self.memory.device
    }

    pub(crate) fn words(&self) -> &[AtomicU64] {
        let Pinned { host, bytes, .. } = self.memory;
        // SAFETY: the block is aligned to a page, zeroed, lives as long as `self` and is accessed
        // by the host only through these atomics. The device's accesses are of whole words too.
        unsafe { std::slice::from_raw_parts(host.as_ptr().cast(), bytes / size_of::<u64>()) }
    }
}

/// Room for one payload, an input and an output. There is one value for each slot, so whoever has
/// it is the only one on the host to use that memory.
pub(crate) struct PinnedSlot {
    memory: Arc<Pinned>,
    index: u16,
    input: usize,
    output: usize,
    input_bytes: usize,
    output_bytes: usize,
}

impl PinnedSlot {
    /// So many slots of so many bytes, and the device addresses of the first input and output.
    pub(crate) fn new(
        stream: &Stream,
        slots: u16,
        input_bytes: usize,
        output_bytes: usize,
    ) -> Result<(Vec<Self>, [u64; 2])> {
        let outputs = usize::from(slots) * input_bytes;
        let bytes = outputs + usize::from(slots) * output_bytes;
        let memory = Arc::new(Pinned::new(stream, bytes)?);
        let addresses = [memory.device, memory.device + outputs as u64];
        let slots = (0..slots).map(|index| Self {
            memory: Arc::clone(&memory),
            index,
            input: usize::from(index) * input_bytes,
            output: outputs + usize::from(index) * output_bytes,
            input_bytes,
            output_bytes,
        });
        Ok((slots.collect(), addresses))
    }

    pub(crate) const fn index(&self) -> u16 {
        self.index
    }

    /// Writes the beginning of the input.
    pub(crate) fn write(&mut self, bytes: &[u8]) {
        assert!(bytes.len() <= self.input_bytes, "the payload is larger than its slot");
        // SAFETY: within this slot's input, which nobody else on the host uses; the device reads
        // it only after the descriptor that is published later.
        unsafe {
            let target = self.memory.host.as_ptr().add(self.input);
            ptr::copy_nonoverlapping(bytes.as_ptr(), target, bytes.len());
        }
    }

    /// Reads the beginning of the output. The unit has completed.
    pub(crate) fn read(&self, bytes: &mut [u8]) {
        assert!(bytes.len() <= self.output_bytes, "the payload is larger than its slot");
        // SAFETY: within this slot's output; the device wrote it before the completion that the
        // caller has seen, and does not write it again before the slot is used anew.
        unsafe {
            let source = self.memory.host.as_ptr().add(self.output);
            ptr::copy_nonoverlapping(source, bytes.as_mut_ptr(), bytes.len());
        }
    }
}
