//! Device side of the forward kernels with telemetry.

use super::*;
use crate::gemm::hopper::{CONSUMER_M, WARPGROUP};
use crate::ptx;
use crate::reduce::{Partial, device as reduce};

/// The part of a tile that a consumer's warp stores, and where its summaries go.
#[derive(Clone, Copy)]
pub(super) struct Unit<'a> {
    tile: Tile,
    params: &'a TelemetryParams,
    /// Row and column of the tile among tiles.
    at: (u32, u32),
    /// Of the tile, from 0 on.
    number: u32,
}

impl<'a> Unit<'a> {
    /// Of the tile at `(tile_m, tile_n)`, by a thread of consumer `consumer`.
    #[inline(always)]
    pub(super) fn new(
        tile: Tile,
        params: &'a TelemetryParams,
        consumer: u32,
        at: (u32, u32),
    ) -> Self {
        let number = consumer * (CONSUMER_M / UNIT_ROWS) + ptx::thread_index() % WARPGROUP / 32;
        Self { tile, params, at, number }
    }

    /// Whether the halves of the tile go to different slots.
    #[inline(always)]
    fn is_split(self) -> bool {
        self.params.segments.segments.piece < self.tile.block_n
    }

    /// Rows that exist.
    #[inline(always)]
    fn rows(self) -> u32 {
        self.tile.unit_rows(self.params.segments.segments.rows, self.at.0, self.number)
    }

    #[inline(always)]
    fn run(self, number: u32) -> Option<Run> {
        let cut = &self.params.segments.segments;
        self.tile.run(cut, self.params.gemm.n, self.at, self.number, number)
    }

    /// Writes the slots as the tensor cores added them up, if the unit is whole and that is
    /// accurate, and says whether it has.
    ///
    /// # Safety
    /// The whole warp calls it; the workspace has a slot for each run of a unit.
    #[inline(always)]
    pub(super) unsafe fn put<E: reduce::Element>(self, grams: &[reduce::Gram]) -> bool {
        let [first, last] = halves::<E>(grams);
        let (half, n) = (self.tile.block_n / 2, self.params.gemm.n);
        if self.rows() < UNIT_ROWS || (self.at.1 + 1) * self.tile.block_n > n {
            return false;
        }
        let (mut gram, columns, runs) =
            if self.is_split() { (first, half, 2) } else { (first.with::<E>(last), 2 * half, 1) };
        let (mut accurate, mut number) = (true, 0);
        loop {
            ptx::nounroll();
            // SAFETY: the caller's contract.
            accurate &= unsafe { self.put_run::<E>(number, gram, columns) };
            number += 1;
            if number == runs {
                return accurate;
            }
            gram = last;
        }
    }

    /// # Safety
    /// As [`put`](Self::put).
    #[inline(always)]
    unsafe fn put_run<E: reduce::Element>(
        self,
        number: u32,
        gram: reduce::Gram,
        columns: u32,
    ) -> bool {
        // SAFETY: the caller's contract.
        match (unsafe { gram.of_warp::<E>(columns) }, self.run(number)) {
            (Some(partial), Some(run)) => {
                // SAFETY: the caller's contract.
                unsafe { self.write(run, &partial) };
                true
            }
            _ => false,
        }
    }

    /// Writes the slots of what is stored in Y.
    ///
    /// # Safety
    /// As [`put`](Self::put), once the unit is stored and visible to the warp.
    #[inline(always)]
    pub(super) unsafe fn put_stored<E: reduce::Element>(self) {
        let (tile, segments) = (self.tile, &self.params.segments);
        let rows = self.rows();
        let row = u64::from(self.at.0 * tile.block_m + self.number * UNIT_ROWS);
        let row_stride = segments.row_stride;
        let runs = if self.is_split() { 2 } else { 1 };
        let mut number = 0;
        while rows > 0 && number < runs {
            ptx::nounroll();
            if let Some(run) = self.run(number) {
                let first = self.at.1 * tile.block_n + number * segments.segments.piece;
                let slab = |column: u32| {
                    let column = u64::from(first + column) * 2;
                    Global { address: segments.data + row * row_stride + column, row_stride }
                };
                // SAFETY: the caller's contract; rows and columns that exist.
                unsafe {
                    let (columns, rule) = (run.columns, segments.rule());
                    let partial = reduce::summary_of_blocks::<E, _>(slab, rows, columns, rule);
                    self.write(run, &partial);
                }
            }
            number += 1;
        }
    }

