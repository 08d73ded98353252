//! Device side of the weight-gradient kernels.

use super::*;
use crate::gemm::hopper::device::{Block, Element, Matrices, Operands, Stage};
use crate::gemm::hopper::{CONSUMER_M, SLAB_BYTES, SLAB_N, WARPGROUP};
use crate::pipeline::RingPosition;
use crate::ptx;
use crate::smem_layout::{SWIZZLE_ROW_BYTES, stmatrix_offset};

// Three warpgroups start with 168 registers a thread each, 504 together: 56 + 2 · 224. The sums
// take more than a producer alone needs.
pub(super) const PRODUCER_REGISTERS: u32 = 56;
pub(super) const CONSUMER_REGISTERS: u32 = 224;

/// What there is to do: the tiles of the product, in parts of k.
#[derive(Clone, Copy)]
pub(super) struct Work {
    pub(super) tile: Tile,
    pub(super) tiles: TileScheduler,
    pub(super) k_blocks: u32,
    pub(super) part_k_blocks: u32,
    pub(super) parts: u32,
}

/// A part of a tile.
#[derive(Clone, Copy)]
pub(super) struct Item {
    /// First row of the product.
    pub(super) m: u32,
    /// First column of the product.
    pub(super) n: u32,
    pub(super) part: u32,
    /// First step of k.
    pub(super) first: u32,
    /// Number of steps.
    pub(super) steps: u32,
}

impl Work {
    #[inline(always)]
    pub(super) const fn items(self) -> u32 {
        self.tiles.num_tiles().wrapping_mul(self.parts)
    }

    /// The item of this number: all tiles of one part, then those of the next.
    #[inline(always)]
    pub(super) const fn item(self, index: u32) -> Item {
        let tiles = self.tiles.num_tiles();
        // Not `/`, which would leave a panic function in the module.
        let part = match index.checked_div(tiles) {
            Some(part) => part,
            None => 0,
        };
        let (tile_m, tile_n) = self.tiles.tile(index.wrapping_sub(part.wrapping_mul(tiles)));
        let first = part.wrapping_mul(self.part_k_blocks);
        let left = self.k_blocks.wrapping_sub(first);
        Item {
            m: tile_m * self.tile.block_m,
            n: tile_n * self.tile.block_n,
            part,
            first,
            steps: if left < self.part_k_blocks { left } else { self.part_k_blocks },
        }
    }
}

/// Feeds the ring for every item of this block.
///
/// # Safety
/// One thread of the block calls it; the operands' maps are 64-aligned addresses of maps with the
/// boxes of [`WeightGradientParams`] (the host encodes them).
#[inline(always)]
pub(super) unsafe fn produce(block: Block, operands: Matrices, work: Work) {
    // SAFETY: valid maps by the caller's contract.
    unsafe { operands.prefetch_maps() };
    let mut position = RingPosition::START;
    let mut index = ptx::block_index();
    let stage_bytes = work.tile.x_stage_bytes() + work.tile.w_stage_bytes();
    while index < work.items() {
        let item = work.item(index);
        let mut step = 0;
        while step < item.steps {
            let full = block.ring.full(position.stage);
            let (x, w) = (block.x_stage(position.stage), block.w_stage(position.stage));
            // SAFETY: the stage is free once `empty` completes; the bytes expected are those of
            // the boxes issued; destinations are whole stages, 1024-aligned.
            unsafe {
                block.ring.wait_empty(position);
                ptx::mbarrier_arrive_expect_tx(full, stage_bytes);
                let stage = Stage { x, w, full };
                operands.load(work.tile, stage, item.m, item.n, item.first + step);
            }
            position = position.next(work.tile.num_stages);
            step += 1;
        }
        index += ptx::grid_size();
    }
}

