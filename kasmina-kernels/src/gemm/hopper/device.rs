//! Device side of the Hopper forward kernels.

use super::unaligned::device::{Slab, store_slab};
use super::*;
use crate::ptx;
use crate::smem_layout::{SWIZZLE_ROW_BYTES, stmatrix_offset};

mod element;
mod exchange;
mod f32_epilogue;
mod multiply;
mod operands;
mod producer;
mod share;
mod warps;
pub(crate) use element::{BF16, Element, F16};
pub(crate) use exchange::Exchange;
pub(crate) use f32_epilogue::{F32Epilogue, Output, TransposedEpilogue, load_some, store_some};
pub(crate) use multiply::multiply_tile;
pub(crate) use operands::{Matrices, Operands, Stage};
pub(crate) use producer::{Work, produce};
pub(super) use share::Shared;
pub(super) use warps::finish_tile;

// Three warpgroups start with 168 registers a thread each, 504 together: 40 + 2 · 232.
pub(crate) const PRODUCER_REGISTERS: u32 = 40;
pub(crate) const CONSUMER_REGISTERS: u32 = 232;

/// Whether consumers need more registers than the block starts with.
pub(crate) const fn needs_registers(tile: Tile) -> bool {
    tile.block_n == 256
}

/// Where the block's shared memory and its ring lie.
#[derive(Clone, Copy)]
pub(crate) struct Block {
    tile: Tile,
    smem: u32,
    pub(crate) ring: RingBarriers,
    /// Of the cluster: which part of k this block has, or which of the tiles below each other.
    rank: u32,
}

impl Block {
    /// Initialises the barriers. The grid before this one may still run: whoever touches global
    /// memory calls [`wait_for_predecessors`] first.
    ///
    /// # Safety
    /// Every thread of the block calls it once, first; `tile.smem_bytes()` of dynamic shared
    /// memory (`Kernel::smem_bytes`, which `launch` on the host passes).
    #[inline(always)]
    pub(crate) unsafe fn start(tile: Tile) -> Self {
        // SAFETY: the caller's contract.
        unsafe { Self::start_with(tile, 1, tile.num_consumers() * tile.cluster_m) }
    }

    /// As [`start`](Self::start), with a ring whose stages take so many arrivals, besides the bytes
    /// they expect, to be full, and so many to be released.
    ///
    /// # Safety
    /// As [`start`](Self::start).
    #[inline(always)]
    pub(crate) unsafe fn start_with(tile: Tile, arrivals: u32, releases: u32) -> Self {
        let smem = ptx::dynamic_smem();
        let ring = RingBarriers { base: smem + tile.barrier_offset(), num_stages: tile.num_stages };
        if ptx::thread_index() == 0 {
            // SAFETY: one thread, before the barrier below, inside the shared memory.
            unsafe {
                ring.init(arrivals, releases);
                if tile.split_k > 1 {
                    Exchange::init(ring, tile.split_k);
                }
            }
        }
        // SAFETY: the whole block is here, and the others of its cluster.
        unsafe {
            if tile.cluster() > 1 {
                ptx::barrier_cluster_relaxed();
            } else {
                ptx::bar_sync_all();
            }
        }
        Self { tile, smem, ring, rank: ptx::block_index() % tile.cluster() }
    }

    /// The first tile of this block and of those it shares tiles with.
    #[inline(always)]
    pub(crate) fn first_tile(self) -> u32 {
        ptx::block_index() / self.tile.cluster()
    }

    /// From a tile of this block to its next.
    #[inline(always)]
    pub(crate) fn tile_step(self) -> u32 {
        ptx::grid_size() / self.tile.cluster()
    }

    /// How many of `k_blocks` steps are this block's.
    #[inline(always)]
    pub(crate) fn steps(self, k_blocks: u32) -> u32 {
        let (begin, end) = self.tile.steps(self.rank_of_k(), k_blocks);
        end - begin
    }

    #[inline(always)]
    pub(crate) fn x_stage(self, stage: u32) -> u32 {
        self.smem + stage * self.tile.x_stage_bytes()
    }

    #[inline(always)]
    pub(crate) fn w_stage(self, stage: u32) -> u32 {
        self.smem + self.tile.w_offset() + stage * self.tile.w_stage_bytes()
    }

