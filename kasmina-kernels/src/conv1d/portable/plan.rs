//! How the gather and wgrad kernels cut a pass into tiles and stages.

use super::{ROW_PAD, SMEM_VALUES, WARP_COLUMNS, WARP_ROWS};
use crate::conv1d::Conv1dShape;

/// How the eight warps of a block lie: `rows() × columns()` results.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tile {
    /// log₂ of the warps along the rows, 0 to 3.
    pub log2_row_warps: u32,
}

impl Tile {
    /// As few rows as cover `rows`, or all eight warps' worth.
    #[must_use]
    pub const fn covering(rows: u32) -> Self {
        let mut log2_row_warps = 0;
        while log2_row_warps < 3 && (WARP_ROWS << log2_row_warps) < rows {
            log2_row_warps += 1;
        }
        Self { log2_row_warps }
    }

    /// Rows of a block.
    #[must_use]
    #[inline(always)]
    pub const fn rows(self) -> u32 {
        WARP_ROWS << self.log2_row_warps
    }

    /// log₂ of [`rows`](Self::rows).
    #[must_use]
    #[inline(always)]
    pub const fn log2_rows(self) -> u32 {
        3 + self.log2_row_warps
    }

    /// Columns of a block.
    #[must_use]
    #[inline(always)]
    pub const fn columns(self) -> u32 {
        (WARP_COLUMNS * 8) >> self.log2_row_warps
    }

    /// First row and first column of a thread; its others are 1 and 32 apart.
    #[must_use]
    #[inline(always)]
    pub const fn thread(self, thread: u32) -> (u32, u32) {
        let (warp, lane) = (thread / 32, thread % 32);
        let row_warp = warp & ((1 << self.log2_row_warps) - 1);
        (row_warp * WARP_ROWS, (warp >> self.log2_row_warps) * WARP_COLUMNS + lane)
    }
}

/// The pass that a gather or direct kernel computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the input to the output.
    Forward,
    /// From the output's gradient to the input's.
    Dgrad,
}

/// How the gather kernel cuts a pass.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GatherPlan {
    /// Rows and columns of a block.
    pub tile: Tile,
    /// 1 where positions of all sequences are numbered together, else 0.
    pub flat: u32,
    /// Taps of a stage.
    pub taps: u32,
    /// log₂ of the depth of a stage.
    pub log2_depth: u32,
    /// Positions that a stage loads per channel.
    pub span: u32,
    /// Tiles along the rows of one group.
    pub row_tiles: u32,
    /// Tiles along the positions: of one sequence, or of all if flat.
    pub column_tiles: u32,
    /// Classes of positions with walks of their own.
    pub residues: u32,
}

/// The f32 values a gather's stage occupies.
pub(super) const fn gather_values(tile: Tile, span: u32, taps: u32, log2_depth: u32) -> u64 {
    (span as u64 + taps as u64 * (tile.rows() + ROW_PAD) as u64) << log2_depth
}