    /// # Safety
    /// As [`put`](Self::put).
    #[inline(always)]
    unsafe fn write(self, run: Run, partial: &Partial) {
        let segments = &self.params.segments;
        let each = segments.segments.strips_of_each();
        if ptx::opaque_u32(ptx::lane_index()) == 0 {
            // SAFETY: the caller's contract; one lane writes a slot that is no other unit's.
            unsafe { reduce::put(segments.partials, run.segment * each + run.index, partial) };
        }
    }
}

/// Of both halves of a tile, from its slabs.
#[inline(always)]
fn halves<E: reduce::Element>(grams: &[reduce::Gram]) -> [reduce::Gram; 2] {
    match *grams {
        [a, b, c, d] => [a.with::<E>(b), c.with::<E>(d)],
        [a, b] => [a, b],
        _ => [reduce::Gram::NONE; 2],
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
            use crate::gemm::hopper::{CONSUMER_M, SLAB_N, WARPGROUP};
            use crate::gemm::hopper::device::{
                self as forward, Block, Epilogue, Matrices, Work, multiply_tile, produce,
                wait_for_predecessors,
            };
            use crate::smem_layout::Major;
            use crate::{pipeline::RingPosition, ptx, reduce::device as reduce};

            const TILE: Tile = Tile::new($block_m, $block_n, $num_stages);
            const SLABS: usize = (TILE.block_n / SLAB_N) as usize;
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
            let (block, warpgroup) = unsafe {
                let block = Block::start(TILE);
                (block, ptx::shfl_sync_idx_first(ptx::thread_index() / WARPGROUP))
            };
            if warpgroup == 0 {
                // SAFETY: the whole producer warpgroup, which starts with more registers; one
                // thread produces, with the maps of the parameters.
                unsafe {
                    if forward::needs_registers(TILE) {
                        ptx::setmaxnreg_dec::<{ forward::PRODUCER_REGISTERS }>();
                    }
                    if ptx::thread_index() == 0 {
                        let stage_bytes = params.gemm.stage_bytes;
                        produce(block, operands, Work { tiles, k_blocks, stage_bytes });
                    }
                }
            } else {
                if forward::needs_registers(TILE) {
                    // SAFETY: whole consumer warpgroups; the producer frees what they take.
                    unsafe { ptx::setmaxnreg_inc::<{ forward::CONSUMER_REGISTERS }>() };
                }
                let consumer = warpgroup - 1;
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
                    let mut group = 0;
                    let mut blocks = [[0; 4]; 4];
                    let mut grams = [reduce::Gram::NONE; SLABS];
                    $(
                        // SAFETY: the whole warpgroup goes through the slabs in order.
                        unsafe {
                            if group % 4 == 0 {
                                epilogue.begin_slab();
                            }
                            blocks[group as usize % 4] =
                                epilogue.columns::<forward::$element>(group, [$($c),+]);
                            if group % 4 == 3 {
                                epilogue.end_slab::<forward::$element>(group / 4, m, n);
                                grams[group as usize / 4] =
                                    reduce::Gram::of::<reduce::$element>(blocks, rule);
                            }
                        }
                        group += 1;
                    )+
                    let _ = group;
                    // The next products overwrite them: until then no register has to hold them.
                    // Blocks of one consumer have enough; there, ptxas would serialise the products.
                    if TILE.block_m > CONSUMER_M {
                        $($($c = ptx::any_f32();)+)+
                    }
                    let unit = device::Unit::new(TILE, &params, consumer, at);
                    // SAFETY: whole warps; the host has made the slots. All of the consumer go the
                    // same way behind its barrier, and read Y once it is stored.
                    unsafe {
                        let put = unit.put::<reduce::$element>(&grams);
                        if epilogue.any(!put) {
                            epilogue.complete_stores();
                            if !put {
                                unit.put_stored::<reduce::$element>();
                            }
                        }
                    }
                    tile += block.tile_step();
                }
                epilogue.finish();
            }
        }
    };
}
pub(super) use entry;
