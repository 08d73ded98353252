//! Device side of wgrad.

use super::*;
use crate::gemm::hopper::device::Block;
use crate::pipeline::RingPosition;
use crate::ptx;
use crate::smem_layout::Major;

mod bias;
mod transpose;
pub(in crate::conv1d::hopper) use bias::across_positions;
pub(super) use bias::sum_rows;
pub(super) use transpose::Raw;

/// What the warps that sum for the bias, and those that transpose, need.
pub(super) const PRODUCER_REGISTERS: u32 = 56;

/// What is left of 504 for each of two consumers, or of 512 with a warpgroup that transposes.
pub(super) const fn consumer_registers(transposes: bool) -> u32 {
    if transposes { 200 } else { 224 }
}

/// Whether consumers need more registers than the block starts with.
pub(super) const fn needs_registers(tile: Tile) -> bool {
    tile.block_m == 128
}

/// What the producer loads from.
#[derive(Clone, Copy)]
pub(super) struct Source {
    pub(super) dz_map: u64,
    pub(super) x_map: u64,
    pub(super) dz_major: Major,
    pub(super) x_major: Major,
    /// [`WgradKernel::tile_taps`].
    pub(super) tile_taps: u32,
    /// Where boxes of a channels-first x wait for their transposition.
    pub(super) raw: Option<Raw>,
}

/// One step: the group, sequence and first position of dz.
#[derive(Clone, Copy)]
struct Step {
    group: u32,
    sequence: u32,
    position: u32,
}

