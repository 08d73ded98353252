//! Device side of the forward kernels with telemetry.

use super::*;
use crate::gemm::hopper::WARPGROUP;
use crate::ptx;
use crate::reduce::device as reduce;
use crate::smem_layout::swizzle_128b;

/// The warps of the producer's warpgroup that do not produce.
const HELPERS: u32 = 3;

/// What a kernel summarises its tiles by.
#[derive(Clone, Copy)]
pub(super) struct Telemetry {
    tile: Tile,
    smem: u32,
    n: u32,
}

impl Telemetry {
    /// Clears what the consumers say.
    ///
    /// # Safety
    /// Every thread of the block calls it, first, and the block's first barrier follows;
    /// `tile.telemetry_smem_bytes()` of dynamic shared memory.
    #[inline(always)]
    pub(super) unsafe fn start(tile: Tile, n: u32) -> Self {
        let this = Self { tile, smem: ptx::dynamic_smem(), n };
        if ptx::thread_index() == 0 {
            // SAFETY: nobody else accesses them before the barrier.
            unsafe {
                ptx::st_shared_u32(this.stored(0), 0);
                ptx::st_shared_u32(this.stored(1), 0);
            }
        }
        this
    }

    #[inline(always)]
    fn stored(self, consumer: u32) -> u32 {
        self.smem + self.tile.stored_offset() + 4 * consumer
    }

    #[inline(always)]
    fn records(self, set: u32) -> u32 {
        self.smem + self.tile.records_offset() + set * (self.tile.units() * RECORD_BYTES)
    }

    /// Says that this consumer's part of its first `tiles` tiles is stored.
    ///
    /// # Safety
    /// The thread that has stored them calls it.
    #[inline(always)]
    pub(super) unsafe fn say_stored(self, consumer: u32, tiles: u32) {
        ptx::cp_async_bulk_wait_group_all();
        // SAFETY: this consumer's own word.
        unsafe { ptx::st_release_cta_shared_u32(self.stored(consumer), tiles) };
    }

    /// Waits until both consumers' parts of the first `tiles` tiles are stored.
    ///
    /// # Safety
    /// The whole warp calls it.
    #[inline(always)]
    unsafe fn wait_stored(self, tiles: u32) {
        // SAFETY: words that consumers store to; the whole warp goes on together.
        unsafe {
            if ptx::opaque_u32(ptx::lane_index()) == 0 {
                let mut consumer = 0;
                while consumer < self.tile.num_consumers() {
                    while ptx::ld_acquire_cta_shared_u32(self.stored(consumer)) < tiles {
                        ptx::nanosleep(200);
                    }
                    consumer += 1;
                }
            }
            ptx::bar_warp_sync();
        }
    }

    /// Summarises every tile of this block but the last, as warp `warp` of three.
    ///
    /// # Safety
    /// The three warps call it, whole, with the block's tiles: from `first` on every `step`th.
    #[inline(always)]
    pub(super) unsafe fn help<E: reduce::Element>(
        self,
        params: &TelemetryParams,
        warp: u32,
        first: u32,
        step: u32,
    ) {
        let tiles = params.gemm.tiles;
        let (mut tile, mut done) = (first, 0);
        while tile + step < tiles.num_tiles() {
            ptx::nounroll();
            done += 1;
            let at = tiles.tile(tile);
            // SAFETY: Y is readable where the tile has been stored; two sets of records in turn, so
            // that one barrier is enough: the first warp has read a set before it comes to the
            // barrier after which the others write to it again.
            unsafe {
                self.wait_stored(done);
                let records = self.records(done % 2);
                let mut index = warp;
                while index < self.tile.units() {
                    ptx::nounroll();
                    let unit = self.tile.unit(params.segments.segments.rows, self.n, at, index);
                    let row_stride = params.segments.row_stride;
                    let source = Global {
                        address: params.segments.data
                            + u64::from(unit.row) * row_stride
                            + u64::from(unit.column) * 2,
                        row_stride,
                    };
                    self.summarise::<E>(params, source, unit, records + index * RECORD_BYTES);
                    index += HELPERS;
                }
                ptx::bar_sync::<3, { HELPERS * 32 }>();
                if warp == 0 {
                    self.merge(params, at, records);
                }
            }
            tile += step;
        }
    }

    /// Summarises the last tile of this block, whose slabs lie in the stages, as warp `warp` of
    /// consumer `consumer`.
    ///
    /// # Safety
    /// All consumer warps call it, whole, behind the barrier after their last slab; `stage(i)` is
    /// where slab i of the consumer lies.
    #[inline(always)]
    pub(super) unsafe fn finish<E: reduce::Element, const CONSUMERS: u32>(
        self,
        params: &TelemetryParams,
        at: (u32, u32),
        (consumer, warp): (u32, u32),
        slab: impl Fn(u32) -> u32,
    ) {
        let records = self.records(2);
        // SAFETY: slabs of this consumer's, which it has written, by the caller's contract.
        unsafe {
            if warp < self.tile.slabs() {
                let index = consumer * self.tile.slabs() + warp;
                let unit = self.tile.unit(params.segments.segments.rows, self.n, at, index);
                let source = Shared { address: slab(warp) };
                self.summarise::<E>(params, source, unit, records + index * RECORD_BYTES);
            }
            if CONSUMERS == 2 {
                ptx::bar_sync::<4, { 2 * WARPGROUP }>();
            } else {
                ptx::bar_sync::<4, WARPGROUP>();
            }
            if consumer == 0 && warp == 0 {
                self.merge(params, at, records);
            }
        }
    }