/// Where the sums of an operand's columns go.
#[derive(Clone, Copy)]
pub(super) struct Sums {
    /// Elements with one part and turn, else f32 for each part and turn.
    pub(super) address: u64,
    /// Whether it is the first operand that is summed.
    pub(super) of_first: bool,
    /// Columns of the operand.
    pub(super) columns: u32,
    pub(super) turns: u32,
    pub(super) accumulate: bool,
}

/// One summing warp's side of the ring: adds the rows of every other slab.
///
/// # Safety
/// The whole warp calls it, `warp` 0 or 1; the ring expects an arrival of each summing warp;
/// `sums.address` is writable as its field says.
#[inline(always)]
pub(super) unsafe fn sum_columns<E: Element>(block: Block, work: Work, warp: u32, sums: Sums) {
    let lane = ptx::thread_index() % 32;
    let extent = if sums.of_first { work.tile.block_m } else { work.tile.block_n };
    let second_slab = SUMMING_WARPS * SLAB_N < extent;
    let mine = warp * SLAB_N < extent;
    // Sixteen lanes have a row, four columns each; the other sixteen the row below.
    let (low, byte) = (lane / 16, lane % 16 * 8);
    let mut position = RingPosition::START;
    let mut index = ptx::block_index();
    while index < work.items() {
        let item = work.item(index);
        // Powers of two known to the compiler: shifts.
        let turn =
            if sums.of_first { item.n / work.tile.block_n } else { item.m / work.tile.block_m };
        let takes_turns = mine && turn < sums.turns;
        let mut steps_until_turn = turn;
        let mut first = [0.0f32; 4];
        let mut second = [0.0f32; 4];
        let mut step = 0;
        while step < item.steps {
            // SAFETY: the stage has landed and is not overwritten before this warp arrives; rows
            // and bytes lie inside its slabs.
            unsafe {
                block.ring.wait_full(position);
                if takes_turns && steps_until_turn == 0 {
                    steps_until_turn = sums.turns;
                    let stage = position.stage;
                    let operand =
                        if sums.of_first { block.x_stage(stage) } else { block.w_stage(stage) };
                    let slab = operand + warp * SLAB_BYTES;
                    add_rows::<E>(&mut first, slab, low, byte);
                    if second_slab {
                        add_rows::<E>(&mut second, slab + SUMMING_WARPS * SLAB_BYTES, low, byte);
                    }
                }
                ptx::bar_warp_sync();
                if lane == 0 {
                    ptx::mbarrier_arrive(block.ring.empty(position.stage));
                }
            }
            steps_until_turn = steps_until_turn.wrapping_sub(1);
            position = position.next(work.tile.num_stages);
            step += 1;
        }
        if takes_turns {
            let column = (if sums.of_first { item.m } else { item.n }) + warp * SLAB_N + byte / 2;
            // SAFETY: the whole warp, as all lanes take turns or none; the caller's contract.
            unsafe {
                store_sums::<E>(work, item.part * sums.turns + turn, sums, column, first);
                if second_slab {
                    let column = column + SUMMING_WARPS * SLAB_N;
                    store_sums::<E>(work, item.part * sums.turns + turn, sums, column, second);
                }
            }
        }
        index += ptx::grid_size();
    }
}

/// Adds rows `low`, `low + 2`, … of a slab of 64 rows to the sums of the four columns from `byte`.
///
/// # Safety
/// The slab has landed and nothing writes it meanwhile.
#[inline(always)]
unsafe fn add_rows<E: Element>(sums: &mut [f32; 4], slab: u32, low: u32, byte: u32) {
    let mut eight = 0;
    while eight < BLOCK_K / 8 {
        ptx::nounroll();
        let rows = slab + eight * (8 * SWIZZLE_ROW_BYTES);
        macro_rules! row {
            ($($pair:literal)+) => {$(
                let row = 2 * $pair + low;
                let address = rows + row * SWIZZLE_ROW_BYTES + (byte ^ (row * 16));
                // SAFETY: inside the slab, 8-aligned.
                let (a, b) = unsafe { ptx::ld_shared_v2_f32(address) };
                let (a, b) = (a.to_bits(), b.to_bits());
                sums[0] += E::widen(a as u16);
                sums[1] += E::widen((a >> 16) as u16);
                sums[2] += E::widen(b as u16);
                sums[3] += E::widen((b >> 16) as u16);
            )+};
        }
        row!(0 1 2 3);
        eight += 1;
    }
}

