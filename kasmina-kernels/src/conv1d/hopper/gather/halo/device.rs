//! Device side of the kernels with a halo.

use super::super::device::place;
use super::super::{TileScheduler, Walk};
use super::*;
use crate::gemm::hopper::device::Block;
use crate::gemm::hopper::{BLOCK_K, CONSUMER_M, SLAB_N};
use crate::pipeline::RingPosition;
use crate::ptx;

/// Warps that transpose.
const TRANSPOSERS: u32 = 3;
/// Bytes of a position of 64 channels, and of a channel of a slab.
const ROW_BYTES: u32 = 128;
const SLAB_BYTES: u32 = SLAB_N * ROW_BYTES;

/// What a kernel is made for, and where its haloed tiles lie.
#[derive(Clone, Copy)]
pub(super) struct Halo {
    pub(super) tile: Tile,
    pub(super) input: SequenceLayout,
    pub(super) output: SequenceLayout,
    /// Of the haloed tiles.
    pub(super) ready: RingBarriers,
    /// Of the slabs.
    pub(super) raw: RingBarriers,
    smem: u32,
}

impl Halo {
    /// Initialises the barriers, before `Block::start` synchronises the block.
    ///
    /// # Safety
    /// Every thread of the block calls it once, first; the shared memory of the kernel.
    #[inline(always)]
    pub(super) unsafe fn start(tile: Tile, input: SequenceLayout, output: SequenceLayout) -> Self {
        let smem = ptx::dynamic_smem();
        let base = smem + tile.smem_bytes();
        let ready = RingBarriers { base, num_stages: BUFFERS };
        let raw = RingBarriers { base: base + RingBarriers::bytes(BUFFERS), num_stages: 1 };
        if ptx::thread_index() == 0 {
            let writers = match input {
                SequenceLayout::Nlc => 1,
                SequenceLayout::Ncl => TRANSPOSERS,
            };
            let mut buffer = 0;
            // SAFETY: one thread, before the block's barrier in `Block::start`, which follows.
            unsafe {
                while buffer < BUFFERS {
                    ptx::mbarrier_init(ready.full(buffer), writers);
                    ptx::mbarrier_init(ready.empty(buffer), tile.num_consumers());
                    buffer += 1;
                }
                ptx::mbarrier_init(raw.full(0), 1);
                ptx::mbarrier_init(raw.empty(0), TRANSPOSERS);
            }
        }
        Self { tile, input, output, ready, raw, smem }
    }

    #[inline(always)]
    const fn rows(self) -> u32 {
        extents(self.output, self.tile)[0] + halo(self.input, self.output)
    }

    #[inline(always)]
    const fn slabs(self) -> u32 {
        self.rows().div_ceil(SLAB_N)
    }

    /// Where the stages of the input would begin.
    #[inline(always)]
    const fn region(self) -> u32 {
        match self.output {
            SequenceLayout::Nlc => self.smem,
            SequenceLayout::Ncl => self.smem + self.tile.num_stages * self.tile.x_stage_bytes(),
        }
    }

    /// A haloed tile.
    #[inline(always)]
    pub(super) const fn buffer(self, buffer: u32) -> u32 {
        let rows = match self.input {
            SequenceLayout::Nlc => self.slabs() * SLAB_N,
            SequenceLayout::Ncl => self.rows(),
        };
        self.region() + buffer * (rows * ROW_BYTES)
    }

    /// The slabs, behind the haloed tiles.
    #[inline(always)]
    const fn raw_slabs(self) -> u32 {
        self.buffer(BUFFERS)
    }

    /// A tap's matrix.
    #[inline(always)]
    pub(super) fn filter(self, block: Block, stage: u32) -> u32 {
        match self.output {
            SequenceLayout::Nlc => block.w_stage(stage),
            SequenceLayout::Ncl => block.x_stage(stage),
        }
    }

    /// Position of the input in the first row of a haloed tile, and the row that the first tap
    /// meets for the tile's first position.
    #[inline(always)]
    pub(super) const fn first_row(self, walk: Walk, position: u32) -> (u32, u32) {
        let first = position.wrapping_add(walk.in_first as u32);
        match self.input {
            SequenceLayout::Nlc => (first, 0),
            SequenceLayout::Ncl => (first & !7, first & 7),
        }
    }