impl Source {
    /// Feeds the ring for every part of this block.
    ///
    /// # Safety
    /// One thread of the block calls it; the maps are 64-aligned addresses of maps with the boxes
    /// that [`WgradParams`] names (`conv1d/hopper.rs` of the host encodes them).
    #[inline(always)]
    pub(super) unsafe fn produce(self, block: Block, tile: Tile, split: Split, walk: Walk) {
        // SAFETY: valid maps by the caller's contract.
        unsafe {
            ptx::prefetch_tensormap(self.dz_map);
            ptx::prefetch_tensormap(self.x_map);
        }
        let x_bytes = if self.raw.is_some() {
            // Those of the raw box have a barrier of their own.
            0
        } else if self.tile_taps > 0 {
            walk.box_positions * (SLAB_N * 2)
        } else {
            tile.block_n * (BLOCK_K * 2)
        };
        let stage_bytes = tile.x_stage_bytes() + x_bytes;
        let (mut ring, mut raw_ring) = (RingPosition::START, RingPosition::START);
        let mut part = ptx::block_index();
        while part < split.num_parts() {
            let (mut step, end) = split.range(part);
            while step < end {
                let segment = split.segment(part, step, end);
                step = segment.next;
                let place = walk.place(segment.tile);
                let out_channel = place.row * tile.block_m;
                let slab = place.column * (tile.block_n / SLAB_N);
                let first_tap = div(slab, walk.channel_blocks);
                let first_block = slab - first_tap * walk.channel_blocks;
                let mut sequence = div(segment.first, walk.sequence_blocks);
                let mut k_block = segment.first - sequence * walk.sequence_blocks;
                let mut left = segment.count;
                while left > 0 {
                    let full = block.ring.full(ring.stage);
                    let position = k_block * BLOCK_K;
                    let at = Step { group: place.group, sequence, position };
                    // SAFETY: the stage is free once `empty` completes; the bytes expected are
                    // those of the boxes issued; destinations are whole stages, 1024-aligned.
                    unsafe {
                        if let Some(raw) = self.raw {
                            raw.ring.wait_empty(raw_ring);
                            let full = raw.ring.full(raw_ring.stage);
                            let bytes = raw_positions(walk.box_positions) * (SLAB_N * 2);
                            ptx::mbarrier_arrive_expect_tx(full, bytes);
                            let dst = raw.stage(raw_ring.stage);
                            self.load_haloed_x(walk, dst, place.column, at, full);
                            raw_ring = raw_ring.next(RAW_STAGES);
                        }
                        block.ring.wait_empty(ring);
                        ptx::mbarrier_arrive_expect_tx(full, stage_bytes);
                        self.load_dz(tile, block.x_stage(ring.stage), out_channel, at, full);
                        let dst = block.w_stage(ring.stage);
                        if self.raw.is_some() {
                            // The transposers fill the rest of the stage.
                        } else if self.tile_taps > 0 {
                            self.load_haloed_x(walk, dst, place.column, at, full);
                        } else {
                            self.load_x(tile, walk, dst, [first_tap, first_block], at, full);
                        }
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

    /// Loads the tile's output channels.
    ///
    /// # Safety
    /// As [`produce`](Self::produce); the stage is free and `full` expects its bytes.
    #[inline(always)]
    unsafe fn load_dz(self, tile: Tile, dst: u32, channel: u32, at: Step, full: u32) {
        let Step { group, sequence, position } = at;
        // SAFETY: by the caller's contract; slabs follow each other in the stage.
        unsafe {
            match self.dz_major {
                Major::K => {
                    let at = [position, channel, sequence, group];
                    ptx::cp_async_bulk_tensor_4d_load(dst, self.dz_map, at, full);
                }
                Major::MN => {
                    let mut loaded = 0;
                    while loaded < tile.block_m {
                        let at = [channel + loaded, position, sequence, group];
                        let dst = dst + loaded * (BLOCK_K * 2);
                        ptx::cp_async_bulk_tensor_4d_load(dst, self.dz_map, at, full);
                        loaded += SLAB_N;
                    }
                }
            }
        }
    }

    /// Loads 64 input channels of all positions that the tile's taps meet.
    ///
    /// # Safety
    /// As [`produce`](Self::produce); the stage is free and `full` expects its bytes.
    #[inline(always)]
    unsafe fn load_haloed_x(self, walk: Walk, dst: u32, column: u32, at: Step, full: u32) {
        let channel = div(column, walk.tap_tiles) * SLAB_N;
        let position = at.position.wrapping_add(walk.first_met(column));
        let at = if self.raw.is_some() {
            [position & !7, channel, at.sequence, at.group]
        } else {
            [channel, position, at.sequence, at.group]
        };
        // SAFETY: by the caller's contract; the box has whole groups of 8 rows.
        unsafe { ptx::cp_async_bulk_tensor_4d_load(dst, self.x_map, at, full) };
    }

    /// Loads the tile's blocks of 64 input channels, each where its tap meets x.
    ///
    /// # Safety
    /// As [`produce`](Self::produce); the stage is free and `full` expects its bytes.
    #[inline(always)]
    unsafe fn load_x(
        self,
        tile: Tile,
        walk: Walk,
        dst: u32,
        [mut tap, mut channel_block]: [u32; 2],
        at: Step,
        full: u32,
    ) {
        let start = at.position.wrapping_mul(walk.in_step).wrapping_add(walk.in_first as u32);
        let mut loaded = 0;
        while loaded < tile.block_n {
            // Beyond the last tap: a sequence that does not exist gives zeros and costs no reads. Its
            // position is that of the first, as the others' need not be one that boxes begin on.
            let (sequence, reach) = if tap < walk.taps {
                (at.sequence, tap.wrapping_mul(walk.tap_step))
            } else {
                (walk.batch, 0)
            };
            let position = start.wrapping_add(reach);
            let channel = channel_block * SLAB_N;
            let dst = dst + loaded * (BLOCK_K * 2);
            // SAFETY: by the caller's contract; slabs of 64 × 64 follow each other in the stage,
            // whichever axis is contiguous.
            unsafe {
                match self.x_major {
                    Major::K => {
                        let at = [position, channel, sequence, at.group];
                        ptx::cp_async_bulk_tensor_4d_load(dst, self.x_map, at, full);
                    }
                    Major::MN => {
                        let mut k = 0;
                        while k < BLOCK_K {
                            let position = position.wrapping_add(k.wrapping_mul(walk.in_step));
                            let at = [channel, position, sequence, at.group];
                            let dst = dst + k * (SLAB_N * 2);
                            ptx::cp_async_bulk_tensor_4d_load(dst, self.x_map, at, full);
                            k += walk.box_positions;
                        }
                    }
                }
            }
            loaded += SLAB_N;
            channel_block += 1;
            if channel_block == walk.channel_blocks {
                channel_block = 0;
                tap += 1;
            }
        }
    }
}

/// Where this thread's sums of a segment go: the address of its first row and its first column.
#[inline(always)]
pub(in crate::conv1d::hopper) fn partials_of_thread(
    partials: u64,
    slot: u32,
    tile: Tile,
    consumer: u32,
) -> u64 {
    let thread = ptx::thread_index() % 128;
    let (row, column) = crate::smem_layout::accumulator_position(thread, 0);
    let row = consumer * crate::gemm::hopper::CONSUMER_M + row;
    let slot_elements = tile.block_m * tile.block_n;
    let element = slot as u64 * slot_elements as u64 + (row * tile.block_n + column) as u64;
    partials + 4 * element
}

/// Stores 16 columns of the thread's two rows.
///
/// # Safety
/// `address` is what [`partials_of_thread`] gives; no other thread has these sums.
#[inline(always)]
pub(in crate::conv1d::hopper) unsafe fn store_columns(
    address: u64,
    tile: Tile,
    group: u32,
    c: [f32; 8],
) {
    let near = address + (group * 16 * 4) as u64;
    let far = near + (8 * tile.block_n * 4) as u64;
    let [c0, c1, c2, c3, c4, c5, c6, c7] = c.map(f32::to_bits);
    // SAFETY: by the caller's contract; columns are even, so pairs are 8-aligned.
    unsafe {
        ptx::st_global_v2_u32(near, [c0, c1]);
        ptx::st_global_v2_u32(far, [c2, c3]);
        ptx::st_global_v2_u32(near + 32, [c4, c5]);
        ptx::st_global_v2_u32(far + 32, [c6, c7]);
    }
}

/// Row of a stage's x that the first tap of a tile meets for the first position.
#[inline(always)]
pub(super) fn first_row(transposes: bool, walk: Walk, tile: u32) -> u32 {
    // A transposed tile begins on a multiple of eight positions.
    if transposes { walk.first_met(walk.place(tile).column) % 8 } else { 0 }
}

/// As [`crate::gemm::hopper::device::multiply_tile`] for an x of which one box serves all columns.
macro_rules! multiply_taps {
    ($ptx_type:literal, $block_n:tt, $num_stages:expr, $dz_major:expr, $block:expr, $consumer:expr,
     $elected:expr, $position:ident, $steps:expr, $first_row:expr, $tap_step:expr,
     $($c:ident)+) => {
        let mut previous = $position.stage;
        let mut step = 0u32;
        let first_row = $first_row * (SLAB_N * 2);
        while step < $steps {
            let stage = $position.stage;
            // 64 rows of dz, or one slab: as many bytes.
            let rows = $crate::gemm::hopper::CONSUMER_M * BLOCK_K * 2;
            let dz = $block.x_stage(stage) + $consumer * rows;
            let a = $crate::smem_layout::wgmma_descriptor(dz, $dz_major);
            let x = $block.w_stage(stage) + first_row;
            let b = $crate::smem_layout::wgmma_descriptor_slabs(x, $tap_step);
            // SAFETY: the stage has landed; the whole warpgroup executes it.
            unsafe {
                $block.ring.wait_full($position);
                $crate::ptx::wgmma::wgmma_k64!(
                    $ptx_type, $block_n, ($dz_major as u32), (Major::MN as u32),
                    ($crate::smem_layout::descriptor_step_k16($dz_major)),
                    ($crate::smem_layout::descriptor_step_k16(Major::MN)),
                    a, b, step, $($c)+
                );
                // The batch before is complete: its stage may be overwritten.
                if $elected && step > 0 {
                    $block.release(previous);
                }
            }
            previous = stage;
            $position = $position.next($num_stages);
            step += 1;
        }
        // SAFETY: the whole warpgroup; the last batch's stage is released after it.
        unsafe {
            $crate::ptx::wgmma::wgmma_wait_all!($block_n, $($c)+);
            if $elected {
                $block.release(previous);
            }
        }
    };
}
pub(super) use multiply_taps;

/// Multiplies a segment as the kernel's taps have it.
macro_rules! multiply_segment {
    (0, $ptx_type:literal, $block_n:tt, $tile:expr, $dz_major:expr, $x_major:expr, $block:expr,
     $consumer:expr, $elected:expr, $position:ident, $steps:expr, $first_row:expr,
     $tap_step:expr, $($c:ident)+) => {
        $crate::gemm::hopper::device::multiply_tile! {
            $ptx_type, $block_n, $tile, $dz_major, $x_major, $block, $consumer, $elected,
            $position, $steps, $($c)+
        }
    };
    ($tile_taps:tt, $ptx_type:literal, $block_n:tt, $tile:expr, $dz_major:expr, $x_major:expr,
     $block:expr, $consumer:expr, $elected:expr, $position:ident, $steps:expr,
     $first_row:expr, $tap_step:expr, $($c:ident)+) => {
        device::multiply_taps! {
            $ptx_type, $block_n, $tile.num_stages, $dz_major, $block, $consumer, $elected,
            $position, $steps, $first_row, $tap_step, $($c)+
        }
    };
}
pub(super) use multiply_segment;

/// Defines the entry for one element type, major orders of dz and x, and tile.
macro_rules! entry {
    ($entry:ident, $element:ident, $ptx_type:literal, $dz_major:ident, $x:ident $x_major:ident,
     $block_m:literal, $block_n:tt, $num_stages:literal, $tile_taps:tt) => {
        $crate::ptx::wgmma::with_accumulators! { $block_n, device::entry! {
            @body $entry, $element, $ptx_type, $dz_major, $x $x_major, $block_m, $block_n,
            $num_stages, $tile_taps
        } }
    };
    (@body $entry:ident, $element:ident, $ptx_type:literal, $dz_major:ident, $x:ident $x_major:ident,
     $block_m:literal, $block_n:tt, $num_stages:literal, $tile_taps:tt $([$($c:ident)+])+) => {
        /// # Safety
        /// Launched by `launch` on the host with the geometry of its `Kernel` and parameters that
        /// the host's `conv1d/hopper.rs` has checked against the shape contract.
        #[unsafe(no_mangle)]
        pub unsafe extern "ptx-kernel" fn $entry(params: WgradParams) {
            use crate::gemm::hopper::device::Block;
            use crate::pipeline::RingPosition;
            use crate::ptx;
            use crate::smem_layout::Major;
            use device::*;

            const TILE: Tile =
                Tile::new($block_m, $block_n, $num_stages);
            const DZ: Major = Major::$dz_major;
            const X: Major = Major::$x_major;
            // The stages are laid out as this one's.
            const STAGES: Tile = if $tile_taps > 0 { haloed_stages(TILE) } else { TILE };
            const TRANSPOSES: bool =
                $tile_taps > 0 && matches!(SequenceLayout::$x, SequenceLayout::Ncl);
            const TRANSPOSING_WARPS: u32 = if TRANSPOSES { TRANSPOSERS } else { 0 };
            type Elements = crate::gemm::hopper::device::$element;
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
                    threads = const TILE.block_dim() + 32 * TRANSPOSING_WARPS,
                    options(pure, nomem, nostack, preserves_flags),
                );
            }
            let (split, walk) = (params.split, params.walk);

            // SAFETY: the whole block is here; a stage is filled by TMA and by the transposers, and
            // released by the consumers and by warps 1 and 2.
            let (raw, block, warpgroup) = unsafe {
                let raw = if TRANSPOSES { Some(Raw::start(STAGES)) } else { None };
                let block =
                    Block::start_with(STAGES, 1 + TRANSPOSING_WARPS, TILE.num_consumers() + 2);
                (raw, block, ptx::shfl_sync_idx_first(ptx::thread_index() / 128))
            };
            $crate::gemm::hopper::device::wait_for_predecessors();
            if warpgroup == 0 {
                // SAFETY: the whole producer warpgroup, which starts with more registers; one
                // thread produces, with the maps of the parameters; two whole warps sum rows.
                unsafe {
                    if needs_registers(TILE) {
                        ptx::setmaxnreg_dec::<PRODUCER_REGISTERS>();
                    }
                    let warp = ptx::shfl_sync_idx_first(ptx::thread_index() / 32);
                    if warp == 1 || warp == 2 {
                        let bias_partials = params.bias_partials;
                        sum_rows::<Elements>(block, TILE, DZ, split, walk, bias_partials);
                    } else if ptx::thread_index() == 0 {
                        let x_map = dz_map + 128;
                        let source = Source {
                            dz_map, x_map, dz_major: DZ, x_major: X, tile_taps: $tile_taps, raw,
                        };
                        source.produce(block, TILE, split, walk);
                    }
                }
            } else if TRANSPOSES && warpgroup > TILE.num_consumers() {
                // SAFETY: the whole warpgroup, which starts with more registers.
                unsafe {
                    if needs_registers(TILE) {
                        ptx::setmaxnreg_dec::<PRODUCER_REGISTERS>();
                    }
                    if let Some(raw) = raw {
                        raw.transpose(block, TILE, split, walk);
                    }
                }
            } else {
                if needs_registers(TILE) {
                    // SAFETY: whole consumer warpgroups; the others free what they take.
                    unsafe { ptx::setmaxnreg_inc::<{ consumer_registers(TRANSPOSES) }>() };
                }
                let consumer = warpgroup - 1;
                let elected = block.releases();
                let mut position = RingPosition::START;
                let mut part = ptx::block_index();
                $($(let mut $c = 0.0f32;)+)+
                while part < split.num_parts() {
                    let (mut step, end) = split.range(part);
                    while step < end {
                        let segment = split.segment(part, step, end);
                        step = segment.next;
                        device::multiply_segment! {
                            $tile_taps, $ptx_type, $block_n, TILE, DZ, X, block, consumer, elected,
                            position, segment.count,
                            (first_row(TRANSPOSES, walk, segment.tile)), walk.tap_step, $($($c)+)+
                        }
                        let address =
                            partials_of_thread(params.partials, segment.slot, TILE, consumer);
                        let mut group = 0;
                        $(
                            // SAFETY: the sums of this thread in the segment's slot.
                            unsafe { store_columns(address, TILE, group, [$($c),+]) };
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