    /// Where the consumers' slabs lie.
    #[inline(always)]
    pub(crate) fn epilogue(self) -> u32 {
        self.smem + self.tile.y_offset()
    }
}

/// Waits until the grid before this one has ended and its results are visible, then lets the next
/// grid start. That order makes everything before the predecessor complete, too, when a grid
/// starts.
#[inline(always)]
pub(crate) fn wait_for_predecessors() {
    ptx::griddepcontrol_wait();
    ptx::griddepcontrol_launch_dependents();
}

/// Applies the activation.
#[inline(always)]
pub(crate) fn activate(activation: EpilogueActivation, c: [f32; 8]) -> [f32; 8] {
    if activation.smooth == 0 {
        c.map(|value| ptx::max_nan_f32(value, activation.lower))
    } else {
        c.map(|value| {
            let power = ptx::ex2_approx_f32(activation.sigmoid_exponent(value));
            value * ptx::rcp_approx_f32(1.0 + power)
        })
    }
}

/// One consumer warpgroup's side of the epilogue.
#[derive(Clone, Copy)]
pub(crate) struct Epilogue {
    tile: Tile,
    /// 0 or 1.
    consumer: u32,
    /// First row of the tile that is this consumer's.
    first_row: u32,
    /// Which of the blocks that share the tile this is.
    rank: u32,
    /// Of the warpgroup, 0 to 127.
    thread: u32,
    slabs: u32,
    bias_smem: u32,
    y_map: u64,
    /// Y, if TMA does not store it.
    plain: PlainRows,
    bias: u64,
    n: u32,
    activation: EpilogueActivation,
    /// Whether warps store their own rows, by TMA, without waiting for each other.
    by_warp: bool,
}

impl Epilogue {
    #[inline(always)]
    pub(crate) fn new(
        block: Block,
        consumer: u32,
        y_map: u64,
        bias: u64,
        n: u32,
        activation: EpilogueActivation,
    ) -> Self {
        let tile = block.tile;
        Self {
            tile,
            consumer,
            first_row: consumer * CONSUMER_M,
            rank: block.rank_of_k(),
            thread: ptx::thread_index() % WARPGROUP,
            slabs: block.smem + tile.y_offset() + consumer * (tile.slab_buffers() * SLAB_BYTES),
            bias_smem: block.smem + tile.bias_offset() + consumer * (tile.block_n * 4),
            y_map,
            plain: PlainRows::NONE,
            bias,
            n,
            activation,
            by_warp: false,
        }
    }

    /// Where slab `slab` of a tile lies until it is stored.
    #[inline(always)]
    fn slab(self, slab: u32) -> u32 {
        self.slabs + (slab % self.tile.slab_buffers()) * SLAB_BYTES
    }

    /// The same, which stores Y as `plain` says unless that is none.
    #[inline(always)]
    pub(crate) fn storing(self, plain: PlainRows) -> Self {
        Self { plain, ..self }
    }

    /// The same of a consumer that has tiles to itself: 64 rows are stored where `end_slab` says.
    #[inline(always)]
    pub(crate) fn of_whole_tiles(self) -> Self {
        Self { first_row: 0, ..self }
    }

    /// This thread's two bias elements of the tile at column `n`, as bits; 0 beyond the edge.
    /// Loaded before the main loop so that their latency hides behind it.
    #[inline(always)]
    pub(crate) fn load_bias(self, n: u32) -> (u16, u16) {
        let column = n + 2 * self.thread;
        let (mut low, mut high) = (0, 0);
        if self.bias != 0 && 2 * self.thread < self.tile.block_n {
            let address = self.bias + 2 * column as u64;
            // SAFETY: inside the bias's n elements; the host checks its length and alignment.
            unsafe {
                if column < self.n {
                    low = ptx::ld_global_u16(address);
                }
                if column + 1 < self.n {
                    high = ptx::ld_global_u16(address + 2);
                }
            }
        }
        (low, high)
    }

    /// Puts the bias where the warpgroup's other threads read it. The first barrier of the first
    /// slab orders it; the last barrier of the tile before ended its readers.
    #[inline(always)]
    pub(crate) fn publish_bias<E: Element>(self, (low, high): (u16, u16)) {
        if 2 * self.thread < self.tile.block_n {
            let address = self.bias_smem + 8 * self.thread;
            // SAFETY: this thread's own 8 bytes.
            unsafe {
                ptx::st_shared_f32(address, E::widen(low));
                ptx::st_shared_f32(address + 4, E::widen(high));
            }
        }
    }

