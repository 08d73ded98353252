//! Device side of the kernels with a halo.

use super::super::{Place, TileScheduler};
use super::*;
use crate::activation::EpilogueActivation;
use crate::gemm::hopper::device::{Element, activate};
use crate::gemm::hopper::{BLOCK_K, CONSUMER_M};
use crate::pipeline::RingPosition;
use crate::ptx;
use crate::smem_layout::{stmatrix_offset, stmatrix_trans_offset};

/// Where the block's shared memory and its rings lie.
#[derive(Clone, Copy)]
pub(super) struct Block {
    pub(super) tile: HaloTile,
    smem: u32,
    /// Of the filter's taps.
    pub(super) filter: RingBarriers,
    /// Of the haloed tiles.
    pub(super) input: RingBarriers,
    /// Of the slabs of a channels-first input: each lap is a haloed tile.
    slabs: RingBarriers,
    /// Where consumers that alternate wait for their turns.
    turns: u32,
}

/// Warps that transpose.
const TRANSPOSERS: u32 = 3;

impl Block {
    /// Initialises the barriers. The grid before this one may still run.
    ///
    /// # Safety
    /// Every thread of the block calls it once, first; `tile.smem_bytes()` of dynamic shared memory
    /// (`Kernel::smem_bytes`, which `launch` on the host passes).
    #[inline(always)]
    pub(super) unsafe fn start(tile: HaloTile) -> Self {
        let smem = ptx::dynamic_smem();
        let base = smem + tile.barrier_offset();
        let filter = RingBarriers { base, num_stages: tile.filter_stages };
        let base = base + RingBarriers::bytes(tile.filter_stages);
        let input = RingBarriers { base, num_stages: tile.buffers };
        let base = base + RingBarriers::bytes(tile.buffers);
        let slabs = RingBarriers { base, num_stages: tile.input_slabs() };
        let turns = base + RingBarriers::bytes(tile.input_slabs());
        let fillers = if tile.transposes { TRANSPOSERS } else { 1 };
        // SAFETY: one thread, before the barrier, inside the shared memory; the whole block is here.
        unsafe {
            if ptx::thread_index() == 0 {
                filter.init(1, tile.readers());
                ptx::mbarrier_init(turns, 1);
                ptx::mbarrier_init(turns + 8, 1);
                slabs.init(1, TRANSPOSERS);
                // Its fence makes these visible, too.
                input.init(fillers, tile.readers());
            }
            ptx::bar_sync_all();
        }
        Self { tile, smem, filter, input, slabs, turns }
    }

    /// Waits until the other consumer has begun to multiply its last batch of the tile before.
    ///
    /// Without turns a consumer might wait for a stage that is two laps behind, whose parity is the
    /// one that it waits for.
    ///
    /// # Safety
    /// A consumer's threads call it, before its tile number `tile`.
    #[inline(always)]
    pub(super) unsafe fn wait_turn(self, consumer: u32, tile: u32) {
        // The first turn of the first consumer counts as begun.
        let parity = (tile ^ consumer ^ 1) & 1;
        // SAFETY: an initialised barrier.
        while !unsafe { ptx::mbarrier_try_wait_parity(self.turns + 8 * consumer, parity) } {}
    }

    /// Gives the other consumer its turn.
    ///
    /// # Safety
    /// One thread of a consumer calls it, once for each `wait_turn`.
    #[inline(always)]
    pub(super) unsafe fn end_turn(self, consumer: u32) {
        // SAFETY: an initialised barrier.
        unsafe { ptx::mbarrier_arrive(self.turns + 8 * (consumer ^ 1)) };
    }

    /// A tap's matrix.
    #[inline(always)]
    pub(super) fn stage(self, stage: u32) -> u32 {
        self.smem + stage * self.tile.filter_bytes()
    }

    /// A haloed tile.
    #[inline(always)]
    pub(super) fn buffer(self, buffer: u32) -> u32 {
        self.smem + self.tile.buffer_offset() + buffer * (ROWS * ROW_BYTES)
    }

    /// Where the slabs of a channels-first input begin.
    #[inline(always)]
    fn input_slabs(self) -> u32 {
        self.smem + self.tile.input_slab_offset()
    }

    /// Row of a haloed tile that the first tap meets for the first position.
    #[inline(always)]
    pub(super) fn first_row(self, walk: Walk) -> u32 {
        // Tiles begin on multiples of 8 plus `in_first`.
        if self.tile.transposes { walk.in_first as u32 & 7 } else { 0 }
    }

