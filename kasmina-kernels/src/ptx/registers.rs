//! Register reallocation between warpgroups.

use core::arch::asm;

/// Gives up registers down to `COUNT` a thread.
///
/// # Safety
/// All warps of the warpgroup execute it; `COUNT` is a multiple of 8 in 24..=256 and no more than
/// they hold.
#[inline(always)]
pub unsafe fn setmaxnreg_dec<const COUNT: u32>() {
    // SAFETY: the caller's contract.
    unsafe { asm!("setmaxnreg.dec.sync.aligned.u32 {n};", n = const COUNT, options(nostack)) }
}

/// Takes registers up to `COUNT` a thread; waits until they are free.
///
/// # Safety
/// All warps of the warpgroup execute it; `COUNT` is a multiple of 8 in 24..=256 and no less than
/// they hold; the block's other warpgroups give up enough, else it waits for ever.
#[inline(always)]
pub unsafe fn setmaxnreg_inc<const COUNT: u32>() {
    // SAFETY: the caller's contract.
    unsafe { asm!("setmaxnreg.inc.sync.aligned.u32 {n};", n = const COUNT, options(nostack)) }
}

/// Any number: a register that nothing is written to, so that none is kept for what it held.
#[cfg(kasmina_tier = "hopper")]
#[must_use]
#[inline(always)]
pub fn any_f32() -> f32 {
    let value: f32;
    // SAFETY: every pattern of bits is an f32.
    unsafe {
        asm!("// {}: any", out(reg32) value, options(pure, nomem, nostack, preserves_flags));
    }
    value
}
