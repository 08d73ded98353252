//! Device side of wgrad in parts: the producer, the bias and the entries.

use super::{BLOCK_K, BLOCK_N, PARTS, SLAB_N, Split, SplitTile, Walk};
use crate::conv1d::hopper::wgrad::BIAS_SLOT;
use crate::conv1d::hopper::wgrad::device::across_positions;
use crate::gemm::hopper::device::{BF16, Element};
use crate::gemm::hopper::split::device::Block;
use crate::pipeline::RingPosition;
use crate::ptx;
use crate::tile_scheduler::div;

/// What the warps that sum for the bias need.
pub(super) const PRODUCER_REGISTERS: u32 = 56;
/// What is left of 504 for each of two consumers.
pub(super) const CONSUMER_REGISTERS: u32 = 224;

/// Warps that sum for the bias.
pub(super) const BIAS_WARPS: u32 = 2;

/// Bytes of a slab of a stage: 64 channels of 32 positions.
const SLAB_BYTES: u32 = SLAB_N * BLOCK_K * 2;

/// What the producer loads from.
#[derive(Clone, Copy)]
pub(super) struct Source {
    pub(super) dz_map: u64,
    pub(super) x_map: u64,
}

impl Source {
    /// Feeds the ring for every part of this block.
    ///
    /// # Safety
    /// One thread of the block calls it; the maps are 64-aligned addresses of maps with the boxes
    /// that `PartsWgradParams` names (`conv1d/parts/wgrad.rs` of the host encodes them).
    #[inline(always)]
    pub(super) unsafe fn produce(self, block: Block, tile: SplitTile, split: Split, walk: Walk) {
        // SAFETY: valid maps by the caller's contract.
        unsafe {
            ptx::prefetch_tensormap(self.dz_map);
            ptx::prefetch_tensormap(self.x_map);
        }
        let mut ring = RingPosition::START;
        let mut part = ptx::block_index();
        while part < split.num_parts() {
            let (mut step, end) = split.range(part);
            while step < end {
                let segment = split.segment(part, step, end);
                step = segment.next;
                let place = walk.place(segment.tile);
                let out_channel = place.row * tile.block_m;
                let slab = place.column * (BLOCK_N / SLAB_N);
                let mut sequence = div(segment.first, walk.sequence_blocks);
                let mut k_block = segment.first - sequence * walk.sequence_blocks;
                let mut left = segment.count;
                while left > 0 {
                    let full = block.ring.full(ring.stage);
                    // SAFETY: the stage is free once `empty` completes; the bytes expected are
                    // those of the boxes issued; destinations are whole slabs, 1024-aligned.
                    unsafe {
                        block.ring.wait_empty(ring);
                        ptx::mbarrier_arrive_expect_tx(full, tile.stage_bytes());
                        let at = [out_channel, k_block * BLOCK_K, sequence, place.group];
                        self.load_dz(tile, walk, block.x_stage(ring.stage), at, full);
                        let at = [slab, k_block * BLOCK_K, sequence, place.group];
                        self.load_x(walk, block.w_stage(ring.stage), at, full);
                    }
                    ring = ring.next(tile.num_stages);
                    left -= 1;
                    k_block += 1;
                    if k_block == walk.sequence_blocks {
                        k_block = 0;
                        sequence += 1;
                    }
                }
            }
            part += ptx::grid_size();
        }
    }

    /// Loads all parts of the tile's output channels, from the first at `at`.
    ///
    /// # Safety
    /// As [`produce`](Self::produce); the stage is free and `full` expects its bytes.
    #[inline(always)]
    unsafe fn load_dz(self, tile: SplitTile, walk: Walk, dst: u32, at: [u32; 4], full: u32) {
        let [channel, position, mut sequence, group] = at;
        let mut dst = dst;
        let mut part = 0;
        while part < PARTS {
            let mut loaded = 0;
            while loaded < tile.block_m {
                let at = [channel + loaded, position, sequence, group];
                // SAFETY: by the caller's contract; slabs follow each other in the part.
                unsafe { ptx::cp_async_bulk_tensor_4d_load(dst, self.dz_map, at, full) };
                dst += SLAB_BYTES;
                loaded += SLAB_N;
            }
            sequence += walk.batch;
            part += 1;
        }
    }