    /// Transposes the slabs of every tile of this block.
    ///
    /// # Safety
    /// The whole of warps 1 to 3 call it; the block's shared memory.
    #[inline(always)]
    pub(super) unsafe fn transpose(self, tiles: TileScheduler, walk: Walk) {
        let (warp, lane) = (ptx::thread_index() / 32 - 1, ptx::thread_index() % 32);
        let (mut slab, mut buffer) = (RingPosition::START, RingPosition::START);
        let mut index = ptx::block_index();
        while index < tiles.num_tiles() {
            let mut block_channel = 0;
            while block_channel < walk.channel_blocks {
                let (src, dst) = (self.input_slabs(), self.buffer(buffer.stage));
                let load = |piece: u32| {
                    // SAFETY: a row of a slab that has landed.
                    unsafe { ptx::ldmatrix_x4_trans(src + piece_in_slabs(piece, lane)) }
                };
                let store = |piece: u32, [a, b, c, d]: [u32; 4]| {
                    // SAFETY: a position of a tile that its readers have released.
                    unsafe { ptx::stmatrix_x4(dst + piece_in_tile(piece, lane), a, b, c, d) };
                };
                // SAFETY: whole warps, by the caller's contract; a slab is released after its loads.
                unsafe {
                    self.input.wait_empty(buffer);
                    let mut first = 0;
                    while first < PIECES {
                        ptx::nounroll();
                        // A warp's pieces of the slab, at most six: all are loaded before the
                        // first is stored. Beyond the last piece, the last is moved once more.
                        let most =
                            if first + SLAB_PIECES < PIECES { first + SLAB_PIECES } else { PIECES };
                        let piece = |number: u32| {
                            let piece = first + warp + number * TRANSPOSERS;
                            if piece < most { piece } else { most - 1 }
                        };
                        self.slabs.wait_full(slab);
                        let (a, b) = (load(piece(0)), load(piece(1)));
                        if most - first == SLAB_PIECES {
                            let (c, d) = (load(piece(2)), load(piece(3)));
                            let (e, f) = (load(piece(4)), load(piece(5)));
                            store(piece(2), c);
                            store(piece(3), d);
                            store(piece(4), e);
                            store(piece(5), f);
                        }
                        store(piece(0), a);
                        store(piece(1), b);
                        ptx::bar_warp_sync();
                        if lane == 0 {
                            ptx::mbarrier_arrive(self.slabs.empty(slab.stage));
                        }
                        slab = slab.next(self.tile.input_slabs());
                        first += SLAB_PIECES;
                    }
                    ptx::fence_proxy_async_shared();
                    ptx::bar_warp_sync();
                    if lane == 0 {
                        ptx::mbarrier_arrive(self.input.full(buffer.stage));
                    }
                }
                buffer = buffer.next(self.tile.buffers);
                block_channel += 1;
            }
            index += ptx::grid_size();
        }
    }

    /// The first position and channel of a tile.
    #[inline(always)]
    pub(super) fn place(self, walk: Walk, (tile_m, tile_n): (u32, u32)) -> Place {
        walk.place(tile_n, tile_m, [POSITIONS, self.tile.channels])
    }

