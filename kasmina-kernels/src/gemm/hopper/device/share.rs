//! How blocks with tiles below each other share the columns of W that they have in common.
//!
//! Each loads its part of every stage of W into the shared memory of all of them, and X for itself.
//!
//! ```text
//! consumers    multiply ─ arrive at `empty` of every block: this one may load into us again
//! producer     wait empty (all blocks') ─ expect the whole stage ─ X ─ a part of W, multicast
//! ```
//! All end together: the last arrivals may still be under way to a block that has nothing to do.

use super::operands::{Matrices, Operands, Stage, load_operand};
use super::{BLOCK_K, Block, SLAB_BYTES, SLAB_N, Tile, TileScheduler, WARPGROUP};
use crate::ptx;
use crate::smem_layout::{Major, SWIZZLE_ROW_BYTES};

impl Block {
    /// The first row and column of a tile of this block.
    #[inline(always)]
    pub(crate) fn corner(self, tiles: TileScheduler, tile: u32) -> (u32, u32) {
        let (tile_m, tile_n) = tiles.tile(tile);
        let row = tile_m * self.tile.cluster_m + self.rank_of_tile();
        (row * self.tile.block_m, tile_n * self.tile.block_n)
    }

    /// Which of the tiles below each other is this block's.
    #[inline(always)]
    fn rank_of_tile(self) -> u32 {
        if self.tile.cluster_m > 1 { self.rank } else { 0 }
    }

    /// Which part of k this block has.
    #[inline(always)]
    pub(crate) fn rank_of_k(self) -> u32 {
        if self.tile.split_k > 1 { self.rank } else { 0 }
    }

    /// Whether this thread of a consumer releases stages: one does for each block that loads.
    #[inline(always)]
    pub(crate) fn releases(self) -> bool {
        ptx::thread_index() % WARPGROUP < self.tile.cluster_m
    }

    /// Releases a stage, to one of the blocks that load into it.
    ///
    /// # Safety
    /// A thread that [`releases`](Self::releases); its warpgroup's reads of the stage are complete.
    #[inline(always)]
    pub(crate) unsafe fn release(self, stage: u32) {
        let empty = self.ring.empty(stage);
        // SAFETY: an initialised barrier; the blocks of a cluster end together.
        unsafe {
            if self.tile.cluster_m > 1 {
                let block = ptx::thread_index() % WARPGROUP;
                ptx::mbarrier_arrive_shared_cluster(ptx::mapa_shared_cluster(empty, block));
            } else {
                ptx::mbarrier_arrive(empty);
            }
        }
    }
}

/// Two matrices of which a block loads X, and a part of W into every block that shares it.
#[derive(Clone, Copy)]
pub(crate) struct Shared {
    matrices: Matrices,
    rank: u32,
    blocks: u32,
}

impl Shared {
    #[inline(always)]
    pub(crate) fn new(matrices: Matrices, block: Block) -> Self {
        Self { matrices, rank: block.rank_of_tile(), blocks: block.tile.cluster_m }
    }
}

impl Operands for Shared {
    #[inline(always)]
    unsafe fn prefetch_maps(self) {
        // SAFETY: by the caller's contract.
        unsafe { self.matrices.prefetch_maps() }
    }

    #[inline(always)]
    unsafe fn prefetch_x(self, tile: Tile, m: u32, k_block: u32) {
        // SAFETY: by the caller's contract.
        unsafe { self.matrices.prefetch_x(tile, m, k_block) }
    }

    #[inline(always)]
    unsafe fn prefetch_w(self, tile: Tile, n: u32, k_block: u32) {
        if self.blocks == 1 {
            // SAFETY: by the caller's contract.
            unsafe { self.matrices.prefetch_w(tile, n, k_block) }
            return;
        }
        let (k, Matrices { w_map, w_major, .. }) = (k_block * BLOCK_K, self.matrices);
        let columns = if matches!(w_major, Major::K) { tile.w_rows() } else { SLAB_N };
        let mut part = 0;
        while part < tile.block_n {
            // SAFETY: a valid map by the caller's contract.
            unsafe {
                match w_major {
                    Major::K => ptx::cp_async_bulk_prefetch_tensor_2d(w_map, k, n + part),
                    Major::MN => {
                        let mut row = k;
                        while row < k + BLOCK_K {
                            ptx::cp_async_bulk_prefetch_tensor_2d(w_map, n + part, row);
                            row += tile.w_depth();
                        }
                    }
                }
            }
            part += columns;
        }
    }

    #[inline(always)]
    unsafe fn load(self, tile: Tile, stage: Stage, m: u32, n: u32, k_block: u32) {
        if self.blocks == 1 {
            // SAFETY: by the caller's contract.
            unsafe { self.matrices.load(tile, stage, m, n, k_block) }
            return;
        }
        let (k, mask) = (k_block * BLOCK_K, (1 << self.blocks) - 1);
        let (columns, Stage { x, w, full }) = (tile.w_rows(), stage);
        let first = self.rank * columns;
        let Matrices { x_map, w_map, x_major, w_major } = self.matrices;
        // SAFETY: the maps' boxes are those of `HopperGemmParams`; the stage is free in every
        // block, by the caller's contract.
        unsafe {
            match w_major {
                Major::K => {
                    let dst = w + first * SWIZZLE_ROW_BYTES;
                    ptx::cp_async_bulk_tensor_2d_multicast(dst, w_map, k, n + first, full, mask);
                }
                Major::MN if columns < SLAB_N => {
                    let row = self.rank * tile.w_depth();
                    let dst = w + row * SWIZZLE_ROW_BYTES;
                    ptx::cp_async_bulk_tensor_2d_multicast(dst, w_map, n, k + row, full, mask);
                }
                Major::MN => {
                    let mut column = first;
                    while column < first + columns {
                        let dst = w + column / SLAB_N * SLAB_BYTES;
                        let n = n + column;
                        ptx::cp_async_bulk_tensor_2d_multicast(dst, w_map, n, k, full, mask);
                        column += SLAB_N;
                    }
                }
            }
            load_operand(x_map, x_major, tile.block_m, x, m, k, full);
        }
    }
}