    /// Waits until the warpgroup may overwrite the buffer of the next slab.
    ///
    /// # Safety
    /// The whole warpgroup calls it.
    #[inline(always)]
    pub(crate) unsafe fn begin_slab(self) {
        if self.stores() {
            // The store that last read this buffer, one or two stores ago, has finished reading.
            if self.tile.slab_buffers() == 2 {
                ptx::cp_async_bulk_wait_group_read::<1>();
            } else {
                ptx::cp_async_bulk_wait_group_read::<0>();
            }
        }
        // SAFETY: the whole warpgroup, by the caller's contract.
        unsafe { self.sync_writers() };
    }

    /// Finishes 16 columns: registers `8·group ..` of the tile, as
    /// `smem_layout::accumulator_position` places them. Gives back what it has put there, in pairs.
    ///
    /// # Safety
    /// The whole warpgroup calls it, between `begin_slab` and `end_slab`.
    #[inline(always)]
    pub(crate) unsafe fn columns<E: Element>(self, group: u32, mut c: [f32; 8]) -> [u32; 4] {
        let bias = self.bias_smem + (16 * group + 2 * (self.thread % 4)) * 4;
        // SAFETY: columns 16·group to 16·group + 15 are below block_n.
        let ((b0, b1), (b2, b3)) =
            unsafe { (ptx::ld_shared_v2_f32(bias), ptx::ld_shared_v2_f32(bias + 32)) };
        c = [
            c[0] + b0,
            c[1] + b1,
            c[2] + b0,
            c[3] + b1,
            c[4] + b2,
            c[5] + b3,
            c[6] + b2,
            c[7] + b3,
        ];
        // SAFETY: by the caller's contract.
        unsafe { self.biased_columns::<E>(group, c) }
    }

    /// The same for sums to which the bias has been added.
    ///
    /// # Safety
    /// As [`columns`](Self::columns).
    #[inline(always)]
    pub(crate) unsafe fn biased_columns<E: Element>(self, group: u32, mut c: [f32; 8]) -> [u32; 4] {
        c = activate(self.activation, c);
        let slab = group / 4;
        let address = self.slab(slab) + stmatrix_offset(self.thread, group % 4);
        let pairs =
            [E::pack(c[1], c[0]), E::pack(c[3], c[2]), E::pack(c[5], c[4]), E::pack(c[7], c[6])];
        // SAFETY: inside this warpgroup's buffer; `begin_slab` has freed it.
        unsafe { ptx::stmatrix_x4(address, pairs[0], pairs[1], pairs[2], pairs[3]) };
        pairs
    }

    /// Stores slab `slab` of the tile whose first row and column are `m` and `n`.
    ///
    /// # Safety
    /// The whole warpgroup calls it, after the slab's four `columns`.
    #[inline(always)]
    pub(crate) unsafe fn end_slab<E: Element>(self, slab: u32, m: u32, n: u32) {
        let rows = self.tile.store_rows();
        let first = self.rank * rows;
        let row = m + self.first_row + first;
        let column = n + slab * SLAB_N;
        // SAFETY: by the caller's contract; the buffer is complete, and is not written before
        // `begin_slab` has waited for the store, or for every thread.
        unsafe {
            let buffer = self.complete_slab(slab);
            if self.plain.address != 0 {
                let slab = Slab { buffer, first, rows, row, column };
                store_slab::<E>(self.plain, slab, self.thread, false);
            } else if self.stores() {
                let first = first + self.first_row_of_warp();
                let row = row + self.first_row_of_warp();
                let buffer = buffer + first * SWIZZLE_ROW_BYTES;
                ptx::cp_async_bulk_tensor_2d_store(self.y_map, column, row, buffer);
                ptx::cp_async_bulk_commit_group();
            }
        }
    }

    /// Makes what all threads have written of a slab visible, to TMA too; the slab's address.
    ///
    /// # Safety
    /// The whole warpgroup calls it.
    #[inline(always)]
    unsafe fn complete_slab(self, slab: u32) -> u32 {
        ptx::fence_proxy_async_shared();
        // SAFETY: the whole warpgroup, by the caller's contract.
        unsafe { self.sync_writers() };
        self.slab(slab)
    }

