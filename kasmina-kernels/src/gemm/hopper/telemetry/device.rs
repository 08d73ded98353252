//! Device side of the forward kernels with telemetry.

use super::*;
use crate::gemm::hopper::device::Epilogue;
use crate::gemm::hopper::{CONSUMER_M, SLAB_N, WARPGROUP};
use crate::ptx;
use crate::reduce::device as reduce;

// Three warpgroups start with 168 registers a thread each, 504 together: 104 + 2 · 200. Merging
// takes more than producing alone.
pub(super) const PRODUCER_REGISTERS: u32 = 104;
pub(super) const CONSUMER_REGISTERS: u32 = 200;

#[inline(always)]
fn record(tile: Tile, run: u32, unit: u32) -> u32 {
    ptx::dynamic_smem() + tile.records_offset() + (run * tile.units() + unit) * RECORD_BYTES
}

/// Where a unit says which of its runs are left to the merging warp: bit `run`.
#[inline(always)]
fn left(tile: Tile, unit: u32) -> u32 {
    ptx::dynamic_smem() + tile.left_offset() + 4 * unit
}

/// Summaries of what a consumer's warp stores.
#[derive(Clone, Copy)]
pub(super) struct Summaries {
    tile: Tile,
    consumer: u32,
    /// Of the tile, from 0 on.
    unit: u32,
    /// Whether all rows and columns of the unit exist.
    whole: bool,
    /// Whether the halves of the tile go to different slots.
    split: bool,
}

impl Summaries {
    /// Of the tile at `(tile_m, tile_n)` by a thread of consumer `consumer`.
    #[inline(always)]
    pub(super) fn new(
        tile: Tile,
        params: &TelemetryParams,
        consumer: u32,
        (tile_m, tile_n): (u32, u32),
    ) -> Self {
        let unit = consumer * (CONSUMER_M / UNIT_ROWS) + ptx::thread_index() % WARPGROUP / 32;
        let (m, n) = (params.segments.segments.rows, params.gemm.n);
        let whole =
            tile.unit_rows(m, tile_m, unit) == UNIT_ROWS && (tile_n + 1) * tile.block_n <= n;
        let split = params.segments.segments.piece < tile.block_n;
        Self { tile, consumer, unit, whole, split }
    }

    /// Waits until the records of the tile before have been read.
    ///
    /// # Safety
    /// The whole consumer calls it, once for every tile but the first.
    #[inline(always)]
    pub(super) unsafe fn wait_read(self) {
        // SAFETY: the caller's contract; each consumer has its own barrier.
        unsafe {
            if self.consumer == 0 {
                ptx::bar_sync::<3, { WARPGROUP + 32 }>();
            } else {
                ptx::bar_sync::<4, { WARPGROUP + 32 }>();
            }
        }
    }

    /// Leaves the warp's summaries of the tile's halves, of which each lane has `len` elements.
    ///
    /// # Safety
    /// The whole consumer calls it, after [`wait_read`](Self::wait_read); its thread `elected` has
    /// stored its slabs.
    #[inline(always)]
    pub(super) unsafe fn put<E: reduce::Element, const CONSUMERS: u32>(
        self,
        halves: [reduce::Held; 2],
        len: f32,
        epilogue: Epilogue,
        elected: bool,
    ) {
        let [first, mut last] = halves;
        let mut len_of_last = len;
        let mut left_to_merger = 0;
        // SAFETY: the unit's own records and word; the whole consumer.
        unsafe {
            if self.split {
                left_to_merger = self.put_run::<E>(0, first, len);
            } else {
                last = first.with::<E>(last, len);
                len_of_last = 2.0 * len;
            }
            left_to_merger |= self.put_run::<E>(1, last, len_of_last);
            if ptx::opaque_u32(ptx::lane_index()) == 0 {
                ptx::st_shared_u32(left(self.tile, self.unit), left_to_merger);
            }
            epilogue.sync();
            if elected {
                let units = self.consumer * (CONSUMER_M / UNIT_ROWS);
                let [a, b, c, d] = ptx::ld_shared_v4_u32(left(self.tile, units));
                if a | b | c | d != 0 {
                    // What the merging warp will read.
                    ptx::cp_async_bulk_wait_group_all();
                }
            }
            ptx::bar_warp_sync();
            if CONSUMERS == 2 {
                ptx::bar_arrive::<5, { 2 * WARPGROUP + 32 }>();
            } else {
                ptx::bar_arrive::<5, { WARPGROUP + 32 }>();
            }
        }
    }

