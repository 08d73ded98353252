//! Device side of the weight-gradient kernels.

use super::*;
use crate::gemm::hopper::device::{
    BF16, Block, Element, F16, Matrices, Operands, Stage, wait_for_predecessors,
};
use crate::gemm::hopper::unaligned::device::{Slab, store_slab};
use crate::gemm::hopper::{CONSUMER_M, SLAB_BYTES, SLAB_N, WARPGROUP};
use crate::pipeline::RingPosition;
use crate::ptx;
use crate::smem_layout::stmatrix_offset;

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

/// Fetches into L2 what the first lap of the ring loads. Tiles that share columns of an operand
/// divide the steps.
///
/// # Safety
/// As [`produce`].
#[inline(always)]
unsafe fn prefetch_first_lap(operands: Matrices, work: Work) {
    let (tile, tiles) = (work.tile, work.tiles);
    let item = work.item(ptx::block_index());
    let (tile_m, tile_n) = (item.m / tile.block_m, item.n / tile.block_n);
    let steps = if item.steps < tile.num_stages { item.steps } else { tile.num_stages };
    let mut step = tile_m;
    while step < steps {
        // SAFETY: the caller's contract.
        unsafe { operands.prefetch_w(tile, item.n, item.first + step) };
        step += tiles.tiles_m;
    }
    let mut step = tile_n;
    while step < steps {
        // SAFETY: the caller's contract.
        unsafe { operands.prefetch_x(tile, item.m, item.first + step) };
        step += tiles.tiles_n;
    }
}

/// Feeds the ring for every item of this block.
///
/// # Safety
/// One thread of the block calls it; the operands' maps are 64-aligned addresses of maps with the
/// boxes of [`WeightGradientParams`] (the host encodes them).
#[inline(always)]
pub(super) unsafe fn produce(block: Block, operands: Matrices, work: Work) {
    // SAFETY: valid maps by the caller's contract. Prefetching may run ahead of the grid before.
    unsafe {
        operands.prefetch_maps();
        prefetch_first_lap(operands, work);
    }
    wait_for_predecessors();
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
    /// Elements with one part, else f32 for each part.
    pub(super) address: u64,
    /// Columns of the operand.
    pub(super) columns: u32,
    pub(super) accumulate: bool,
}

impl Sums {
    /// Stores what a warpgroup has summed over the rows of a slab: `low` of the row of
    /// accumulators 0 and 1, `high` of that of 2 and 3, which every fourth thread has.
    ///
    /// # Safety
    /// `address` is writable as its field says; `column` is the slab's first.
    #[inline(always)]
    pub(super) unsafe fn store<E: Element>(
        self,
        work: Work,
        part: u32,
        column: u32,
        [low, high]: [f32; 2],
    ) {
        let thread = ptx::thread_index() % WARPGROUP;
        if thread % 4 != 0 {
            return;
        }
        let column = column + 16 * (thread / 32) + thread % 32 / 4;
        // SAFETY: elements of the result, which one warpgroup of the grid has; the caller's
        // contract.
        unsafe {
            self.store_one::<E>(work, part, column, low);
            self.store_one::<E>(work, part, column + 8, high);
        }
    }

    /// # Safety
    /// As [`store`](Self::store).
    #[inline(always)]
    unsafe fn store_one<E: Element>(self, work: Work, part: u32, column: u32, sum: f32) {
        if column >= self.columns {
            return;
        }
        // SAFETY: an element of the result, by the caller's contract.
        unsafe {
            if work.parts == 1 {
                let address = self.address + 2 * u64::from(column);
                let before =
                    if self.accumulate { E::widen(ptx::ld_global_u16(address)) } else { 0.0 };
                ptx::st_global_u16(address, E::pack(0.0, before + sum) as u16);
            } else {
                let row = u64::from(part) * u64::from(self.columns);
                let address = self.address + 4 * (row + u64::from(column));
                ptx::st_global_u32(address, sum.to_bits());
            }
        }
    }
}

/// Ones in both halves: what sums are multiplied by.
pub(super) trait Ones {
    const PAIR: u32;
}

impl Ones for BF16 {
    const PAIR: u32 = 0x3F80_3F80;
}

impl Ones for F16 {
    const PAIR: u32 = 0x3C00_3C00;
}

/// Fills the second operand of the sums, 16 rows of 8 ones, where the forward kernels have the
/// bias; its address.
///
/// # Safety
/// Every thread of the block calls it, and a block barrier follows before any use.
#[inline(always)]
pub(super) unsafe fn write_ones<E: Ones>(tile: Tile) -> u32 {
    let ones = ptx::dynamic_smem() + tile.bias_offset();
    let thread = ptx::thread_index();
    if thread < ONES_BYTES / 4 {
        // SAFETY: this thread's own 4 bytes.
        unsafe { ptx::st_shared_f32(ones + 4 * thread, f32::from_bits(E::PAIR)) };
    }
    ptx::fence_proxy_async_shared();
    ones
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
    /// The product, if TMA does not store it.
    plain: PlainRows,
    /// Whether the product is added to what is there.
    accumulate: bool,
}

