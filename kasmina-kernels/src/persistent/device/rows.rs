//! A unit's rows on their way into shared memory and out of it, in vectors of 16 bytes where they
//! consist of such.

use super::{Early, Grid, POLLS, Unit, is_absent};
use crate::persistent::THREADS;
use crate::ptx;

/// Vectors of the input that a thread has under way at a time: each takes a trip over the bus.
const LOADS: u32 = 4;

/// How long a thread waits for what is to arrive.
#[derive(Default)]
struct Patience {
    polls: u32,
    since: u64,
}

impl Patience {
    /// Counts a poll in vain; whether these have gone on for so long.
    #[inline(always)]
    fn is_over(&mut self, nanoseconds: u64) -> bool {
        self.polls += 1;
        if !self.polls.is_multiple_of(POLLS) {
            return false;
        }
        let now = ptx::globaltimer();
        if self.since == 0 {
            self.since = now;
        }
        now.wrapping_sub(self.since) > nanoseconds
    }
}

/// A thread's way through rows of vectors of 16 bytes, without a division.
struct Vectors {
    row: u32,
    column: u32,
    /// Counted through all rows.
    index: u32,
    per_row: u32,
}

impl Vectors {
    #[inline(always)]
    fn new(thread: u32, per_row: u32) -> Self {
        let mut vectors = Self { row: 0, column: thread, index: thread, per_row };
        vectors.wrap();
        vectors
    }

    #[inline(always)]
    fn advance(&mut self) {
        self.index += THREADS;
        self.column += THREADS;
        self.wrap();
    }

    #[inline(always)]
    fn wrap(&mut self) {
        while self.column >= self.per_row {
            ptx::nounroll();
            self.column -= self.per_row;
            self.row += 1;
        }
    }
}

/// Brings the unit's input to shared memory. Whether this thread waited in vain for a part that was
/// to arrive, for longer than the lease.
///
/// # Safety
/// As [`Stack::compute`](super::Stack::compute); a barrier follows. Only rows of whole vectors arrive
/// ([`StackPlan::takes_arriving`](crate::persistent::StackPlan::takes_arriving)).
#[inline(always)]
pub(super) unsafe fn load_rows(grid: &Grid<'_>, unit: Unit, buffer: u32, width: u32) -> bool {
    let row_bytes = grid.params.row_bytes;
    let mut missing = false;
    // SAFETY: the input has `rows` rows of `width` elements, one after the other.
    unsafe {
        if width.is_multiple_of(8) && unit.input.is_multiple_of(16) {
            let mut at = Vectors::new(grid.thread, width / 8);
            while at.row < unit.rows && !missing {
                ptx::nounroll();
                let mut places = [u32::MAX; 4];
                let mut values = [[0; 4]; 4];
                let first = unit.input + u64::from(at.index) * 16;
                let load = |load: usize| {
                    ptx::ld_relaxed_sys_v4_u32(first + load as u64 * u64::from(THREADS * 16))
                };
                for_each_below!(LOADS of 4, LOAD => {
                    if at.row < unit.rows {
                        values[LOAD] = load(LOAD);
                        places[LOAD] = buffer + at.row * row_bytes + at.column * 16;
                        at.advance();
                    }
                });
                let mut patience = Patience::default();
                while unit.arriving && !missing {
                    ptx::nounroll();
                    let mut absent = false;
                    for_each_below!(LOADS of 4, LOAD => {
                        if places[LOAD] != u32::MAX && is_absent(values[LOAD]) {
                            absent = true;
                            values[LOAD] = load(LOAD);
                        }
                    });
                    if !absent {
                        break;
                    }
                    missing = patience.is_over(grid.params.lease_ns);
                }
                for_each_below!(LOADS of 4, LOAD => {
                    if places[LOAD] != u32::MAX {
                        ptx::st_shared_v4_u32(places[LOAD], values[LOAD]);
                    }
                });
            }
        } else {
            let mut row = 0;
            while row < unit.rows {
                ptx::nounroll();
                let mut column = grid.thread;
                while column < width {
                    ptx::nounroll();
                    let element = u64::from(row * width + column);
                    let value = ptx::ld_relaxed_sys_u16(unit.input + element * 2);
                    ptx::st_shared_u16(buffer + row * row_bytes + column * 2, value);
                    column += THREADS;
                }
                row += 1;
            }
        }
    }
    missing
}

/// Brings the unit's input to shared memory from the registers where it is, as [`load_rows`] does
/// where it is not.
///
/// # Safety
/// As [`load_rows`]; the unit is what was expected.
#[inline(always)]
pub(super) unsafe fn store_early(
    grid: &Grid<'_>,
    unit: Unit,
    early: Early,
    buffer: u32,
    width: u32,
) -> bool {
    let mut missing = false;
    if grid.thread < unit.early {
        let mut vector = early.vector;
        let mut patience = Patience::default();
        // SAFETY: this contract; `early` counts vectors of the input's rows.
        unsafe {
            if !early.found {
                loop {
                    ptx::nounroll();
                    vector = ptx::ld_relaxed_sys_v4_u32(unit.input + u64::from(grid.thread * 16));
                    if !is_absent(vector) {
                        break;
                    }
                    missing = patience.is_over(grid.params.lease_ns);
                    if missing {
                        break;
                    }
                }
            }
            let at = Vectors::new(grid.thread, width / 8);
            let place = buffer + at.row * grid.params.row_bytes + at.column * 16;
            ptx::st_shared_v4_u32(place, vector);
        }
    }
    missing
}

/// Makes the columns after the unit's input, up to the next multiple of 32, zeros: what lay there
/// could be NaN, and 0 · NaN is NaN.
///
/// # Safety
/// As [`Stack::compute`](super::Stack::compute); a barrier follows.
#[inline(always)]
pub(super) unsafe fn pad_rows(grid: &Grid<'_>, unit: Unit, buffer: u32, width: u32) {
    if grid.thread < width.next_multiple_of(32) - width {
        let mut place = buffer + (width + grid.thread) * 2;
        let mut row = 0;
        while row < unit.rows {
            ptx::nounroll();
            // SAFETY: a buffer's row has room for `width` rounded up to 32.
            unsafe { ptx::st_shared_u16(place, 0) }
            place += grid.params.row_bytes;
            row += 1;
        }
    }
}

/// Writes the unit's result.
///
/// # Safety
/// As [`Stack::compute`](super::Stack::compute); a barrier came before.
#[inline(always)]
pub(super) unsafe fn store_rows(grid: &Grid<'_>, unit: Unit, buffer: u32, width: u32) {
    let row_bytes = grid.params.row_bytes;
    // SAFETY: as in `load_rows`, for the output.
    unsafe {
        if width.is_multiple_of(8) && unit.output.is_multiple_of(16) {
            let mut at = Vectors::new(grid.thread, width / 8);
            while at.row < unit.rows {
                let values = ptx::ld_shared_v4_u32(buffer + at.row * row_bytes + at.column * 16);
                ptx::st_relaxed_sys_v4_u32(unit.output + u64::from(at.index) * 16, values);
                at.advance();
            }
        } else {
            let mut row = 0;
            while row < unit.rows {
                ptx::nounroll();
                let mut column = grid.thread;
                while column < width {
                    ptx::nounroll();
                    let value = ptx::ld_shared_u16(buffer + row * row_bytes + column * 2);
                    let element = u64::from(row * width + column);
                    ptx::st_relaxed_sys_u16(unit.output + element * 2, value);
                    column += THREADS;
                }
                row += 1;
            }
        }
    }
}
