//! Pinned host memory that a kernel reads and writes while it runs.

use std::ptr::{self, NonNull};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering, fence};

use kasmina_kernels::persistent::protocol::{self, ABSENT};

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
    /// How much of the input's and of the output's beginning may not be absent.
    written: usize,
    answered: usize,
}

impl PinnedSlot {
    /// So many slots of so many bytes, multiples of 64, and the device addresses of the first input
    /// and output. Inputs and outputs are absent.
    pub(crate) fn new(
        stream: &Stream,
        slots: u16,
        input_bytes: usize,
        output_bytes: usize,
    ) -> Result<(Vec<Self>, [u64; 2])> {
        let outputs = usize::from(slots) * input_bytes;
        let bytes = outputs + usize::from(slots) * output_bytes;
        let memory = Arc::new(Pinned::new(stream, bytes)?);
        // SAFETY: the whole block, of which nobody else knows yet.
        unsafe { ptr::write_bytes(memory.host.as_ptr(), ABSENT, bytes) };
        let addresses = [memory.device, memory.device + outputs as u64];
        let slots = (0..slots).map(|index| Self {
            memory: Arc::clone(&memory),
            index,
            input: usize::from(index) * input_bytes,
            output: outputs + usize::from(index) * output_bytes,
            input_bytes,
            output_bytes,
            written: 0,
            answered: 0,
        });
        Ok((slots.collect(), addresses))
    }

    pub(crate) const fn index(&self) -> u16 {
        self.index
    }

    /// Whether input and output are absent.
    pub(crate) const fn is_clear(&self) -> bool {
        self.written == 0 && self.answered == 0
    }

    /// Makes them absent, which no device uses now.
    pub(crate) fn clear(&mut self) {
        // SAFETY: within this slot's input, which nobody else uses.
        unsafe {
            ptr::write_bytes(self.memory.host.as_ptr().add(self.input), ABSENT, self.written);
        }
        self.written = 0;
        self.clear_output();
    }

    /// Makes the output absent, as it has to be before a result is asked for.
    pub(crate) fn clear_output(&mut self) {
        // SAFETY: within this slot's output, which nobody else uses.
        unsafe {
            ptr::write_bytes(self.memory.host.as_ptr().add(self.output), ABSENT, self.answered);
        }
        self.answered = 0;
    }

    /// Writes the beginning of the input.
    pub(crate) fn write(&mut self, bytes: &[u8]) {
        assert!(bytes.len() <= self.input_bytes, "the payload is larger than its slot");
        self.written = self.written.max(bytes.len());
        // SAFETY: within this slot's input, which nobody else on the host uses; the device reads
        // it only after the descriptor that is published later.
        unsafe {
            let target = self.memory.host.as_ptr().add(self.input);
            ptr::copy_nonoverlapping(bytes.as_ptr(), target, bytes.len());
        }
    }

    /// Writes elements of 16 bits to the beginning of the input, which is clear, for a device that
    /// reads each as it arrives.
    pub(crate) fn write_arriving(&mut self, elements: &[u16]) {
        assert!(size_of_val(elements) <= self.input_bytes, "the payload is larger than its slot");
        self.written = size_of_val(elements);
        // SAFETY: this slot's input, which is aligned to a line and nobody else on the host uses.
        // The device reads it at the same time, which is why the writes are volatile.
        unsafe { copy_arriving(elements, self.memory.host.as_ptr().add(self.input).cast()) };
    }

    /// How many of the output's first `bytes` bytes, elements of `size` bytes, have been written,
    /// given that the first `from` have, which it gave before.
    pub(crate) fn present(&self, from: usize, bytes: usize, size: usize) -> usize {
        assert!(bytes <= self.output_bytes, "the result is larger than its slot");
        // SAFETY: within this slot's output; nothing is copied.
        unsafe { self.copy_present(from, bytes, size, ptr::null_mut()) }
    }