impl GatherPlan {
    /// The plan of a pass.
    #[must_use]
    pub const fn new(shape: &Conv1dShape, direction: Direction) -> Self {
        let (rows, depth, walk, residues) = match direction {
            Direction::Forward => (shape.group_out(), shape.group_in(), shape.forward_gather(), 1),
            Direction::Dgrad => {
                let residues = shape.residues();
                // The first class has the most positions, that of tap 0 the most taps.
                let mut walk = shape.dgrad_gather(0);
                walk.taps = shape.most_dgrad_taps();
                (shape.group_in(), shape.group_out(), walk, residues)
            }
        };
        let tile = Tile::covering(rows);
        let columns = tile.columns();
        let count = walk.out_count;
        let taps = if walk.taps == 0 { 1 } else { walk.taps };

        let mut most_depth = 0;
        while most_depth < 4 && (1 << most_depth) < depth {
            most_depth += 1;
        }
        // As many taps as leave a depth of 4.
        let mut stage_taps = if taps < 16 { taps } else { 16 };
        let enough = if most_depth < 2 { most_depth } else { 2 };
        let base = (columns as u64 - 1) * walk.in_step as u64 + 1;
        let mut span = base + (stage_taps as u64 - 1) * walk.tap_step as u64;
        while stage_taps > 1
            && (span > SMEM_VALUES as u64
                || gather_values(tile, span as u32, stage_taps, enough) > SMEM_VALUES as u64)
        {
            stage_taps -= 1;
            span = base + (stage_taps as u64 - 1) * walk.tap_step as u64;
        }
        let column_tiles = count.div_ceil(columns);
        let idle = column_tiles as u64 * columns as u64 > 2 * count as u64 && shape.batch > 1;
        let flat = idle || span > stage_taps as u64 * columns as u64;
        if flat {
            stage_taps = 1;
            span = columns as u64;
        }
        let span = span as u32;
        let mut log2_depth = most_depth;
        while log2_depth > 0
            && gather_values(tile, span, stage_taps, log2_depth) > SMEM_VALUES as u64
        {
            log2_depth -= 1;
        }
        let positions = if flat { count * shape.batch } else { count };
        Self {
            tile,
            flat: flat as u32,
            taps: stage_taps,
            log2_depth,
            span,
            row_tiles: rows.div_ceil(tile.rows()),
            column_tiles: positions.div_ceil(columns),
            residues,
        }
    }

    /// Blocks of the launch.
    #[must_use]
    pub const fn blocks(&self, shape: &Conv1dShape) -> u64 {
        let batch = if self.flat == 1 { 1 } else { shape.batch as u64 };
        let tiles = self.row_tiles as u64 * self.column_tiles as u64;
        tiles.saturating_mul(batch).saturating_mul(shape.groups as u64 * self.residues as u64)
    }
}

impl GatherPlan {
    /// Estimated cycles of the busiest multiprocessor for an f32 pass: one product a lane and cycle,
    /// of which half are reached (28 to 32 TFLOP/s for 64 and more channels on an H200).
    #[must_use]
    pub const fn f32_cost(
        &self,
        shape: &Conv1dShape,
        direction: Direction,
        multiprocessors: u32,
    ) -> u64 {
        let (depth, taps) = match direction {
            Direction::Forward => (shape.group_in(), shape.kernel_size),
            Direction::Dgrad => (shape.group_out(), shape.most_dgrad_taps()),
        };
        let waves = self.blocks(shape).div_ceil(multiprocessors as u64);
        let results = self.tile.rows() as u64 * self.tile.columns() as u64;
        waves.saturating_mul((results * depth as u64).saturating_mul(taps as u64) / 64 + 2000)
    }
}

/// How the wgrad kernel cuts a pass.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WgradPlan {
    /// Rows (output channels) and columns (pairs of input channel and tap) of a block.
    pub tile: Tile,
    /// 1 where positions of all sequences are numbered together, else 0.
    pub flat: u32,
    /// Taps of a block.
    pub taps: u32,
    /// Input channels of a block.
    pub channels: u32,
    /// log₂ of the positions of a stage.
    pub log2_depth: u32,
    /// Positions of x that a stage loads per channel.
    pub span: u32,
    /// f32 values from channel to channel of x in shared memory.
    pub pitch: u32,
    /// Tiles along the output channels of a group.
    pub row_tiles: u32,
    /// Tiles along the input channels of a group.
    pub channel_tiles: u32,
    /// Tiles along the taps.
    pub tap_tiles: u32,
    /// Stages: of one sequence times the batch, or of all sequences if flat.
    pub stages: u32,
    /// Stages that one block sums.
    pub stages_per_split: u32,
    /// Blocks that share a result.
    pub splits: u32,
}

/// The most blocks that share a result: the second kernel adds so many numbers per result.
const MAX_SPLITS: u64 = 256;