impl Epilogue {
    #[inline(always)]
    pub(super) fn new(
        block: Block,
        tile: Tile,
        consumer: u32,
        product_map: u64,
        plain: PlainRows,
        accumulate: bool,
    ) -> Self {
        Self {
            tile,
            consumer,
            thread: ptx::thread_index() % WARPGROUP,
            slabs: block.epilogue() + consumer * (tile.slab_buffers() * SLAB_BYTES),
            product_map,
            plain,
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
        // before this store, or every thread, has read it.
        unsafe {
            self.sync();
            let (row, column) = (item.m + self.consumer * CONSUMER_M, item.n + slab * SLAB_N);
            if self.plain.address != 0 {
                let slab = Slab { buffer, first: 0, rows: CONSUMER_M, row, column };
                store_slab::<E>(self.plain, slab, self.thread, self.accumulate);
            } else if self.thread == 0 {
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
                let pair = [c[$a].to_bits(), c[$b].to_bits()];
                if $row < m && $column < n {
                    // SAFETY: where n is even both exist, and the even column is 8-aligned; else the
                    // second exists where it is checked.
                    unsafe {
                        if n % 2 == 0 {
                            ptx::st_global_v2_u32($address, pair);
                        } else {
                            ptx::st_global_u32($address, pair[0]);
                            if $column + 1 < n {
                                ptx::st_global_u32($address + 4, pair[1]);
                            }
                        }
                    }
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
                $element, Block, CONSUMER_REGISTERS, Matrices, PRODUCER_REGISTERS,
                needs_registers, wait_for_predecessors,
            };
            use crate::gemm::hopper::{CONSUMER_M, SLAB_BYTES, SLAB_N, WARPGROUP};
            use crate::smem_layout::{
                Major, descriptor_step_k16, wgmma_descriptor, wgmma_descriptor_plain,
            };
            use crate::{pipeline::RingPosition, ptx};
            use device::*;

            const TILE: Tile = Tile::new($block_m, $block_n, $num_stages);
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
            // SAFETY: the whole block is here.
            let (block, ones, warpgroup) = unsafe {
                let ones = write_ones::<$element>(TILE);
                let block = Block::start(TILE);
                (block, ones, ptx::shfl_sync_idx_first(ptx::thread_index() / WARPGROUP))
            };
            if warpgroup == 0 {
                // SAFETY: the whole producer warpgroup, which starts with more registers; one
                // thread produces, with the maps of the parameters.
                unsafe {
                    if needs_registers(TILE) {
                        ptx::setmaxnreg_dec::<PRODUCER_REGISTERS>();
                    }
                    if ptx::thread_index() == 0 {
                        let (x_major, w_major) = (Major::MN, Major::MN);
                        produce(block, Matrices { x_map, w_map, x_major, w_major }, work);
                    }
                }
            } else {
                if needs_registers(TILE) {
                    // SAFETY: whole consumer warpgroups; the producer frees what they take.
                    unsafe { ptx::setmaxnreg_inc::<CONSUMER_REGISTERS>() };
                }
                let consumer = warpgroup - 1;
                let accumulate = params.accumulate != 0;
                let of_first = summed == Summed::First as u32;
                let sums = Sums {
                    address: params.sums,
                    columns: if of_first { params.m } else { params.n },
                    accumulate,
                };
                // Slabs of the summed operand: of the first, a consumer's own; of the second, the
                // consumers' in turn, at most two each.
                let two_slabs = !of_first && TILE.block_n / SLAB_N > TILE.num_consumers();
                let second_slab = TILE.num_consumers() * SLAB_N;
                let ones = wgmma_descriptor_plain(ones);
                let epilogue = Epilogue::new(
                    block, TILE, consumer, product_map, params.plain, accumulate,
                );
                let elected = ptx::thread_index() % WARPGROUP == 0;
                wait_for_predecessors();
                let mut position = RingPosition::START;
                let mut index = ptx::block_index();
                let [mut s0, mut s1, mut s2, mut s3] = [0.0f32; 4];
                let [mut s4, mut s5, mut s6, mut s7] = [0.0f32; 4];
                $($(let mut $c = 0.0f32;)+)+
                while index < work.items() {
                    let item = work.item(index);
                    // The tiles that are first in the other direction sum.
                    let first = if of_first { item.n } else { item.m } == 0;
                    let sum = summed != 0 && first;
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
                            if sum {
                                let operand =
                                    if of_first { block.x_stage(stage) } else { block.w_stage(stage) };
                                let slab = operand + consumer * SLAB_BYTES;
                                let d = wgmma_descriptor(slab, Major::MN);
                                ptx::wgmma::wgmma_sums_k64!($ptx_type, d, ones, step, s0 s1 s2 s3);
                                if two_slabs {
                                    let slab = slab + TILE.num_consumers() * SLAB_BYTES;
                                    let d = wgmma_descriptor(slab, Major::MN);
                                    ptx::wgmma::wgmma_sums_k64!(
                                        $ptx_type, d, ones, step, s4 s5 s6 s7
                                    );
                                }
                            }
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
                        ptx::wgmma::wgmma_wait_sums!(s0 s1 s2 s3 s4 s5 s6 s7);
                        if elected {
                            ptx::mbarrier_arrive(block.ring.empty(previous));
                        }
                    }
                    if sum {
                        let column = (if of_first { item.m } else { item.n }) + consumer * SLAB_N;
                        // SAFETY: the host made room for these sums.
                        unsafe {
                            sums.store::<$element>(work, item.part, column, [s0, s2]);
                            if two_slabs {
                                let column = column + second_slab;
                                sums.store::<$element>(work, item.part, column, [s4, s6]);
                            }
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