    /// Loads haloed tiles, or their slabs, and the filter's taps for every tile of this block.
    ///
    /// # Safety
    /// One thread of the block calls it; the maps are 64-aligned addresses of maps with the boxes
    /// that [`GatherParams`] names (`conv1d/hopper.rs` of the host encodes them).
    #[inline(always)]
    pub(super) unsafe fn produce(
        self,
        block: Block,
        [in_map, w_map]: [u64; 2],
        tiles: TileScheduler,
        walk: Walk,
    ) {
        // SAFETY: valid maps by the caller's contract.
        unsafe {
            ptx::prefetch_tensormap(in_map);
            ptx::prefetch_tensormap(w_map);
        }
        let filter_bytes = extents(self.output, self.tile)[1] * (BLOCK_K * 2);
        let (mut ring, mut input) = (RingPosition::START, RingPosition::START);
        let mut index = ptx::block_index();
        while index < tiles.num_tiles() {
            let place = place(walk, self.output, self.tile, tiles.tile(index));
            let (first, _) = self.first_row(walk, place.position);
            let mut block_channel = 0;
            while block_channel < walk.channel_blocks {
                let channel = block_channel * BLOCK_K;
                let (barriers, dst, buffers) = match self.input {
                    SequenceLayout::Nlc => (self.ready, self.buffer(input.stage), BUFFERS),
                    SequenceLayout::Ncl => (self.raw, self.raw_slabs(), 1),
                };
                let full = barriers.full(input.stage);
                // SAFETY: free once `empty` completes; the bytes expected are those of the boxes
                // issued; destinations are multiples of 1024.
                unsafe {
                    barriers.wait_empty(input);
                    ptx::mbarrier_arrive_expect_tx(full, self.slabs() * SLAB_BYTES);
                    let mut slab = 0;
                    while slab < self.slabs() {
                        let position = first.wrapping_add(slab * SLAB_N);
                        let (inner, outer) = match self.input {
                            SequenceLayout::Nlc => (channel, position),
                            SequenceLayout::Ncl => (position, channel),
                        };
                        let at = [inner, outer, place.sequence, place.group];
                        let dst = dst + slab * SLAB_BYTES;
                        ptx::cp_async_bulk_tensor_4d_load(dst, in_map, at, full);
                        slab += 1;
                    }
                }
                input = input.next(buffers);
                let mut filter_tap = walk.first_tap;
                let mut tap = 0;
                while tap < walk.taps {
                    let full = block.ring.full(ring.stage);
                    let at = [channel, place.channel, filter_tap, place.group];
                    // SAFETY: as above.
                    unsafe {
                        block.ring.wait_empty(ring);
                        ptx::mbarrier_arrive_expect_tx(full, filter_bytes);
                        let dst = self.filter(block, ring.stage);
                        ptx::cp_async_bulk_tensor_4d_load(dst, w_map, at, full);
                    }
                    ring = ring.next(self.tile.num_stages);
                    filter_tap = filter_tap.wrapping_add(walk.tap_stride as u32);
                    tap += 1;
                }
                block_channel += 1;
            }
            index += ptx::grid_size();
        }
    }

    /// Transposes slabs into haloed tiles for every tile of this block.
    ///
    /// # Safety
    /// The whole of warps 1 to 3 call it.
    #[inline(always)]
    pub(super) unsafe fn transpose(self, tiles: TileScheduler, walk: Walk) {
        let (warp, lane) = (ptx::thread_index() / 32 - 1, ptx::thread_index() % 32);
        let (mut slabs, mut ready) = (RingPosition::START, RingPosition::START);
        let mut index = ptx::block_index();
        while index < tiles.num_tiles() {
            let mut block_channel = 0;
            while block_channel < walk.channel_blocks {
                let (raw, dst) = (self.raw_slabs(), self.buffer(ready.stage));
                // Eight positions and 32 channels at a time.
                let pieces = self.rows() / 8 * 2;
                let load = |piece: u32| {
                    let (eight, half) = (piece / 2, piece % 2);
                    let channel = 32 * half + lane;
                    let row = raw + eight / 8 * SLAB_BYTES + channel * ROW_BYTES;
                    // SAFETY: a row of a slab that has landed.
                    unsafe { ptx::ldmatrix_x4_trans(row + ((eight ^ channel) % 8) * 16) }
                };
                let store = |piece: u32, [a, b, c, d]: [u32; 4]| {
                    let (eight, half) = (piece / 2, piece % 2);
                    let row = dst + (8 * eight + lane % 8) * ROW_BYTES;
                    let chunk = 4 * half + lane / 8;
                    // SAFETY: a position of a tile that its readers have released.
                    unsafe { ptx::stmatrix_x4(row + (chunk ^ (lane % 8)) * 16, a, b, c, d) };
                };
                // SAFETY: whole warps, by the caller's contract.
                unsafe {
                    self.raw.wait_full(slabs);
                    self.ready.wait_empty(ready);
                    let mut piece = warp;
                    while piece < pieces {
                        // Two at a time; at the end the same twice.
                        let next = piece + TRANSPOSERS;
                        let next = if next < pieces { next } else { piece };
                        let (near, far) = (load(piece), load(next));
                        store(piece, near);
                        store(next, far);
                        piece += 2 * TRANSPOSERS;
                    }
                    ptx::fence_proxy_async_shared();
                    ptx::bar_warp_sync();
                    if lane == 0 {
                        ptx::mbarrier_arrive(self.ready.full(ready.stage));
                        ptx::mbarrier_arrive(self.raw.empty(0));
                    }
                }
                slabs = slabs.next(1);
                ready = ready.next(BUFFERS);
                block_channel += 1;
            }
            index += ptx::grid_size();
        }
    }

