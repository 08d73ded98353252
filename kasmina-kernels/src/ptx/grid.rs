//! Overlap of a grid with the one before it in its stream ("programmatic dependent launch").

use core::arch::asm;

/// Lets the next grid of the stream start, if it was launched to overlap, once every block of this
/// one has said so or exited. It may not yet read what this grid writes.
#[inline(always)]
pub fn griddepcontrol_launch_dependents() {
    // SAFETY: a hint to the scheduler.
    unsafe { asm!("griddepcontrol.launch_dependents;", options(nostack)) }
}

/// Waits until the grids this one overlaps with have completed and their writes are visible; at
/// once if it was not launched to overlap.
#[inline(always)]
pub fn griddepcontrol_wait() {
    // SAFETY: waits only.
    unsafe { asm!("griddepcontrol.wait;", options(nostack)) }
}
