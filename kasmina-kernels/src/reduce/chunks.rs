//! How a run of elements is cut into chunks, and what is left of a chunk.

use super::{CLUSTER_BLOCKS, CLUSTER_THREADS, Moments, THREADS, VECTORS};
use crate::abi::DType;

/// Bytes of a block's vectors of the same number, and of its batch.
const ROW_BYTES: u64 = THREADS as u64 * 16;
const BATCH_BYTES: u64 = ROW_BYTES * VECTORS as u64;
/// Number of chunks at which they grow beyond a row.
const FEW: u64 = 128;
/// Number of chunks that a GPU takes on at once: three for each of the 132 multiprocessors of an
/// H100 or H200, but for the block that merges. A constant, so that the result does not depend on
/// the GPU.
const WAVE: u64 = 395;
/// Batches of a chunk, at least, once there are more than [`FEW`]: fewer slots to merge take less
/// time than twice as many blocks save.
const LEAST_BATCHES: u64 = 2;
/// Batches of a chunk, at most, in a run that one wave takes.
const MOST_BATCHES: u64 = 16;
/// Batches of a large chunk in a longer run, and in one of more batches than that.
const LARGE_BATCHES: u64 = 4;
const LONG_BATCHES: u64 = 8;
const LONG: u64 = 1 << 14;
/// Number of chunks beyond which they grow further.
const MANY: u64 = 1 << 15;
/// log2 of the most elements in a chunk, whose counts a [`Partial`] keeps in 21 bits each.
pub(super) const LOG2_MOST_ELEMENTS: u32 = 20;
/// Bytes at the end of a run of several waves that are cut into chunks of a batch, so that all
/// blocks finish at about the same time.
const TAIL_BYTES: u64 = 4 << 20;

/// Bytes that one cluster takes, and those of a row of its blocks.
pub(super) const FEW_BYTES: u64 = 1 << 20;
const CLUSTER_ROW_BYTES: u64 = CLUSTER_THREADS as u64 * 16;

/// How a run of elements is cut up: into large chunks, then small ones, the last of them shorter.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunks {
    /// Elements in all.
    pub len: u64,
    /// Elements in a large chunk.
    pub large_len: u32,
    /// Elements in a small chunk.
    pub small_len: u32,
    /// Number of large chunks.
    pub large: u32,
    /// Number of chunks; 0 for no elements.
    pub count: u32,
}

impl Chunks {
    /// The chunks of `len` elements of this type, fewer than 2⁵⁰.
    ///
    /// One up to 16 KiB, then chunks of 4 KiB and more, at most 128 of them up to 2 MiB, then of
    /// 32 KiB, and of as many rows of 4 KiB as makes 395 chunks. Beyond 99 MiB they are of 64 KiB,
    /// beyond 256 MiB of 128 KiB, followed by 4 MiB in chunks of a batch, and larger, up to 2²⁰
    /// elements, once there are more than 32768.
    #[must_use]
    pub const fn of(len: u64, dtype: DType) -> Self {
        let size = dtype.size() as u64;
        let (row, batch) = (ROW_BYTES / size, BATCH_BYTES / size);
        if len <= batch {
            return Self::equal(len, batch);
        }
        if len <= batch * FEW {
            let rows = len.div_ceil(row).div_ceil(FEW);
            return Self::equal(len, row * rows.next_power_of_two());
        }
        let batches = len.div_ceil(batch);
        if batches <= WAVE * MOST_BATCHES {
            let rows = len.div_ceil(row).div_ceil(WAVE);
            let least = LEAST_BATCHES * VECTORS as u64;
            return Self::equal(len, row * if rows > least { rows } else { least });
        }
        let many = batches.div_ceil(MANY).next_power_of_two();
        let large = if batches <= LONG { LARGE_BATCHES } else { LONG_BATCHES };
        let large_len = batch * if many < large { large } else { many };
        let most = 1 << LOG2_MOST_ELEMENTS;
        let large_len = if large_len < most { large_len } else { most };
        let large = (len - TAIL_BYTES / size) / large_len;
        let small = (len - large * large_len).div_ceil(batch);
        Self {
            len,
            large_len: large_len as u32,
            small_len: batch as u32,
            large: large as u32,
            count: (large + small) as u32,
        }
    }

    /// The chunks of a run so short that one cluster of blocks takes it; `None` if it is not, up to
    /// 1 MiB. They are whole rows of 4 KiB, a chunk for each of at most 16 blocks.
    #[must_use]
    pub const fn few(len: u64, dtype: DType) -> Option<Self> {
        let size = dtype.size() as u64;
        if len > FEW_BYTES / size {
            return None;
        }
        let row = CLUSTER_ROW_BYTES / size;
        let rows = len.div_ceil(row).div_ceil(CLUSTER_BLOCKS as u64);
        Some(Self::equal(len, row * if rows > 1 { rows } else { 1 }))
    }

