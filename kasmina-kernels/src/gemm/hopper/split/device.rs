//! Device side of the f32 kernels: the split, the producer and the epilogue.

use super::*;
use crate::activation::Activation;
use crate::gemm::parts::{Findings, PARTS, W_SHIFT, of_block, split};
use crate::pipeline::RingPosition;
use crate::ptx;
use crate::smem_layout::Major;

mod staging;
pub(crate) use staging::Staging;

// As the 16-bit kernels' of 128×256.
pub(crate) use crate::gemm::hopper::device::{CONSUMER_REGISTERS, PRODUCER_REGISTERS};

/// Where the block's shared memory and its ring lie.
#[derive(Clone, Copy)]
pub(crate) struct Block {
    tile: SplitTile,
    smem: u32,
    pub(crate) ring: RingBarriers,
}

impl Block {
    /// Initialises the barriers, then waits for the grid before this one.
    ///
    /// # Safety
    /// Every thread of the block calls it once, first; `tile.smem_bytes()` of dynamic shared
    /// memory (`Kernel::smem_bytes`, which `launch` on the host passes).
    #[inline(always)]
    pub(crate) unsafe fn start(tile: SplitTile) -> Self {
        // SAFETY: by the caller's contract.
        unsafe { Self::start_with(tile, tile.num_consumers()) }
    }

    /// The same with so many that release a stage.
    ///
    /// # Safety
    /// As [`start`](Self::start).
    #[inline(always)]
    pub(crate) unsafe fn start_with(tile: SplitTile, releasing: u32) -> Self {
        let smem = ptx::dynamic_smem();
        let ring = RingBarriers { base: smem + tile.barrier_offset(), num_stages: tile.num_stages };
        if ptx::thread_index() == 0 {
            // SAFETY: one thread, before the barrier below, inside the shared memory.
            unsafe { ring.init(1, releasing) };
        }
        // Everything so far touched only shared memory and may overlap the grid before.
        ptx::griddepcontrol_launch_dependents();
        ptx::griddepcontrol_wait();
        // SAFETY: the whole block is here.
        unsafe { ptx::bar_sync_all() };
        Self { tile, smem, ring }
    }

    /// Where a warp stages its sums.
    #[inline(always)]
    fn staged(self, warp: u32) -> u32 {
        self.smem + self.tile.staged_offset() + warp * STAGED_BYTES
    }

    /// The first part of X in a stage; the others follow.
    #[inline(always)]
    pub(crate) fn x_stage(self, stage: u32) -> u32 {
        self.smem + stage * self.tile.stage_bytes()
    }

    /// The first part of W in a stage; the others follow.
    #[inline(always)]
    pub(crate) fn w_stage(self, stage: u32) -> u32 {
        self.x_stage(stage) + self.tile.x_stage_bytes()
    }
}

/// The parts of both operands.
#[derive(Clone, Copy)]
pub(super) struct PartsOf {
    pub(super) x_map: u64,
    pub(super) w_map: u64,
    pub(super) w_major: Major,
    pub(super) m: u32,
    pub(super) n: u32,
    pub(super) k: u32,
}

impl PartsOf {
    /// Issues the loads of a stage.
    ///
    /// # Safety
    /// As [`produce`]; the stage is free and its barrier expects `stage_bytes`.
    #[inline(always)]
    unsafe fn load(self, block: Block, stage: u32, m: u32, n: u32, k: u32) {
        let full = block.ring.full(stage);
        let (mut x, mut w) = (block.x_stage(stage), block.w_stage(stage));
        let mut part = 0;
        while part < block.tile.parts {
            // SAFETY: boxes as `SplitGemmParams` names them, into their places in a free stage.
            unsafe {
                ptx::cp_async_bulk_tensor_2d_load(x, self.x_map, k, m + part * self.m, full);
                match self.w_major {
                    Major::K => {
                        let n = n + part * self.n;
                        ptx::cp_async_bulk_tensor_2d_load(w, self.w_map, k, n, full);
                    }
                    Major::MN => {
                        let k = k + part * self.k;
                        ptx::cp_async_bulk_tensor_2d_load(w, self.w_map, n, k, full);
                        let (w, n) = (w + SplitTile::w_part_bytes() / 2, n + SLAB_N);
                        ptx::cp_async_bulk_tensor_2d_load(w, self.w_map, n, k, full);
                    }
                }
            }
            x += block.tile.x_part_bytes();
            w += SplitTile::w_part_bytes();
            part += 1;
        }
    }
}

