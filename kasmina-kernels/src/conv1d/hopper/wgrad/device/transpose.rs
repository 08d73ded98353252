//! The transposition of a channels-first x.
//!
//! ```text
//! producer      wait empty[r] ─ TMA of 64 channels into raw box r
//! transposers   wait full[r] and the stage ─ ldmatrix.trans ─ stmatrix ─ arrive empty[r], full stage
//! ```

use super::super::{
    RAW_BYTES, RAW_STAGES, Split, TRANSPOSERS, Walk, piece_in_raw, raw_offset, raw_positions,
};
use crate::conv1d::hopper::gather::halo::piece_in_tile;
use crate::gemm::hopper::Tile;
use crate::gemm::hopper::device::Block;
use crate::pipeline::{RingBarriers, RingPosition};
use crate::ptx;

/// The ring of raw boxes.
#[derive(Clone, Copy)]
pub(in super::super) struct Raw {
    boxes: u32,
    pub(super) ring: RingBarriers,
}

impl Raw {
    /// Initialises its barriers.
    ///
    /// # Safety
    /// Every thread of the block calls it once, before a barrier of the block;
    /// `smem_bytes(stages, true)` of dynamic shared memory.
    #[inline(always)]
    pub(in super::super) unsafe fn start(stages: Tile) -> Self {
        let boxes = ptx::dynamic_smem() + raw_offset(stages);
        let base = boxes + RAW_STAGES * RAW_BYTES;
        let ring = RingBarriers { base, num_stages: RAW_STAGES };
        if ptx::thread_index() == 0 {
            // SAFETY: one thread, before first use, inside the shared memory.
            unsafe { ring.init(1, TRANSPOSERS) };
        }
        Self { boxes, ring }
    }

    /// A raw box.
    #[inline(always)]
    pub(super) fn stage(self, stage: u32) -> u32 {
        self.boxes + stage * RAW_BYTES
    }

    /// Transposes the boxes of every part of this block, each into the stage of its step.
    ///
    /// # Safety
    /// A whole warpgroup calls it, the last of the block.
    #[inline(always)]
    pub(in super::super) unsafe fn transpose(
        self,
        block: Block,
        tile: Tile,
        split: Split,
        walk: Walk,
    ) {
        let (warp, lane) = (ptx::thread_index() / 32 % TRANSPOSERS, ptx::thread_index() % 32);
        let pieces = walk.box_positions / 4;
        let positions = raw_positions(walk.box_positions);
        let (mut ring, mut raw) = (RingPosition::START, RingPosition::START);
        let mut part = ptx::block_index();
        while part < split.num_parts() {
            let (mut step, end) = split.range(part);
            while step < end {
                let segment = split.segment(part, step, end);
                step = segment.next;
                let mut left = segment.count;
                while left > 0 {
                    let (src, dst) = (self.stage(raw.stage), block.w_stage(ring.stage));
                    let load = |piece: u32| {
                        let at = src + piece_in_raw(piece, lane, positions);
                        // SAFETY: a row of a box that has landed.
                        unsafe { ptx::ldmatrix_x4_trans(at) }
                    };
                    let store = |piece: u32, [a, b, c, d]: [u32; 4]| {
                        // SAFETY: a position of a stage that its readers have released.
                        unsafe { ptx::stmatrix_x4(dst + piece_in_tile(piece, lane), a, b, c, d) };
                    };
                    // SAFETY: whole warps, by the caller's contract.
                    unsafe {
                        self.ring.wait_full(raw);
                        block.ring.wait_empty(ring);
                        let mut piece = warp;
                        while piece < pieces {
                            ptx::nounroll();
                            // Three are loaded before one is stored; at the end the first of them
                            // is moved more than once.
                            let [second, third] = [TRANSPOSERS, 2 * TRANSPOSERS]
                                .map(|on| if piece + on < pieces { piece + on } else { piece });
                            let (a, b, c) = (load(piece), load(second), load(third));
                            store(piece, a);
                            store(second, b);
                            store(third, c);
                            piece += 3 * TRANSPOSERS;
                        }
                        ptx::fence_proxy_async_shared();
                        ptx::bar_warp_sync();
                        if lane == 0 {
                            ptx::mbarrier_arrive(block.ring.full(ring.stage));
                            ptx::mbarrier_arrive(self.ring.empty(raw.stage));
                        }
                    }
                    ring = ring.next(tile.num_stages);
                    raw = raw.next(RAW_STAGES);
                    left -= 1;
                }
            }
            part += ptx::grid_size();
        }
    }
}
