//! Forward kernels that summarise what they write: for each chunk of the output's columns its
//! statistics over all rows, without another pass over memory.
//!
//! Consumers have tensor cores add up what they store, as it passes through their registers
//! (`reduce/device/gram.rs`):
//!
//! ```text
//! k … k │ epilogue: slab ─ TMA store ─ add it up │ four times │ a slot for each warp │ k … k
//! ```
//! A warp summarises 16 rows of the columns of a tile that lie in one chunk (a *unit*), and writes a
//! slot for it. The host merges the slots of a chunk by number when somebody reads them: done by the
//! last block of the grid, that took as long as everything else here. So the bits of a result depend
//! on elements, shape and tile alone: not on the grid, nor on the order in which tiles are done.
//! Elements are those of Y, rounded to its type. What tensor cores add up has the error bounds that
//! `reduce/device/gram.rs` derives, and says what it assumes for that: 170u for m2, where the segmented
//! reduction of Y has 108u, and 35u·Σ|x| for the sum, where that has 90u (`reduce.rs`).
//!
//! Units that Y's edge cuts, and those with which tensor cores would not be accurate enough (a mean
//! larger than the standard deviation, NaN, infinities, squares that leave the range of f32), a warp
//! reads back once they are stored, and summarises them as that reduction does. The consumer waits
//! for its stores before that, so outputs that are mostly far from zero gain less from the fusion.
//!
//! # Shape contract
//! - As `hopper.rs`, with operands and rows of Y that TMA can address, and chunks of columns that are whole halves of a tile or more, or one chunk.

use core::num::NonZeroU32;

use super::{Forced, HopperGemmParams, Problem, Tile};
use crate::abi::{DType, Kernel, KernelParams, hopper_kernel};
use crate::gemm::WeightLayout;
use crate::reduce::{SegmentParams, Segments};
use crate::tile_scheduler::div;

#[cfg(all(target_arch = "nvptx64", kasmina_tier = "hopper"))]
mod device;

/// Rows of a unit: a consumer's warp has as many.
const UNIT_ROWS: u32 = 16;

/// Columns of a tile that go to one slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The chunk.
    pub segment: u32,
    /// Number of the slot within the chunk.
    pub index: u32,
    /// Columns of it that exist.
    pub columns: u32,
}

impl Tile {
    /// Warps of consumers.
    const fn units(self) -> u32 {
        self.block_m / UNIT_ROWS
    }

    /// How the chunks of an `[m, n]` output are put together from tiles; `None` where chunks are
    /// not whole halves of tiles. There are at least as many columns as chunks, and at least one row.
    #[must_use]
    pub fn cut(self, m: u32, n: u32, chunks: NonZeroU32) -> Option<Segments> {
        let width = n / chunks;
        let half = self.block_n / 2;
        if chunks.get() > 1 && (n % chunks != 0 || !width.is_multiple_of(half)) {
            return None;
        }
        let whole = chunks.get() == 1 || width.is_multiple_of(self.block_n);
        let piece = if whole { self.block_n } else { half };
        let pieces = NonZeroU32::new(width.div_ceil(piece))?;
        Some(Segments {
            rows: m,
            parts: chunks,
            width,
            wider: 0,
            piece,
            pieces,
            block: UNIT_ROWS,
            blocks: m.div_ceil(UNIT_ROWS),
            log2_team: 5,
            log2_across: 3,
            by_rows: 0,
            reserved: 0,
        })
    }

    /// Rows of unit `unit` of a tile in row `tile_m` of tiles that exist, of `m`.
    #[must_use]
    #[inline(always)]
    pub const fn unit_rows(self, m: u32, tile_m: u32, unit: u32) -> u32 {
        let rows = m.saturating_sub(tile_m * self.block_m + unit * UNIT_ROWS);
        if rows < UNIT_ROWS { rows } else { UNIT_ROWS }
    }

