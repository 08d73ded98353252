//! Special registers and control.

use core::arch::asm;

macro_rules! special_register {
    ($($(#[$doc:meta])* $name:ident = $register:literal;)+) => {$(
        $(#[$doc])*
        #[must_use]
        #[inline(always)]
        pub fn $name() -> u32 {
            let value: u32;
            // SAFETY: reads a special register; no memory, no side effect.
            unsafe {
                asm!(concat!("mov.u32 {}, ", $register, ";"), out(reg32) value,
                     options(pure, nomem, nostack, preserves_flags));
            }
            value
        }
    )+};
}

special_register! {
    /// Index of the thread in its block.
    thread_index = "%tid.x";
    /// Index of the thread in its warp.
    lane_index = "%laneid";
    /// Index of the block in the grid.
    block_index = "%ctaid.x";
    /// Number of blocks.
    grid_size = "%nctaid.x";
}

/// `value` of the warp's first lane: how a value every lane holds becomes one the compiler keeps
/// in uniform registers.
///
/// # Safety
/// The whole warp executes it.
#[must_use]
#[inline(always)]
pub unsafe fn shfl_sync_idx_first(value: u32) -> u32 {
    let first: u32;
    // SAFETY: the caller's contract.
    unsafe {
        asm!("shfl.sync.idx.b32 {}, {}, 0, 0x1f, 0xffffffff;", out(reg32) first, in(reg32) value,
             options(nomem, nostack));
    }
    first
}

/// First in the body of a loop: neither compiler unrolls it.
#[inline(always)]
pub fn nounroll() {
    // SAFETY: a directive. Not pure, so that the loop it stands in keeps it, once.
    unsafe { asm!(".pragma \"nounroll\";", options(nomem, nostack, preserves_flags)) }
}

/// Ends the kernel with an error.
#[inline(always)]
pub fn trap() -> ! {
    // SAFETY: `trap` does not return and touches no memory.
    unsafe { asm!("trap;", options(noreturn, nomem, nostack)) }
}