/// Feeds the ring for every tile of this block.
///
/// # Safety
/// One thread of the block calls it; the maps are 64-aligned addresses of maps with the boxes that
/// `SplitGemmParams` names (the host encodes them).
#[inline(always)]
pub(super) unsafe fn produce(block: Block, parts: PartsOf, tiles: TileScheduler) {
    // SAFETY: valid maps by the caller's contract.
    unsafe {
        ptx::prefetch_tensormap(parts.x_map);
        ptx::prefetch_tensormap(parts.w_map);
    }
    let mut position = RingPosition::START;
    let mut tile = ptx::block_index();
    while tile < tiles.num_tiles() {
        let (tile_m, tile_n) = tiles.tile(tile);
        let mut k = 0;
        while k < parts.k {
            // SAFETY: the stage is free once `empty` completes; the bytes expected are those of
            // the boxes issued; destinations are whole parts, 1024-aligned.
            unsafe {
                block.ring.wait_empty(position);
                ptx::mbarrier_arrive_expect_tx(
                    block.ring.full(position.stage),
                    block.tile.stage_bytes(),
                );
                let (m, n) = (tile_m * block.tile.block_m, tile_n * BLOCK_N);
                parts.load(block, position.stage, m, n, k);
            }
            position = position.next(block.tile.num_stages);
            k += BLOCK_K;
        }
        tile += ptx::grid_size();
    }
}

/// One warp's side of the epilogue.
#[derive(Clone, Copy)]
pub(super) struct Epilogue {
    staging: Staging,
    bias: u64,
    y: u64,
    y_stride: u64,
    m: u32,
    n: u32,
    activation: u32,
}

impl Epilogue {
    #[inline(always)]
    pub(super) fn new(block: Block, consumer: u32, params: &SplitGemmParams) -> Self {
        Self {
            staging: Staging::new(block, consumer),
            bias: params.bias,
            y: params.y,
            y_stride: params.y_stride,
            m: params.m,
            n: params.n,
            activation: params.activation,
        }
    }

    /// As [`Staging::stage`].
    ///
    /// # Safety
    /// The whole warp calls it, after `store` of the columns staged before.
    #[inline(always)]
    pub(super) unsafe fn stage(self, group: u32, sums: [f32; 8]) {
        // SAFETY: by the caller's contract.
        unsafe { self.staging.stage(group, sums) };
    }

    /// Adds the bias to what is staged, applies the activation and stores it; the tile's first row
    /// is `m`, the first staged column `n`.
    ///
    /// # Safety
    /// The whole warp calls it, after four groups have been staged.
    #[inline(always)]
    pub(super) unsafe fn store(self, m: u32, n: u32) {
        // Sixteen lanes to a row, four columns to a lane.
        let (row, offset) = (self.staging.lane / 16, self.staging.lane % 16 * 4);
        let column = n + offset;
        let left = self.n.saturating_sub(column);
        // SAFETY: elements of the bias's n; the host checks its length.
        let bias = unsafe {
            load_some(self.bias + 4 * u64::from(column), if self.bias == 0 { 0 } else { left })
        }
        .map(f32::from_bits);
        let activation = Activation::from_code(self.activation);
        let whole = left >= 4 && self.y % 16 == 0 && self.y_stride % 4 == 0;
        // SAFETY: the whole warp.
        unsafe { ptx::bar_warp_sync() };
        let mut step = 0;
        while step < 8 {
            ptx::nounroll();
            let row = row + 2 * step;
            // SAFETY: inside the warp's rows, staged before the barrier above.
            let sums = unsafe { self.staging.four(row, offset) };
            let row = m + self.staging.row + row;
            if row < self.m {
                let address = self.y + 4 * (u64::from(row) * self.y_stride + u64::from(column));
                let values = [
                    activation.apply(sums[0] + bias[0]).to_bits(),
                    activation.apply(sums[1] + bias[1]).to_bits(),
                    activation.apply(sums[2] + bias[2]).to_bits(),
                    activation.apply(sums[3] + bias[3]).to_bits(),
                ];
                // SAFETY: elements of Y, which no other thread writes; 16 bytes at once only where
                // address and stride allow it.
                unsafe {
                    if whole {
                        ptx::st_global_v4_u32(address, values);
                    } else {
                        store_some(address, left, values);
                    }
                }
            }
            step += 1;
        }
        // SAFETY: the whole warp. What is staged next overwrites what was read here.
        unsafe { ptx::bar_warp_sync() };
    }
}

