//! Order between the threads of a block without a barrier, by words in its shared memory.

use core::arch::asm;

/// Loads 32 bits; what their writer wrote before its release is visible afterwards.
///
/// # Safety
/// `address` is 4-aligned and inside the block's shared memory.
#[must_use]
#[inline(always)]
pub unsafe fn ld_acquire_cta_shared_u32(address: u32) -> u32 {
    let value: u32;
    // SAFETY: the caller's contract. The memory clobber keeps accesses on their side.
    unsafe {
        asm!("ld.acquire.cta.shared.u32 {}, [{}];", out(reg32) value, in(reg32) address,
             options(nostack));
    }
    value
}

/// Stores 32 bits after everything that this thread, and threads it has met at a barrier, wrote.
///
/// # Safety
/// `address` is 4-aligned and inside the block's shared memory.
#[inline(always)]
pub unsafe fn st_release_cta_shared_u32(address: u32, value: u32) {
    // SAFETY: the caller's contract. The memory clobber keeps accesses on their side.
    unsafe {
        asm!("st.release.cta.shared.u32 [{}], {};", in(reg32) address, in(reg32) value,
             options(nostack));
    }
}

/// Loads 64 bits as one, in no order with other memory.
///
/// # Safety
/// `address` is 8-aligned and inside the block's shared memory.
#[must_use]
#[inline(always)]
pub unsafe fn ld_relaxed_cta_shared_u64(address: u32) -> u64 {
    let value: u64;
    // SAFETY: the caller's contract. Not pure, so that every call reads anew.
    unsafe {
        asm!("ld.relaxed.cta.shared.u64 {}, [{}];", out(reg64) value, in(reg32) address,
             options(nostack));
    }
    value
}

/// Stores 64 bits, as [`st_release_cta_shared_u32`].
///
/// # Safety
/// `address` is 8-aligned and inside the block's shared memory.
#[inline(always)]
pub unsafe fn st_release_cta_shared_u64(address: u32, value: u64) {
    // SAFETY: the caller's contract. The memory clobber keeps accesses on their side.
    unsafe {
        asm!("st.release.cta.shared.u64 [{}], {};", in(reg32) address, in(reg64) value,
             options(nostack));
    }
}

/// Puts `new` in the place of `expected` if that is there, and returns what was there; an acquire
/// and a release.
///
/// # Safety
/// `address` is 8-aligned and inside the block's shared memory.
#[must_use]
#[inline(always)]
pub unsafe fn atom_cas_acq_rel_cta_shared_u64(address: u32, expected: u64, new: u64) -> u64 {
    let before: u64;
    // SAFETY: the caller's contract. The memory clobber keeps accesses on their side.
    unsafe {
        asm!("atom.acq_rel.cta.shared.cas.b64 {}, [{}], {}, {};", out(reg64) before,
             in(reg32) address, in(reg64) expected, in(reg64) new, options(nostack));
    }
    before
}