/// Stores the sums of four columns, in this row of partial sums, once both halves of the warp are
/// added.
///
/// # Safety
/// The whole warp calls it; `sums.address` is writable as its field says.
#[inline(always)]
unsafe fn store_sums<E: Element>(work: Work, row: u32, sums: Sums, column: u32, values: [f32; 4]) {
    macro_rules! column {
        ($($i:literal)+) => {$({
            // SAFETY: the whole warp, by the caller's contract.
            let other = unsafe { ptx::shfl_sync_bfly::<16>(values[$i].to_bits()) };
            let sum = values[$i] + f32::from_bits(other);
            let column = column + $i;
            if ptx::thread_index() % 32 < 16 && column < sums.columns {
                // SAFETY: an element of the result, which one warp of the grid has.
                unsafe {
                    if work.parts * sums.turns == 1 {
                        let address = sums.address + 2 * u64::from(column);
                        let before = if sums.accumulate {
                            E::widen(ptx::ld_global_u16(address))
                        } else {
                            0.0
                        };
                        ptx::st_global_u16(address, E::pack(0.0, before + sum) as u16);
                    } else {
                        let row = u64::from(row) * u64::from(sums.columns);
                        let address = sums.address + 4 * (row + u64::from(column));
                        ptx::st_global_u32(address, sum.to_bits());
                    }
                }
            }
        })+};
    }
    column!(0 1 2 3);
}

/// One consumer warpgroup's side of the epilogue.
#[derive(Clone, Copy)]
pub(super) struct Epilogue {
    tile: Tile,
    /// 0 or 1.
    consumer: u32,
    /// Of the warpgroup, 0 to 127.
    thread: u32,
    slabs: u32,
    product_map: u64,
    /// Whether the product is added to what is there.
    accumulate: bool,
}

impl Epilogue {
    #[inline(always)]
    pub(super) fn new(block: Block, tile: Tile, consumer: u32, map: u64, accumulate: bool) -> Self {
        Self {
            tile,
            consumer,
            thread: ptx::thread_index() % WARPGROUP,
            slabs: block.epilogue() + consumer * (tile.slab_buffers() * SLAB_BYTES),
            product_map: map,
            accumulate,
        }
    }

    /// Finishes 16 columns of the tile, registers `8·group ..`, whose part is the only one; the
    /// last of a slab starts its store.
    ///
    /// # Safety
    /// The whole warpgroup calls it, for the groups in order.
    #[inline(always)]
    pub(super) unsafe fn columns<E: Element>(self, group: u32, c: [f32; 8], item: Item) {
        let slab = group / 4;
        let buffer = self.slabs + (slab % self.tile.slab_buffers()) * SLAB_BYTES;
        // SAFETY: the whole warpgroup; the buffer is free once the store that last read it, one or
        // two stores ago, has finished reading.
        unsafe {
            if group % 4 == 0 {
                if self.thread == 0 {
                    if self.tile.slab_buffers() == 2 {
                        ptx::cp_async_bulk_wait_group_read::<1>();
                    } else {
                        ptx::cp_async_bulk_wait_group_read::<0>();
                    }
                }
                self.sync();
            }
            ptx::stmatrix_x4(
                buffer + stmatrix_offset(self.thread, group % 4),
                E::pack(c[1], c[0]),
                E::pack(c[3], c[2]),
                E::pack(c[5], c[4]),
                E::pack(c[7], c[6]),
            );
        }
        if group % 4 < 3 {
            return;
        }
        ptx::fence_proxy_async_shared();
        // SAFETY: every writer has fenced before the barrier; the buffer is not written again
        // before this store has read it.
        unsafe {
            self.sync();
            if self.thread == 0 {
                let (row, column) = (item.m + self.consumer * CONSUMER_M, item.n + slab * SLAB_N);
                if self.accumulate {
                    ptx::cp_reduce_async_bulk_tensor_2d_add(self.product_map, column, row, buffer);
                } else {
                    ptx::cp_async_bulk_tensor_2d_store(self.product_map, column, row, buffer);
                }
                ptx::cp_async_bulk_commit_group();
            }
        }
    }