    pub(super) const fn equal(len: u64, chunk: u64) -> Self {
        let count = len.div_ceil(chunk) as u32;
        Self { len, large_len: chunk as u32, small_len: chunk as u32, large: 0, count }
    }

    /// Index of the first element of chunk `index`, and how many it has.
    #[must_use]
    #[inline(always)]
    pub const fn range(self, index: u32) -> (u64, u32) {
        if index < self.large {
            return (index as u64 * self.large_len as u64, self.large_len);
        }
        let before = self.large as u64 * self.large_len as u64;
        let first = before + (index - self.large) as u64 * self.small_len as u64;
        let left = self.len - first;
        (first, if left < self.small_len as u64 { left as u32 } else { self.small_len })
    }
}

/// How many of `len` elements part `part` gets when runs of `width` are dealt to `parts` in turn.
/// The product of the two is a power of two.
#[must_use]
#[inline(always)]
pub const fn share(len: u32, width: u32, parts: u32, part: u32) -> u32 {
    let round = width * parts;
    let rest = (len % round) as i32 - (part * width) as i32;
    let rest = if rest < 0 { 0 } else { rest as u32 };
    len / round * width + if rest < width { rest } else { width }
}

/// The least n with `2ⁿ ≥ value`; 0 for 0.
pub(super) const fn ceil_log2(value: u64) -> u32 {
    if value <= 1 { 0 } else { u64::BITS - (value - 1).leading_zeros() }
}

/// Summary of one chunk or strip, as it lies in its slot: four words, of which none ever has all
/// bits set. Its number says how many elements it has.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Partial {
    /// Sum of the elements.
    pub sum: f64,
    /// Sum of the squared distances from their mean.
    pub m2: f64,
    /// Smallest element; NaN if any is.
    pub min: f32,
    /// Largest element; NaN if any is.
    pub max: f32,
    /// Elements by kind.
    pub counts: Counts,
}

const _: () = assert!(size_of::<Partial>() == 32);

impl Partial {
    /// Of no elements.
    pub const EMPTY: Self =
        Self { sum: 0.0, m2: 0.0, min: f32::INFINITY, max: f32::NEG_INFINITY, counts: Counts(0) };

    /// The same of `len` elements, with those that were skipped.
    #[must_use]
    pub fn moments(&self, len: u32) -> Moments {
        let count = u64::from(len) - self.counts.skipped();
        let non_finite = self.counts.non_finite();
        if count == 0 {
            return Moments { non_finite, ..Moments::EMPTY };
        }
        Moments {
            count,
            sum: self.sum,
            mean: self.sum / count as f64,
            m2: self.m2,
            non_finite,
            dead: self.counts.dead(),
            min: self.min,
            max: self.max,
        }
    }

    /// A word of a slot to which nothing has been written.
    pub const UNWRITTEN: u64 = u64::MAX;

    /// The four words of the slot.
    #[must_use]
    #[inline(always)]
    pub const fn words(&self) -> [u64; 4] {
        let extremes = self.min.to_bits() as u64 | (self.max.to_bits() as u64) << 32;
        let words = [self.sum.to_bits(), self.m2.to_bits(), extremes, self.counts.0];
        // A NaN may have all bits set, and another does as well.
        [written(words[0]), written(words[1]), written(words[2]), words[3]]
    }

    /// What [`words`](Self::words) gave, if all of it has been written.
    #[must_use]
    #[inline(always)]
    pub const fn from_words([sum, m2, extremes, counts]: [u64; 4]) -> Option<Self> {
        let unwritten = sum == Self::UNWRITTEN
            || m2 == Self::UNWRITTEN
            || extremes == Self::UNWRITTEN
            || counts == Self::UNWRITTEN;
        if unwritten {
            return None;
        }
        Some(Self {
            sum: f64::from_bits(sum),
            m2: f64::from_bits(m2),
            min: f32::from_bits(extremes as u32),
            max: f32::from_bits((extremes >> 32) as u32),
            counts: Counts(counts),
        })
    }
}

/// The word without its lowest bit, if it has all bits set. As a f64 and as two f32 that is NaN
/// still.
const fn written(word: u64) -> u64 {
    if word == Partial::UNWRITTEN { word - 1 } else { word }
}

/// Numbers of elements of a few kinds, of at most 2²⁰ elements.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counts(u64);

impl Counts {
    const BITS: u32 = 21;
    const MASK: u64 = (1 << Self::BITS) - 1;

    /// Elements that are NaN or infinite, of which some were skipped, and dead ones.
    #[must_use]
    #[inline(always)]
    pub const fn new(non_finite: u32, skipped: u32, dead: u32) -> Self {
        let (non_finite, skipped) = (non_finite as u64, (skipped as u64) << Self::BITS);
        Self(non_finite | skipped | (dead as u64) << (2 * Self::BITS))
    }

