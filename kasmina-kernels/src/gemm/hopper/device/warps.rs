//! The epilogue of the widest tiles, whose warps do not wait for each other.
//!
//! ```text
//! warpgroup   share the bias ┬ warp 0  16 rows ─ stmatrix ─ TMA store ─ the next 64 columns ─ …
//!                            ├ warp 1  the same
//!                            ├ warp 2
//!                            └ warp 3
//! ```
//! A warp's rows of a slab are two periods of the swizzle, so a box of them is a piece of the slab.

use super::{Element, Epilogue};
use crate::activation::EpilogueActivation;
use crate::gemm::hopper::WARP_M;
use crate::gemm::hopper::unaligned::PlainRows;
use crate::ptx;

impl Epilogue {
    /// The same in a `HopperKernel`, whose map of Y may have boxes of a warp's rows.
    #[inline(always)]
    pub(crate) fn of_forward(self) -> Self {
        Self { by_warp: self.tile.stores_by_warp(), ..self }
    }

    /// The same where the activation is piecewise linear and TMA stores Y: code of that alone, one
    /// piece without jumps.
    #[inline(always)]
    pub(crate) fn without_branches(self) -> Self {
        let activation = EpilogueActivation { smooth: 0, ..self.activation };
        Self { activation, plain: PlainRows::NONE, ..self }
    }

    /// As [`publish_bias`](Self::publish_bias), with barriers of its own where slabs have none.
    ///
    /// # Safety
    /// The whole warpgroup calls it.
    #[inline(always)]
    pub(crate) unsafe fn share_bias<E: Element>(self, bias: (u16, u16)) {
        // SAFETY: the caller's contract. The first barrier is behind the readers of the bias before.
        unsafe {
            if self.by_warp {
                self.sync();
            }
            self.publish_bias::<E>(bias);
            if self.by_warp {
                self.sync();
            }
        }
    }

    /// Of the rows that a store of the whole slab covers, the first that this warp's covers.
    #[inline(always)]
    pub(super) fn first_row_of_warp(self) -> u32 {
        if self.by_warp { self.thread / 32 * WARP_M } else { 0 }
    }

    /// Whether this thread issues stores, and waits for them.
    #[inline(always)]
    pub(super) fn stores(self) -> bool {
        if self.by_warp { self.thread % 32 == 0 } else { self.thread == 0 }
    }

    /// Waits for the threads that write what is stored together.
    ///
    /// # Safety
    /// The whole warpgroup calls it.
    #[inline(always)]
    pub(super) unsafe fn sync_writers(self) {
        // SAFETY: the caller's contract. Stores without TMA share the rows out otherwise.
        unsafe {
            if self.by_warp && self.plain.address == 0 {
                ptx::bar_warp_sync();
            } else {
                self.sync();
            }
        }
    }
}

/// Finishes and stores a consumer's part of a tile.
macro_rules! finish_tile {
    ($element:ident, $tile:expr, $epilogue:ident, $exchange:ident, $m:ident, $n:ident,
     $([$($c:ident)+])+) => {
        let mut group = 0;
        $(
            // SAFETY: the whole warpgroup goes through the slabs in order.
            unsafe {
                if group % 4 == 0 {
                    $epilogue.begin_slab();
                }
                if $tile.split_k == 1 || $exchange.owns() {
                    $epilogue.columns::<$element>(group, [$($c),+]);
                }
                if group % 4 == 3 {
                    $epilogue.end_slab::<$element>(group / 4, $m, $n);
                }
            }
            group += 1;
        )+
        let _ = group;
    };
}
pub(crate) use finish_tile;
