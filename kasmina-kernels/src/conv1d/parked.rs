//! Values of a block that wait in shared memory, so as not to occupy registers beside the sums.

use crate::ptx;

/// A row of 32-bit values in shared memory.
#[derive(Clone, Copy)]
pub(in crate::conv1d) struct Parked {
    at: u32,
}

impl Parked {
    /// Bytes that the longest row takes.
    pub(in crate::conv1d) const BYTES: u32 = 64;

    /// Puts the values at `at`. A barrier must follow before anyone reads them.
    ///
    /// # Safety
    /// There is room for them, and one thread of the block calls it, before any other thread reads.
    #[inline(always)]
    pub(in crate::conv1d) unsafe fn put<const N: usize>(at: u32, values: [u32; N]) {
        const { assert!(N * 4 <= Self::BYTES as usize) }
        let mut index = 0;
        while index < N {
            // SAFETY: the caller's contract.
            unsafe { ptx::st_shared_u32(at + index as u32 * 4, values[index]) };
            index += 1;
        }
    }

    /// The row at `at`.
    ///
    /// # Safety
    /// It has been put there, and a barrier has passed since.
    #[inline(always)]
    pub(in crate::conv1d) const unsafe fn at(at: u32) -> Self {
        Self { at }
    }

    /// Value `index`, loaded where it is asked for.
    #[inline(always)]
    pub(in crate::conv1d) fn get(self, index: u32) -> u32 {
        // SAFETY: put before the barrier that the constructor asks for.
        unsafe { ptx::ld_shared_u32(self.at + index * 4) }
    }
}