    /// Leaves a record of a run, or gives its bit and an empty one.
    ///
    /// # Safety
    /// As [`put`](Self::put), for a warp.
    #[inline(always)]
    unsafe fn put_run<E: reduce::Element>(self, run: u32, held: reduce::Held, len: f32) -> u32 {
        // SAFETY: the caller's contract.
        unsafe {
            let partial = held.of_warp::<E>(len);
            let partial = if self.whole { partial } else { None };
            if ptx::opaque_u32(ptx::lane_index()) == 0 {
                let partial = partial.unwrap_or(reduce::EMPTY);
                reduce::put_record(record(self.tile, run, self.unit), &partial);
            }
            if partial.is_none() { 1 << run } else { 0 }
        }
    }
}

/// What a lane holds of both halves of a tile, from its slabs, and how many elements that is each.
#[inline(always)]
pub(super) fn halves<E: reduce::Element>(
    slabs: &[Option<reduce::Held>],
) -> ([reduce::Held; 2], f32) {
    const SLAB: f32 = 32.0;
    match *slabs {
        [Some(a), Some(b), Some(c), Some(d)] => {
            ([a.with::<E>(b, SLAB), c.with::<E>(d, SLAB)], 2.0 * SLAB)
        }
        [Some(a), Some(b)] => ([a, b], SLAB),
        _ => ([reduce::Held::NONE; 2], SLAB),
    }
}

/// Adds what consumers have left of a run to their records, from Y, which they have stored.
///
/// # Safety
/// The merging warp calls it, whole, behind the consumers' barrier.
#[inline(always)]
unsafe fn add_left<E: reduce::Element>(
    tile: Tile,
    params: &TelemetryParams,
    (tile_m, tile_n): (u32, u32),
    (half, run): (u32, Run),
) {
    let (cut, row_stride) = (params.segments.segments, params.segments.row_stride);
    let only = cut.piece == tile.block_n;
    let first = tile_n * tile.block_n + if only { 0 } else { half * cut.piece };
    let mut unit = 0;
    while unit < tile.units() {
        ptx::nounroll();
        // SAFETY: the caller's contract; rows and columns that exist.
        unsafe {
            let rows = tile.unit_rows(cut.rows, tile_m, unit);
            if rows > 0 && ptx::ld_shared_u32(left(tile, unit)) >> half & 1 != 0 {
                let row = tile_m * tile.block_m + unit * UNIT_ROWS;
                let mut column = 0;
                while column < run.columns {
                    ptx::nounroll();
                    let columns = run.columns - column;
                    let columns = if columns < SLAB_N { columns } else { SLAB_N };
                    let source = Global {
                        address: params.segments.data
                            + u64::from(row) * row_stride
                            + u64::from(first + column) * 2,
                        row_stride,
                    };
                    let rule = params.segments.rule();
                    let partial = reduce::summary_of_block::<E>(source, rows, columns, rule);
                    let address = record(tile, half, unit);
                    reduce::add_to_record(address, rows * column, &partial, rows * columns);
                    column += SLAB_N;
                }
            }
        }
        unit += 1;
    }
}

/// A block of Y, which another block's stores may share cache lines with: it is read past L1.
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