    /// Loads haloed tiles and the filter's taps for every tile of this block.
    ///
    /// # Safety
    /// One thread of the block calls it; the maps are 64-aligned addresses of maps with the boxes
    /// that [`GatherParams`] names (`conv1d/hopper.rs` of the host encodes them).
    #[inline(always)]
    pub(super) unsafe fn produce(
        self,
        [in_map, w_map]: [u64; 2],
        tiles: TileScheduler,
        walk: Walk,
    ) {
        // SAFETY: valid maps by the caller's contract.
        unsafe {
            ptx::prefetch_tensormap(in_map);
            ptx::prefetch_tensormap(w_map);
        }
        let (mut stage, mut buffer) = (RingPosition::START, RingPosition::START);
        let mut slab = RingPosition::START;
        let mut index = ptx::block_index();
        while index < tiles.num_tiles() {
            let place = self.place(walk, tiles.tile(index));
            let first = place.position.wrapping_add(walk.in_first as u32);
            let mut block_channel = 0;
            while block_channel < walk.channel_blocks {
                let channel = block_channel * BLOCK_K;
                // SAFETY: free once `empty` completes; the bytes expected are those of the boxes
                // issued; destinations are multiples of 1024.
                unsafe {
                    if self.tile.transposes {
                        let mut number = 0;
                        while number < self.tile.input_slabs() {
                            let full = self.slabs.full(slab.stage);
                            self.slabs.wait_empty(slab);
                            ptx::mbarrier_arrive_expect_tx(full, SLAB_BYTES);
                            let dst = self.input_slabs() + slab.stage * SLAB_BYTES;
                            let position = (first & !7).wrapping_add(number * SLAB_POSITIONS);
                            let at = [position, channel, place.sequence, place.group];
                            ptx::cp_async_bulk_tensor_4d_load(dst, in_map, at, full);
                            slab = slab.next(self.tile.input_slabs());
                            number += 1;
                        }
                    } else {
                        let full = self.input.full(buffer.stage);
                        let dst = self.buffer(buffer.stage);
                        self.input.wait_empty(buffer);
                        ptx::mbarrier_arrive_expect_tx(full, ROWS * ROW_BYTES);
                        let at = [channel, first, place.sequence, place.group];
                        ptx::cp_async_bulk_tensor_4d_load(dst, in_map, at, full);
                        let at = [channel, first + BOX_ROWS, place.sequence, place.group];
                        let dst = dst + BOX_ROWS * ROW_BYTES;
                        ptx::cp_async_bulk_tensor_4d_load(dst, in_map, at, full);
                        buffer = buffer.next(self.tile.buffers);
                    }
                }
                let mut filter_tap = walk.first_tap;
                let mut tap = 0;
                while tap < walk.taps {
                    let (full, dst) = (self.filter.full(stage.stage), self.stage(stage.stage));
                    let at = [channel, place.channel, filter_tap, place.group];
                    // SAFETY: as above.
                    unsafe {
                        self.filter.wait_empty(stage);
                        ptx::mbarrier_arrive_expect_tx(full, self.tile.filter_bytes());
                        ptx::cp_async_bulk_tensor_4d_load(dst, w_map, at, full);
                    }
                    stage = stage.next(self.tile.filter_stages);
                    filter_tap = filter_tap.wrapping_add(walk.tap_stride as u32);
                    tap += 1;
                }
                block_channel += 1;
            }
            index += ptx::grid_size();
        }
    }
}

/// One consumer warpgroup's slabs of the output.
#[derive(Clone, Copy)]
pub(super) struct Slabs {
    first: u32,
    consumer: u32,
    /// First of its channels in the tile.
    channel: u32,
    out_map: u64,
    output: SequenceLayout,
    activation: EpilogueActivation,
}

impl Slabs {
    #[inline(always)]
    pub(super) fn new(
        block: Block,
        consumer: u32,
        out_map: u64,
        output: SequenceLayout,
        activation: EpilogueActivation,
    ) -> Self {
        let first = block.smem + block.tile.slab_offset() + consumer * (SLABS * SLAB_BYTES);
        let channel = block.tile.share(consumer) * CONSUMER_M;
        Self { first, consumer, channel, out_map, output, activation }
    }

    /// Waits until the warpgroup may overwrite the next slab.
    ///
    /// # Safety
    /// The whole warpgroup calls it.
    #[inline(always)]
    pub(super) unsafe fn begin(self) {
        if ptx::thread_index() % 128 == 0 {
            // The store that last read it, two stores ago, has finished reading.
            ptx::cp_async_bulk_wait_group_read::<1>();
        }
        // SAFETY: the whole warpgroup, by the caller's contract.
        unsafe { self.sync() };
    }

    /// Finishes 16 positions: registers `8·group ..` of the tile, rows `n` and `n + 8`, whose bias
    /// is given.
    ///
    /// # Safety
    /// The whole warpgroup calls it, between `begin` and `end`.
    #[inline(always)]
    pub(super) unsafe fn columns<E: Element>(self, group: u32, c: [f32; 8], bias: [f32; 2]) {
        let [low, high] = bias;
        let c = activate(
            self.activation,
            [
                c[0] + low,
                c[1] + low,
                c[2] + high,
                c[3] + high,
                c[4] + low,
                c[5] + low,
                c[6] + high,
                c[7] + high,
            ],
        );
        let [a, b, c, d] =
            [E::pack(c[1], c[0]), E::pack(c[3], c[2]), E::pack(c[5], c[4]), E::pack(c[7], c[6])];
        let slab = self.first + group / 4 % SLABS * SLAB_BYTES;
        let thread = ptx::thread_index() % 128;
        // SAFETY: inside this warpgroup's slab, which `begin` has freed.
        unsafe {
            match self.output {
                SequenceLayout::Ncl => {
                    let address = slab + stmatrix_offset(thread, group % 4);
                    ptx::stmatrix_x4(address, a, b, c, d);
                }
                SequenceLayout::Nlc => {
                    let address = slab + stmatrix_trans_offset(thread, group % 4);
                    ptx::stmatrix_x4_trans(address, a, b, c, d);
                }
            }
        }
    }