    /// As [`present`](Self::present), and copies what it finds to its place in `values`, which is
    /// as large as the result.
    pub(crate) fn receive(&mut self, from: usize, values: &mut [u8], size: usize) -> usize {
        self.forget(values.len());
        // SAFETY: within this slot's output and the values.
        unsafe { self.copy_present(from, values.len(), size, values.as_mut_ptr()) }
    }

    /// # Safety
    /// The output has so many bytes, and so many may be written from `target` on unless it is null.
    unsafe fn copy_present(
        &self,
        from: usize,
        bytes: usize,
        size: usize,
        target: *mut u8,
    ) -> usize {
        // SAFETY: this slot's output lies within the memory.
        let output = unsafe { self.memory.host.as_ptr().add(self.output) };
        let lines = bytes / LINE_BYTES * LINE_BYTES;
        // SAFETY: lines of the output, on which slots begin and of which `from` is a multiple
        // until the last one.
        let mut at = unsafe { lines_present(output, from, lines, size, target) };
        if at < lines {
            return at;
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
        if from < bytes && !target.is_null() {
            let rest = from.max(lines);
            // SAFETY: this contract; all of it is present.
            unsafe {
                ptr::copy_nonoverlapping(output.add(rest), target.add(rest), bytes - rest);
            }
        }
        bytes
    }

    /// Takes the beginning of the output, all of which is present or was written before a
    /// completion that was seen.
    pub(crate) fn take(&mut self, bytes: &mut [u8]) {
        self.forget(bytes.len());
        // SAFETY: within this slot's output; the device wrote it before, and does not write it
        // again before the slot is used anew.
        unsafe {
            let source = self.memory.host.as_ptr().add(self.output);
            ptr::copy_nonoverlapping(source, bytes.as_mut_ptr(), bytes.len());
        }
    }

    /// Takes note that the beginning of the output, all of which is present, is so.
    pub(crate) fn forget(&mut self, bytes: usize) {
        assert!(bytes <= self.output_bytes, "the result is larger than its slot");
        self.answered = self.answered.max(bytes);
    }
}

/// Copies elements, none of them as the one that means that nothing is there.
///
/// # Safety
/// `target` is 64-aligned and valid for volatile writes of as many elements.
unsafe fn copy_arriving(elements: &[u16], target: *mut u16) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: this contract; the processor has what is asked for.
    let done = unsafe {
        if is_x86_feature_detected!("avx2") {
            x86::copy_lines_avx2(elements, target)
        } else {
            x86::copy_lines(elements, target)
        }
    };
    #[cfg(not(target_arch = "x86_64"))]
    let done = 0;
    for (place, &element) in (done..).zip(&elements[done..]) {
        // SAFETY: this contract.
        unsafe { target.add(place).write_volatile(protocol::arriving(element)) };
    }
}

/// Bytes that are looked at together.
const LINE_BYTES: usize = 64;