impl WgradPlan {
    /// The plan of a pass on a GPU of `sm_count` multiprocessors.
    #[must_use]
    pub const fn new(shape: &Conv1dShape, sm_count: u32) -> Self {
        let (rows, depth) = (shape.group_out(), shape.group_in());
        let mut tile = Tile::covering(rows);
        let (step, tap_step) = (shape.stride as u64, shape.dilation as u64);
        let mut taps = if shape.kernel_size < 16 { shape.kernel_size } else { 16 };
        let mut flat = shape.out_length < 32 && shape.batch > 1;
        let mut log2_depth = 5;
        if !flat {
            // A halo that leaves no gain over loading each tap by itself.
            let span = 31 * step + (taps as u64 - 1) * tap_step + 1;
            flat = span > 32 * taps as u64;
        }
        if flat {
            taps = 1;
        }
        let needed = depth as u64 * taps as u64;
        while tile.log2_row_warps < 3 && tile.columns() as u64 >= 2 * needed {
            tile.log2_row_warps += 1;
        }
        let (mut span, mut pitch, mut channels);
        loop {
            let positions = 1u64 << log2_depth;
            span = if flat {
                positions
            } else {
                (positions - 1) * step + (taps as u64 - 1) * tap_step + 1
            };
            // Lane by lane the columns of a channel follow each other by taps; this makes the next
            // channel's follow on too, on the 32 banks, where the dilation is 1.
            pitch = span + (taps as u64 + 32 - span % 32) % 32;
            channels = (tile.columns() / taps) as u64;
            if channels > depth as u64 {
                channels = depth as u64;
            }
            let values = channels * pitch + ((tile.rows() + ROW_PAD) as u64) * positions;
            if values <= SMEM_VALUES as u64 {
                break;
            }
            // Fewer columns first, then shorter stages.
            if tile.log2_row_warps < 3 {
                tile.log2_row_warps += 1;
            } else if log2_depth > 3 {
                log2_depth -= 1;
            } else {
                // One channel of 16 taps always fits, as its span is at most 8 · 16 · 16.
                channels = SMEM_VALUES as u64 / 2 / pitch;
                break;
            }
        }
        let (span, pitch, channels) = (span as u32, pitch as u32, channels as u32);
        let positions = if flat { shape.out_length * shape.batch } else { shape.out_length };
        let per_row = positions.div_ceil(1 << log2_depth);
        let stages = if flat { per_row } else { per_row * shape.batch };
        let row_tiles = rows.div_ceil(tile.rows());
        let channel_tiles = depth.div_ceil(channels);
        let tap_tiles = shape.kernel_size.div_ceil(taps);
        let tiles =
            row_tiles as u64 * channel_tiles as u64 * tap_tiles as u64 * shape.groups as u64;
        // Two waves of two blocks per multiprocessor.
        let wanted = (4 * sm_count as u64).div_ceil(tiles);
        let mut splits = if wanted < stages as u64 { wanted } else { stages as u64 };
        splits = if splits > MAX_SPLITS { MAX_SPLITS } else { splits };
        splits = if splits == 0 { 1 } else { splits };
        let stages_per_split = (stages as u64).div_ceil(splits) as u32;
        let splits = if stages_per_split == 0 { 1 } else { stages.div_ceil(stages_per_split) };
        Self {
            tile,
            flat: flat as u32,
            taps,
            channels,
            log2_depth,
            span,
            pitch,
            row_tiles,
            channel_tiles,
            tap_tiles,
            stages,
            stages_per_split,
            splits,
        }
    }

    /// Blocks of the launch.
    #[must_use]
    pub const fn blocks(&self, shape: &Conv1dShape) -> u64 {
        let tiles = self.row_tiles as u64 * self.channel_tiles as u64;
        tiles
            .saturating_mul(self.tap_tiles as u64 * shape.groups as u64)
            .saturating_mul(self.splits as u64)
    }

    /// Estimated cycles of the busiest multiprocessor for f32, as [`GatherPlan::f32_cost`], of which
    /// a third are reached (17 to 23 TFLOP/s for 64 and more channels on an H200).
    #[must_use]
    pub const fn f32_cost(&self, shape: &Conv1dShape, multiprocessors: u32) -> u64 {
        let waves = self.blocks(shape).div_ceil(multiprocessors as u64);
        let results = self.tile.rows() as u64 * self.tile.columns() as u64;
        let positions = (self.stages_per_split as u64) << self.log2_depth;
        waves.saturating_mul(results.saturating_mul(positions) / 42 + 2000)
    }
}