    /// Stores slab `slab` of the tile at `place`.
    ///
    /// # Safety
    /// The whole warpgroup calls it, after the slab's four `columns`.
    #[inline(always)]
    pub(super) unsafe fn end(self, slab: u32, place: Place) {
        ptx::fence_proxy_async_shared();
        // SAFETY: the whole warpgroup, by the caller's contract.
        unsafe { self.sync() };
        if ptx::thread_index() % 128 == 0 {
            let (channel, position) = (place.channel + self.channel, place.position + slab * 64);
            let (inner, outer) = match self.output {
                SequenceLayout::Nlc => (channel, position),
                SequenceLayout::Ncl => (position, channel),
            };
            let at = [inner, outer, place.sequence, place.group];
            // SAFETY: every writer has fenced and the barrier is behind us; the slab is not written
            // again before `begin` has waited for this store, which clips to the output.
            unsafe {
                let src = self.first + slab % SLABS * SLAB_BYTES;
                ptx::cp_async_bulk_tensor_4d_store(self.out_map, at, src);
            }
            ptx::cp_async_bulk_commit_group();
        }
    }

    /// Waits for the stores: shared memory must outlive their reads.
    #[inline(always)]
    pub(super) fn finish(self) {
        if ptx::thread_index() % 128 == 0 {
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
                ptx::bar_sync::<1, 128>();
            } else {
                ptx::bar_sync::<2, 128>();
            }
        }
    }
}

