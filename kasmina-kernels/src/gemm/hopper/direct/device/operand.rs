//! Loads of operands that lie in memory in any way, a stage at a time.

use super::*;

/// One operand as a block sees it.
#[derive(Clone, Copy)]
pub(super) struct Operand {
    /// Address of the tile's first row (or column) at k = 0.
    base: u64,
    /// From row to row of memory, in bytes.
    stride: u64,
    /// Rows (or columns) from the tile's first to the last there is.
    extent: u32,
    /// Whether rows begin at multiples of 16 bytes.
    aligned: bool,
}

impl Operand {
    #[inline(always)]
    pub(super) fn new<A: Axis>(address: u64, stride: u64, extent: u32, first: u32) -> Self {
        let stride = stride * 4;
        let from_first = if A::K_MAJOR { u64::from(first) * stride } else { u64::from(first) * 4 };
        Self {
            base: address + from_first,
            stride,
            extent: extent - first,
            aligned: (address | stride) % 16 == 0,
        }
    }

    /// Starts loading `shares` warps' shares, each of `extent` rows (or columns), of the 32 k from
    /// `k`, of which `left` exist; this thread's part, as one of `threads`. What does not exist
    /// arrives as zeros.
    ///
    /// # Safety
    /// The operand is readable; `stage` is the slice's place for the shares, which nobody accesses.
    #[inline(always)]
    pub(super) unsafe fn load<A: Axis>(
        self,
        stage: u32,
        [shares, extent]: [u32; 2],
        [k, left]: [u32; 2],
        [thread, threads]: [u32; 2],
    ) {
        // Opaque, so that places are found anew each time: held, they would take the registers of
        // sums.
        let thread = ptx::opaque_u32(thread) % threads;
        // Pieces of 16 bytes to a row of memory, and rows that the threads load at once.
        let per_row = if A::K_MAJOR { BLOCK_K / 4 } else { shares * extent / 4 };
        let (row, chunk, rows) = (thread / per_row, thread % per_row, threads / per_row);
        let passes = shares * extent * (BLOCK_K / 4) / threads;
        let place = |row: u32| {
            stage
                + if A::K_MAJOR {
                    let share = row / extent * (extent * BLOCK_K * 4);
                    share + k_major_place(extent, row % extent, chunk)
                } else {
                    let share = chunk / (extent / 4) * (extent * BLOCK_K * 4);
                    share + mn_major_place(extent, row, chunk % (extent / 4))
                }
        };
        // Elements of a piece that exist.
        let exist = |row: u32| {
            let (has_row, left) = if A::K_MAJOR {
                (row < self.extent, left.saturating_sub(4 * chunk))
            } else {
                (row < left, self.extent.saturating_sub(4 * chunk))
            };
            let left = if left < 4 { left } else { 4 };
            if has_row { left } else { 0 }
        };
        let first = if A::K_MAJOR {
            u64::from(row) * self.stride + row_offset(k, chunk)
        } else {
            u64::from(k + row) * self.stride + row_offset(0, chunk)
        };
        let mut address = self.base + first;
        let step = u64::from(rows) * self.stride;
        let whole = self.aligned && left >= BLOCK_K && self.extent >= shares * extent;
        let mut row = row;
        let mut pass = 0;
        // SAFETY: as many elements as exist, 16-aligned where rows are; the slice's own places.
        unsafe {
            if whole {
                while pass < passes {
                    ptx::cp_async_cg_16(place(row), address, 16);
                    (pass, row, address) = (pass + 1, row + rows, address + step);
                }
            } else if self.aligned {
                while pass < passes {
                    ptx::cp_async_cg_16(place(row), address, 4 * exist(row));
                    (pass, row, address) = (pass + 1, row + rows, address + step);
                }
            } else {
                while pass < passes {
                    ptx::nounroll();
                    let (place, exist) = (place(row), exist(row));
                    unroll!(element: u32 in [0 1 2 3] {
                        let address = address + u64::from(4 * element);
                        ptx::cp_async_ca_4(place + 4 * element, address, element < exist);
                    });
                    (pass, row, address) = (pass + 1, row + rows, address + step);
                }
            }
        }
    }
}
