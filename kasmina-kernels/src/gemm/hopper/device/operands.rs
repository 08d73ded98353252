//! What the producer loads for a step of a tile.

use super::{BLOCK_K, SLAB_N, Tile};
use crate::ptx;
use crate::smem_layout::Major;

/// Where the operands of a product come from: what to load for a step of a tile.
pub(crate) trait Operands: Copy {
    /// Announces the maps, so that the first loads find them cached.
    ///
    /// # Safety
    /// As [`produce`](super::produce).
    unsafe fn prefetch_maps(self);

    /// Fetches into L2 what step `k_block` loads of the rows from `m` on.
    ///
    /// # Safety
    /// As [`produce`](super::produce).
    unsafe fn prefetch_x(self, tile: Tile, m: u32, k_block: u32);

    /// Fetches into L2 what step `k_block` loads of the columns from `n` on.
    ///
    /// # Safety
    /// As [`produce`](super::produce).
    unsafe fn prefetch_w(self, tile: Tile, n: u32, k_block: u32);

    /// Issues the loads of step `k_block` of the tile whose first row and column are `m` and `n`:
    /// rows to `x` and columns to `w`, completing on `full`.
    ///
    /// # Safety
    /// As [`produce`](super::produce); the stage is free and `full` expects its bytes.
    unsafe fn load(self, tile: Tile, stage: Stage, m: u32, n: u32, k_block: u32);
}

/// Where a stage lies in shared memory.
#[derive(Clone, Copy)]
pub(crate) struct Stage {
    pub(crate) x: u32,
    pub(crate) w: u32,
    /// The barrier that its loads complete on.
    pub(crate) full: u32,
}

/// Two matrices, each K-major or MN-major.
#[derive(Clone, Copy)]
pub(crate) struct Matrices {
    pub(crate) x_map: u64,
    pub(crate) w_map: u64,
    pub(crate) x_major: Major,
    pub(crate) w_major: Major,
}

impl Operands for Matrices {
    #[inline(always)]
    unsafe fn prefetch_maps(self) {
        // SAFETY: valid maps by the caller's contract.
        unsafe {
            ptx::prefetch_tensormap(self.x_map);
            ptx::prefetch_tensormap(self.w_map);
        }
    }

    #[inline(always)]
    unsafe fn prefetch_x(self, tile: Tile, m: u32, k_block: u32) {
        // SAFETY: a valid map by the caller's contract.
        unsafe {
            prefetch_operand(self.x_map, self.x_major, tile.block_m, m, k_block * BLOCK_K);
        }
    }

    #[inline(always)]
    unsafe fn prefetch_w(self, tile: Tile, n: u32, k_block: u32) {
        // SAFETY: a valid map by the caller's contract.
        unsafe {
            prefetch_operand(self.w_map, self.w_major, tile.block_n, n, k_block * BLOCK_K);
        }
    }

    #[inline(always)]
    unsafe fn load(self, tile: Tile, stage: Stage, m: u32, n: u32, k_block: u32) {
        let k = k_block * BLOCK_K;
        let Stage { x, w, full } = stage;
        // SAFETY: the maps' boxes are those of `HopperGemmParams`; a free stage, by the caller's
        // contract.
        unsafe {
            load_operand(self.w_map, self.w_major, tile.block_n, w, n, k, full);
            load_operand(self.x_map, self.x_major, tile.block_m, x, m, k, full);
        }
    }
}

/// Loads `extent` rows (or columns) of an operand and 64 k: in one box where k is contiguous, else
/// in slabs of 64.
///
/// # Safety
/// As [`Operands::load`].
#[inline(always)]
pub(super) unsafe fn load_operand(
    map: u64,
    major: Major,
    extent: u32,
    dst: u32,
    mn: u32,
    k: u32,
    full: u32,
) {
    // SAFETY: by the caller's contract; slabs follow each other in the stage.
    unsafe {
        match major {
            Major::K => ptx::cp_async_bulk_tensor_2d_load(dst, map, k, mn, full),
            Major::MN => {
                let mut slab = 0;
                while slab < extent / SLAB_N {
                    let dst = dst + slab * (BLOCK_K * SLAB_N * 2);
                    ptx::cp_async_bulk_tensor_2d_load(dst, map, mn + slab * SLAB_N, k, full);
                    slab += 1;
                }
            }
        }
    }
}

/// Fetches into L2 what [`load_operand`] will load.
///
/// # Safety
/// A valid map.
#[inline(always)]
unsafe fn prefetch_operand(map: u64, major: Major, extent: u32, mn: u32, k: u32) {
    // SAFETY: by the caller's contract.
    unsafe {
        match major {
            Major::K => ptx::cp_async_bulk_prefetch_tensor_2d(map, k, mn),
            Major::MN => {
                let mut slab = 0;
                while slab < extent / SLAB_N {
                    ptx::cp_async_bulk_prefetch_tensor_2d(map, mn + slab * SLAB_N, k);
                    slab += 1;
                }
            }
        }
    }
}
