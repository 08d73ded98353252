//! Device side of forward and dgrad.

use super::*;
use crate::gemm::hopper::CONSUMER_M;
use crate::gemm::hopper::device::{Block, Element, Epilogue};
use crate::pipeline::RingPosition;
use crate::ptx;

/// Whether consumers need more registers than the block starts with.
pub(super) const fn needs_registers(tile: Tile) -> bool {
    tile.block_m == 128 && tile.block_n == 256
}

/// The first position and channel of the tile in this row and column of the product.
#[inline(always)]
pub(super) fn place(
    walk: Walk,
    output: SequenceLayout,
    tile: Tile,
    (tile_m, tile_n): (u32, u32),
) -> Place {
    match output {
        SequenceLayout::Nlc => walk.place(tile_m, tile_n, [tile.block_m, tile.block_n]),
        SequenceLayout::Ncl => walk.place(tile_n, tile_m, [tile.block_n, tile.block_m]),
    }
}

/// What the producer loads from.
#[derive(Clone, Copy)]
pub(super) struct Source {
    pub(super) in_map: u64,
    pub(super) w_map: u64,
    pub(super) output: SequenceLayout,
}

impl Source {
    /// Feeds the ring for every tile of this block.
    ///
    /// # Safety
    /// One thread of the block calls it; the maps are 64-aligned addresses of maps with the boxes
    /// that [`GatherParams`] names (`conv1d/hopper.rs` of the host encodes them).
    #[inline(always)]
    pub(super) unsafe fn produce(self, block: Block, tile: Tile, tiles: TileScheduler, walk: Walk) {
        // SAFETY: valid maps by the caller's contract.
        unsafe {
            ptx::prefetch_tensormap(self.in_map);
            ptx::prefetch_tensormap(self.w_map);
        }
        let stage_bytes = tile.x_stage_bytes() + tile.w_stage_bytes();
        let mut ring = RingPosition::START;
        let mut index = ptx::block_index();
        while index < tiles.num_tiles() {
            let place = place(walk, self.output, tile, tiles.tile(index));
            let mut block_channel = 0;
            while block_channel < walk.channel_blocks {
                let in_channel = block_channel * BLOCK_K;
                let start = place.position.wrapping_mul(walk.in_step);
                let mut position = start.wrapping_add(walk.in_first as u32);
                let mut filter_tap = walk.first_tap;
                let mut tap = 0;
                while tap < walk.taps {
                    let full = block.ring.full(ring.stage);
                    let (first, second) = (block.x_stage(ring.stage), block.w_stage(ring.stage));
                    let (input, filter) = match self.output {
                        SequenceLayout::Nlc => (first, second),
                        SequenceLayout::Ncl => (second, first),
                    };
                    // SAFETY: the stage is free once `empty` completes; the bytes expected are
                    // those of the boxes issued; destinations are whole stages, 1024-aligned.
                    unsafe {
                        block.ring.wait_empty(ring);
                        ptx::mbarrier_arrive_expect_tx(full, stage_bytes);
                        let at = [in_channel, place.channel, filter_tap, place.group];
                        ptx::cp_async_bulk_tensor_4d_load(filter, self.w_map, at, full);
                        let at = Place { position, channel: in_channel, ..place };
                        self.load_input(tile, walk, input, at, full);
                    }
                    ring = ring.next(tile.num_stages);
                    position = position.wrapping_add(walk.tap_step);
                    filter_tap = filter_tap.wrapping_add(walk.tap_stride as u32);
                    tap += 1;
                }
                block_channel += 1;
            }
            index += ptx::grid_size();
        }
    }

    /// Loads the positions of a tile and 64 channels: rows of 128 bytes.
    ///
    /// # Safety
    /// As [`produce`](Self::produce); the stage is free and `full` expects its bytes.
    #[inline(always)]
    unsafe fn load_input(self, tile: Tile, walk: Walk, dst: u32, at: Place, full: u32) {
        let positions = match self.output {
            SequenceLayout::Nlc => tile.block_m,
            SequenceLayout::Ncl => tile.block_n,
        };
        let mut loaded = 0;
        while loaded < positions {
            let offset = dst + loaded * (BLOCK_K * 2);
            let position = at.position.wrapping_add(loaded.wrapping_mul(walk.in_step));
            let at = [at.channel, position, at.sequence, at.group];
            // SAFETY: by the caller's contract; a position is 128 bytes, and boxes follow each
            // other in the stage.
            unsafe { ptx::cp_async_bulk_tensor_4d_load(offset, self.in_map, at, full) };
            loaded += walk.box_positions;
        }
    }
}

/// The bias of this thread's two rows, where rows are channels: rows `n` and `n + 8` of the 64,
/// as [`crate::smem_layout::accumulator_position`] places them; 0 beyond the group.
#[inline(always)]
pub(super) fn load_row_bias<E: Element>(
    bias: u64,
    group_out: u32,
    place: Place,
    consumer: u32,
) -> [f32; 2] {
    let thread = ptx::thread_index() % 128;
    let row = place.channel + consumer * CONSUMER_M + 16 * (thread / 32) + thread % 32 / 4;
    let (mut low, mut high) = (0, 0);
    if bias != 0 {
        let address = bias + 2 * (place.group * group_out + row) as u64;
        // SAFETY: inside the bias, an element for each channel; the host checks its length.
        unsafe {
            if row < group_out {
                low = ptx::ld_global_u16(address);
            }
            if row + 8 < group_out {
                high = ptx::ld_global_u16(address + 16);
            }
        }
    }
    [E::widen(low), E::widen(high)]
}

