//! The split: an input and a filter in f32 become three bf16 parts each, and what parts cannot
//! express is noticed.
//!
//! A channels-last input is split along its rows. Of a channels-first one a block takes tiles of 64
//! channels × 64 positions through shared memory and splits them on the way out, so that its parts
//! lie channels-last too. Words of a row there change places by the number of the row's eight, so
//! that eight channels of four positions, which a warp reads at once, lie on 32 banks.
//!
//! For wgrad there are two inputs, dz and x, split one after the other.
//!
//! The filter's parts are a matrix for every tap and group, whose columns are the channels that are
//! summed over. Neighbouring threads take neighbouring input channels, which lie closer together in
//! the filter than output channels do: along rows for dgrad.

use super::padded;
use crate::abi::{Kernel, KernelParams, Module, module};
use crate::conv1d::portable::{Strided, StridedFilter};
use crate::tile_scheduler::div;

#[cfg(doc)]
use crate::gemm::parts::W_SHIFT;

#[cfg(all(target_arch = "nvptx64", kasmina_tier = "hopper"))]
mod device;

/// Channels that a thread splits at once.
pub const PIECE: u32 = 8;
/// Channels and positions of a tile of a channels-first input.
pub const TILE: u32 = 64;
/// Threads per block.
pub const THREADS: u32 = 256;
/// Blocks that a multiprocessor holds at once.
pub const BLOCKS: u32 = 4;
/// Shared memory: a tile.
const SMEM_BYTES: u32 = TILE * TILE * 4;

/// What the kernel takes.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct SplitParams {
    /// The tensor that is gathered from.
    pub input: Strided,
    /// Device address of its parts, 16-aligned.
    pub input_parts: u64,
    /// The filter.
    pub filter: StridedFilter,
    /// Device address of its parts, 16-aligned.
    pub filter_parts: u64,
    /// Device address of one word per block, for its findings.
    pub findings: u64,
    /// Sequences.
    pub sequences: u32,
    /// Positions of a sequence.
    pub positions: u32,
    /// Groups.
    pub groups: u32,
    /// Channels of a group of the output of the forward pass.
    pub group_out: u32,
    /// Channels of a group of its input.
    pub group_in: u32,
    /// Taps; 0 without a filter.
    pub taps: u32,
    /// 1 where rows of the filter's matrices are channels of the output, and so in forward passes.
    pub rows_are_out: u32,
    /// 1 where the input is channels-last, and the rows of all sequences follow each other.
    pub channels_last: u32,
    /// How far the input's findings are shifted: 0, or [`W_SHIFT`] where it is the second operand.
    pub shift: u32,
    /// Keeps the size a multiple of 8 without padding.
    pub reserved: u32,
}

// SAFETY: repr(C); eleven u64 and ten u32: no padding.
unsafe impl KernelParams for SplitParams {}
const _: () = assert!(size_of::<SplitParams>() == 11 * 8 + 10 * 4);

/// Eight channels of an input's position, or of a row of a filter's matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The position, counted through all sequences, or the tap.
    pub outer: u32,
    /// The group.
    pub group: u32,
    /// The row of the filter's matrix; 0 of an input.
    pub row: u32,
    /// The first of the channels, in the group.
    pub channel: u32,
}

/// The first channel and position of a tile of a channels-first input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TilePlace {
    /// The sequence.
    pub sequence: u32,
    /// The position in it.
    pub position: u32,
    /// The group.
    pub group: u32,
    /// The channel in it.
    pub channel: u32,
}

/// Quotient and remainder.
#[inline(always)]
const fn div_rem(a: u32, b: u32) -> (u32, u32) {
    let quotient = div(a, b);
    (quotient, a.wrapping_sub(quotient.wrapping_mul(b)))
}

impl SplitParams {
    /// Channels of a group that are summed over.
    #[must_use]
    #[inline(always)]
    pub const fn channels(&self) -> u32 {
        if self.rows_are_out != 0 { self.group_in } else { self.group_out }
    }

    /// Rows of the filter's matrices.
    #[must_use]
    #[inline(always)]
    pub const fn rows(&self) -> u32 {
        if self.rows_are_out != 0 { self.group_out } else { self.group_in }
    }

    /// Pieces of the input.
    #[must_use]
    #[inline(always)]
    pub const fn input_pieces(&self) -> u32 {
        let rows = self.sequences.wrapping_mul(self.positions).wrapping_mul(self.groups);
        rows.wrapping_mul(self.channels().div_ceil(PIECE))
    }