    /// Loads all parts of the tile's blocks of 64 input channels, each where its tap meets x: the
    /// first block is `at[0]`, the position that of dz.
    ///
    /// # Safety
    /// As [`produce`](Self::produce); the stage is free and `full` expects its bytes.
    #[inline(always)]
    unsafe fn load_x(self, walk: Walk, dst: u32, at: [u32; 4], full: u32) {
        let [first_slab, position, sequence, group] = at;
        let start = position.wrapping_mul(walk.in_step).wrapping_add(walk.in_first as u32);
        let mut tap = div(first_slab, walk.channel_blocks);
        let mut block = first_slab - tap * walk.channel_blocks;
        let mut slab = 0;
        while slab < BLOCK_N / SLAB_N {
            let position = start.wrapping_add(tap.wrapping_mul(walk.tap_step));
            // Beyond the last tap: sequences that do not exist give zeros and cost no reads.
            let (mut sequence, next) = if tap < walk.taps {
                (sequence, walk.batch)
            } else {
                (walk.batch * PARTS as u32, 0)
            };
            let mut dst = dst + slab * SLAB_BYTES;
            let mut part = 0;
            while part < PARTS {
                let at = [block * SLAB_N, position, sequence, group];
                // SAFETY: by the caller's contract; slabs follow each other in the part.
                unsafe { ptx::cp_async_bulk_tensor_4d_load(dst, self.x_map, at, full) };
                dst += SplitTile::w_part_bytes();
                sequence += next;
                part += 1;
            }
            slab += 1;
            block += 1;
            if block == walk.channel_blocks {
                block = 0;
                tap += 1;
            }
        }
    }
}

/// Releases every stage together with the consumers, and adds up the rows of dz that are this
/// tile's to add: a thread has eight channels at every eighth position of its warp's slab, or, of one
/// slab, of its warp's half.
///
/// # Safety
/// The whole of warps 1 and 2 call it; `bias_partials` is that of `PartsWgradParams`.
#[inline(always)]
pub(super) unsafe fn sum_rows(
    block: Block,
    tile: SplitTile,
    split: Split,
    walk: Walk,
    bias_partials: u64,
) {
    let thread = ptx::thread_index() - 32;
    let (warp, lane) = (thread / 32, thread % 32);
    // Positions of a slab that the warp has, and the bytes before them.
    let (count, first) = if tile.block_m == 128 {
        (BLOCK_K, warp * SLAB_BYTES)
    } else {
        (BLOCK_K / 2, warp * (SLAB_BYTES / 2))
    };
    let mut ring = RingPosition::START;
    let mut part = ptx::block_index();
    while part < split.num_parts() {
        let (mut step, end) = split.range(part);
        while step < end {
            let segment = split.segment(part, step, end);
            step = segment.next;
            let wanted = bias_partials != 0;
            // Of the tiles of a row, which load the same rows of dz, each sums every so many steps.
            let column = walk.place(segment.tile).column;
            let mut turn = segment.first - div(segment.first, walk.tiles_n) * walk.tiles_n;
            let mut sums = [0.0f32; 8];
            let mut left = segment.count;
            while left > 0 {
                let stage = block.x_stage(ring.stage) + first;
                // SAFETY: the stage has landed and stays until this warp has released it.
                unsafe {
                    block.ring.wait_full(ring);
                    if wanted && turn == column {
                        let mut k = lane / 8;
                        while k < count {
                            ptx::nounroll();
                            let at = stage + k * (SLAB_N * 2) + ((lane % 8) ^ (k % 8)) * 16;
                            sums = add(sums, at, tile.x_part_bytes());
                            k += 4;
                        }
                    }
                    ptx::bar_warp_sync();
                    if lane == 0 {
                        ptx::mbarrier_arrive(block.ring.empty(ring.stage));
                    }
                }
                ring = ring.next(tile.num_stages);
                left -= 1;
                turn += 1;
                if turn == walk.tiles_n {
                    turn = 0;
                }
            }
            if wanted {
                let slot = bias_partials + segment.slot as u64 * (BIAS_SLOT as u64 * 4);
                // SAFETY: 128 sums of this segment's slot, each written by one thread.
                unsafe {
                    let sums = across_positions(sums, [0.0; 8]);
                    if lane < 8 {
                        let address = slot + (warp * 64 + lane * 8) as u64 * 4;
                        let [a, b, c, d, e, f, g, h] = sums.map(f32::to_bits);
                        ptx::st_global_v4_u32(address, [a, b, c, d]);
                        ptx::st_global_v4_u32(address + 16, [e, f, g, h]);
                    }
                }
            }
        }
        part += ptx::grid_size();
    }
}

