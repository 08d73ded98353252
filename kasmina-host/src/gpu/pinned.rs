//! Pinned host memory that a kernel reads and writes while it runs.

use std::ptr::{self, NonNull};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering, fence};

use kasmina_kernels::persistent::protocol::ABSENT;

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
    /// So many slots of so many bytes, multiples of 64, and the device addresses of the first input
    /// and output. The outputs are absent.
    pub(crate) fn new(
        stream: &Stream,
        slots: u16,
        input_bytes: usize,
        output_bytes: usize,
    ) -> Result<(Vec<Self>, [u64; 2])> {
        let outputs = usize::from(slots) * input_bytes;
        let bytes = outputs + usize::from(slots) * output_bytes;
        let memory = Arc::new(Pinned::new(stream, bytes)?);
        // SAFETY: the outputs, of which nobody else knows yet.
        unsafe {
            let outputs_of = memory.host.as_ptr().add(outputs);
            ptr::write_bytes(outputs_of, ABSENT, bytes - outputs);
        }
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

    /// How many of the output's first `bytes` bytes, elements of `size` bytes, have been written,
    /// given that the first `from` have, which it gave before.
    pub(crate) fn present(&self, from: usize, bytes: usize, size: usize) -> usize {
        assert!(bytes <= self.output_bytes, "the result is larger than its slot");
        // SAFETY: within this slot's output.
        let output = unsafe { self.memory.host.as_ptr().add(self.output) };
        let mut at = from;
        while at + LINE_BYTES <= bytes {
            // SAFETY: a line of the output, on which slots begin and of which `at` is a multiple
            // until the last one.
            if !unsafe { line_is_present(output.add(at), size) } {
                return at;
            }
            at += LINE_BYTES;
        }
        while at < bytes {
            // SAFETY: an element of the output, aligned as such. Volatile, as the device writes it
            // at the same time.
            let absent = unsafe {
                if size == 2 {
                    output.add(at).cast::<u16>().read_volatile() == u16::MAX
                } else {
                    output.add(at).cast::<u32>().read_volatile() == u32::MAX
                }
            };
            if absent {
                return at / LINE_BYTES * LINE_BYTES;
            }
            at += size;
        }
        // What is read from now on is read after that.
        fence(Ordering::Acquire);
        bytes
    }

    /// Takes the beginning of the output, all of which is present or was written before a
    /// completion that was seen, and leaves it absent.
    pub(crate) fn take(&mut self, bytes: &mut [u8]) {
        assert!(bytes.len() <= self.output_bytes, "the result is larger than its slot");
        // SAFETY: within this slot's output; the device wrote it before, and does not write it
        // again before the slot is used anew.
        unsafe {
            let source = self.memory.host.as_ptr().add(self.output);
            ptr::copy_nonoverlapping(source, bytes.as_mut_ptr(), bytes.len());
        }
        self.clear(bytes.len());
    }

    /// Makes the beginning of the output absent, all of which is present.
    pub(crate) fn clear(&mut self, bytes: usize) {
        assert!(bytes <= self.output_bytes, "the result is larger than its slot");
        // SAFETY: as in `take`.
        unsafe { ptr::write_bytes(self.memory.host.as_ptr().add(self.output), ABSENT, bytes) };
    }
}

/// Bytes that are looked at together.
const LINE_BYTES: usize = 64;

/// Whether none of the elements of a line is absent.
///
/// # Safety
/// `line` is 64-aligned, and 64 bytes from there on are readable for as long as the call takes.
/// The device may write them at the same time, elements as wholes.
#[cfg(target_arch = "x86_64")]
unsafe fn line_is_present(line: *const u8, size: usize) -> bool {
    use std::arch::x86_64::{
        __m128i, _mm_cmpeq_epi16, _mm_cmpeq_epi32, _mm_movemask_epi8, _mm_or_si128, _mm_set1_epi8,
    };
    // SAFETY: SSE2 is part of the architecture. Volatile, as the device writes at the same time;
    // no element lies across two loads.
    unsafe {
        let absent = _mm_set1_epi8(ABSENT.cast_signed());
        let vectors = [0, 1, 2, 3].map(|i| line.cast::<__m128i>().add(i).read_volatile());
        let found = if size == 2 {
            vectors.map(|vector| _mm_cmpeq_epi16(vector, absent))
        } else {
            vectors.map(|vector| _mm_cmpeq_epi32(vector, absent))
        };
        let low = _mm_or_si128(found[0], found[1]);
        let high = _mm_or_si128(found[2], found[3]);
        _mm_movemask_epi8(_mm_or_si128(low, high)) == 0
    }
}

/// As above, eight bytes at a time.
#[cfg(not(target_arch = "x86_64"))]
unsafe fn line_is_present(line: *const u8, size: usize) -> bool {
    let (ones, highs) = if size == 2 {
        (0x0001_0001_0001_0001_u64, 0x8000_8000_8000_8000_u64)
    } else {
        (0x0000_0001_0000_0001, 0x8000_0000_8000_0000)
    };
    (0..LINE_BYTES / 8).all(|i| {
        // SAFETY: this contract. Volatile, as the device writes at the same time.
        let inverse = !unsafe { line.cast::<u64>().add(i).read_volatile() };
        // Whether an element of the inverse is zero.
        inverse.wrapping_sub(ones) & !inverse & highs == 0
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[repr(align(64))]
    struct Line([u8; LINE_BYTES]);

    #[test]
    fn a_line_is_present_when_no_element_is_all_ones() {
        for size in [2, 4] {
            let mut line = Line([0x7F; LINE_BYTES]);
            // SAFETY: a line that nobody else uses.
            assert!(unsafe { line_is_present(line.0.as_ptr(), size) });
            for element in 0..LINE_BYTES / size {
                for byte in 0..size {
                    line.0[element * size + byte] = ABSENT;
                    // SAFETY: as above.
                    let present = unsafe { line_is_present(line.0.as_ptr(), size) };
                    assert_eq!(present, byte + 1 < size, "element {element} of {size} bytes");
                }
                line.0[element * size..][..size].fill(0);
            }
            // Ones across two elements are none.
            line.0[1..1 + size].fill(ABSENT);
            // SAFETY: as above.
            assert!(unsafe { line_is_present(line.0.as_ptr(), size) });
        }
    }
}