/// Loads up to four elements, of which `left` exist, as bits; 0 for the others.
///
/// # Safety
/// `address` is that of `left` readable elements.
#[inline(always)]
pub(crate) unsafe fn load_some(address: u64, left: u32) -> [u32; 4] {
    let element = |i: u32| {
        // SAFETY: one of those that exist.
        if i < left { unsafe { ptx::ld_global_u32(address + 4 * u64::from(i)) } } else { 0 }
    };
    [element(0), element(1), element(2), element(3)]
}

/// Stores the first `left` of four elements.
///
/// # Safety
/// `address` is that of `left` writable elements, which no other thread accesses.
#[inline(always)]
unsafe fn store_some(address: u64, left: u32, [a, b, c, d]: [u32; 4]) {
    let element = |i: u32, value: u32| {
        if i < left {
            // SAFETY: one of those that exist.
            unsafe { ptx::st_global_u32(address + 4 * u64::from(i), value) }
        }
    };
    element(0, a);
    element(1, b);
    element(2, c);
    element(3, d);
}

/// The parts of two neighbours, each pair packed as it lies in memory.
#[inline(always)]
fn split_pair(first: u32, second: u32, findings: &mut Findings) -> [u32; PARTS] {
    let (first, second) = (f32::from_bits(first), f32::from_bits(second));
    let (low, missed) = split(first);
    *findings = findings.with(first, missed);
    let (high, missed) = split(second);
    *findings = findings.with(second, missed);
    let pack = |i: usize| u32::from(low[i]) | u32::from(high[i]) << 16;
    [pack(0), pack(1), pack(2)]
}

/// The parts of eight neighbours, as they lie in memory.
#[inline(always)]
pub(crate) fn split_eight(
    low: [u32; 4],
    high: [u32; 4],
    findings: &mut Findings,
) -> [[u32; 4]; PARTS] {
    let pairs = [
        split_pair(low[0], low[1], findings),
        split_pair(low[2], low[3], findings),
        split_pair(high[0], high[1], findings),
        split_pair(high[2], high[3], findings),
    ];
    let part = |i: usize| [pairs[0][i], pairs[1][i], pairs[2][i], pairs[3][i]];
    [part(0), part(1), part(2)]
}