    /// Stores 16 columns of one part of several, as [`columns`](Self::columns) has them.
    ///
    /// # Safety
    /// `partials` has room for the parts of an `[m, n]` product.
    #[inline(always)]
    pub(super) unsafe fn partial(
        self,
        group: u32,
        c: [f32; 8],
        item: Item,
        partials: u64,
        [m, n]: [u32; 2],
    ) {
        let (warp, lane) = (self.thread / 32, self.thread % 32);
        let row = item.m + self.consumer * CONSUMER_M + 16 * warp + lane / 4;
        let column = item.n + 16 * group + 2 * (lane % 4);
        let first = u64::from(item.part) * u64::from(m) + u64::from(row);
        let address = partials + 4 * (first * u64::from(n) + u64::from(column));
        let below = address + 32 * u64::from(n);
        macro_rules! pair {
            ($row:expr, $column:expr, $address:expr, $a:literal, $b:literal) => {
                if $row < m && $column < n {
                    // SAFETY: n is even, so both exist; 8-aligned as the column is even.
                    unsafe { ptx::st_global_v2_u32($address, [c[$a].to_bits(), c[$b].to_bits()]) };
                }
            };
        }
        pair!(row, column, address, 0, 1);
        pair!(row + 8, column, below, 2, 3);
        pair!(row, column + 8, address + 32, 4, 5);
        pair!(row + 8, column + 8, below + 32, 6, 7);
    }