/// Merges the records of every tile of this block: from `first` on every `step`th.
///
/// # Safety
/// One whole warp calls it, that is no consumer's.
#[inline(always)]
pub(super) unsafe fn merge<E: reduce::Element, const CONSUMERS: u32>(
    tile: Tile,
    params: &TelemetryParams,
    first: u32,
    step: u32,
) {
    let tiles = params.gemm.tiles;
    let cut = params.segments.segments;
    let mut number = first;
    while number < tiles.num_tiles() {
        ptx::nounroll();
        let at = tiles.tile(number);
        number += step;
        // SAFETY: the caller's contract; as many arrivals as the consumers wait for and make.
        unsafe {
            if CONSUMERS == 2 {
                ptx::bar_sync::<5, { 2 * WARPGROUP + 32 }>();
            } else {
                ptx::bar_sync::<5, { WARPGROUP + 32 }>();
            }
            let mut half = 0;
            while half < 2 {
                ptx::nounroll();
                // A tile in one run has its records where those of the second are.
                let only = cut.piece == tile.block_n;
                let number = if only { 0 } else { half };
                if let Some(run) = tile.run(&cut, params.gemm.n, at, number)
                    && !(only && half == 0)
                {
                    add_left::<E>(tile, params, at, (half, run));
                    let unit = |unit: u32| {
                        let elements = tile.unit_rows(cut.rows, at.0, unit) * run.columns;
                        (record(tile, half, unit), elements)
                    };
                    let slot = (run.segment, run.index);
                    reduce::write_slot(&params.segments, slot, tile.units(), unit);
                }
                half += 1;
            }
            // Nobody waits after the last tile.
            if number < tiles.num_tiles() {
                ptx::bar_warp_sync();
                ptx::bar_arrive::<3, { WARPGROUP + 32 }>();
                if CONSUMERS == 2 {
                    ptx::bar_arrive::<4, { WARPGROUP + 32 }>();
                }
            }
        }
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
            use crate::gemm::hopper::{SLAB_N, WARPGROUP};
            use crate::gemm::hopper::device::{
                self as forward, Block, Epilogue, Matrices, Work, multiply_tile, produce,
                wait_for_predecessors,
            };
            use crate::smem_layout::Major;
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
            let (block, warp) = unsafe {
                (Block::start(TILE), ptx::shfl_sync_idx_first(ptx::thread_index() / 32))
            };
            if warp < WARPGROUP / 32 {
                // SAFETY: the whole producer warpgroup drops registers that it does not use; one
                // of its threads produces, with the maps of the parameters, and another of its
                // warps merges.
                unsafe {
                    if forward::needs_registers(TILE) {
                        ptx::setmaxnreg_dec::<{ device::PRODUCER_REGISTERS }>();
                    }
                    if warp == 1 {
                        wait_for_predecessors();
                        let (first, step) = (block.first_tile(), block.tile_step());
                        device::merge::<reduce::$element, { TILE.num_consumers() }>(TILE, &params, first, step);
                    } else if ptx::thread_index() == 0 {
                        let stage_bytes = params.gemm.stage_bytes;
                        produce(block, operands, Work { tiles, k_blocks, stage_bytes });
                    }
                }
            } else {
                if forward::needs_registers(TILE) {
                    // SAFETY: whole consumer warpgroups; the producer frees what they take.
                    unsafe { ptx::setmaxnreg_inc::<{ device::CONSUMER_REGISTERS }>() };
                }
                let consumer = warp / (WARPGROUP / 32) - 1;
                let epilogue = Epilogue::new(
                    block, consumer, y_map, params.gemm.bias, params.gemm.n,
                    params.gemm.activation,
                );
                let elected = block.releases();
                wait_for_predecessors();
                let mut position = RingPosition::START;
                let mut tile = block.first_tile();
                let rule = params.segments.rule();
                $($(let mut $c = 0.0f32;)+)+
                while tile < tiles.num_tiles() {
                    let at = tiles.tile(tile);
                    let (m, n) = (at.0 * TILE.block_m, at.1 * TILE.block_n);
                    let bias = epilogue.load_bias(n);
                    multiply_tile! {
                        $ptx_type, $block_n, TILE, X_MAJOR, W_MAJOR, block, consumer, elected,
                        position, k_blocks, $($($c)+)+
                    }
                    epilogue.publish_bias::<forward::$element>(bias);
                    let summaries = device::Summaries::new(TILE, &params, consumer, at);
                    let mut group = 0;
                    let mut pairs = [[0; 4]; 4];
                    let mut held = [None; (TILE.block_n / SLAB_N) as usize];
                    $(
                        // SAFETY: the whole warpgroup goes through the slabs in order.
                        unsafe {
                            if group % 4 == 0 {
                                epilogue.begin_slab();
                            }
                            pairs[group as usize % 4] =
                                epilogue.columns::<forward::$element>(group, [$($c),+]);
                            if group % 4 == 3 {
                                let slab = group / 4;
                                epilogue.end_slab(slab, m, n);
                                let of_slab = reduce::Held::of::<reduce::$element>(pairs, rule);
                                held[slab as usize] = Some(of_slab);
                            }
                        }
                        group += 1;
                    )+
                    let _ = group;
                    // SAFETY: the whole consumer, once for this tile.
                    unsafe {
                        if tile != block.first_tile() {
                            summaries.wait_read();
                        }
                        let (halves, len) = device::halves::<reduce::$element>(&held);
                        summaries.put::<reduce::$element, { TILE.num_consumers() }>(
                            halves, len, epilogue, elected,
                        );
                    }
                    tile += block.tile_step();
                }
                epilogue.finish();
            }
        }
    };
}
pub(super) use entry;
