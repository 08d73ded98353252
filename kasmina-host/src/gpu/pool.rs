//! Which free blocks of device memory there are, by size. Plain bookkeeping: no driver call.
#![forbid(unsafe_code)]

use crate::device::MemoryStats;

/// log₂ of the smallest block: what `cuMemAlloc` aligns to.
const SMALLEST_LOG2: u32 = 9;
/// log₂ of the size up to which blocks are powers of two. Small blocks waste little in total.
const POWERS_UP_TO_LOG2: u32 = 20;
/// Sizes between two powers of two above that, so that at most an eighth is wasted.
const STEPS: u32 = 8;
/// log₂ of a size no device has.
const LARGEST_LOG2: u32 = 46;
const NUM_CLASSES: usize =
    (POWERS_UP_TO_LOG2 - SMALLEST_LOG2 + 1 + (LARGEST_LOG2 - POWERS_UP_TO_LOG2) * STEPS) as usize;

/// A size in which blocks are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SizeClass(u16);

impl SizeClass {
    /// The smallest class that holds `bytes`; `None` beyond what any device has.
    pub(super) const fn of(bytes: usize) -> Option<Self> {
        let last = if bytes == 0 { 0 } else { bytes - 1 };
        let index = if last >> POWERS_UP_TO_LOG2 == 0 {
            let log2 = usize::BITS - last.leading_zeros();
            log2.saturating_sub(SMALLEST_LOG2)
        } else {
            let octave = last.ilog2();
            if octave >= LARGEST_LOG2 {
                return None;
            }
            let step = (last >> (octave - STEPS.ilog2())) as u32 - STEPS;
            POWERS_UP_TO_LOG2 - SMALLEST_LOG2 + 1 + (octave - POWERS_UP_TO_LOG2) * STEPS + step
        };
        Some(Self(index as u16))
    }

    /// The size of its blocks.
    pub(super) const fn bytes(self) -> usize {
        let index = self.0 as u32;
        if index <= POWERS_UP_TO_LOG2 - SMALLEST_LOG2 {
            return 1 << (index + SMALLEST_LOG2);
        }
        let above = index - (POWERS_UP_TO_LOG2 - SMALLEST_LOG2 + 1);
        let (octave, step) = (POWERS_UP_TO_LOG2 + above / STEPS, above % STEPS);
        ((STEPS + step + 1) as usize) << (octave - STEPS.ilog2())
    }
}

/// The free blocks of one stream.
pub(super) struct FreeLists {
    by_class: Vec<Vec<u64>>,
    stats: MemoryStats,
}

impl FreeLists {
    pub(super) fn new() -> Self {
        Self { by_class: vec![Vec::new(); NUM_CLASSES], stats: MemoryStats::default() }
    }

    /// The address of a free block, the one freed last.
    pub(super) fn take(&mut self, class: SizeClass) -> Option<u64> {
        let address = self.by_class[usize::from(class.0)].pop()?;
        self.stats.cached -= class.bytes() as u64;
        self.count_use(class);
        Some(address)
    }

    /// Counts a block that came from the driver and is in use from now on.
    pub(super) fn add(&mut self, class: SizeClass) {
        self.stats.driver_allocations += 1;
        self.count_use(class);
    }

    fn count_use(&mut self, class: SizeClass) {
        self.stats.in_use += class.bytes() as u64;
        self.stats.peak_in_use = self.stats.peak_in_use.max(self.stats.in_use);
    }

    /// Takes a block back.
    pub(super) fn give(&mut self, class: SizeClass, address: u64) {
        self.stats.in_use -= class.bytes() as u64;
        self.stats.cached += class.bytes() as u64;
        self.by_class[usize::from(class.0)].push(address);
    }

    /// All free blocks with their classes, which are nobody's afterwards.
    pub(super) fn drain(&mut self) -> Vec<(SizeClass, u64)> {
        self.stats.cached = 0;
        let lists = self.by_class.iter_mut().enumerate();
        // A class is as small a number as its index.
        lists
            .flat_map(|(index, list)| {
                let class = SizeClass(index as u16);
                std::mem::take(list).into_iter().map(move |address| (class, address))
            })
            .collect()
    }

    /// Takes drained blocks back.
    pub(super) fn undrain(&mut self, blocks: Vec<(SizeClass, u64)>) {
        for (class, address) in blocks {
            self.stats.cached += class.bytes() as u64;
            self.by_class[usize::from(class.0)].push(address);
        }
    }

    pub(super) const fn stats(&self) -> MemoryStats {
        self.stats
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_hold_what_they_are_chosen_for_and_waste_at_most_an_eighth_above_a_mebibyte() {
        let mut bytes = 1usize;
        while bytes < 1 << LARGEST_LOG2 {
            for bytes in [bytes - 1, bytes, bytes + 1] {
                let size = SizeClass::of(bytes).unwrap().bytes();
                assert!(size >= bytes && size.is_multiple_of(256), "{bytes} in {size}");
                let limit = if bytes > 1 << 20 { bytes + bytes / 8 } else { (2 * bytes).max(512) };
                assert!(size <= limit, "{bytes} in {size}");
            }
            bytes += bytes / 7 + 1;
        }
    }

    #[test]
    fn every_class_is_the_class_of_its_own_size() {
        let mut previous = 0;
        for index in 0..NUM_CLASSES {
            let class = SizeClass(index as u16);
            assert!(class.bytes() > previous);
            previous = class.bytes();
            assert_eq!(SizeClass::of(class.bytes()), Some(class));
        }
        assert_eq!(SizeClass::of(previous + 1), None);
        assert_eq!(SizeClass::of(usize::MAX), None);
    }

    #[test]
    fn a_freed_block_is_reused_for_its_class_only() {
        let mut lists = FreeLists::new();
        let (small, large) = (SizeClass::of(100).unwrap(), SizeClass::of(5000).unwrap());
        lists.add(small);
        lists.give(small, 0x1000);
        assert_eq!(lists.take(large), None);
        assert_eq!(lists.take(small), Some(0x1000));
        assert_eq!(lists.take(small), None);
    }

    #[test]
    fn statistics_follow_the_blocks() {
        let mut lists = FreeLists::new();
        let class = SizeClass::of(3 << 20).unwrap();
        lists.add(class);
        lists.add(class);
        lists.give(class, 0x1000);
        let stats = lists.stats();
        assert_eq!((stats.in_use, stats.cached), (3 << 20, 3 << 20));
        assert_eq!((stats.peak_in_use, stats.driver_allocations), (6 << 20, 2));
        let drained = lists.drain();
        assert_eq!(drained, [(class, 0x1000)]);
        assert_eq!((lists.stats().in_use, lists.stats().cached), (3 << 20, 0));
        lists.undrain(drained);
        assert_eq!((lists.stats().in_use, lists.stats().cached), (3 << 20, 3 << 20));
        assert_eq!(lists.take(class), Some(0x1000));
    }
}
