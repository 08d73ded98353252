//! How blocks that share a tile, each with a part of k, add their sums.
//!
//! Each of the blocks keeps as many rows, those of one or two warps or of half a warp, and sends
//! the sums of the others:
//!
//! ```text
//! every warp        wait free ─ sums of others' rows to shared memory ─ bulk copies to them
//! warps of own rows wait received ─ add in the order of the blocks ─ arrive at the others' free
//! ```
//! All end together: a copy reads the shared memory of the block it comes from.
//!
//! Each element is summed by one block, its own part first and then those of the others in order:
//! the result has the same bits each time.

use super::{Block, WARPGROUP};
use crate::pipeline::RingBarriers;
use crate::ptx;

/// One block's side.
#[derive(Clone, Copy)]
pub(crate) struct Exchange {
    rank: u32,
    blocks: u32,
    /// Of the warpgroup, 0 to 127.
    thread: u32,
    outbox: u32,
    inbox: u32,
    /// Bytes of a piece: what one block sends another.
    bytes: u32,
    barriers: u32,
    /// Of the current tile.
    parity: u32,
}

impl Exchange {
    /// Initialises the two barriers behind those of the ring: `received` and `free`.
    ///
    /// # Safety
    /// One thread of the block calls it, and a cluster barrier follows before any other use.
    #[inline(always)]
    pub(super) unsafe fn init(ring: RingBarriers, blocks: u32) {
        let barriers = ring.base + RingBarriers::bytes(ring.num_stages);
        // SAFETY: `Tile::smem_bytes` has room for them.
        unsafe {
            ptx::mbarrier_init(barriers, 1);
            // Each of the others arrives once for each warp that reads there.
            ptx::mbarrier_init(barriers + 8, (blocks - 1) * if blocks == 2 { 2 } else { 1 });
        }
        ptx::fence_mbarrier_init();
    }

    #[inline(always)]
    pub(crate) fn new(block: Block) -> Self {
        let tile = block.tile;
        let outbox = block.smem + tile.exchange_offset();
        Self {
            rank: block.rank,
            blocks: tile.split_k,
            thread: ptx::thread_index() % WARPGROUP,
            outbox,
            inbox: outbox + (tile.split_k - 1) * tile.exchange_bytes(),
            bytes: tile.exchange_bytes(),
            barriers: block.ring.base + RingBarriers::bytes(block.ring.num_stages),
            parity: 0,
        }
    }

    /// Whether rows of this thread stay in this block.
    #[inline(always)]
    pub(crate) fn owns(self) -> bool {
        if self.blocks == 8 {
            self.thread / 32 == self.rank / 2
        } else {
            self.thread / (WARPGROUP / self.blocks) == self.rank
        }
    }

    /// The place of another block among the others.
    #[inline(always)]
    fn slot(self, other: u32) -> u32 {
        other - (other > self.rank) as u32
    }

    /// Waits until the others have taken what was sent last.
    ///
    /// # Safety
    /// The whole warpgroup calls it, first for each tile.
    #[inline(always)]
    pub(crate) unsafe fn begin(self) {
        // SAFETY: an initialised barrier. On the first tile that phase counts as completed.
        while !unsafe { ptx::mbarrier_try_wait_parity(self.barriers + 8, self.parity ^ 1) } {}
    }

    /// Puts this thread's sums of 16 columns into the outbox, if another block keeps their rows.
    ///
    /// # Safety
    /// Between `begin` and `swap`.
    #[inline(always)]
    pub(crate) unsafe fn put(self, group: u32, c: [f32; 8]) {
        // SAFETY: this thread's own places, which the others have taken.
        unsafe {
            if self.blocks == 8 {
                // Rows 0 to 7 of the warp go to one block, rows 8 to 15 to the next.
                let first = 2 * (self.thread / 32);
                let place = (group * 32 + self.thread % 32) * 16;
                if first != self.rank {
                    let piece = self.outbox + self.slot(first) * self.bytes;
                    ptx::st_shared_v4_f32(piece + place, [c[0], c[1], c[4], c[5]]);
                }
                if first + 1 != self.rank {
                    let piece = self.outbox + self.slot(first + 1) * self.bytes;
                    ptx::st_shared_v4_f32(piece + place, [c[2], c[3], c[6], c[7]]);
                }
            } else if !self.owns() {
                let keeper = self.thread / (WARPGROUP / self.blocks);
                let [low, high] = self.offsets(group);
                let piece = self.outbox + self.slot(keeper) * self.bytes;
                ptx::st_shared_v4_f32(piece + low, [c[0], c[1], c[2], c[3]]);
                ptx::st_shared_v4_f32(piece + high, [c[4], c[5], c[6], c[7]]);
            }
        }
    }