    /// The piece of the input with this number.
    #[must_use]
    #[inline(always)]
    pub const fn input_piece(&self, index: u32) -> Piece {
        let (rest, piece) = div_rem(index, self.channels().div_ceil(PIECE));
        let (outer, group) = div_rem(rest, self.groups);
        Piece { outer, group, row: 0, channel: piece * PIECE }
    }

    /// Where a piece stands in a part of the input, in elements.
    #[must_use]
    #[inline(always)]
    pub const fn input_offset(&self, piece: Piece) -> u64 {
        let row = piece.outer as u64 * self.groups as u64 + piece.group as u64;
        row * padded(self.channels()) as u64 + piece.channel as u64
    }

    /// Elements of a part of the input.
    #[must_use]
    #[inline(always)]
    pub const fn input_elements(&self) -> u64 {
        let rows = self.sequences.wrapping_mul(self.positions) as u64 * self.groups as u64;
        rows * padded(self.channels()) as u64
    }

    /// Tiles of a channels-first input.
    #[must_use]
    #[inline(always)]
    pub const fn input_tiles(&self) -> u32 {
        let of_group = self.channels().div_ceil(TILE).wrapping_mul(self.positions.div_ceil(TILE));
        self.sequences.wrapping_mul(self.groups).wrapping_mul(of_group)
    }

    /// Where the tile with this number lies.
    #[must_use]
    #[inline(always)]
    pub const fn input_tile(&self, index: u32) -> TilePlace {
        let (rest, position) = div_rem(index, self.positions.div_ceil(TILE));
        let (rest, channel) = div_rem(rest, self.channels().div_ceil(TILE));
        let (sequence, group) = div_rem(rest, self.groups);
        TilePlace { sequence, position: position * TILE, group, channel: channel * TILE }
    }

    /// Pieces of the filter.
    #[must_use]
    #[inline(always)]
    pub const fn filter_pieces(&self) -> u32 {
        let matrices = self.taps.wrapping_mul(self.groups);
        matrices.wrapping_mul(self.rows()).wrapping_mul(self.channels().div_ceil(PIECE))
    }

    /// The piece of the filter with this number.
    #[must_use]
    #[inline(always)]
    pub const fn filter_piece(&self, index: u32) -> Piece {
        let (rows, pieces) = (self.rows(), self.channels().div_ceil(PIECE));
        let (rest, row, piece) = if self.rows_are_out != 0 {
            let (rest, piece) = div_rem(index, pieces);
            let (rest, row) = div_rem(rest, rows);
            (rest, row, piece)
        } else {
            let (rest, row) = div_rem(index, rows);
            let (rest, piece) = div_rem(rest, pieces);
            (rest, row, piece)
        };
        let (outer, group) = div_rem(rest, self.groups);
        Piece { outer, group, row, channel: piece * PIECE }
    }

    /// Where a piece stands in a part of the filter, in elements.
    #[must_use]
    #[inline(always)]
    pub const fn filter_offset(&self, piece: Piece) -> u64 {
        let matrix = piece.outer as u64 * self.groups as u64 + piece.group as u64;
        let row = matrix * self.rows() as u64 + piece.row as u64;
        row * padded(self.channels()) as u64 + piece.channel as u64
    }

    /// Elements of a part of the filter.
    #[must_use]
    #[inline(always)]
    pub const fn filter_elements(&self) -> u64 {
        let matrices = self.taps as u64 * self.groups as u64;
        matrices * self.rows() as u64 * padded(self.channels()) as u64
    }

    /// Blocks to launch on a GPU of so many multiprocessors.
    #[must_use]
    pub fn blocks(&self, multiprocessors: u32) -> u32 {
        let input = if self.channels_last != 0 {
            self.input_pieces().div_ceil(THREADS)
        } else {
            self.input_tiles()
        };
        let needed = input.max(self.filter_pieces().div_ceil(THREADS));
        needed.clamp(1, multiprocessors * BLOCKS)
    }
}

/// The word of the tile in shared memory that holds a channel's position.
#[must_use]
#[inline(always)]
pub const fn word(channel: u32, position: u32) -> u32 {
    channel * TILE + ((position / 4) ^ (channel / PIECE)) * 4 + position % 4
}

/// Its module.
pub static MODULE: Module = module!(Hopper, "hopper", "conv1d_split_f32", ["conv1d_split_f32"]);

