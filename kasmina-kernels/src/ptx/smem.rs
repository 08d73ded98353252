//! Shared memory.

use core::arch::{asm, global_asm};

// 1024: what a 128-byte swizzle needs. rustc cannot declare a variable of the shared space.
global_asm!(".extern .shared .align 1024 .b8 kasmina_dynamic_smem[];");

/// Address of the block's dynamic shared memory, 1024-aligned.
#[must_use]
#[inline(always)]
pub fn dynamic_smem() -> u32 {
    let address: u32;
    // SAFETY: takes an address.
    unsafe {
        asm!("mov.u32 {}, kasmina_dynamic_smem;", out(reg32) address,
             options(pure, nomem, nostack, preserves_flags));
    }
    address
}

/// Stores an f32.
///
/// # Safety
/// `address` is 4-aligned and inside the block's shared memory; no other thread accesses it
/// without a barrier between.
#[inline(always)]
pub unsafe fn st_shared_f32(address: u32, value: f32) {
    // SAFETY: the caller's contract.
    unsafe {
        asm!("st.shared.f32 [{}], {};", in(reg32) address, in(reg32) value, options(nostack));
    }
}

/// Stores two neighbouring f32.
///
/// # Safety
/// `address` is 8-aligned and inside the block's shared memory; no other thread accesses these
/// bytes without a barrier between.
#[inline(always)]
pub unsafe fn st_shared_v2_f32(address: u32, first: f32, second: f32) {
    // SAFETY: the caller's contract.
    unsafe {
        asm!("st.shared.v2.f32 [{}], {{{}, {}}};", in(reg32) address, in(reg32) first,
             in(reg32) second, options(nostack));
    }
}

/// Loads two neighbouring f32.
///
/// # Safety
/// `address` is 8-aligned and inside the block's shared memory; no other thread writes it without
/// a barrier between.
#[must_use]
#[inline(always)]
pub unsafe fn ld_shared_v2_f32(address: u32) -> (f32, f32) {
    let (a, b): (f32, f32);
    // SAFETY: the caller's contract.
    unsafe {
        asm!("ld.shared.v2.f32 {{{}, {}}}, [{}];", out(reg32) a, out(reg32) b, in(reg32) address,
             options(readonly, nostack));
    }
    (a, b)
}

/// Stores four 8×8 matrices of 16-bit elements held across the warp, one 16-byte row from the
/// address of each lane: lanes 0–7 give the rows of the first matrix, 8–15 of the second, and so on.
///
/// # Safety
/// The whole warp executes it; each `address` is 16-aligned and inside the block's shared memory;
/// no other warp accesses those rows without a barrier between.
#[inline(always)]
pub unsafe fn stmatrix_x4(address: u32, r0: u32, r1: u32, r2: u32, r3: u32) {
    // SAFETY: the caller's contract.
    unsafe {
        asm!("stmatrix.sync.aligned.m8n8.x4.shared.b16 [{}], {{{}, {}, {}, {}}};",
             in(reg32) address, in(reg32) r0, in(reg32) r1, in(reg32) r2, in(reg32) r3,
             options(nostack));
    }
}

/// Loads four 8×8 matrices of 16-bit elements, transposed: one 16-byte row from the address of each
/// lane, lanes 0–7 giving the rows of the first matrix, 8–15 of the second, and so on. What
/// [`stmatrix_x4`] then stores as rows are their columns.
///
/// # Safety
/// The whole warp executes it; each `address` is 16-aligned and inside the block's shared memory;
/// nothing writes those rows without a barrier between.
#[must_use]
#[inline(always)]
pub unsafe fn ldmatrix_x4_trans(address: u32) -> [u32; 4] {
    let (a, b, c, d): (u32, u32, u32, u32);
    // SAFETY: the caller's contract. The memory clobber keeps it behind the barrier.
    unsafe {
        asm!("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {{{}, {}, {}, {}}}, [{}];",
             out(reg32) a, out(reg32) b, out(reg32) c, out(reg32) d, in(reg32) address,
             options(nostack));
    }
    [a, b, c, d]
}

/// As [`stmatrix_x4`], transposed: a lane's address is where a column of its matrix goes.
///
/// # Safety
/// As [`stmatrix_x4`].
#[inline(always)]
pub unsafe fn stmatrix_x4_trans(address: u32, r0: u32, r1: u32, r2: u32, r3: u32) {
    // SAFETY: the caller's contract.
    unsafe {
        asm!("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [{}], {{{}, {}, {}, {}}};",
             in(reg32) address, in(reg32) r0, in(reg32) r1, in(reg32) r2, in(reg32) r3,
             options(nostack));
    }
}