/// What [`store_tile`] adds: the bias of two columns where columns are channels, else that of two
/// rows. Loaded before the main loop so that its latency hides behind it.
#[inline(always)]
pub(super) fn load_bias<E: Element>(
    epilogue: Epilogue,
    output: SequenceLayout,
    bias: u64,
    group_out: u32,
    place: Place,
    consumer: u32,
) -> ((u16, u16), [f32; 2]) {
    match output {
        SequenceLayout::Nlc => {
            (epilogue.load_bias(place.group * group_out + place.channel), [0.0; 2])
        }
        SequenceLayout::Ncl => ((0, 0), load_row_bias::<E>(bias, group_out, place, consumer)),
    }
}

/// Finishes the sums of a tile and stores them. Executed by a whole consumer warpgroup.
macro_rules! store_tile {
    ($output:expr, $elements:ty, $epilogue:expr, $consumer:expr, $place:expr, $column_bias:expr,
     $row_bias:expr, $([$($c:ident)+])+) => {
        if matches!($output, SequenceLayout::Nlc) {
            $epilogue.publish_bias::<$elements>($column_bias);
        }
        let mut group = 0;
        $(
            // SAFETY: the whole warpgroup goes through the slabs in order; a slab lies within the
            // output's map or is clipped.
            unsafe {
                if group % 4 == 0 {
                    $epilogue.begin_slab();
                }
                let c = [$($c),+];
                match $output {
                    SequenceLayout::Nlc => {
                        $epilogue.columns::<$elements>(group, c);
                    }
                    SequenceLayout::Ncl => {
                        let [low, high] = $row_bias;
                        let c = [
                            c[0] + low, c[1] + low, c[2] + high, c[3] + high,
                            c[4] + low, c[5] + low, c[6] + high, c[7] + high,
                        ];
                        $epilogue.biased_columns::<$elements>(group, c);
                    }
                }
                if group % 4 == 3 {
                    let row = $consumer * $crate::gemm::hopper::CONSUMER_M;
                    let column = group / 4 * $crate::gemm::hopper::SLAB_N;
                    let (inner, outer) = match $output {
                        SequenceLayout::Nlc => ($place.channel + column, $place.position + row),
                        SequenceLayout::Ncl => ($place.position + column, $place.channel + row),
                    };
                    let at = [inner, outer, $place.sequence, $place.group];
                    $epilogue.end_slab_with(group / 4, |map, buffer| {
                        $crate::ptx::cp_async_bulk_tensor_4d_store(map, at, buffer);
                    });
                }
            }
            group += 1;
        )+
        let _ = group;
    };
}
pub(super) use store_tile;

/// Defines the entry for one element type, layout of the output, major orders and tile.
macro_rules! entry {
    ($entry:ident, $element:ident, $ptx_type:literal, $output:ident, $block_m:literal, $block_n:tt, $num_stages:literal, $blocks:literal) => {
        $crate::ptx::wgmma::with_accumulators! { $block_n, device::entry! {
            @body $entry, $element, $ptx_type, $output, $block_m, $block_n, $num_stages, $blocks
        } }
    };
    (@body $entry:ident, $element:ident, $ptx_type:literal, $output:ident, $block_m:literal, $block_n:tt, $num_stages:literal, $blocks:literal
     $([$($c:ident)+])+) => {
        /// # Safety
        /// Launched by `launch` on the host with the geometry of its `Kernel` and parameters that
        /// the host's `conv1d/hopper.rs` has checked against the shape contract.
        #[unsafe(no_mangle)]
        pub unsafe extern "ptx-kernel" fn $entry(params: GatherParams) {
            use crate::gemm::hopper::device::{
                Block, CONSUMER_REGISTERS, Epilogue, PRODUCER_REGISTERS, multiply_tile,
            };
            use crate::pipeline::RingPosition;
            use crate::ptx;
            use crate::smem_layout::Major;
            use device::{Source, load_bias, needs_registers, place, store_tile};

            const TILE: Tile =
                Tile::new($block_m, $block_n, $num_stages);
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
            let (w_map, out_map) = (in_map + 128, in_map + 256);
            let (tiles, walk) = (params.tiles, params.walk);

            // SAFETY: the whole block is here.
            let (block, warpgroup) = unsafe {
                let block = Block::start(TILE);
                (block, ptx::shfl_sync_idx_first(ptx::thread_index() / 128))
            };
            $crate::gemm::hopper::device::wait_for_predecessors();
            if warpgroup == 0 {
                // SAFETY: the whole producer warpgroup, which starts with more registers; one
                // thread produces, with the maps of the parameters.
                unsafe {
                    if needs_registers(TILE) {
                        ptx::setmaxnreg_dec::<PRODUCER_REGISTERS>();
                    }
                    if ptx::thread_index() == 0 {
                        let source = Source { in_map, w_map, output: OUTPUT };
                        source.produce(block, TILE, tiles, walk);
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
                    block, consumer, out_map, bias, params.out_channels, params.activation,
                );
                let elected = block.releases();
                let k_blocks = walk.k_blocks();
                let mut position = RingPosition::START;
                let mut index = ptx::block_index();
                $($(let mut $c = 0.0f32;)+)+
                while index < tiles.num_tiles() {
                    let place = place(walk, OUTPUT, TILE, tiles.tile(index));
                    let (column_bias, row_bias) =
                        load_bias::<Elements>(epilogue, OUTPUT, bias, group_out, place, consumer);
                    multiply_tile! {
                        $ptx_type, $block_n, TILE, Major::K, Major::K, block, consumer, elected,
                        position, k_blocks, $($($c)+)+
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