/// Splits the elements of an operand that are this thread's, and tells what it noticed.
///
/// # Safety
/// Called by every thread of the grid; source and parts are as large as the operand says (the
/// host checks the one and allocates the other), and nothing else accesses the parts.
#[inline(always)]
unsafe fn split_operand(operand: SplitOperand, parts: u32) -> Findings {
    let SplitOperand { source, parts: target, row_stride, rows, columns } = operand;
    let chunks_per_row = columns.div_ceil(CHUNK);
    let chunks = rows * chunks_per_row;
    let padded = columns.div_ceil(ROW_ALIGN as u32) * ROW_ALIGN as u32;
    let part_bytes = u64::from(rows) * u64::from(padded) * 2;
    let aligned = source % 16 == 0 && row_stride % 4 == 0;
    let mut findings = Findings::NONE;
    let mut chunk = ptx::block_index() * SPLIT_THREADS + ptx::thread_index();
    while chunk < chunks {
        ptx::nounroll();
        let row = chunk.checked_div(chunks_per_row).unwrap_or(0);
        let column = (chunk - row * chunks_per_row) * CHUNK;
        let address = source + 4 * (u64::from(row) * row_stride + u64::from(column));
        // SAFETY: elements of the operand; those beyond the end of the row are not loaded.
        let (low, high) = unsafe {
            if aligned && column + CHUNK <= columns {
                (ptx::ld_global_v4_u32(address), ptx::ld_global_v4_u32(address + 16))
            } else {
                let left = columns - column;
                (load_some(address, left), load_some(address + 16, left.saturating_sub(4)))
            }
        };
        let split = split_eight(low, high, &mut findings);
        let address = target + 2 * (u64::from(row) * u64::from(padded) + u64::from(column));
        // SAFETY: eight elements of a padded row of each part, 16-aligned.
        unsafe {
            ptx::st_global_v4_u32(address, split[0]);
            ptx::st_global_v4_u32(address + part_bytes, split[1]);
            if parts > 2 {
                ptx::st_global_v4_u32(address + 2 * part_bytes, split[2]);
            }
        }
        chunk += ptx::grid_size() * SPLIT_THREADS;
    }
    findings
}

/// # Safety
/// Launched by `launch` on the host with the geometry of its `Kernel` and parameters that `gemm.rs`
/// has checked against the shape contract.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "ptx-kernel" fn split_f32(params: SplitParams) {
    // SAFETY: comments for `cargo xtask ptx`.
    unsafe {
        core::arch::asm!(
            "// kasmina: .maxntid {threads}, 1, 1",
            "// kasmina: .minnctapersm 2",
            threads = const SPLIT_THREADS,
            options(nomem, nostack, preserves_flags),
        );
    }
    ptx::griddepcontrol_launch_dependents();
    ptx::griddepcontrol_wait();
    // SAFETY: every thread of the grid; the host's checks, as above; a word for each block.
    unsafe {
        let x = split_operand(params.x, params.parts).bits();
        let w = split_operand(params.w, params.parts).bits();
        let findings = of_block(x | w << W_SHIFT);
        if ptx::thread_index() == 0 {
            ptx::st_global_u32(params.findings + 4 * u64::from(ptx::block_index()), findings);
        }
    }
}

/// Issues a batch into the accumulators `$into`; those of the batch before, `$done`, are complete
/// then, and its stage may be overwritten.
macro_rules! batch {
    ($products:ident, $tile:ident, $x_major:ident, $w_major:ident, $block:ident, $consumer:ident,
     $elected:ident, $position:ident, $previous:ident, $k_block:ident, [$($into:ident)+], [$($done:ident)+]) => {
        let stage = $position.stage;
        // 64 rows, or one slab: as many bytes.
        let x = $block.x_stage(stage) + $consumer * (CONSUMER_M * BLOCK_K * 2);
        let a = wgmma_descriptor_k32(x, $x_major);
        let b = wgmma_descriptor_k32($block.w_stage(stage), $w_major);
        // SAFETY: the stage has landed; the whole warpgroup executes it.
        unsafe {
            $block.ring.wait_full($position);
            ptx::wgmma::wgmma_parts_k32!(
                $products,
                ($x_major as u32),
                ($w_major as u32),
                (descriptor_step_k16($x_major)),
                (descriptor_step_k16($w_major)),
                ($tile.x_part_bytes() / 16),
                (SplitTile::w_part_bytes() / 16),
                a, b, [$($into)+], [$($done)+]
            );
            if $elected && $k_block > 0 {
                ptx::mbarrier_arrive($block.ring.empty($previous));
            }
        }
        $previous = stage;
        $position = $position.next($tile.num_stages);
        $k_block += 1;
    };
}
pub(crate) use batch;

