//! Products of small matrices held in the registers of one warp.

use core::arch::asm;

/// Loads four 8×8 matrices of 16-bit elements across the warp, one 16-byte row from the address of
/// each lane: lanes 0–7 give the rows of the first matrix, 8–15 of the second, and so on. A lane
/// gets elements `2·(lane % 4)` and the next of row `lane / 4` of each.
///
/// # Safety
/// The whole warp executes it; each `address` is 16-aligned and inside the block's shared memory;
/// no other thread writes those rows without a barrier between.
#[must_use]
#[inline(always)]
pub(crate) unsafe fn ldmatrix_x4(address: u32) -> [u32; 4] {
    let (a, b, c, d): (u32, u32, u32, u32);
    // SAFETY: the caller's contract.
    unsafe {
        asm!("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{{}, {}, {}, {}}}, [{}];", out(reg32) a,
             out(reg32) b, out(reg32) c, out(reg32) d, in(reg32) address,
             options(readonly, nostack));
    }
    [a, b, c, d]
}

macro_rules! mma_m16n8k16 {
    ($(#[$doc:meta])* $name:ident $kind:literal) => {
        $(#[$doc])*
        ///
        /// # Safety
        /// The whole warp executes it.
        #[inline(always)]
        pub(crate) unsafe fn $name(sum: &mut [f32; 4], a: [u32; 4], b: [u32; 2]) {
            let [c0, c1, c2, c3] = *sum;
            let (d0, d1, d2, d3): (f32, f32, f32, f32);
            // SAFETY: the caller's contract.
            unsafe {
                asm!(concat!("mma.sync.aligned.m16n8k16.row.col.f32.", $kind, ".", $kind, ".f32 ",
                     "{{{}, {}, {}, {}}}, {{{}, {}, {}, {}}}, {{{}, {}}}, {{{}, {}, {}, {}}};"),
                     out(reg32) d0, out(reg32) d1, out(reg32) d2, out(reg32) d3,
                     in(reg32) a[0], in(reg32) a[1], in(reg32) a[2], in(reg32) a[3],
                     in(reg32) b[0], in(reg32) b[1],
                     in(reg32) c0, in(reg32) c1, in(reg32) c2, in(reg32) c3,
                     options(pure, nomem, nostack));
            }
            *sum = [d0, d1, d2, d3];
        }
    };
}

mma_m16n8k16! {
    /// `sum += a·b` for a 16×16 `a` and a 16×8 `b` of bf16.
    mma_m16n8k16_bf16 "bf16"
}
mma_m16n8k16! {
    /// `sum += a·b` for a 16×16 `a` and a 16×8 `b` of f16.
    mma_m16n8k16_f16 "f16"
}
