//! Exchange and order between the lanes of a warp.

use core::arch::asm;

/// `value` of the lane whose number differs from this one's in the bits of `MASK`.
///
/// # Safety
/// The whole warp executes it.
#[must_use]
#[inline(always)]
pub unsafe fn shfl_sync_bfly<const MASK: u32>(value: u32) -> u32 {
    let other: u32;
    // SAFETY: the caller's contract.
    unsafe {
        asm!("shfl.sync.bfly.b32 {}, {}, {mask}, 0x1f, 0xffffffff;", out(reg32) other,
             in(reg32) value, mask = const MASK, options(nomem, nostack));
    }
    other
}

/// `bar.warp.sync`: waits for the whole warp, and orders its shared-memory accesses.
///
/// # Safety
/// The whole warp executes it.
#[inline(always)]
pub unsafe fn bar_warp_sync() {
    // SAFETY: the caller's contract.
    unsafe { asm!("bar.warp.sync 0xffffffff;", options(nostack)) }
}

/// `value` of the lane whose number differs from this one's in the bits of `mask`, below 32.
///
/// # Safety
/// The whole warp executes it, with the same mask.
#[must_use]
#[inline(always)]
pub unsafe fn shfl_sync_bfly_by(value: u32, mask: u32) -> u32 {
    let other: u32;
    // SAFETY: the caller's contract.
    unsafe {
        asm!("shfl.sync.bfly.b32 {}, {}, {}, 0x1f, 0xffffffff;", out(reg32) other,
             in(reg32) value, in(reg32) mask, options(nomem, nostack));
    }
    other
}

/// `value` of lane `lane`, below 32.
///
/// # Safety
/// The whole warp executes it.
#[must_use]
#[inline(always)]
pub unsafe fn shfl_sync_idx(value: u32, lane: u32) -> u32 {
    let other: u32;
    // SAFETY: the caller's contract.
    unsafe {
        asm!("shfl.sync.idx.b32 {}, {}, {}, 0x1f, 0xffffffff;", out(reg32) other,
             in(reg32) value, in(reg32) lane, options(nomem, nostack));
    }
    other
}

/// Whether any lane of the warp says so.
///
/// # Safety
/// The whole warp executes it.
#[must_use]
#[inline(always)]
pub unsafe fn vote_any(said: bool) -> bool {
    let any: u32;
    // SAFETY: the caller's contract.
    unsafe {
        asm!("{{", ".reg .pred said, any;", "setp.ne.u32 said, {}, 0;",
             "vote.sync.any.pred any, said, 0xffffffff;", "selp.u32 {}, 1, 0, any;", "}}",
             in(reg32) u32::from(said), out(reg32) any, options(nomem, nostack));
    }
    any != 0
}

macro_rules! redux {
    ($($(#[$doc:meta])* $name:ident: $type:ident = $instruction:literal;)+) => {$(
        $(#[$doc])*
        ///
        /// # Safety
        /// The whole warp executes it.
        #[cfg(kasmina_tier = "hopper")]
        #[must_use]
        #[inline(always)]
        pub unsafe fn $name(value: $type) -> $type {
            let result: $type;
            // SAFETY: the caller's contract.
            unsafe {
                asm!(concat!($instruction, " {}, {}, 0xffffffff;"), out(reg32) result,
                     in(reg32) value, options(nomem, nostack));
            }
            result
        }
    )+};
}

redux! {
    /// Bitwise or over the warp; compute capability 8.0 and later.
    redux_sync_or_b32: u32 = "redux.sync.or.b32";
    /// Sum over the warp; compute capability 8.0 and later.
    redux_sync_add_u32: u32 = "redux.sync.add.u32";
    /// Minimum over the warp; compute capability 8.0 and later.
    redux_sync_min_s32: i32 = "redux.sync.min.s32";
    /// Maximum over the warp; compute capability 8.0 and later.
    redux_sync_max_s32: i32 = "redux.sync.max.s32";
}
