//! Device side of the kernels for comparison.

use super::*;
use crate::gemm::hopper::device::{Block, Matrices, Operands, Stage, wait_for_predecessors};
use crate::gemm::hopper::{BLOCK_K, SLAB_BYTES, SLAB_N};
use crate::pipeline::RingPosition;
use crate::ptx;
use crate::smem_layout::SWIZZLE_ROW_BYTES;
use crate::tile_scheduler::TileScheduler;

// Three warpgroups start with 168 registers a thread each, 504 together: 72 + 2 · 216. Addresses
// take more than a producer that names boxes needs.
pub(super) const PRODUCER_REGISTERS: u32 = 72;
pub(super) const CONSUMER_REGISTERS: u32 = 216;

/// Threads that copy through pointers.
pub(super) const COPYING: u32 = 128;
/// Elements of a piece of 16 bytes, and such pieces in a row of a stage.
const PIECE: u32 = 8;
const PIECES: u32 = BLOCK_K / PIECE;
/// Rows of a stage that the threads copy at a time.
const ROWS_AT_ONCE: u32 = COPYING / PIECES;
/// Stages whose copies are under way before the threads wait for the first of them.
const AHEAD: u32 = 2;

/// A matrix through a pointer.
#[derive(Clone, Copy)]
pub(super) struct Pointer {
    pub(super) address: u64,
    /// Bytes from row to row.
    pub(super) stride: u64,
    pub(super) rows: u32,
    pub(super) columns: u32,
}

impl Pointer {
    /// Starts copying this thread's pieces of `rows` rows from `row` on, 64 columns from `column`
    /// on, into rows of 128 bytes with a 128-byte swizzle. What does not exist arrives as zeros.
    ///
    /// # Safety
    /// The matrix is readable, its address and stride multiples of 16; `dst` has room, and nothing
    /// accesses it before the copies are waited for.
    #[inline(always)]
    unsafe fn copy(self, dst: u32, rows: u32, row: u32, column: u32) {
        let thread = ptx::thread_index() % COPYING;
        let (within, piece) = (thread / PIECES, thread % PIECES);
        let column = column + piece * PIECE;
        let exist = if column < self.columns { self.columns - column } else { 0 };
        let bytes = 2 * if exist < PIECE { exist } else { PIECE };
        // `ROWS_AT_ONCE` is a multiple of 8: the swizzle is that of the thread's first row.
        let mut dst = dst + within * SWIZZLE_ROW_BYTES + ((piece ^ (within % 8)) * 16);
        let mut row = row + within;
        let mut src = self.address + u64::from(row) * self.stride + 2 * u64::from(column);
        let mut i = 0;
        while i < rows / ROWS_AT_ONCE {
            let bytes = if row < self.rows { bytes } else { 0 };
            // SAFETY: `bytes` bytes of the row exist; the caller's contract.
            unsafe { ptx::cp_async_cg_16(dst, src, bytes) };
            dst += ROWS_AT_ONCE * SWIZZLE_ROW_BYTES;
            src += u64::from(ROWS_AT_ONCE) * self.stride;
            row += ROWS_AT_ONCE;
            i += 1;
        }
    }
}

/// Feeds the ring for every tile of this block, through pointers.
///
/// # Safety
/// The first `COPYING` threads of the block call it; `full` barriers expect an arrival of each.
#[inline(always)]
pub(super) unsafe fn produce_by_pointers(
    block: Block,
    tile: Tile,
    [x, w]: [Pointer; 2],
    tiles: TileScheduler,
    k_blocks: u32,
) {
    let mut position = RingPosition::START;
    // The stage whose copies are waited for next, `AHEAD` stages behind.
    let mut landed = RingPosition::START;
    let mut under_way = 0;
    let mut index = ptx::block_index();
    while index < tiles.num_tiles() {
        let (tile_m, tile_n) = tiles.tile(index);
        let (m, n) = (tile_m * tile.block_m, tile_n * tile.block_n);
        let mut k_block = 0;
        while k_block < k_blocks {
            let k = k_block * BLOCK_K;
            // SAFETY: the stage is free once `empty` completes; its tiles have room.
            unsafe {
                block.ring.wait_empty(position);
                let slabs = block.w_stage(position.stage);
                let mut slab = 0;
                while slab < tile.block_n / SLAB_N {
                    w.copy(slabs + slab * SLAB_BYTES, BLOCK_K, k, n + slab * SLAB_N);
                    slab += 1;
                }
                x.copy(block.x_stage(position.stage), tile.block_m, m, k);
            }
            ptx::cp_async_commit_group();
            position = position.next(tile.num_stages);
            under_way += 1;
            if under_way > AHEAD {
                ptx::cp_async_wait_group::<AHEAD>();
                // SAFETY: this thread's pieces of that stage have landed.
                unsafe { publish(block, landed) };
                landed = landed.next(tile.num_stages);
                under_way = AHEAD;
            }
            k_block += 1;
        }
        index += ptx::grid_size();
    }
    ptx::cp_async_wait_group::<0>();
    while under_way > 0 {
        ptx::nounroll();
        // SAFETY: every copy has landed.
        unsafe { publish(block, landed) };
        landed = landed.next(tile.num_stages);
        under_way -= 1;
    }
}

