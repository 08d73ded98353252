//! Device side of the product of parts: the producer, the epilogue and the entries.

use super::{BLOCK_K, PartsParams, SplitTile, TileScheduler, Walk, extents};
use crate::activation::Activation;
use crate::conv1d::hopper::gather::Place;
use crate::gemm::hopper::split::STAGED_N;
use crate::gemm::hopper::split::device::{Block, Staging, load_some};
use crate::pipeline::RingPosition;
use crate::ptx;

/// The first position and channel of the tile in this row and column of the product.
#[inline(always)]
pub(super) fn place(
    walk: Walk,
    tile: SplitTile,
    channels_are_rows: bool,
    (row, column): (u32, u32),
) -> Place {
    let extents = extents(tile.block_m, channels_are_rows);
    let (positions, channels) = if channels_are_rows { (column, row) } else { (row, column) };
    walk.place(positions, channels, extents)
}

/// What the producer loads from.
#[derive(Clone, Copy)]
pub(super) struct Source {
    pub(super) in_map: u64,
    pub(super) w_map: u64,
    pub(super) channels_are_rows: bool,
    pub(super) sequences: u32,
    pub(super) filter_taps: u32,
}

impl Source {
    /// Feeds the ring for every tile of this block.
    ///
    /// # Safety
    /// One thread of the block calls it; the maps are 64-aligned addresses of maps with the boxes
    /// that [`PartsParams`] names (`conv1d/parts.rs` of the host encodes them).
    #[inline(always)]
    pub(super) unsafe fn produce(
        self,
        block: Block,
        tile: SplitTile,
        tiles: TileScheduler,
        walk: Walk,
    ) {
        // SAFETY: valid maps by the caller's contract.
        unsafe {
            ptx::prefetch_tensormap(self.in_map);
            ptx::prefetch_tensormap(self.w_map);
        }
        let mut ring = RingPosition::START;
        let mut index = ptx::block_index();
        while index < tiles.num_tiles() {
            let place = place(walk, tile, self.channels_are_rows, tiles.tile(index));
            let start = place.position.wrapping_mul(walk.in_step);
            let first = start.wrapping_add(walk.in_first as u32);
            let mut channel = 0;
            let mut block_channel = 0;
            while block_channel < walk.channel_blocks {
                let mut position = first;
                let mut filter_tap = walk.first_tap;
                let mut tap = 0;
                while tap < walk.taps {
                    // SAFETY: the stage is free once `empty` completes; the bytes expected are
                    // those of the boxes issued.
                    unsafe {
                        block.ring.wait_empty(ring);
                        let full = block.ring.full(ring.stage);
                        ptx::mbarrier_arrive_expect_tx(full, tile.stage_bytes());
                        let input = [channel, position, place.sequence, place.group];
                        let filter = [channel, place.channel, filter_tap, place.group];
                        self.load(block, tile, walk, ring.stage, input, filter);
                    }
                    ring = ring.next(tile.num_stages);
                    position = position.wrapping_add(walk.tap_step);
                    filter_tap = filter_tap.wrapping_add(walk.tap_stride as u32);
                    tap += 1;
                }
                channel += BLOCK_K;
                block_channel += 1;
            }
            index += ptx::grid_size();
        }
    }