    /// Where a thread's eight sums of 16 columns lie in a piece, in two halves.
    #[inline(always)]
    fn offsets(self, group: u32) -> [u32; 2] {
        let threads = WARPGROUP / self.blocks;
        let first = (2 * group * threads + self.thread % threads) * 16;
        [first, first + threads * 16]
    }

    /// Sends the outbox and waits for the inbox.
    ///
    /// # Safety
    /// The whole warpgroup calls it, after every `put` of the tile.
    #[inline(always)]
    pub(crate) unsafe fn swap(self) {
        ptx::fence_proxy_async_shared();
        // SAFETY: the whole warpgroup; the only consumer's barrier. Every writer has fenced; the
        // others run until they have received this and expect as many bytes.
        unsafe {
            ptx::bar_sync::<1, WARPGROUP>();
            if self.thread == self.rank {
                ptx::mbarrier_arrive_expect_tx(self.barriers, (self.blocks - 1) * self.bytes);
            } else if self.thread < self.blocks {
                let peer = self.thread;
                // This block's place among the others of the peer.
                let place = self.rank - (self.rank > peer) as u32;
                ptx::cp_async_bulk_shared_cluster(
                    ptx::mapa_shared_cluster(self.inbox + place * self.bytes, peer),
                    self.outbox + self.slot(peer) * self.bytes,
                    self.bytes,
                    ptx::mapa_shared_cluster(self.barriers, peer),
                );
            }
            if self.owns() {
                while !ptx::mbarrier_try_wait_parity(self.barriers, self.parity) {}
            }
        }
    }

    /// `c` and what the others have summed for the same places, for rows that stay here.
    ///
    /// # Safety
    /// Between `swap` and `end`.
    #[must_use]
    #[inline(always)]
    pub(crate) unsafe fn add(self, group: u32, mut c: [f32; 8]) -> [f32; 8] {
        if !self.owns() {
            return c;
        }
        let mut other = 0;
        while other < self.blocks - 1 {
            let piece = self.inbox + other * self.bytes;
            // SAFETY: the other block's thread of this index has put them, and they have landed.
            unsafe {
                if self.blocks == 8 {
                    let place = (group * 32 + self.thread % 32) * 16;
                    let a = ptx::ld_shared_v4_f32(piece + place);
                    // Only one half is stored; the other may hold anything.
                    if self.rank % 2 == 0 {
                        c = [
                            c[0] + a[0],
                            c[1] + a[1],
                            c[2],
                            c[3],
                            c[4] + a[2],
                            c[5] + a[3],
                            c[6],
                            c[7],
                        ];
                    } else {
                        c = [
                            c[0],
                            c[1],
                            c[2] + a[0],
                            c[3] + a[1],
                            c[4],
                            c[5],
                            c[6] + a[2],
                            c[7] + a[3],
                        ];
                    }
                } else {
                    let [low, high] = self.offsets(group);
                    let a = ptx::ld_shared_v4_f32(piece + low);
                    let b = ptx::ld_shared_v4_f32(piece + high);
                    c = [
                        c[0] + a[0],
                        c[1] + a[1],
                        c[2] + a[2],
                        c[3] + a[3],
                        c[4] + b[0],
                        c[5] + b[1],
                        c[6] + b[2],
                        c[7] + b[3],
                    ];
                }
            }
            other += 1;
        }
        c
    }

    /// Lets the others send the next tile, if there is one: after the last they may have ended.
    ///
    /// # Safety
    /// The whole warpgroup calls it, after every `add` of the tile.
    #[inline(always)]
    pub(crate) unsafe fn end(&mut self, more: bool) {
        if more && self.owns() {
            // SAFETY: the whole warp; the others have the same tiles, and wait for this before
            // their next.
            unsafe {
                ptx::bar_warp_sync();
                let lane = self.thread % 32;
                if lane < self.blocks && lane != self.rank {
                    let free = ptx::mapa_shared_cluster(self.barriers + 8, lane);
                    ptx::mbarrier_arrive_shared_cluster(free);
                }
            }
        }
        self.parity ^= 1;
    }
}