    /// Run `run` of a unit that has rows, of the tile at `(tile_m, tile_n)`; `None` where that is
    /// beyond the last column.
    #[must_use]
    #[inline(always)]
    pub fn run(
        self,
        cut: &Segments,
        n: u32,
        (tile_m, tile_n): (u32, u32),
        unit: u32,
        run: u32,
    ) -> Option<Run> {
        let column = tile_n * self.block_n + run * cut.piece;
        if column >= n {
            return None;
        }
        let segment = div(column, cut.width);
        let piece = div(column - segment * cut.width, cut.piece);
        let index = (tile_m * self.units() + unit) * cut.pieces.get() + piece;
        let columns = n - column;
        let columns = if columns < cut.piece { columns } else { cut.piece };
        Some(Run { segment, index, columns })
    }
}

/// What a forward kernel with telemetry takes.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct TelemetryParams {
    /// The forward pass. Its maps stand first, where the kernel looks for them.
    pub gemm: HopperGemmParams,
    /// What is summarised, Y, and how it is cut up ([`Tile::cut`]); the slots are used also where
    /// segments have one each.
    pub segments: SegmentParams,
}

// SAFETY: repr(C); both are 8-aligned multiples of 8 bytes without padding.
unsafe impl KernelParams for TelemetryParams {}
const _: () = assert!(
    size_of::<TelemetryParams>() == size_of::<HopperGemmParams>() + size_of::<SegmentParams>()
);

/// A forward kernel with telemetry and what it serves.
pub struct TelemetryKernel {
    /// Element type of all operands.
    pub dtype: DType,
    /// Layout of W.
    pub layout: WeightLayout,
    /// How it cuts the problem up.
    pub tile: Tile,
    /// What to launch.
    pub kernel: Kernel<TelemetryParams>,
}

/// As [`super::select`], of the kernels with telemetry whose tile `serves`.
#[must_use]
pub fn select(
    dtype: DType,
    layout: WeightLayout,
    problem: Problem,
    multiprocessors: u32,
    forced: Forced,
    serves: impl Fn(Tile) -> bool,
) -> Option<&'static TelemetryKernel> {
    KERNELS
        .iter()
        .filter(|row| (row.dtype, row.layout) == (dtype, layout))
        .filter(|row| forced.admits(row.tile, problem.k) && serves(row.tile))
        .min_by_key(|row| row.tile.cost(problem, multiprocessors))
}

/// One row makes a kernel's module, its host-side description and, on the device, its entry.
macro_rules! kernels {
    ($($entry:ident: $element:ident $ptx_type:literal, $layout:ident $w_major:ident,
        $block_m:literal x $block_n:tt, $num_stages:literal stages;)+) => {
        /// Every kernel, for each element type and layout from the largest tile to the smallest.
        pub static KERNELS: [TelemetryKernel; [$(stringify!($entry)),+].len()] = [$({
            let tile = Tile::new($block_m, $block_n, $num_stages);
            TelemetryKernel {
                dtype: DType::$element,
                layout: WeightLayout::$layout,
                tile,
                kernel: hopper_kernel!($entry, tile.block_dim(), tile.smem_bytes()),
            }
        }),+];
        $(
            #[cfg(all(target_arch = "nvptx64", kasmina_tier = "hopper"))]
            device::entry!($entry, $element, $ptx_type, $w_major, $block_m, $block_n, $num_stages);
        )+
    };
}