    /// # Safety
    /// The whole warp calls it; the unit is readable, `record` nobody else's before the next
    /// barrier.
    #[inline(always)]
    unsafe fn summarise<E: reduce::Element>(
        self,
        params: &TelemetryParams,
        source: impl reduce::Source,
        unit: Unit,
        record: u32,
    ) {
        // SAFETY: the caller's contract.
        unsafe {
            let rule = params.segments.rule();
            let partial = reduce::summary_of_block::<E>(source, unit.rows, unit.columns, rule);
            if ptx::opaque_u32(ptx::lane_index()) == 0 {
                reduce::put_record(record, &partial);
            }
        }
    }

    /// Merges the records of a tile to slots.
    ///
    /// # Safety
    /// The whole warp calls it, behind the barrier after all records.
    #[inline(always)]
    unsafe fn merge(self, params: &TelemetryParams, at: (u32, u32), records: u32) {
        let cut = params.segments.segments;
        let consumers = self.tile.num_consumers();
        let mut slab = 0;
        while slab < self.tile.slabs() {
            ptx::nounroll();
            if let Some(run) = self.tile.run(&cut, self.n, at, slab) {
                let record = |record: u32| {
                    let slab = run.first_slab + record / consumers;
                    let index = record % consumers * self.tile.slabs() + slab;
                    let unit = self.tile.unit(cut.rows, self.n, at, index);
                    (records + index * RECORD_BYTES, unit.rows * unit.columns)
                };
                let slot = (run.segment, run.index);
                // SAFETY: the caller's contract; the host makes a slot for every run.
                unsafe {
                    reduce::write_slot(&params.segments, slot, run.slabs * consumers, record);
                }
            }
            slab += cut.piece / SLAB_N;
        }
    }
}

/// A unit in Y, which another block's stores may share cache lines with: it is read past L1.
#[derive(Clone, Copy)]
struct Global {
    address: u64,
    row_stride: u64,
}

impl reduce::Source for Global {
    #[inline(always)]
    unsafe fn load(self, row: u32, x: u32, exists: bool) -> [u32; 4] {
        let address = self.address + u64::from(row) * self.row_stride + u64::from(16 * x);
        // SAFETY: the caller's contract; a slab starts at a multiple of 128 bytes of a row, and
        // rows at multiples of 16.
        unsafe { ptx::ld_relaxed_gpu_v4_u32_if(address, exists) }
    }
}

/// A unit in a slab in shared memory, with its swizzle.
#[derive(Clone, Copy)]
struct Shared {
    address: u32,
}

impl reduce::Source for Shared {
    #[inline(always)]
    unsafe fn load(self, row: u32, x: u32, _: bool) -> [u32; 4] {
        // SAFETY: inside the slab, whether or not the element exists in Y.
        unsafe { ptx::ld_shared_v4_u32(self.address + swizzle_128b(row, 16 * x)) }
    }
}