/// Adds eight elements of dz, whose parts lie so many bytes apart, to eight sums. The smallest parts
/// first, so that the sum of all is exact.
///
/// # Safety
/// The parts lie in shared memory at `at`, complete.
#[inline(always)]
unsafe fn add(sums: [f32; 8], at: u32, part_bytes: u32) -> [f32; 8] {
    let eight = |part: u32| {
        // SAFETY: by the caller's contract; a chunk is 16 bytes.
        let words = unsafe { ptx::ld_shared_v4_f32(at + part * part_bytes) };
        words.map(|pair| BF16::widen_pair(pair.to_bits()))
    };
    let (large, middle, small) = (eight(0), eight(1), eight(2));
    let low = |i: usize| large[i].0 + (middle[i].0 + small[i].0);
    let high = |i: usize| large[i].1 + (middle[i].1 + small[i].1);
    [
        sums[0] + low(0),
        sums[1] + high(0),
        sums[2] + low(1),
        sums[3] + high(1),
        sums[4] + low(2),
        sums[5] + high(2),
        sums[6] + low(3),
        sums[7] + high(3),
    ]
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
        /// the host's `conv1d/parts/wgrad.rs` has checked against the shape contract.
        #[unsafe(no_mangle)]
        pub unsafe extern "ptx-kernel" fn $entry(params: PartsWgradParams) {
            use crate::conv1d::hopper::wgrad::device::{partials_of_thread, store_columns};
            use crate::gemm::hopper::split::device::{Block, multiply_tile};
            use crate::gemm::hopper::{CONSUMER_M, WARPGROUP};
            use crate::smem_layout::{Major, descriptor_step_k16, wgmma_descriptor_k32};
            use crate::{pipeline::RingPosition, ptx};
            use device::{BIAS_WARPS, CONSUMER_REGISTERS, PRODUCER_REGISTERS, Source, sum_rows};

            const TILE: SplitTile = SplitTile {
                block_m: $block_m, num_stages: $num_stages, parts: PARTS as u32,
            };
            const SUMS: Tile = sums_tile($block_m);
            const MAJOR: Major = Major::MN;
            let dz_map: u64;
            // SAFETY: comments for `cargo xtask ptx`, and the parameter's own address: a reference
            // to `params` in Rust would be a copy in local memory, useless to TMA.
            unsafe {
                core::arch::asm!(
                    "// kasmina: .maxntid {threads}, 1, 1",
                    "// kasmina: .minnctapersm 1",
                    "// kasmina: .param_align 64",
                    concat!("mov.b64 {address}, ", stringify!($entry), "_param_0;"),
                    "cvta.param.u64 {address}, {address};",
                    address = out(reg64) dz_map,
                    threads = const TILE.block_dim(),
                    options(pure, nomem, nostack, preserves_flags),
                );
            }
            let (split, walk) = (params.split, params.walk);

            // SAFETY: the whole block is here; a stage is released by the consumers and by the
            // warps that sum for the bias.
            let (block, warpgroup) = unsafe {
                let block = Block::start_with(TILE, TILE.num_consumers() + BIAS_WARPS);
                (block, ptx::shfl_sync_idx_first(ptx::thread_index() / WARPGROUP))
            };
            if warpgroup == 0 {
                // SAFETY: the whole producer warpgroup, which starts with more registers; one
                // thread produces, with the maps of the parameters; two whole warps sum rows.
                unsafe {
                    if TILE.num_consumers() == 2 {
                        ptx::setmaxnreg_dec::<PRODUCER_REGISTERS>();
                    }
                    let warp = ptx::shfl_sync_idx_first(ptx::thread_index() / 32);
                    if warp == 1 || warp == 2 {
                        sum_rows(block, TILE, split, walk, params.bias_partials);
                    } else if ptx::thread_index() == 0 {
                        let source = Source { dz_map, x_map: dz_map + 128 };
                        source.produce(block, TILE, split, walk);
                    }
                }
            } else {
                if TILE.num_consumers() == 2 {
                    // SAFETY: whole consumer warpgroups; the producer frees what they take.
                    unsafe { ptx::setmaxnreg_inc::<CONSUMER_REGISTERS>() };
                }
                let consumer = warpgroup - 1;
                let elected = ptx::thread_index() % WARPGROUP == 0;
                let mut position = RingPosition::START;
                let mut part = ptx::block_index();
                while part < split.num_parts() {
                    let (mut step, end) = split.range(part);
                    while step < end {
                        let segment = split.segment(part, step, end);
                        step = segment.next;
                        let k_blocks = segment.count;
                        $($(let (mut $c, mut $d, mut $s) = (0.0f32, 0.0f32, 0.0f32);)+)+
                        multiply_tile! {
                            six, TILE, MAJOR, MAJOR, block, consumer, elected, position, k_blocks,
                            $($($c $d $s)+)+
                        }
                        let address =
                            partials_of_thread(params.partials, segment.slot, SUMS, consumer);
                        let mut group = 0;
                        $(
                            // SAFETY: the sums of this thread in the segment's slot.
                            unsafe { store_columns(address, SUMS, group, [$($s),+]) };
                            group += 1;
                        )+
                        let _ = group;
                    }
                    part += ptx::grid_size();
                }
            }
        }
    };
}
pub(super) use entry;