kernels! {
    gemm_bf16_kn_128x256x64_telemetry: BF16 "bf16", InOut MN, 128 x 256, 4 stages;
    gemm_bf16_kn_64x128x64_telemetry: BF16 "bf16", InOut MN, 64 x 128, 8 stages;
    gemm_bf16_nk_128x256x64_telemetry: BF16 "bf16", OutIn K, 128 x 256, 4 stages;
    gemm_bf16_nk_64x128x64_telemetry: BF16 "bf16", OutIn K, 64 x 128, 8 stages;
    gemm_f16_kn_128x256x64_telemetry: F16 "f16", InOut MN, 128 x 256, 4 stages;
    gemm_f16_kn_64x128x64_telemetry: F16 "f16", InOut MN, 64 x 128, 8 stages;
    gemm_f16_nk_128x256x64_telemetry: F16 "f16", OutIn K, 128 x 256, 4 stages;
    gemm_f16_nk_64x128x64_telemetry: F16 "f16", OutIn K, 64 x 128, 8 stages;
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;
    use std::vec;

    const TILES: [Tile; 4] = [
        Tile::new(128, 256, 4),
        Tile::new(128, 128, 6),
        Tile::new(64, 128, 8),
        Tile::new(64, 64, 8),
    ];

    fn chunks(count: u32) -> NonZeroU32 {
        NonZeroU32::new(count).expect("chunks")
    }

    #[test]
    fn units_cover_every_element_once_and_slots_know_how_many_they_have() {
        for tile in TILES {
            for (m, n, parts) in [
                (1, 8, 1),
                (64, 64, 1),
                (65, 72, 1),
                (129, 264, 1),
                (200, 512, 1),
                (200, 512, 2),
                (130, 768, 4),
                (7, 576, 3),
                (300, 640, 10),
            ] {
                let Some(cut) = tile.cut(m, n, chunks(parts)) else { continue };
                let mut owner = vec![u32::MAX; (m * n) as usize];
                let mut slots = HashMap::new();
                let scheduler = tile.scheduler(m, n);
                for number in 0..scheduler.num_tiles() {
                    let at = scheduler.tile(number);
                    let runs = tile.block_n / cut.piece;
                    for (unit, number) in (0..tile.units() * runs).map(|i| (i / runs, i % runs)) {
                        let rows = tile.unit_rows(m, at.0, unit);
                        let run = tile.run(&cut, n, at, unit, number).filter(|_| rows > 0);
                        let Some(run) = run else { continue };
                        let first = at.1 * tile.block_n + number * cut.piece;
                        let elements = rows * run.columns;
                        let top = at.0 * tile.block_m + unit * UNIT_ROWS;
                        for row in top..top + rows {
                            for column in first..first + run.columns {
                                let owner = &mut owner[(row * n + column) as usize];
                                assert_eq!(std::mem::replace(owner, run.segment), u32::MAX);
                            }
                        }
                        assert!(run.index < cut.strips_of_each());
                        assert_eq!(cut.elements(run.segment, run.index), elements);
                        assert!(slots.insert((run.segment, run.index), elements).is_none());
                    }
                }
                assert_eq!(slots.len() as u64, cut.strips());
                for (position, &segment) in owner.iter().enumerate() {
                    assert_eq!(segment, position as u32 % n / (n / parts), "{tile:?} {m}×{n}");
                }
            }
        }
    }

    #[test]
    fn chunks_that_are_not_whole_halves_of_tiles_are_not_served() {
        let served = |tile: Tile, n, parts| tile.cut(10, n, chunks(parts)).is_some();
        assert_eq!([served(TILES[0], 96, 1), served(TILES[0], 96, 2)], [true, false]);
        assert_eq!([served(TILES[0], 192, 3), served(TILES[1], 192, 3)], [false, true]);
        assert_eq!([served(TILES[0], 768, 2), served(TILES[1], 200, 3)], [true, false]);
    }

    #[test]
    fn a_tile_that_lies_in_one_chunk_is_one_run() {
        let piece = |n, parts| TILES[0].cut(128, n, chunks(parts)).expect("halves").piece;
        assert_eq!([piece(4096, 8), piece(4096, 16), piece(4096, 32)], [256, 256, 128]);
        assert_eq!(piece(100, 1), 256);
    }

    #[test]
    fn entry_names_say_what_the_kernel_serves() {
        for row in &KERNELS {
            let [block_m, block_n] = row.tile.extents();
            let (dtype, layout) = (row.dtype, row.layout.name());
            let expected = std::format!("gemm_{dtype}_{layout}_{block_m}x{block_n}x64_telemetry");
            assert_eq!(row.kernel.entry, expected);
            assert_eq!(row.kernel.module.entries, [row.kernel.entry]);
        }
    }

    #[test]
    fn every_tile_is_one_that_the_plain_kernels_have() {
        for row in &KERNELS {
            let same = super::super::KERNELS.iter().filter(|plain| plain.tile == row.tile);
            assert_eq!(same.count(), 4);
        }
    }
}
