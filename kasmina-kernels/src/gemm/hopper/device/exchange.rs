//! How two blocks that share a tile, each with half of k, add their sums.
//!
//! Each of the two keeps half of the rows, those of two warps, and sends the sums of the others:
//!
//! ```text
//! warps of the peer's rows   wait free ─ sums to shared memory ─ bulk copy to the peer
//! warps of the own rows      wait received ─ add ─ arrive at the peer's free ─ epilogue
//! ```
//! Both end together: a copy reads the shared memory of the block it comes from.
//!
//! Two numbers are added, so the order does not matter, and both blocks take the same part of
//! every tile: the result has the same bits each time.

use super::{Block, WARPGROUP};
use crate::pipeline::RingBarriers;
use crate::ptx;

/// One block's side.
#[derive(Clone, Copy)]
pub(crate) struct Exchange {
    rank: u32,
    /// Of the warpgroup, 0 to 127.
    thread: u32,
    outbox: u32,
    inbox: u32,
    bytes: u32,
    barriers: u32,
    /// Of the current tile.
    parity: u32,
}

/// Threads whose rows stay in a block.
const READERS: u32 = 64;

impl Exchange {
    /// Initialises the two barriers behind those of the ring: `received` and `free`.
    ///
    /// # Safety
    /// One thread of the block calls it, and a cluster barrier follows before any other use.
    #[inline(always)]
    pub(super) unsafe fn init(ring: RingBarriers) {
        let barriers = ring.base + RingBarriers::bytes(ring.num_stages);
        // SAFETY: `Tile::smem_bytes` has room for them.
        unsafe {
            ptx::mbarrier_init(barriers, 1);
            ptx::mbarrier_init(barriers + 8, READERS);
        }
        ptx::fence_mbarrier_init();
    }

    #[inline(always)]
    pub(crate) fn new(block: Block) -> Self {
        let bytes = block.tile.exchange_bytes();
        let outbox = block.smem + block.tile.exchange_offset();
        Self {
            rank: block.rank,
            thread: ptx::thread_index() % WARPGROUP,
            outbox,
            inbox: outbox + bytes,
            bytes,
            barriers: block.ring.base + RingBarriers::bytes(block.ring.num_stages),
            parity: 0,
        }
    }

    /// Whether this thread's rows stay in this block.
    #[inline(always)]
    pub(crate) fn owns(self) -> bool {
        self.thread / READERS == self.rank
    }

    /// Where this thread's eight sums of 16 columns lie in a box, in two pieces.
    #[inline(always)]
    fn offsets(self, group: u32) -> [u32; 2] {
        let first = (2 * group * READERS + self.thread % READERS) * 16;
        [first, first + READERS * 16]
    }

    /// Waits until the peer has taken what was sent last.
    ///
    /// # Safety
    /// The whole warpgroup calls it, first for each tile.
    #[inline(always)]
    pub(crate) unsafe fn begin(self) {
        if !self.owns() {
            // SAFETY: an initialised barrier. On the first tile that phase counts as completed.
            while !unsafe { ptx::mbarrier_try_wait_parity(self.barriers + 8, self.parity ^ 1) } {}
        }
    }

    /// Puts this thread's sums of 16 columns into the outbox, if the peer keeps its rows.
    ///
    /// # Safety
    /// Between `begin` and `swap`.
    #[inline(always)]
    pub(crate) unsafe fn put(self, group: u32, c: [f32; 8]) {
        if !self.owns() {
            let [low, high] = self.offsets(group);
            // SAFETY: this thread's own places, which the peer has taken.
            unsafe {
                ptx::st_shared_v4_f32(self.outbox + low, [c[0], c[1], c[2], c[3]]);
                ptx::st_shared_v4_f32(self.outbox + high, [c[4], c[5], c[6], c[7]]);
            }
        }
    }

    /// Sends the outbox and waits for the inbox.
    ///
    /// # Safety
    /// The whole warpgroup calls it, after every `put` of the tile.
    #[inline(always)]
    pub(crate) unsafe fn swap(self) {
        ptx::fence_proxy_async_shared();
        // SAFETY: the whole warpgroup; the only consumer's barrier. Every writer has fenced; the
        // peer runs until it has received this and expects as many bytes.
        unsafe {
            ptx::bar_sync::<1, WARPGROUP>();
            if self.thread == 0 {
                ptx::mbarrier_arrive_expect_tx(self.barriers, self.bytes);
                let peer = self.rank ^ 1;
                ptx::cp_async_bulk_shared_cluster(
                    ptx::mapa_shared_cluster(self.inbox, peer),
                    self.outbox,
                    self.bytes,
                    ptx::mapa_shared_cluster(self.barriers, peer),
                );
            }
            if self.owns() {
                while !ptx::mbarrier_try_wait_parity(self.barriers, self.parity) {}
            }
        }
    }

    /// `c` and what the peer has summed for the same places, for rows that stay here.
    ///
    /// # Safety
    /// Between `swap` and `end`.
    #[must_use]
    #[inline(always)]
    pub(crate) unsafe fn add(self, group: u32, c: [f32; 8]) -> [f32; 8] {
        if !self.owns() {
            return c;
        }
        let [low, high] = self.offsets(group);
        // SAFETY: the peer's thread of this index has put them, and they have landed.
        let (a, b) = unsafe {
            (ptx::ld_shared_v4_f32(self.inbox + low), ptx::ld_shared_v4_f32(self.inbox + high))
        };
        [
            c[0] + a[0],
            c[1] + a[1],
            c[2] + a[2],
            c[3] + a[3],
            c[4] + b[0],
            c[5] + b[1],
            c[6] + b[2],
            c[7] + b[3],
        ]
    }

    /// Lets the peer send the next tile, if there is one: after the last it may have ended.
    ///
    /// # Safety
    /// The whole warpgroup calls it, after every `add` of the tile.
    #[inline(always)]
    pub(crate) unsafe fn end(&mut self, more: bool) {
        if more && self.owns() {
            let free = ptx::mapa_shared_cluster(self.barriers + 8, self.rank ^ 1);
            // SAFETY: the peer has the same tiles, and waits for this before its next.
            unsafe { ptx::mbarrier_arrive_shared_cluster(free) };
        }
        self.parity ^= 1;
    }
}