/// Defines the entry for one element type, pair of layouts and tile.
macro_rules! entry {
    ($entry:ident, $element:ident, $ptx_type:literal, $input:ident, $output:ident,
     $channels:literal, $filter_stages:literal, $buffers:literal) => {
        $crate::ptx::wgmma::with_accumulators! { 256, device::entry! {
            @body $entry, $element, $ptx_type, $input, $output, $channels, $filter_stages, $buffers
        } }
    };
    (@body $entry:ident, $element:ident, $ptx_type:literal, $input:ident, $output:ident,
     $channels:literal, $filter_stages:literal, $buffers:literal
     $([$($c:ident)+])+) => {
        /// # Safety
        /// Launched by `launch` on the host with the geometry of its `Kernel` and parameters that
        /// the host's `conv1d/hopper.rs` has checked against the shape contract.
        #[unsafe(no_mangle)]
        pub unsafe extern "ptx-kernel" fn $entry(params: GatherParams) {
            use super::device::load_row_bias;
            use crate::gemm::hopper::CONSUMER_M;
            use crate::gemm::hopper::device::{
                CONSUMER_REGISTERS, PRODUCER_REGISTERS, wait_for_predecessors,
            };
            use crate::pipeline::RingPosition;
            use crate::ptx;
            use crate::smem_layout::{Major, descriptor_step_k16, wgmma_descriptor};
            use device::{Block, Slabs};

            const TILE: HaloTile = HaloTile {
                channels: $channels, filter_stages: $filter_stages, buffers: $buffers,
                transposes: matches!(SequenceLayout::$input, SequenceLayout::Ncl),
            };
            type Elements = crate::gemm::hopper::device::$element;
            let in_map: u64;
            // SAFETY: comments for `cargo xtask ptx`, and the parameter's own address: a reference
            // to `params` in Rust would be a copy in local memory, useless to TMA.
            unsafe {
                core::arch::asm!(
                    "// kasmina: .maxntid {threads}, 1, 1",
                    "// kasmina: .minnctapersm 1",
                    "// kasmina: .param_align 64",
                    concat!("mov.b64 {address}, ", stringify!($entry), "_param_0;"),
                    "cvta.param.u64 {address}, {address};",
                    address = out(reg64) in_map,
                    threads = const BLOCK_DIM,
                    options(pure, nomem, nostack, preserves_flags),
                );
            }
            let (tiles, walk) = (params.tiles, params.walk);

            // SAFETY: the whole block is here.
            let (block, warpgroup) = unsafe {
                (Block::start(TILE), ptx::shfl_sync_idx_first(ptx::thread_index() / 128))
            };
            wait_for_predecessors();
            if warpgroup == 0 {
                // SAFETY: the whole producer warpgroup, which starts with more registers; one
                // thread produces, with the maps of the parameters; three whole warps transpose.
                unsafe {
                    ptx::setmaxnreg_dec::<PRODUCER_REGISTERS>();
                    let warp = ptx::shfl_sync_idx_first(ptx::thread_index() / 32);
                    if warp > 0 {
                        if TILE.transposes {
                            block.transpose(tiles, walk);
                        }
                    } else if ptx::thread_index() == 0 {
                        block.produce([in_map, in_map + 128], tiles, walk);
                    }
                }
            } else {
                // SAFETY: whole consumer warpgroups; the producer frees what they take.
                unsafe { ptx::setmaxnreg_inc::<CONSUMER_REGISTERS>() };
                let consumer = warpgroup - 1;
                let output = SequenceLayout::$output;
                let slabs = Slabs::new(block, consumer, in_map + 256, output, params.activation);
                let elected = ptx::thread_index() % 128 == 0;
                let share = TILE.share(consumer);
                let mut tile = 0u32;
                let (mut stage, mut buffer) = (RingPosition::START, RingPosition::START);
                let mut index = ptx::block_index();
                $($(let mut $c = 0.0f32;)+)+
                while index < tiles.num_tiles() {
                    if TILE.readers() == 1 {
                        let mine = tile % CONSUMERS == consumer;
                        tile += 1;
                        if !mine {
                            stage = stage.after(walk.k_blocks(), TILE.filter_stages);
                            buffer = buffer.after(walk.channel_blocks, TILE.buffers);
                            index += ptx::grid_size();
                            continue;
                        }
                    }
                    let place = block.place(walk, tiles.tile(index));
                    let bias =
                        load_row_bias::<Elements>(params.bias, params.group_out, place, share);
                    let (mut previous, mut previous_buffer) = (stage.stage, buffer.stage);
                    if TILE.readers() == 1 {
                        // SAFETY: this consumer's threads; it has every other tile.
                        unsafe { block.wait_turn(consumer, (tile - 1) / CONSUMERS) };
                    }
                    let mut step = 0u32;
                    let mut block_channel = 0;
                    while block_channel < walk.channel_blocks {
                        let mut row =
                            block.buffer(buffer.stage) + block.first_row(walk) * ROW_BYTES;
                        // SAFETY: an initialised barrier, and this is a consumer's position.
                        unsafe { block.input.wait_full(buffer) };
                        let mut tap = 0;
                        while tap < walk.taps {
                            let filter = block.stage(stage.stage) + share * (CONSUMER_M * ROW_BYTES);
                            let a = wgmma_descriptor(filter, Major::K);
                            let b = wgmma_descriptor(row, Major::K);
                            // SAFETY: both have landed; the whole warpgroup executes it.
                            unsafe {
                                block.filter.wait_full(stage);
                                $crate::ptx::wgmma::wgmma_k64!(
                                    $ptx_type, 256, 0, 0,
                                    (descriptor_step_k16(Major::K)),
                                    (descriptor_step_k16(Major::K)),
                                    a, b, step, $($($c)+)+
                                );
                                // The batch before is complete: what it read may be overwritten.
                                if elected && step > 0 {
                                    ptx::mbarrier_arrive(block.filter.empty(previous));
                                    if tap == 0 {
                                        ptx::mbarrier_arrive(block.input.empty(previous_buffer));
                                    }
                                }
                            }
                            previous = stage.stage;
                            stage = stage.next(TILE.filter_stages);
                            row = row.wrapping_add(walk.tap_step * ROW_BYTES);
                            step += 1;
                            tap += 1;
                        }
                        previous_buffer = buffer.stage;
                        buffer = buffer.next(TILE.buffers);
                        block_channel += 1;
                    }
                    // SAFETY: the whole warpgroup; what the last batch read is released after it.
                    unsafe {
                        if TILE.readers() == 1 && elected {
                            block.end_turn(consumer);
                        }
                        $crate::ptx::wgmma::wgmma_wait_all!(256, $($($c)+)+);
                        if elected {
                            ptx::mbarrier_arrive(block.filter.empty(previous));
                            ptx::mbarrier_arrive(block.input.empty(previous_buffer));
                        }
                    }
                    let mut group = 0;
                    $(
                        // SAFETY: the whole warpgroup goes through the slabs in order.
                        unsafe {
                            if group % 4 == 0 {
                                slabs.begin();
                            }
                            slabs.columns::<Elements>(group, [$($c),+], bias);
                            if group % 4 == 3 {
                                slabs.end(group / 4, place);
                            }
                        }
                        group += 1;
                    )+
                    let _ = group;
                    index += ptx::grid_size();
                }
                slabs.finish();
            }
        }
    };
}
pub(super) use entry;