/// Hands this thread's pieces of a stage to the tensor cores.
///
/// # Safety
/// They have landed.
#[inline(always)]
unsafe fn publish(block: Block, position: RingPosition) {
    // wgmma reads through the asynchronous proxy, `cp.async` wrote through the generic one.
    ptx::fence_proxy_async_shared();
    // SAFETY: an initialised barrier that expects this thread.
    unsafe { ptx::mbarrier_arrive(block.ring.full(position.stage)) };
}

/// One thread's part of feeding the ring between batches of products.
#[derive(Clone, Copy)]
pub(super) struct Feeder {
    pub(super) block: Block,
    pub(super) tile: Tile,
    pub(super) operands: Matrices,
    pub(super) tiles: TileScheduler,
    pub(super) k_blocks: u32,
    pub(super) stage_bytes: u32,
    position: RingPosition,
    index: u32,
    k_block: u32,
}

impl Feeder {
    #[inline(always)]
    pub(super) fn new(
        block: Block,
        tile: Tile,
        operands: Matrices,
        tiles: TileScheduler,
        k_blocks: u32,
        stage_bytes: u32,
    ) -> Self {
        let (position, index) = (RingPosition::START, ptx::block_index());
        Self { block, tile, operands, tiles, k_blocks, stage_bytes, position, index, k_block: 0 }
    }

    /// Loads the next stage, if there is one, once it is free.
    ///
    /// # Safety
    /// One thread calls it; the maps are those of the forward kernel's parameters. Stages are
    /// released without this thread from here on.
    #[inline(always)]
    pub(super) unsafe fn feed(&mut self) {
        if self.index >= self.tiles.num_tiles() {
            return;
        }
        let (tile_m, tile_n) = self.tiles.tile(self.index);
        let (m, n) = (tile_m * self.tile.block_m, tile_n * self.tile.block_n);
        let full = self.block.ring.full(self.position.stage);
        let x = self.block.x_stage(self.position.stage);
        let w = self.block.w_stage(self.position.stage);
        // SAFETY: the stage is free once `empty` completes; the bytes expected are those of the
        // boxes issued; destinations are whole stages, 1024-aligned.
        unsafe {
            self.block.ring.wait_empty(self.position);
            ptx::mbarrier_arrive_expect_tx(full, self.stage_bytes);
            self.operands.load(self.tile, Stage { x, w, full }, m, n, self.k_block);
        }
        self.position = self.position.next(self.tile.num_stages);
        self.k_block += 1;
        if self.k_block == self.k_blocks {
            self.k_block = 0;
            self.index += ptx::grid_size();
        }
    }
}

/// Initialises the block's ring: `full` barriers take so many arrivals.
///
/// # Safety
/// As `Block::start`.
#[inline(always)]
pub(super) unsafe fn start(tile: Tile, arrivals: u32) -> Block {
    // SAFETY: the caller's contract.
    let block = unsafe { Block::start_with(tile, arrivals, tile.num_consumers()) };
    wait_for_predecessors();
    block
}