/// The end of the lines from `from` on, up to `end`, none of whose elements is absent. These are
/// copied to as far behind `target`, unless that is null.
///
/// # Safety
/// `output` is 64-aligned, `from` and `end` multiples of 64; the bytes between them are readable for
/// as long as the call takes, and their places behind `target` writable. The device may write them
/// at the same time, elements as wholes.
unsafe fn lines_present(
    output: *const u8,
    from: usize,
    end: usize,
    size: usize,
    target: *mut u8,
) -> usize {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: this contract; the processor has what is asked for.
    unsafe {
        match (size, is_x86_feature_detected!("avx2")) {
            (2, true) => x86::lines_present_avx2::<2>(output, from, end, target),
            (_, true) => x86::lines_present_avx2::<4>(output, from, end, target),
            (2, false) => x86::lines_present::<2>(output, from, end, target),
            (_, false) => x86::lines_present::<4>(output, from, end, target),
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        let (ones, highs) = if size == 2 {
            (0x0001_0001_0001_0001_u64, 0x8000_8000_8000_8000_u64)
        } else {
            (0x0000_0001_0000_0001, 0x8000_0000_8000_0000)
        };
        let mut at = from;
        while at < end {
            // SAFETY: this contract. Volatile, as the device writes at the same time.
            let words = [0, 8, 16, 24, 32, 40, 48, 56]
                .map(|word| unsafe { output.add(at + word).cast::<u64>().read_volatile() });
            // Whether an element of the inverse is zero.
            if words.iter().any(|word| (!word).wrapping_sub(ones) & word & highs != 0) {
                break;
            }
            if !target.is_null() {
                // SAFETY: this contract.
                unsafe { target.add(at).cast::<[u64; 8]>().write_unaligned(words) }
            }
            at += LINE_BYTES;
        }
        at
    }
}

/// Lines in vectors of 16 or, as half as many instructions, 32 bytes.
#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{
        __m128i, __m256i, _mm_cmpeq_epi16, _mm_cmpeq_epi32, _mm_loadu_si128, _mm_movemask_epi8,
        _mm_or_si128, _mm_set1_epi8, _mm_slli_epi16, _mm_storeu_si128, _mm_xor_si128,
        _mm256_cmpeq_epi16, _mm256_cmpeq_epi32, _mm256_loadu_si256, _mm256_movemask_epi8,
        _mm256_or_si256, _mm256_set1_epi8, _mm256_slli_epi16, _mm256_storeu_si256,
        _mm256_xor_si256,
    };

    use kasmina_kernels::persistent::protocol::ABSENT;

    use super::LINE_BYTES;

    /// Elements of 16 bits in a line.
    const ELEMENTS: usize = LINE_BYTES / 2;

    /// The whole lines of [`copy_arriving`](super::copy_arriving); how many elements they hold.
    macro_rules! copy_lines {
        ($name:ident, $vector:ty, $count:literal,
         $load:ident $set:ident $equal:ident $shift:ident $xor:ident $(, $feature:literal)?) => {
            /// # Safety
            /// As [`copy_arriving`](super::copy_arriving), on a processor with the feature.
            $(#[target_feature(enable = $feature)])?
            pub(super) unsafe fn $name(elements: &[u16], target: *mut u16) -> usize {
                let lines = elements.len() / ELEMENTS;
                // SAFETY: whole lines are within both ends.
                unsafe {
                    let absent = $set(ABSENT.cast_signed());
                    let (source, target) =
                        (elements.as_ptr().cast::<$vector>(), target.cast::<$vector>());
                    for line in 0..lines {
                        for vector in line * $count..(line + 1) * $count {
                            let values = $load(source.add(vector));
                            let signs = $shift::<15>($equal(values, absent));
                            target.add(vector).write_volatile($xor(values, signs));
                        }
                    }
                }
                lines * ELEMENTS
            }
        };
    }

    copy_lines!(copy_lines, __m128i, 4,
        _mm_loadu_si128 _mm_set1_epi8 _mm_cmpeq_epi16 _mm_slli_epi16 _mm_xor_si128);
    copy_lines!(copy_lines_avx2, __m256i, 2,
        _mm256_loadu_si256 _mm256_set1_epi8 _mm256_cmpeq_epi16 _mm256_slli_epi16 _mm256_xor_si256,
        "avx2");

    /// [`lines_present`](super::lines_present) for elements of `SIZE` bytes.
    macro_rules! lines_present {
        ($name:ident, $vector:ty, $count:literal,
         $set:ident $equal2:ident $equal4:ident $or:ident $mask:ident $store:ident
         $(, $feature:literal)?) => {
            /// # Safety
            /// As [`lines_present`](super::lines_present), on a processor with the feature.
            $(#[target_feature(enable = $feature)])?
            pub(super) unsafe fn $name<const SIZE: usize>(
                output: *const u8,
                from: usize,
                end: usize,
                target: *mut u8,
            ) -> usize {
                let mut at = from;
                // SAFETY: this contract. Volatile, as the device writes at the same time; no
                // element lies across two loads.
                unsafe {
                    let absent = $set(ABSENT.cast_signed());
                    while at < end {
                        let line = output.add(at).cast::<$vector>();
                        let mut values = [$set(0); $count];
                        let mut found = $set(0);
                        for (vector, values) in values.iter_mut().enumerate() {
                            *values = line.add(vector).read_volatile();
                            let equal = if SIZE == 2 {
                                $equal2(*values, absent)
                            } else {
                                $equal4(*values, absent)
                            };
                            found = $or(found, equal);
                        }
                        if $mask(found) != 0 {
                            break;
                        }
                        if !target.is_null() {
                            let place = target.add(at).cast::<$vector>();
                            for (vector, &values) in values.iter().enumerate() {
                                $store(place.add(vector), values);
                            }
                        }
                        at += LINE_BYTES;
                    }
                }
                at
            }
        };
    }

    lines_present!(lines_present, __m128i, 4,
        _mm_set1_epi8 _mm_cmpeq_epi16 _mm_cmpeq_epi32 _mm_or_si128 _mm_movemask_epi8
        _mm_storeu_si128);
    lines_present!(lines_present_avx2, __m256i, 2,
        _mm256_set1_epi8 _mm256_cmpeq_epi16 _mm256_cmpeq_epi32 _mm256_or_si256
        _mm256_movemask_epi8 _mm256_storeu_si256, "avx2");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[repr(align(64))]
    struct Lines([u8; 3 * LINE_BYTES]);

    #[test]
    fn what_arrives_holds_no_element_of_all_ones_and_the_others_as_they_are() {
        #[repr(align(64))]
        struct Place([u16; 104]);
        for count in [0, 1, 7, 31, 32, 33, 63, 64, 97] {
            let elements: Vec<u16> =
                (0..count).map(|i| [0xFFFF, 0x7FFF, 0, 0xFFFE, 0x8000][i % 5]).collect();
            let mut place = Place([0xAAAA; 104]);
            // SAFETY: the place is aligned and larger.
            unsafe { copy_arriving(&elements, place.0.as_mut_ptr()) };
            let expected = elements.iter().map(|&bits| protocol::arriving(bits));
            assert!(place.0[..count].iter().copied().eq(expected), "{count}");
            assert!(place.0[count..].iter().all(|&bits| bits == 0xAAAA), "{count}");
        }
    }

    #[test]
    fn lines_are_present_up_to_the_first_with_an_element_of_all_ones() {
        for size in [2, 4] {
            let mut lines = Lines([0x7F; 3 * LINE_BYTES]);
            let present = |lines: &Lines, from| {
                let mut copy = [0xAA; 3 * LINE_BYTES];
                // SAFETY: lines that nobody else uses.
                let end = unsafe {
                    let target = copy.as_mut_ptr();
                    lines_present(lines.0.as_ptr(), from, 3 * LINE_BYTES, size, target)
                };
                assert_eq!(copy[from..end], lines.0[from..end]);
                assert!(copy[..from].iter().chain(&copy[end..]).all(|&byte| byte == 0xAA));
                end
            };
            assert_eq!(present(&lines, 0), 3 * LINE_BYTES);
            for element in 0..3 * LINE_BYTES / size {
                let line = element * size / LINE_BYTES * LINE_BYTES;
                for byte in 0..size {
                    lines.0[element * size + byte] = ABSENT;
                    let expected = if byte + 1 < size { 3 * LINE_BYTES } else { line };
                    assert_eq!(present(&lines, 0), expected, "{element} of {size} bytes");
                }
                assert_eq!(present(&lines, line), line);
                if line < 2 * LINE_BYTES {
                    assert_eq!(present(&lines, line + LINE_BYTES), 3 * LINE_BYTES);
                }
                lines.0[element * size..][..size].fill(0);
            }
            // Ones across two elements are none.
            lines.0[1..1 + size].fill(ABSENT);
            assert_eq!(present(&lines, 0), 3 * LINE_BYTES);
        }
    }
}