/// Adds up `$k_blocks` stages of a tile in `$s`, which are 0 before; `$c` and `$d` are the
/// accumulators that tensor cores fill in turn.
macro_rules! multiply_tile {
    ($products:ident, $tile:ident, $x_major:ident, $w_major:ident, $block:ident, $consumer:ident,
     $elected:ident, $position:ident, $k_blocks:ident, $($c:ident $d:ident $s:ident)+) => {
        // Of the batch in flight.
        let mut previous = $position.stage;
        let mut k_block = 0u32;
        loop {
            $crate::gemm::hopper::split::device::batch! {
                $products, $tile, $x_major, $w_major, $block, $consumer, $elected, $position,
                previous, k_block, [$($c)+], [$($d)+]
            }
            $($s += $d;)+
            if k_block == $k_blocks {
                // SAFETY: the whole warpgroup.
                unsafe { $crate::ptx::wgmma::wgmma_wait_all!(128, $($c)+) };
                $($s += $c;)+
                break;
            }
            $crate::gemm::hopper::split::device::batch! {
                $products, $tile, $x_major, $w_major, $block, $consumer, $elected, $position,
                previous, k_block, [$($d)+], [$($c)+]
            }
            $($s += $c;)+
            if k_block == $k_blocks {
                // SAFETY: the whole warpgroup.
                unsafe { $crate::ptx::wgmma::wgmma_wait_all!(128, $($d)+) };
                $($s += $d;)+
                break;
            }
        }
        if $elected {
            // SAFETY: an initialised barrier; no batch is in flight any more.
            unsafe { $crate::ptx::mbarrier_arrive($block.ring.empty(previous)) };
        }
    };
}
pub(crate) use multiply_tile;

/// Defines the entry for a list of products, number of parts, major order of W, and tile.
macro_rules! entry {
    ($entry:ident, $products:ident, $parts:literal, $w_major:ident, $block_m:literal,
     $num_stages:literal) => {
        $crate::ptx::wgmma::with_promoted_accumulators! { device::entry! {
            @body $entry, $products, $parts, $w_major, $block_m, $num_stages
        } }
    };
    (@body $entry:ident, $products:ident, $parts:literal, $w_major:ident, $block_m:literal,
     $num_stages:literal $([$(($c:ident $d:ident $s:ident))+])+) => {
        /// # Safety
        /// Launched by `launch` on the host with the geometry of its `Kernel` and parameters that
        /// `gemm.rs` has checked against the shape contract.
        #[unsafe(no_mangle)]
        pub unsafe extern "ptx-kernel" fn $entry(params: SplitGemmParams) {
            use crate::smem_layout::{Major, descriptor_step_k16, wgmma_descriptor_k32};
            use crate::{pipeline::RingPosition, ptx};
            use device::*;

            const TILE: SplitTile =
                SplitTile { block_m: $block_m, num_stages: $num_stages, parts: $parts };
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
            let tiles = params.tiles;

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
                        let parts = PartsOf {
                            x_map,
                            w_map: x_map + 128,
                            w_major: W_MAJOR,
                            m: params.m,
                            n: params.n,
                            k: params.k,
                        };
                        produce(block, parts, tiles);
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
                let k_blocks = params.k.div_ceil(BLOCK_K);
                let mut position = RingPosition::START;
                let mut tile = ptx::block_index();
                while tile < tiles.num_tiles() {
                    let (tile_m, tile_n) = tiles.tile(tile);
                    let (m, n) = (tile_m * TILE.block_m, tile_n * BLOCK_N);
                    $($(let (mut $c, mut $d, mut $s) = (0.0f32, 0.0f32, 0.0f32);)+)+
                    device::multiply_tile! {
                        $products, TILE, X_MAJOR, W_MAJOR, block, consumer, elected, position,
                        k_blocks,
                        $($($c $d $s)+)+
                    }
                    let mut group = 0;
                    $(
                        // SAFETY: the whole warp goes through the columns in order.
                        unsafe {
                            epilogue.stage(group, [$($s),+]);
                            if group % 4 == 3 {
                                epilogue.store(m, n + (group / 4) * STAGED_N);
                            }
                        }
                        group += 1;
                    )+
                    let _ = group;
                    tile += ptx::grid_size();
                }
            }
        }
    };
}
pub(super) use entry;