/// Defines the entry for what it goes without and a tile.
macro_rules! entry {
    ($entry:ident, $without:ident, $warpgroups:literal, $block_m:literal, $block_n:tt,
     $num_stages:literal) => {
        $crate::ptx::wgmma::with_accumulators! { $block_n, device::entry! {
            @body $entry, $without, $warpgroups, $block_m, $block_n, $num_stages
        } }
    };
    (@body $entry:ident, $without:ident, $warpgroups:literal, $block_m:literal, $block_n:tt,
     $num_stages:literal $([$($c:ident)+])+) => {
        /// # Safety
        /// Launched by `launch` on the host with the geometry of its `Kernel` and parameters that
        /// `gemm.rs` has checked against the shape contract.
        #[unsafe(no_mangle)]
        pub unsafe extern "ptx-kernel" fn $entry(params: ComparisonParams) {
            use crate::gemm::hopper::device::{
                BF16, Epilogue, Matrices, needs_registers,
            };
            use crate::gemm::hopper::{BLOCK_K, CONSUMER_M, WARPGROUP};
            use crate::smem_layout::{Major, descriptor_step_k16, wgmma_descriptor};
            use crate::{pipeline::RingPosition, ptx};
            use device::*;

            const TILE: Tile = Tile::new($block_m, $block_n, $num_stages);
            const BY_POINTERS: bool = matches!(Without::$without, Without::TmaLoads);
            let x_map: u64;
            // SAFETY: comments for `cargo xtask ptx`, and the parameter's own address: a reference
            // to `params` in Rust would be a copy in local memory, useless to TMA.
            unsafe {
                core::arch::asm!(
                    "// kasmina: .maxntid {threads}, 1, 1",
                    "// kasmina: .minnctapersm 1",
                    "// kasmina: .param_align 64",
                    concat!("mov.b64 {address}, ", stringify!($entry), "_param_0;"),
                    "cvta.param.u64 {address}, {address};",
                    address = out(reg64) x_map,
                    threads = const 128 * $warpgroups,
                    options(pure, nomem, nostack, preserves_flags),
                );
            }
            let (w_map, y_map) = (x_map + 128, x_map + 256);
            let forward = params.forward;
            let (tiles, k_blocks) = (forward.tiles, forward.k_blocks);
            // SAFETY: the whole block is here.
            let (block, warpgroup) = unsafe {
                let block = start(TILE, if BY_POINTERS { COPYING } else { 1 });
                (block, ptx::shfl_sync_idx_first(ptx::thread_index() / WARPGROUP))
            };
            if BY_POINTERS && warpgroup == 0 {
                let x = Pointer {
                    address: params.x, stride: params.x_stride, rows: params.m, columns: params.k,
                };
                let w = Pointer {
                    address: params.w,
                    stride: params.w_stride,
                    rows: params.k,
                    columns: forward.n,
                };
                // SAFETY: the whole warpgroup, which starts with more registers.
                unsafe {
                    if needs_registers(TILE) {
                        ptx::setmaxnreg_dec::<PRODUCER_REGISTERS>();
                    }
                    produce_by_pointers(block, TILE, [x, w], tiles, k_blocks);
                }
            } else {
                if BY_POINTERS && needs_registers(TILE) {
                    // SAFETY: whole consumer warpgroups; the producer frees what they take.
                    unsafe { ptx::setmaxnreg_inc::<CONSUMER_REGISTERS>() };
                }
                let consumer = warpgroup - if BY_POINTERS { 1 } else { 0 };
                let epilogue = Epilogue::new(
                    block, consumer, y_map, forward.bias, forward.n, forward.activation,
                )
                .storing(params.forward.plain);
                let elected = ptx::thread_index() % WARPGROUP == 0;
                let feeds = !BY_POINTERS && ptx::thread_index() == 0;
                let (x_major, w_major) = (Major::K, Major::MN);
                let operands = Matrices { x_map, w_map, x_major, w_major };
                let mut feeder =
                    Feeder::new(block, TILE, operands, tiles, k_blocks, forward.stage_bytes);
                if feeds {
                    let mut stage = 1;
                    while stage < TILE.num_stages {
                        // SAFETY: one thread; every stage is free.
                        unsafe { feeder.feed() };
                        stage += 1;
                    }
                }
                let mut position = RingPosition::START;
                let mut tile = ptx::block_index();
                $($(let mut $c = 0.0f32;)+)+
                while tile < tiles.num_tiles() {
                    let (tile_m, tile_n) = tiles.tile(tile);
                    let (m, n) = (tile_m * TILE.block_m, tile_n * TILE.block_n);
                    let bias = epilogue.load_bias(n);
                    let mut previous = position.stage;
                    let mut k_block = 0u32;
                    while k_block < k_blocks {
                        let stage = position.stage;
                        let x = block.x_stage(stage) + consumer * (CONSUMER_M * BLOCK_K * 2);
                        let a = wgmma_descriptor(x, Major::K);
                        let b = wgmma_descriptor(block.w_stage(stage), Major::MN);
                        // SAFETY: the stage has landed; the whole warpgroup executes it. The batch
                        // before is complete after it: its stage may be overwritten. The stage
                        // behind the newest is the one before, or has not been used.
                        unsafe {
                            block.ring.wait_full(position);
                            ptx::wgmma::wgmma_k64!(
                                "bf16", $block_n,
                                (Major::K as u32), (Major::MN as u32),
                                (descriptor_step_k16(Major::K)),
                                (descriptor_step_k16(Major::MN)),
                                a, b, k_block, $($($c)+)+
                            );
                            if elected && k_block > 0 {
                                ptx::mbarrier_arrive(block.ring.empty(previous));
                            }
                            if feeds {
                                feeder.feed();
                            }
                        }
                        previous = stage;
                        position = position.next(TILE.num_stages);
                        k_block += 1;
                    }
                    // SAFETY: the whole warpgroup; the last batch's stage is released after it.
                    unsafe {
                        ptx::wgmma::wgmma_wait_all!($block_n, $($($c)+)+);
                        if elected {
                            ptx::mbarrier_arrive(block.ring.empty(previous));
                        }
                    }
                    tile += ptx::grid_size();
                    epilogue.publish_bias::<BF16>(bias);
                    let mut group = 0;
                    $(
                        // SAFETY: the whole warpgroup goes through the slabs in order.
                        unsafe {
                            if group % 4 == 0 {
                                epilogue.begin_slab();
                            }
                            epilogue.columns::<BF16>(group, [$($c),+]);
                            if group % 4 == 3 {
                                epilogue.end_slab::<BF16>(group / 4, m, n);
                            }
                        }
                        group += 1;
                    )+
                    let _ = group;
                }
                epilogue.finish();
            }
        }
    };
}
pub(super) use entry;