    /// Waits for the stores: shared memory must outlive their reads.
    #[inline(always)]
    pub(super) fn finish(self) {
        if self.thread == 0 {
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

/// Defines the entry for one element type and tile.
macro_rules! entry {
    ($entry:ident, $element:ident, $ptx_type:literal,
     $block_m:literal, $block_n:tt, $num_stages:literal) => {
        $crate::ptx::wgmma::with_accumulators! { $block_n, device::entry! {
            @body $entry, $element, $ptx_type, $block_m, $block_n, $num_stages
        } }
    };
    (@body $entry:ident, $element:ident, $ptx_type:literal,
     $block_m:literal, $block_n:tt, $num_stages:literal $([$($c:ident)+])+) => {
        /// # Safety
        /// Launched by `launch` on the host with the geometry of its `Kernel` and parameters that
        /// `gemm::Backward` has checked against the shape contract.
        #[unsafe(no_mangle)]
        pub unsafe extern "ptx-kernel" fn $entry(params: WeightGradientParams) {
            use crate::gemm::hopper::device::{
                $element, Block, Matrices, needs_registers, wait_for_predecessors,
            };
            use crate::gemm::hopper::{CONSUMER_M, WARPGROUP};
            use crate::smem_layout::{Major, descriptor_step_k16, wgmma_descriptor};
            use crate::{pipeline::RingPosition, ptx};
            use device::*;

            const TILE: Tile = Tile {
                block_m: $block_m, block_n: $block_n, num_stages: $num_stages, split_k: 1,
            };
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
            let (w_map, product_map) = (x_map + 128, x_map + 256);
            let work = Work {
                tile: TILE,
                tiles: params.tiles,
                k_blocks: params.k_blocks,
                part_k_blocks: params.part_k_blocks,
                parts: params.parts,
            };
            let summed = params.summed;
            let releases =
                TILE.num_consumers() + if summed == 0 { 0 } else { SUMMING_WARPS };

            // SAFETY: the whole block is here.
            let (block, warp) = unsafe {
                let block = Block::start_with(TILE, releases);
                (block, ptx::shfl_sync_idx_first(ptx::thread_index() / 32))
            };
            wait_for_predecessors();
            let warpgroup = warp / 4;
            if warpgroup == 0 {
                // SAFETY: the whole producer warpgroup, which starts with more registers; one
                // thread produces, with the maps of the parameters, and whole warps sum.
                unsafe {
                    if needs_registers(TILE) {
                        ptx::setmaxnreg_dec::<PRODUCER_REGISTERS>();
                    }
                    if ptx::thread_index() == 0 {
                        let (x_major, w_major) = (Major::MN, Major::MN);
                        produce(block, Matrices { x_map, w_map, x_major, w_major }, work);
                    } else if summed != 0 && warp > 0 && warp <= SUMMING_WARPS {
                        let of_first = summed == Summed::First as u32;
                        let sums = Sums {
                            address: params.sums,
                            of_first,
                            columns: if of_first { params.m } else { params.n },
                            turns: params.turns,
                            accumulate: params.accumulate != 0,
                        };
                        sum_columns::<$element>(block, work, warp - 1, sums);
                    }
                }
            } else {
                if needs_registers(TILE) {
                    // SAFETY: whole consumer warpgroups; the producer frees what they take.
                    unsafe { ptx::setmaxnreg_inc::<CONSUMER_REGISTERS>() };
                }
                let consumer = warpgroup - 1;
                let accumulate = params.accumulate != 0;
                let epilogue = Epilogue::new(block, TILE, consumer, product_map, accumulate);
                let elected = ptx::thread_index() % WARPGROUP == 0;
                let mut position = RingPosition::START;
                let mut index = ptx::block_index();
                $($(let mut $c = 0.0f32;)+)+
                while index < work.items() {
                    let item = work.item(index);
                    let mut previous = position.stage;
                    let mut step = 0u32;
                    while step < item.steps {
                        let stage = position.stage;
                        // A consumer's 64 rows of the product are one slab.
                        let x = block.x_stage(stage) + consumer * (CONSUMER_M * BLOCK_K * 2);
                        let a = wgmma_descriptor(x, Major::MN);
                        let b = wgmma_descriptor(block.w_stage(stage), Major::MN);
                        // SAFETY: the stage has landed; the whole warpgroup executes it.
                        unsafe {
                            block.ring.wait_full(position);
                            ptx::wgmma::wgmma_k64!(
                                $ptx_type, $block_n,
                                (Major::MN as u32), (Major::MN as u32),
                                (descriptor_step_k16(Major::MN)),
                                (descriptor_step_k16(Major::MN)),
                                a, b, step, $($($c)+)+
                            );
                            // The batch before is complete: its stage may be overwritten.
                            if elected && step > 0 {
                                ptx::mbarrier_arrive(block.ring.empty(previous));
                            }
                        }
                        previous = stage;
                        position = position.next(TILE.num_stages);
                        step += 1;
                    }
                    // SAFETY: the whole warpgroup; the last batch's stage is released after it.
                    unsafe {
                        ptx::wgmma::wgmma_wait_all!($block_n, $($($c)+)+);
                        if elected {
                            ptx::mbarrier_arrive(block.ring.empty(previous));
                        }
                    }
                    let mut group = 0;
                    if work.parts == 1 {
                        $(
                            // SAFETY: the whole warpgroup goes through the groups in order.
                            unsafe { epilogue.columns::<$element>(group, [$($c),+], item) };
                            group += 1;
                        )+
                    } else {
                        $(
                            // SAFETY: the host made the partials for these parts.
                            unsafe {
                                let extents = [params.m, params.n];
                                epilogue.partial(group, [$($c),+], item, params.partials, extents);
                            }
                            group += 1;
                        )+
                    }
                    let _ = group;
                    index += ptx::grid_size();
                }
                epilogue.finish();
            }
        }
    };
}
pub(super) use entry;