    /// Stores slab `slab` as `store` says, which gets Y's map and the buffer's address in one
    /// thread, after every writer has fenced; the buffer is not written again before `begin_slab`
    /// has waited for the store.
    ///
    /// # Safety
    /// The whole warpgroup calls it, after the slab's four `columns`.
    #[inline(always)]
    pub(crate) unsafe fn end_slab_with(self, slab: u32, store: impl FnOnce(u64, u32)) {
        // SAFETY: the whole warpgroup, by the caller's contract.
        let buffer = unsafe { self.complete_slab(slab) };
        if self.thread == 0 {
            store(self.y_map, buffer);
            ptx::cp_async_bulk_commit_group();
        }
    }

    /// Waits until everything stored so far is visible to the warpgroup.
    ///
    /// # Safety
    /// The whole warpgroup calls it.
    #[inline(always)]
    pub(super) unsafe fn complete_stores(self) {
        if self.stores() {
            ptx::cp_async_bulk_wait_group_all();
        }
        // SAFETY: the whole warpgroup, by the caller's contract.
        unsafe { self.sync() };
    }

    /// Whether any thread of the warpgroup says so.
    ///
    /// # Safety
    /// The whole warpgroup calls it.
    #[inline(always)]
    pub(super) unsafe fn any(self, said: bool) -> bool {
        // SAFETY: as for `sync`.
        unsafe {
            if self.consumer == 0 {
                ptx::bar_red_or::<1, WARPGROUP>(said)
            } else {
                ptx::bar_red_or::<2, WARPGROUP>(said)
            }
        }
    }

    /// Waits for the stores: shared memory must outlive their reads.
    #[inline(always)]
    pub(crate) fn finish(self) {
        if self.stores() {
            ptx::cp_async_bulk_wait_group_read::<0>();
        }
    }

    /// # Safety
    /// The whole warpgroup calls it.
    #[inline(always)]
    unsafe fn sync(self) {
        // SAFETY: barrier ids are immediates; each consumer has its own.
        unsafe {
            if self.consumer == 0 {
                ptx::bar_sync::<1, WARPGROUP>();
            } else {
                ptx::bar_sync::<2, WARPGROUP>();
            }
        }
    }
}

/// A comment for `cargo xtask ptx` where blocks share tiles or columns of W. A cluster of one is
/// not declared: it would start more slowly.
macro_rules! cluster_marker {
    (1 1) => {
        ""
    };
    ($blocks:literal 1) => {
        $crate::gemm::hopper::device::cluster_marker!(1 $blocks)
    };
    (1 $blocks:literal) => {
        concat!("// kasmina: .reqnctapercluster ", $blocks, ", 1, 1")
    };
}
pub(crate) use cluster_marker;