/// Splits both operands.
pub static KERNEL: Kernel<SplitParams> =
    Kernel::new(&MODULE, "conv1d_split_f32", THREADS, SMEM_BYTES).waiting_for_predecessors();

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    /// Of an input that is 0 × 0 where only numbers matter.
    fn params(
        channels_last: bool,
        rows_are_out: bool,
        [group_in, group_out]: [u32; 2],
    ) -> SplitParams {
        SplitParams {
            input: Strided { address: 0, batch: 0, channel: 0, position: 0 },
            input_parts: 0,
            filter: StridedFilter { address: 0, out: 0, input: 0, tap: 0 },
            filter_parts: 0,
            findings: 0,
            sequences: 3,
            positions: 130,
            groups: 2,
            group_out,
            group_in,
            taps: 5,
            rows_are_out: u32::from(rows_are_out),
            channels_last: u32::from(channels_last),
            shift: 0,
            reserved: 0,
        }
    }

    #[test]
    fn pieces_cover_every_operand_once_and_stay_apart() {
        for channels in [[1, 7], [8, 9], [16, 64], [65, 17]] {
            for rows_are_out in [false, true] {
                let params = params(true, rows_are_out, channels);
                let pieces = params.channels().div_ceil(PIECE);
                let mut seen = HashSet::new();
                for index in 0..params.input_pieces() {
                    let piece = params.input_piece(index);
                    assert!(piece.outer < 3 * 130 && piece.group < 2 && piece.row == 0);
                    assert!(piece.channel < params.channels());
                    let offset = params.input_offset(piece);
                    assert!(offset + u64::from(PIECE) <= params.input_elements());
                    assert!(offset.is_multiple_of(8) && seen.insert(offset));
                }
                assert_eq!(seen.len() as u32, 3 * 130 * 2 * pieces);
                let mut seen = HashSet::new();
                for index in 0..params.filter_pieces() {
                    let piece = params.filter_piece(index);
                    assert!(piece.outer < 5 && piece.group < 2 && piece.row < params.rows());
                    assert!(piece.channel < params.channels());
                    let offset = params.filter_offset(piece);
                    assert!(offset + u64::from(PIECE) <= params.filter_elements());
                    assert!(offset.is_multiple_of(8) && seen.insert(offset));
                }
                assert_eq!(seen.len() as u32, 5 * 2 * params.rows() * pieces);
            }
        }
    }

    #[test]
    fn neighbouring_threads_take_neighbouring_input_channels_of_the_filter() {
        let forward = params(true, true, [64, 48]);
        assert_eq!(forward.filter_piece(1).channel, PIECE);
        let dgrad = params(true, false, [64, 48]);
        assert_eq!((dgrad.filter_piece(1).row, dgrad.filter_piece(1).channel), (1, 0));
    }

    #[test]
    fn tiles_cover_every_channel_and_position_once() {
        let params = params(false, true, [65, 8]);
        let mut seen = HashSet::new();
        for index in 0..params.input_tiles() {
            let TilePlace { sequence, position, group, channel } = params.input_tile(index);
            assert!(sequence < 3 && position < 130 && group < 2 && channel < 65);
            assert!(position.is_multiple_of(TILE) && channel.is_multiple_of(TILE));
            assert!(seen.insert((sequence, position, group, channel)));
        }
        assert_eq!(seen.len(), 3 * 3 * 2 * 2);
    }

    /// A quarter of a warp stores four positions of a channel each, a whole one reads eight channels
    /// of four positions, one after the other.
    #[test]
    fn words_of_a_tile_are_its_own_and_meet_on_no_bank() {
        let words: HashSet<u32> =
            (0..TILE).flat_map(|c| (0..TILE).map(move |p| word(c, p))).collect();
        assert_eq!(words.len() as u32, TILE * TILE);
        assert!(words.iter().all(|&word| 4 * word < SMEM_BYTES));
        for channel in 0..TILE {
            for eight in 0..2 {
                let quads = (0..8).map(|quad| word(channel, 4 * (8 * eight + quad)));
                let banks: HashSet<_> = quads.map(|word| word % 32).collect();
                assert_eq!(banks.len(), 8);
                assert!(banks.iter().all(|bank| bank.is_multiple_of(4)));
            }
        }
        for quad in 0..TILE / 4 {
            for within in 0..PIECE {
                let banks: HashSet<_> = (0..32)
                    .map(|lane| word(lane % 8 * PIECE + within, 4 * quad + lane / 8) % 32)
                    .collect();
                assert_eq!(banks.len(), 32);
            }
        }
    }

    #[test]
    fn a_split_fills_the_gpu_at_most_and_has_a_block_at_least() {
        let small = SplitParams { sequences: 1, positions: 1, ..params(true, true, [8, 8]) };
        assert_eq!(small.blocks(132), 1);
        assert_eq!(SplitParams { sequences: 0, ..small }.blocks(132), 1);
        let large =
            SplitParams { sequences: 64, positions: 4096, ..params(false, true, [256, 256]) };
        assert_eq!(large.blocks(132), 528);
    }
}