    /// Elements that are NaN or infinite, with those that were skipped.
    #[must_use]
    #[inline(always)]
    pub const fn non_finite(self) -> u64 {
        self.0 & Self::MASK
    }

    /// Elements that were skipped.
    #[must_use]
    #[inline(always)]
    pub const fn skipped(self) -> u64 {
        self.0 >> Self::BITS & Self::MASK
    }

    /// Elements of absolute value below epsilon.
    #[must_use]
    #[inline(always)]
    pub const fn dead(self) -> u64 {
        self.0 >> (2 * Self::BITS)
    }
}

#[cfg(test)]
mod tests {
    use super::super::WARPS;
    use super::*;
    use std::vec::Vec;

    const LENGTHS: [u64; 14] = [
        0,
        1,
        8191,
        8192,
        8193,
        16_384,
        16_385,
        32_769,
        1_000_003,
        (1 << 24) + 1,
        (1 << 25) + 1,
        (1 << 26) - 1,
        (1 << 29) + 12_345,
        (1 << 33) + 7,
    ];

    #[test]
    fn chunks_cover_every_element_once_in_order() {
        for dtype in DType::ALL {
            for len in LENGTHS {
                let chunks = Chunks::of(len, dtype);
                let mut next = 0;
                for index in 0..chunks.count {
                    let (first, len) = chunks.range(index);
                    assert_eq!(first, next);
                    assert!(len > 0 && len <= 1 << LOG2_MOST_ELEMENTS);
                    next += u64::from(len);
                }
                assert_eq!(next, len);
            }
        }
    }

    #[test]
    fn small_tensors_are_one_chunk_and_chunks_grow_before_there_are_many() {
        let count = |log2: u32, dtype| Chunks::of(1 << log2, dtype).count;
        assert_eq!(
            [10, 12, 13, 14, 16, 18].map(|log2| count(log2, DType::F32)),
            [1, 1, 8, 16, 64, 128]
        );
        assert_eq!([20, 22, 24, 26].map(|log2| count(log2, DType::F32)), [128, 373, 391, 4288]);
        assert_eq!([13, 14, 25].map(|log2| count(log2, DType::BF16)), [1, 8, 391]);
        for len in (10..37).flat_map(|log2| [(1 << log2) - 1, 1 << log2, (1 << log2) + 1]) {
            let chunks = Chunks::of(len, DType::F32);
            assert!(chunks.count <= (1 << 17) + (1 << 11), "{len}");
            assert!(len > 1 << 33 || chunks.count <= (1 << 15) + (1 << 11), "{len}");
        }
    }

    #[test]
    fn every_chunk_but_the_last_is_whole_aligned_vectors_for_every_thread() {
        for dtype in DType::ALL {
            for len in LENGTHS {
                let chunks = Chunks::of(len, dtype);
                for elements in [chunks.small_len, chunks.large_len] {
                    assert_eq!(dtype.size() as u64 * u64::from(elements) % ROW_BYTES, 0);
                }
            }
        }
    }

    #[test]
    fn shares_are_what_dealing_the_elements_in_turn_gives() {
        for (width, parts) in [(4, 256), (8, 256), (128, 8), (256, 8)] {
            for len in [0, 1, 3, 4, 5, 127, 128, 2047, 2048, 2049, 5000, 16_384, 40_001] {
                let mut dealt: Vec<u32> = std::vec![0; parts as usize];
                (0..len).for_each(|element| dealt[(element / width % parts) as usize] += 1);
                for part in 0..parts {
                    assert_eq!(share(len, width, parts, part), dealt[part as usize]);
                }
            }
        }
    }

    #[test]
    fn a_warp_has_what_its_threads_have() {
        for len in [1, 129, 2049, 5000, 16_383] {
            for warp in 0..WARPS {
                let threads = 32 * warp..32 * (warp + 1);
                let sum: u32 = threads.map(|thread| share(len, 4, THREADS, thread)).sum();
                assert_eq!(share(len, 4 * 32, WARPS, warp), sum);
            }
        }
    }

    #[test]
    fn a_written_slot_is_told_from_an_unwritten_one_whatever_it_holds() {
        let none = f32::from_bits(u32::MAX);
        let most = Counts::new(1 << 20, 1 << 20, 1 << 20);
        let partial =
            Partial { sum: f64::from_bits(u64::MAX), m2: 2.0, min: none, max: none, counts: most };
        let read = Partial::from_words(partial.words()).expect("it is written");
        assert!(read.sum.is_nan() && read.min.is_nan() && read.max.is_nan());
        assert_eq!((read.m2, read.counts), (2.0, most));
        assert_eq!((most.non_finite(), most.skipped(), most.dead()), (1 << 20, 1 << 20, 1 << 20));
        for word in 0..4 {
            let mut words = partial.words();
            words[word] = Partial::UNWRITTEN;
            assert_eq!(Partial::from_words(words), None);
        }
    }
}