/// Defines the entry for one element type, major order of W and tile.
macro_rules! entry {
    ($entry:ident, $element:ident, $ptx_type:literal, $w_major:ident,
     $block_m:literal, $block_n:tt, $num_stages:literal) => {
        $crate::ptx::wgmma::with_accumulators! { $block_n, device::entry! {
            @body $entry, $element, $ptx_type, $w_major, $block_m, $block_n, $num_stages
        } }
    };
    (@body $entry:ident, $element:ident, $ptx_type:literal, $w_major:ident,
     $block_m:literal, $block_n:tt, $num_stages:literal $([$($c:ident)+])+) => {
        /// # Safety
        /// Launched by `launch` on the host with the geometry of its `Kernel` and parameters that
        /// `gemm/telemetry.rs` has checked against the shape contract.
        #[unsafe(no_mangle)]
        pub unsafe extern "ptx-kernel" fn $entry(params: TelemetryParams) {
            use crate::gemm::hopper::device::{
                self as forward, Block, Epilogue, Matrices, Work, produce, wait_for_predecessors,
            };
            use crate::gemm::hopper::{BLOCK_K, WARPGROUP};
            use crate::smem_layout::{Major, descriptor_step_k16, wgmma_descriptor};
            use crate::{pipeline::RingPosition, ptx, reduce::device as reduce};

            const TILE: Tile = Tile {
                block_m: $block_m, block_n: $block_n, num_stages: $num_stages, split_k: 1,
                cluster_m: 1,
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
                    "// kasmina: .param_align 64",
                    concat!("mov.b64 {address}, ", stringify!($entry), "_param_0;"),
                    "cvta.param.u64 {address}, {address};",
                    address = out(reg64) x_map,
                    threads = const TILE.block_dim(),
                    options(pure, nomem, nostack, preserves_flags),
                );
            }
            let (w_map, y_map) = (x_map + 128, x_map + 256);
            let (tiles, k_blocks) = (params.gemm.tiles, params.gemm.k_blocks);

            let operands = Matrices { x_map, w_map, x_major: X_MAJOR, w_major: W_MAJOR };
            // SAFETY: the whole block is here.
            let (block, telemetry, warp) = unsafe {
                let telemetry = device::Telemetry::start(TILE, params.gemm.n);
                let block = Block::start(TILE);
                (block, telemetry, ptx::shfl_sync_idx_first(ptx::thread_index() / 32))
            };
            if warp < WARPGROUP / 32 {
                // SAFETY: one thread of the producer warpgroup produces, with the maps of the
                // parameters, and its other warps help. They need about as many registers as
                // consumers do, so none change hands.
                unsafe {
                    if warp > 0 {
                        wait_for_predecessors();
                        let (first, step) = (block.first_tile(), block.tile_step());
                        telemetry.help::<reduce::$element>(&params, warp - 1, first, step);
                    } else if ptx::thread_index() == 0 {
                        let stage_bytes = params.gemm.stage_bytes;
                        produce(block, operands, Work { tiles, k_blocks, stage_bytes });
                    }
                }
            } else {
                let consumer = warp / (WARPGROUP / 32) - 1;
                let mut epilogue = Epilogue::new(
                    block, consumer, y_map, params.gemm.bias, params.gemm.n,
                    params.gemm.activation,
                );
                let elected = ptx::thread_index() % WARPGROUP == 0;
                wait_for_predecessors();
                let mut position = RingPosition::START;
                let (mut tile, mut done) = (block.first_tile(), 0);
                let mut at = (0, 0);
                $($(let mut $c = 0.0f32;)+)+
                while tile < tiles.num_tiles() {
                    at = tiles.tile(tile);
                    let (m, n) = (at.0 * TILE.block_m, at.1 * TILE.block_n);
                    let bias = epilogue.load_bias(n);
                    let mut previous = position.stage;
                    let mut k_block = 0u32;
                    let mut until =
                        if k_blocks < STEPS_BEFORE_STORED { k_blocks } else { STEPS_BEFORE_STORED };
                    loop {
                        while k_block < until {
                            let stage = position.stage;
                            let x = block.x_stage(stage) + consumer * (CONSUMER_M * BLOCK_K * 2);
                            let a = wgmma_descriptor(x, X_MAJOR);
                            let b = wgmma_descriptor(block.w_stage(stage), W_MAJOR);
                            // SAFETY: the stage has landed; the whole warpgroup executes it.
                            unsafe {
                                block.ring.wait_full(position);
                                ptx::wgmma::wgmma_k64!(
                                    $ptx_type, $block_n,
                                    (X_MAJOR as u32), (W_MAJOR as u32),
                                    (descriptor_step_k16(X_MAJOR)),
                                    (descriptor_step_k16(W_MAJOR)),
                                    a, b, k_block, $($($c)+)+
                                );
                                // The batch before is complete: its stage may be overwritten.
                                if elected && k_block > 0 {
                                    ptx::mbarrier_arrive(block.ring.empty(previous));
                                }
                            }
                            previous = stage;
                            position = position.next(TILE.num_stages);
                            k_block += 1;
                        }
                        if elected {
                            // SAFETY: this thread has stored the tiles before. The second time it
                            // says the same: that costs nothing, a condition would.
                            unsafe { telemetry.say_stored(consumer, done) };
                        }
                        if until == k_blocks {
                            break;
                        }
                        until = k_blocks;
                    }
                    // SAFETY: the whole warpgroup; the last batch's stage is released after it.
                    unsafe {
                        ptx::wgmma::wgmma_wait_all!($block_n, $($($c)+)+);
                        if elected {
                            ptx::mbarrier_arrive(block.ring.empty(previous));
                        }
                    }
                    tile += block.tile_step();
                    done += 1;
                    if tile >= tiles.num_tiles() {
                        // Nothing is loaded any more, and only this consumer has read its rows of
                        // X: its slabs stay there.
                        epilogue = epilogue.with_slabs_in_stages(block);
                    }
                    epilogue.publish_bias::<forward::$element>(bias);
                    let mut group = 0;
                    $(
                        // SAFETY: the whole warpgroup goes through the slabs in order.
                        unsafe {
                            if group % 4 == 0 {
                                epilogue.begin_slab();
                            }
                            epilogue.columns::<forward::$element>(group, [$($c),+]);
                            if group % 4 == 3 {
                                epilogue.end_slab(group / 4, m, n);
                            }
                        }
                        group += 1;
                    )+
                    let _ = group;
                }
                // SAFETY: all consumers, behind the last slab's barrier. No grid has more blocks
                // than tiles.
                unsafe {
                    telemetry.finish::<reduce::$element, { TILE.num_consumers() }>(
                        &params,
                        at,
                        (consumer, warp % (WARPGROUP / 32)),
                        |slab| epilogue.slab(slab),
                    );
                }
                epilogue.finish();
            }
        }
    };
}
pub(super) use entry;