    /// Issues the loads of a stage, whose first parts lie at `input` and `filter`.
    ///
    /// # Safety
    /// As [`produce`](Self::produce); the stage is free and its barrier expects `stage_bytes`.
    #[inline(always)]
    unsafe fn load(
        self,
        block: Block,
        tile: SplitTile,
        walk: Walk,
        stage: u32,
        mut input: [u32; 4],
        mut filter: [u32; 4],
    ) {
        let full = block.ring.full(stage);
        let (mut rows, mut columns) = (block.x_stage(stage), block.w_stage(stage));
        let [positions, _] = extents(tile.block_m, self.channels_are_rows);
        let mut part = 0;
        while part < tile.parts {
            let (input_at, filter_at) =
                if self.channels_are_rows { (columns, rows) } else { (rows, columns) };
            // SAFETY: boxes as `PartsParams` names them, into their places in a free stage, which
            // start on multiples of the swizzle's period.
            unsafe {
                ptx::cp_async_bulk_tensor_4d_load(filter_at, self.w_map, filter, full);
                let mut loaded = 0;
                let mut at = input;
                while loaded < positions {
                    ptx::nounroll();
                    let place = input_at + loaded * (BLOCK_K * 2);
                    ptx::cp_async_bulk_tensor_4d_load(place, self.in_map, at, full);
                    loaded += walk.box_positions;
                    at[1] = at[1].wrapping_add(walk.box_positions.wrapping_mul(walk.in_step));
                }
            }
            rows += tile.x_part_bytes();
            columns += SplitTile::w_part_bytes();
            input[2] = input[2].wrapping_add(self.sequences);
            filter[2] = filter[2].wrapping_add(self.filter_taps);
            part += 1;
        }
    }
}

/// One warp's side of the epilogue.
#[derive(Clone, Copy)]
pub(super) struct Epilogue {
    staging: Staging,
    bias: u64,
    out: u64,
    out_sequence: u64,
    out_group: u64,
    out_row: u64,
    out_column: u64,
    rows: u32,
    columns: u32,
    group_out: u32,
    channels_are_rows: bool,
    activation: u32,
}

impl Epilogue {
    #[inline(always)]
    pub(super) fn new(block: Block, consumer: u32, params: &PartsParams) -> Self {
        Self {
            staging: Staging::new(block, consumer),
            bias: params.bias,
            out: params.out,
            out_sequence: params.out_sequence,
            out_group: params.out_group,
            out_row: params.out_row,
            out_column: params.out_column,
            rows: params.rows,
            columns: params.columns,
            group_out: params.group_out,
            channels_are_rows: params.channels_are_rows != 0,
            activation: params.activation,
        }
    }

    /// Stages 16 columns, as [`Staging::stage`].
    ///
    /// # Safety
    /// The whole warp calls it, after `store` of the columns staged before.
    #[inline(always)]
    pub(super) unsafe fn stage(self, group: u32, sums: [f32; 8]) {
        // SAFETY: by the caller's contract.
        unsafe { self.staging.stage(group, sums) };
    }

    /// Adds the bias to what is staged, applies the activation and stores it; the first staged
    /// column is column `first` of the tile.
    ///
    /// # Safety
    /// The whole warp calls it, after four groups have been staged.
    #[inline(always)]
    pub(super) unsafe fn store(self, place: Place, first: u32) {
        // SAFETY: the whole warp, by the caller's contract.
        unsafe {
            ptx::bar_warp_sync();
            if self.out_row == 1 && self.channels_are_rows {
                self.store_columns(place, first);
            } else {
                self.store_rows(place, first);
            }
            // What is staged next overwrites what was read here.
            ptx::bar_warp_sync();
        }
    }

    /// Where column `column` of the tile's sequence and group begins in the output.
    #[inline(always)]
    fn column(self, place: Place, column: u32) -> u64 {
        self.out
            + 4 * (u64::from(place.sequence) * self.out_sequence
                + u64::from(place.group) * self.out_group
                + u64::from(column) * self.out_column)
    }