/// Defines the entry for one element type, major order of W and tile.
macro_rules! entry {
    ($entry:ident, $element:ident, $ptx_type:literal, $w_major:ident,
     $block_m:literal, $block_n:tt, $num_stages:literal, $split_k:tt, $cluster_m:tt) => {
        $crate::ptx::wgmma::with_accumulators! { $block_n, device::entry! {
            @body $entry, $element, $ptx_type, $w_major, $block_m, $block_n, $num_stages,
            $split_k, $cluster_m
        } }
    };
    (@body $entry:ident, $element:ident, $ptx_type:literal, $w_major:ident,
     $block_m:literal, $block_n:tt, $num_stages:literal, $split_k:tt, $cluster_m:tt
     $([$($c:ident)+])+) => {
        /// # Safety
        /// Launched by `launch` on the host with the geometry of its `Kernel` and parameters that
        /// `gemm.rs` has checked against the shape contract.
        #[unsafe(no_mangle)]
        pub unsafe extern "ptx-kernel" fn $entry(params: HopperGemmParams) {
            use crate::smem_layout::Major;
            use crate::{pipeline::RingPosition, ptx};
            use device::*;

            const TILE: Tile = Tile {
                block_m: $block_m, block_n: $block_n, num_stages: $num_stages, split_k: $split_k,
                cluster_m: $cluster_m,
            };
            const X_MAJOR: Major = Major::K;
            const W_MAJOR: Major = Major::$w_major;
            let x_map: u64;
            // SAFETY: comments for `cargo xtask ptx`, and the parameter's own address: a reference
            // to `params` in Rust would be a copy in local memory, useless to TMA.
            unsafe {
                core::arch::asm!(
                    "// kasmina: .maxntid {threads}, 1, 1",
                    "// kasmina: .minnctapersm 1",
                    device::cluster_marker!($split_k $cluster_m),
                    "// kasmina: .param_align 64",
                    concat!("mov.b64 {address}, ", stringify!($entry), "_param_0;"),
                    "cvta.param.u64 {address}, {address};",
                    address = out(reg64) x_map,
                    threads = const TILE.block_dim(),
                    options(pure, nomem, nostack, preserves_flags),
                );
            }
            let (w_map, y_map) = (x_map + 128, x_map + 256);
            let (tiles, k_blocks) = (params.tiles, params.k_blocks);

            let operands = Matrices { x_map, w_map, x_major: X_MAJOR, w_major: W_MAJOR };
            // SAFETY: the whole block is here.
            let (block, warpgroup) = unsafe {
                let block = Block::start(TILE);
                (block, ptx::shfl_sync_idx_first(ptx::thread_index() / WARPGROUP))
            };
            if warpgroup == 0 {
                // SAFETY: the whole producer warpgroup, which starts with more registers; one
                // thread produces, with the maps of the parameters.
                unsafe {
                    if needs_registers(TILE) {
                        ptx::setmaxnreg_dec::<PRODUCER_REGISTERS>();
                    }
                    if ptx::thread_index() == 0 {
                        let stage_bytes = params.stage_bytes;
                        let operands = Shared::new(operands, block);
                        produce(block, operands, Work { tiles, k_blocks, stage_bytes });
                    }
                }
            } else {
                if needs_registers(TILE) {
                    // SAFETY: whole consumer warpgroups; the producer frees what they take.
                    unsafe { ptx::setmaxnreg_inc::<CONSUMER_REGISTERS>() };
                }
                let consumer = warpgroup - 1;
                let epilogue = Epilogue::new(
                    block, consumer, y_map, params.bias, params.n, params.activation,
                )
                .of_forward()
                .storing(params.plain);
                let elected = block.releases();
                wait_for_predecessors();
                let k_steps = block.steps(k_blocks);
                let mut exchange = Exchange::new(block);
                let mut position = RingPosition::START;
                let mut tile = block.first_tile();
                $($(let mut $c = 0.0f32;)+)+
                while tile < tiles.num_tiles() {
                    let (m, n) = block.corner(tiles, tile);
                    let bias = epilogue.load_bias(n);
                    multiply_tile! {
                        $ptx_type, $block_n, TILE, X_MAJOR, W_MAJOR, block, consumer, elected,
                        position, k_steps, $($($c)+)+
                    }
                    tile += block.tile_step();
                    if TILE.split_k > 1 {
                        let mut chunk = 0;
                        // SAFETY: the whole warpgroup, on both sides of the exchange.
                        unsafe {
                            exchange.begin();
                            $(
                                exchange.put(chunk, [$($c),+]);
                                chunk += 1;
                            )+
                            exchange.swap();
                            chunk = 0;
                            $(
                                [$($c),+] = exchange.add(chunk, [$($c),+]);
                                chunk += 1;
                            )+
                            exchange.end(tile < tiles.num_tiles());
                        }
                        let _ = chunk;
                    }
                    // SAFETY: the whole warpgroup.
                    unsafe { epilogue.share_bias::<$element>(bias) };
                    let branches = params.activation.smooth != 0 || params.plain.address != 0;
                    if TILE.stores_by_warp() && !branches {
                        let epilogue = epilogue.without_branches();
                        device::finish_tile! { $element, TILE, epilogue, exchange, m, n, $([$($c)+])+ }
                    } else {
                        device::finish_tile! { $element, TILE, epilogue, exchange, m, n, $([$($c)+])+ }
                    }
                }
                epilogue.finish();
            }
            if TILE.cluster() > 1 {
                // SAFETY: every thread of the cluster, at the end. Until then others may be
                // reading what this block sends, out of its shared memory, or arrive there.
                unsafe { ptx::barrier_cluster() };
            }
        }
    };
}
pub(super) use entry;