    /// The addresses of the product's first and second operand: the rows of the haloed tile from
    /// `row` on and a tap's matrix, in the order of the output's layout.
    #[inline(always)]
    pub(super) fn operands(self, tile: u32, row: u32, filter: u32, consumer: u32) -> (u32, u32) {
        let input = tile + row * ROW_BYTES;
        let share = consumer * (CONSUMER_M * ROW_BYTES);
        match self.output {
            SequenceLayout::Nlc => (input + share, filter),
            SequenceLayout::Ncl => (filter + share, input),
        }
    }
}

/// Defines the entry for one element type, pair of layouts and tile.
macro_rules! entry {
    ($entry:ident, $element:ident, $ptx_type:literal, $input:ident, $output:ident,
     $block_m:literal, $block_n:tt, $num_stages:literal, $blocks:literal) => {
        $crate::ptx::wgmma::with_accumulators! { $block_n, device::entry! {
            @body $entry, $element, $ptx_type, $input, $output, $block_m, $block_n, $num_stages,
            $blocks
        } }
    };
    (@body $entry:ident, $element:ident, $ptx_type:literal, $input:ident, $output:ident,
     $block_m:literal, $block_n:tt, $num_stages:literal, $blocks:literal $([$($c:ident)+])+) => {
        /// # Safety
        /// Launched by `launch` on the host with the geometry of its `Kernel` and parameters that
        /// the host's `conv1d/hopper.rs` has checked against the shape contract.
        #[unsafe(no_mangle)]
        pub unsafe extern "ptx-kernel" fn $entry(params: GatherParams) {
            use super::device::{load_bias, needs_registers, place, store_tile};
            use crate::gemm::hopper::SLAB_N;
            use crate::gemm::hopper::device::{
                Block, CONSUMER_REGISTERS, Epilogue, PRODUCER_REGISTERS,
            };
            use crate::pipeline::RingPosition;
            use crate::ptx;
            use crate::smem_layout::{Major, descriptor_step_k16, wgmma_descriptor};
            use device::Halo;

            const TILE: Tile =
                Tile { block_m: $block_m, block_n: $block_n, num_stages: $num_stages, split_k: 1 };
            const INPUT: SequenceLayout = SequenceLayout::$input;
            const OUTPUT: SequenceLayout = SequenceLayout::$output;
            type Elements = crate::gemm::hopper::device::$element;
            let in_map: u64;
            // SAFETY: comments for `cargo xtask ptx`, and the parameter's own address: a reference
            // to `params` in Rust would be a copy in local memory, useless to TMA.
            unsafe {
                core::arch::asm!(
                    "// kasmina: .maxntid {threads}, 1, 1",
                    concat!("// kasmina: .minnctapersm ", $blocks),
                    "// kasmina: .param_align 64",
                    concat!("mov.b64 {address}, ", stringify!($entry), "_param_0;"),
                    "cvta.param.u64 {address}, {address};",
                    address = out(reg64) in_map,
                    threads = const TILE.block_dim(),
                    options(pure, nomem, nostack, preserves_flags),
                );
            }
            let (tiles, walk) = (params.tiles, params.walk);

            // SAFETY: the whole block is here.
            let (halo, block, warpgroup) = unsafe {
                let halo = Halo::start(TILE, INPUT, OUTPUT);
                let block = Block::start(TILE);
                (halo, block, ptx::shfl_sync_idx_first(ptx::thread_index() / 128))
            };
            $crate::gemm::hopper::device::wait_for_predecessors();
            if warpgroup == 0 {
                // SAFETY: the whole producer warpgroup, which starts with more registers; one
                // thread produces, with the maps of the parameters; three whole warps transpose.
                unsafe {
                    if needs_registers(TILE) {
                        ptx::setmaxnreg_dec::<PRODUCER_REGISTERS>();
                    }
                    let warp = ptx::shfl_sync_idx_first(ptx::thread_index() / 32);
                    if warp > 0 {
                        if matches!(INPUT, SequenceLayout::Ncl) {
                            halo.transpose(tiles, walk);
                        }
                    } else if ptx::thread_index() == 0 {
                        halo.produce(block, [in_map, in_map + 128], tiles, walk);
                    }
                }
            } else {
                if needs_registers(TILE) {
                    // SAFETY: whole consumer warpgroups; the producer frees what they take.
                    unsafe { ptx::setmaxnreg_inc::<CONSUMER_REGISTERS>() };
                }
                let consumer = warpgroup - 1;
                let (bias, group_out) = (params.bias, params.group_out);
                let epilogue = Epilogue::new(
                    block, consumer, in_map + 256, bias, params.out_channels, params.activation,
                );
                let elected = ptx::thread_index() % 128 == 0;
                let (mut position, mut ready) = (RingPosition::START, RingPosition::START);
                let mut index = ptx::block_index();
                $($(let mut $c = 0.0f32;)+)+
                while index < tiles.num_tiles() {
                    let place = place(walk, OUTPUT, TILE, tiles.tile(index));
                    let (column_bias, row_bias) =
                        load_bias::<Elements>(epilogue, OUTPUT, bias, group_out, place, consumer);
                    let (_, first_row) = halo.first_row(walk, place.position);
                    let (mut previous, mut previous_tile) = (position.stage, ready.stage);
                    let mut step = 0u32;
                    let mut block_channel = 0;
                    while block_channel < walk.channel_blocks {
                        let tile = halo.buffer(ready.stage);
                        // SAFETY: an initialised barrier, and this is a consumer's position.
                        unsafe { halo.ready.wait_full(ready) };
                        let mut row = first_row;
                        let mut tap = 0;
                        while tap < walk.taps {
                            let stage = position.stage;
                            let filter = halo.filter(block, stage);
                            let (a, b) = halo.operands(tile, row, filter, consumer);
                            let a = wgmma_descriptor(a, Major::K);
                            let b = wgmma_descriptor(b, Major::K);
                            // SAFETY: tile and stage have landed; the whole warpgroup executes it.
                            unsafe {
                                block.ring.wait_full(position);
                                $crate::ptx::wgmma::wgmma_k64!(
                                    $ptx_type, $block_n, 0, 0,
                                    (descriptor_step_k16(Major::K)),
                                    (descriptor_step_k16(Major::K)),
                                    a, b, step, $($($c)+)+
                                );
                                // The batch before is complete: what it read may be overwritten.
                                if elected && step > 0 {
                                    ptx::mbarrier_arrive(block.ring.empty(previous));
                                    if tap == 0 {
                                        ptx::mbarrier_arrive(halo.ready.empty(previous_tile));
                                    }
                                }
                            }
                            previous = stage;
                            position = position.next(TILE.num_stages);
                            row = row.wrapping_add(walk.tap_step);
                            step += 1;
                            tap += 1;
                        }
                        previous_tile = ready.stage;
                        ready = ready.next(BUFFERS);
                        block_channel += 1;
                    }
                    // SAFETY: the whole warpgroup; what the last batch read is released after it.
                    unsafe {
                        $crate::ptx::wgmma::wgmma_wait_all!($block_n, $($($c)+)+);
                        if elected {
                            ptx::mbarrier_arrive(block.ring.empty(previous));
                            ptx::mbarrier_arrive(halo.ready.empty(previous_tile));
                        }
                    }
                    store_tile! {
                        OUTPUT, Elements, epilogue, consumer, place, column_bias, row_bias,
                        $([$($c)+])+
                    }
                    index += ptx::grid_size();
                }
                epilogue.finish();
            }
        }
    };
}
pub(super) use entry;
