//! Forward kernels that summarise what they write: for each chunk of the output's columns its
//! statistics over all rows, without another pass over memory.
//!
//! A forward kernel's epilogue has nothing to spare: the tensor cores wait for it. Three warps of
//! the producer's warpgroup do have, since one thread feeds the ring. They summarise a tile while
//! the next one is multiplied:
//!
//! ```text
//! consumers       k … k │ epilogue, TMA stores │ 8 steps of k, stores are complete ─ say so │ k …
//! three warps           wait until it is said ─ read the tile back from L2 ─ summarise it
//! last tile             epilogue into free stages of the ring ─ the consumers summarise it there
//! ```
//! A warp summarises 64×64 elements (`reduce/device/blocks.rs`); of these *units* a tile has one
//! for each consumer and slab. Units of neighbouring slabs that lie in one chunk are merged to a
//! slot of the workspace, and who writes the last slot of a chunk merges all of them by number. So
//! the bits of a result depend on elements, shape and tile alone: not on the grid, nor on the order
//! in which tiles are done. Elements are those of Y, rounded to its type. Arithmetic, error bounds
//! and layout of the results are those of the segmented reduction of Y (`reduce.rs`).
//!
//! # Shape contract
//! - As `hopper.rs`, and chunks of columns that are whole slabs of 64, or one chunk.

use core::num::NonZeroU32;

use super::{CONSUMER_M, Forced, HopperGemmParams, Problem, SLAB_N, Tile};
use crate::abi::{DType, Kernel, KernelParams, Module, module};
use crate::gemm::WeightLayout;
use crate::reduce::{SegmentParams, Segments};
use crate::tile_scheduler::div;

#[cfg(all(target_arch = "nvptx64", kasmina_tier = "hopper"))]
mod device;

/// Bytes of a unit's record in shared memory.
const RECORD_BYTES: u32 = 32;
/// Steps of k after which the stores of the tile before are taken to be complete, so that nobody
/// waits for them.
#[cfg(all(target_arch = "nvptx64", kasmina_tier = "hopper"))]
const STEPS_BEFORE_STORED: u32 = 8;

/// A piece of a tile that one warp summarises.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unit {
    /// Its first row and column in Y.
    pub row: u32,
    /// Its first column.
    pub column: u32,
    /// Rows that exist, up to 64.
    pub rows: u32,
    /// Columns that exist, up to 64.
    pub columns: u32,
}

/// Slabs of a tile that go to one slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The chunk.
    pub segment: u32,
    /// Number of the slot within the chunk.
    pub index: u32,
    /// Its first slab in the tile.
    pub first_slab: u32,
    /// Number of slabs.
    pub slabs: u32,
}

impl Tile {
    const fn slabs(self) -> u32 {
        self.block_n / SLAB_N
    }

    const fn units(self) -> u32 {
        self.num_consumers() * self.slabs()
    }

    /// Where the records of the three warps lie, those of two tiles in turn, and then those of the
    /// consumers.
    const fn records_offset(self) -> u32 {
        self.smem_bytes()
    }

    /// Where each consumer says how many of its tiles are stored.
    const fn stored_offset(self) -> u32 {
        self.records_offset() + 3 * self.units() * RECORD_BYTES
    }

    const fn telemetry_smem_bytes(self) -> u32 {
        self.stored_offset() + 16
    }

    /// How the chunks of an `[m, n]` output are put together from tiles; `None` where chunks are
    /// not whole slabs. There are at least as many columns as chunks, and at least one row.
    #[must_use]
    pub fn cut(self, m: u32, n: u32, chunks: NonZeroU32) -> Option<Segments> {
        let width = n / chunks;
        if chunks.get() > 1 && (n % chunks != 0 || !width.is_multiple_of(SLAB_N)) {
            return None;
        }
        let mut piece = self.block_n;
        while chunks.get() > 1 && !width.is_multiple_of(piece) {
            piece /= 2;
        }
        let pieces = NonZeroU32::new(width.div_ceil(piece))?;
        Some(Segments {
            rows: m,
            parts: chunks,
            width,
            wider: 0,
            piece,
            pieces,
            block: self.block_m,
            blocks: m.div_ceil(self.block_m),
            log2_team: 5,
            log2_across: 3,
            by_rows: 0,
            reserved: 0,
        })
    }