    /// As [`store`](Self::store) where neighbours in a column are neighbours in the output: rows are
    /// channels of a channels-last one.
    ///
    /// # Safety
    /// As [`store`](Self::store), between its barriers.
    #[inline(always)]
    unsafe fn store_columns(self, place: Place, first: u32) {
        // Four lanes to a column, four rows to a lane.
        let (lane_column, four) = (self.staging.lane / 4, self.staging.lane % 4);
        let row = place.channel + self.staging.row + 4 * four;
        let left = self.rows.saturating_sub(row);
        let channel = u64::from(place.group * self.group_out) + u64::from(row);
        // SAFETY: elements of the bias; the host checks its length.
        let bias =
            unsafe { load_some(self.bias + 4 * channel, if self.bias == 0 { 0 } else { left }) }
                .map(f32::from_bits);
        let activation = Activation::from_code(self.activation);
        let mut within = lane_column;
        while within < STAGED_N {
            ptx::nounroll();
            // SAFETY: staged before the barrier in `store`.
            let sums = unsafe { self.staging.four_rows(four, within) };
            let column = place.position + first + within;
            if column < self.columns {
                let address = self.column(place, column) + 4 * u64::from(row);
                let values = [
                    activation.apply(sums[0] + bias[0]).to_bits(),
                    activation.apply(sums[1] + bias[1]).to_bits(),
                    activation.apply(sums[2] + bias[2]).to_bits(),
                    activation.apply(sums[3] + bias[3]).to_bits(),
                ];
                // SAFETY: as in `store_rows`.
                unsafe {
                    if left >= 4 && address % 16 == 0 {
                        ptx::st_global_v4_u32(address, values);
                    } else {
                        store_some(address, 4, left, values);
                    }
                }
            }
            within += 8;
        }
    }

    /// As [`store`](Self::store) by rows.
    ///
    /// # Safety
    /// As [`store`](Self::store), between its barriers.
    #[inline(always)]
    unsafe fn store_rows(self, place: Place, first: u32) {
        // Sixteen lanes to a row, four columns to a lane.
        let (lane_row, offset) = (self.staging.lane / 16, self.staging.lane % 16 * 4);
        let (row, column) = if self.channels_are_rows {
            (place.channel, place.position)
        } else {
            (place.position, place.channel)
        };
        let row = row + self.staging.row + lane_row;
        let column = column + first + offset;
        let left = self.columns.saturating_sub(column);
        let plane = self.column(place, column);
        let bias = self.bias + 4 * u64::from(place.group * self.group_out);
        let of_columns = self.bias != 0 && !self.channels_are_rows;
        let of_rows = self.bias != 0 && self.channels_are_rows;
        // SAFETY: elements of the group's bias; the host checks its length.
        let column_bias =
            unsafe { load_some(bias + 4 * u64::from(column), if of_columns { left } else { 0 }) }
                .map(f32::from_bits);
        let activation = Activation::from_code(self.activation);
        let mut step = 0;
        while step < 16 {
            ptx::nounroll();
            // SAFETY: staged before the barrier in `store`.
            let sums = unsafe { self.staging.four(lane_row + step, offset) };
            let row = row + step;
            if row < self.rows {
                let address = plane + 4 * (u64::from(row) * self.out_row);
                let bias = if of_rows {
                    // SAFETY: an element of the group's bias.
                    [f32::from_bits(unsafe { ptx::ld_global_u32(bias + 4 * u64::from(row)) }); 4]
                } else {
                    column_bias
                };
                let values = [
                    activation.apply(sums[0] + bias[0]).to_bits(),
                    activation.apply(sums[1] + bias[1]).to_bits(),
                    activation.apply(sums[2] + bias[2]).to_bits(),
                    activation.apply(sums[3] + bias[3]).to_bits(),
                ];
                // SAFETY: elements of the output, which no other thread writes; 16 bytes at once
                // only where the address allows it.
                unsafe {
                    if left >= 4 && self.out_column == 1 && address % 16 == 0 {
                        ptx::st_global_v4_u32(address, values);
                    } else {
                        store_some(address, 4 * self.out_column, left, values);
                    }
                }
            }
            step += 2;
        }
    }
}

/// Stores the first `left` of four elements, `step` bytes apart.
///
/// # Safety
/// `address` is that of `left` writable elements, which no other thread accesses.
#[inline(always)]
unsafe fn store_some(address: u64, step: u64, left: u32, [a, b, c, d]: [u32; 4]) {
    let element = |i: u32, value: u32| {
        if i < left {
            // SAFETY: one of those that exist.
            unsafe { ptx::st_global_u32(address + step * u64::from(i), value) }
        }
    };
    element(0, a);
    element(1, b);
    element(2, c);
    element(3, d);
}