    /// Unit `index` of the tile at `(tile_m, tile_n)` of an `[m, n]` output: those of the first
    /// consumer by slabs, then those of the second.
    #[must_use]
    #[inline(always)]
    pub const fn unit(self, m: u32, n: u32, (tile_m, tile_n): (u32, u32), index: u32) -> Unit {
        let (consumer, slab) = (index / self.slabs(), index % self.slabs());
        let row = tile_m * self.block_m + consumer * CONSUMER_M;
        let column = tile_n * self.block_n + slab * SLAB_N;
        let (rows, columns) = (m.saturating_sub(row), n.saturating_sub(column));
        Unit {
            row,
            column,
            rows: if rows < CONSUMER_M { rows } else { CONSUMER_M },
            columns: if columns < SLAB_N { columns } else { SLAB_N },
        }
    }

    /// The run of the tile at `(tile_m, tile_n)` that starts at slab `first_slab`, a multiple of
    /// the slabs of a piece; `None` where that is beyond the last column.
    #[must_use]
    #[inline(always)]
    pub fn run(
        self,
        cut: &Segments,
        n: u32,
        (tile_m, tile_n): (u32, u32),
        first_slab: u32,
    ) -> Option<Run> {
        let column = tile_n * self.block_n + first_slab * SLAB_N;
        if column >= n {
            return None;
        }
        let segment = div(column, cut.width);
        let piece = div(column - segment * cut.width, cut.piece);
        let index = tile_m * cut.pieces.get() + piece;
        Some(Run { segment, index, first_slab, slabs: cut.piece / SLAB_N })
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

/// As [`super::select`], of the kernels with telemetry.
#[must_use]
pub fn select(
    dtype: DType,
    layout: WeightLayout,
    problem: Problem,
    multiprocessors: u32,
    forced: Forced,
) -> Option<&'static TelemetryKernel> {
    KERNELS
        .iter()
        .filter(|row| (row.dtype, row.layout) == (dtype, layout))
        .filter(|row| forced.admits(row.tile, problem.k))
        .min_by_key(|row| row.tile.cost(problem, multiprocessors))
}

/// One row makes a kernel's module, its host-side description and, on the device, its entry.
macro_rules! kernels {
    ($($entry:ident: $element:ident $ptx_type:literal, $layout:ident $w_major:ident,
        $block_m:literal x $block_n:tt, $num_stages:literal stages;)+) => {
        /// Every kernel, for each element type and layout from the largest tile to the smallest.
        pub static KERNELS: [TelemetryKernel; [$(stringify!($entry)),+].len()] = [$({
            static MODULE: Module = module!(Hopper, "hopper", stringify!($entry), [stringify!($entry)]);
            let tile = Tile {
                block_m: $block_m, block_n: $block_n, num_stages: $num_stages, split_k: 1,
                cluster_m: 1,
            };
            TelemetryKernel {
                dtype: DType::$element,
                layout: WeightLayout::$layout,
                tile,
                kernel: Kernel::new(
                    &MODULE, stringify!($entry), tile.block_dim(), tile.telemetry_smem_bytes(),
                )
                .waiting_for_predecessors(),
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
    gemm_bf16_kn_128x128x64_telemetry: BF16 "bf16", InOut MN, 128 x 128, 6 stages;
    gemm_bf16_kn_64x128x64_telemetry: BF16 "bf16", InOut MN, 64 x 128, 8 stages;
    gemm_bf16_nk_128x256x64_telemetry: BF16 "bf16", OutIn K, 128 x 256, 4 stages;
    gemm_bf16_nk_128x128x64_telemetry: BF16 "bf16", OutIn K, 128 x 128, 6 stages;
    gemm_bf16_nk_64x128x64_telemetry: BF16 "bf16", OutIn K, 64 x 128, 8 stages;
    gemm_f16_kn_128x256x64_telemetry: F16 "f16", InOut MN, 128 x 256, 4 stages;
    gemm_f16_kn_128x128x64_telemetry: F16 "f16", InOut MN, 128 x 128, 6 stages;
    gemm_f16_kn_64x128x64_telemetry: F16 "f16", InOut MN, 64 x 128, 8 stages;
    gemm_f16_nk_128x256x64_telemetry: F16 "f16", OutIn K, 128 x 256, 4 stages;
    gemm_f16_nk_128x128x64_telemetry: F16 "f16", OutIn K, 128 x 128, 6 stages;
    gemm_f16_nk_64x128x64_telemetry: F16 "f16", OutIn K, 64 x 128, 8 stages;
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;
    use std::vec;

    const TILES: [Tile; 4] = [
        Tile { block_m: 128, block_n: 256, num_stages: 4, split_k: 1, cluster_m: 1 },
        Tile { block_m: 128, block_n: 128, num_stages: 6, split_k: 1, cluster_m: 1 },
        Tile { block_m: 64, block_n: 128, num_stages: 8, split_k: 1, cluster_m: 1 },
        Tile { block_m: 64, block_n: 64, num_stages: 8, split_k: 1, cluster_m: 1 },
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
                let cut = tile.cut(m, n, chunks(parts)).expect("whole slabs");
                let mut owner = vec![u32::MAX; (m * n) as usize];
                let mut slots = HashMap::new();
                let scheduler = tile.scheduler(m, n);
                for index in 0..scheduler.num_tiles() {
                    let at = scheduler.tile(index);
                    let mut slab = 0;
                    while slab < tile.slabs() {
                        let run = tile.run(&cut, n, at, slab);
                        slab += cut.piece / SLAB_N;
                        let Some(run) = run else { continue };
                        let mut elements = 0;
                        for consumer in 0..tile.num_consumers() {
                            for slab in run.first_slab..run.first_slab + run.slabs {
                                let unit = tile.unit(m, n, at, consumer * tile.slabs() + slab);
                                elements += unit.rows * unit.columns;
                                for row in unit.row..unit.row + unit.rows {
                                    for column in unit.column..unit.column + unit.columns {
                                        let owner = &mut owner[(row * n + column) as usize];
                                        assert_eq!(std::mem::replace(owner, run.segment), u32::MAX);
                                    }
                                }
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
    fn chunks_that_are_not_whole_slabs_are_not_served() {
        let tile = TILES[0];
        assert!(tile.cut(10, 96, chunks(1)).is_some());
        assert!(tile.cut(10, 96, chunks(2)).is_none());
        assert!(tile.cut(10, 192, chunks(2)).is_none());
        assert!(tile.cut(10, 200, chunks(3)).is_none());
        assert!(tile.cut(10, 192, chunks(3)).is_some());
    }

    #[test]
    fn slabs_of_a_chunk_share_a_slot_as_far_as_chunks_allow() {
        let piece = |n, parts| TILES[0].cut(128, n, chunks(parts)).expect("whole slabs").piece;
        assert_eq!([piece(4096, 8), piece(4096, 16), piece(4096, 32)], [256, 256, 128]);
        assert_eq!([piece(4096, 64), piece(576, 3), piece(100, 1)], [64, 64, 256]);
    }

    #[test]
    fn entry_names_say_what_the_kernel_serves() {
        for row in &KERNELS {
            let [block_m, block_n] = row.tile.extents();
            let (dtype, layout) = (row.dtype, row.layout.name());
            let expected = std::format!("gemm_{dtype}_{layout}_{block_m}x{block_n}x64_telemetry");
            assert_eq!(row.kernel.entry, expected);
            assert_eq!(row.kernel.module.entries, [row.kernel.entry]);
            // A stage for each slab of the last tile.
            assert!(row.tile.num_stages >= row.tile.slabs());
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