/// Defines the entry for a tile.
macro_rules! entry {
    ($entry:ident, $block_m:literal, $num_stages:literal) => {
        $crate::ptx::wgmma::with_promoted_accumulators! { device::entry! {
            @body $entry, $block_m, $num_stages
        } }
    };
    (@body $entry:ident, $block_m:literal, $num_stages:literal
     $([$(($c:ident $d:ident $s:ident))+])+) => {
        /// # Safety
        /// Launched by `launch` on the host with the geometry of its `Kernel` and parameters that
        /// the host's `conv1d/parts.rs` has checked against the shape contract.
        #[unsafe(no_mangle)]
        pub unsafe extern "ptx-kernel" fn $entry(params: PartsParams) {
            use crate::gemm::hopper::split::STAGED_N;
            use crate::gemm::hopper::split::device::{
                Block, CONSUMER_REGISTERS, PRODUCER_REGISTERS, multiply_tile,
            };
            use crate::gemm::hopper::{CONSUMER_M, WARPGROUP};
            use crate::smem_layout::{Major, descriptor_step_k16, wgmma_descriptor_k32};
            use crate::{pipeline::RingPosition, ptx};
            use device::{Epilogue, Source, place};

            const TILE: SplitTile = SplitTile {
                block_m: $block_m, num_stages: $num_stages, parts: PARTS as u32,
            };
            const MAJOR: Major = Major::K;
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
                    threads = const TILE.block_dim(),
                    options(pure, nomem, nostack, preserves_flags),
                );
            }
            let (tiles, walk) = (params.tiles, params.walk);
            let channels_are_rows = params.channels_are_rows != 0;

            // SAFETY: the whole block is here.
            let (block, warpgroup) = unsafe {
                let block = Block::start(TILE);
                (block, ptx::shfl_sync_idx_first(ptx::thread_index() / WARPGROUP))
            };
            if warpgroup == 0 {
                // SAFETY: the whole producer warpgroup, which starts with more registers; one
                // thread produces, with the maps of the parameters.
                unsafe {
                    if TILE.num_consumers() == 2 {
                        ptx::setmaxnreg_dec::<PRODUCER_REGISTERS>();
                    }
                    if ptx::thread_index() == 0 {
                        let source = Source {
                            in_map,
                            w_map: in_map + 128,
                            channels_are_rows,
                            sequences: params.sequences,
                            filter_taps: params.filter_taps,
                        };
                        source.produce(block, TILE, tiles, walk);
                    }
                }
            } else {
                if TILE.num_consumers() == 2 {
                    // SAFETY: whole consumer warpgroups; the producer frees what they take.
                    unsafe { ptx::setmaxnreg_inc::<CONSUMER_REGISTERS>() };
                }
                let consumer = warpgroup - 1;
                let epilogue = Epilogue::new(block, consumer, &params);
                let elected = ptx::thread_index() % WARPGROUP == 0;
                let k_blocks = walk.k_blocks();
                let mut position = RingPosition::START;
                let mut index = ptx::block_index();
                while index < tiles.num_tiles() {
                    $($(let (mut $c, mut $d, mut $s) = (0.0f32, 0.0f32, 0.0f32);)+)+
                    multiply_tile! {
                        six, TILE, MAJOR, MAJOR, block, consumer, elected, position, k_blocks,
                        $($($c $d $s)+)+
                    }
                    let place = place(walk, TILE, channels_are_rows, tiles.tile(index));
                    let mut group = 0;
                    $(
                        // SAFETY: the whole warp goes through the columns in order.
                        unsafe {
                            epilogue.stage(group, [$($s),+]);
                            if group % 4 == 3 {
                                epilogue.store(place, (group / 4) * STAGED_N);
                            }
                        }
                        group += 1;
                    )+
                    let _ = group;
                    index += ptx::grid_size();
                }
            }
        }
    };
}
pub(super) use entry;
