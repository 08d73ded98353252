//! Forward and dgrad with one haloed tile of the input for all taps.
//!
//! ```text
//! out[channels, positions] = w[channels, k] · in[positions, k]ᵀ
//! ```
//! Shared memory holds the positions that a tile's taps meet and 64 channels as rows of 128 bytes,
//! swizzled. A tap's operand begins a few rows further on: the swizzle follows the address, so a
//! descriptor may start on any row (confirmed on an H200; its base offset stays 0). So of all that
//! is multiplied only the filter is loaded anew for every tap.
//!
//! A channels-last input arrives so by TMA. A channels-first one arrives from the multiple of eight
//! positions before, as [`super`] says why, in slabs of 64 channels × 64 positions; three warps
//! transpose these, once for all taps.
//!
//! Rows are channels whichever way round the output lies: one that is channels-last is transposed
//! on its way to shared memory, by `stmatrix`.
//!
//! ```text
//! producer   one thread: TMA of the haloed input, then of the filter's taps
//! warps 1–3  channels first: slabs ─ ldmatrix.trans ─ stmatrix ─ haloed tile
//! consumers  for every tap wgmma from its matrix and the shifted tile. Of 128 channels each has
//!            64; of 64, they take tiles by turns, and one multiplies while the other stores.
//! ```

use super::{Cut, GatherKernel};
#[cfg(all(target_arch = "nvptx64", kasmina_tier = "hopper"))]
use super::{GatherParams, Walk};
use crate::abi::{DType, hopper_kernel};
use crate::conv1d::SequenceLayout;
use crate::pipeline::RingBarriers;
use crate::smem_layout::swizzle_128b;

#[cfg(all(target_arch = "nvptx64", kasmina_tier = "hopper"))]
mod device;

/// Positions of a tile.
pub const POSITIONS: u32 = 256;
/// Positions of the input in shared memory.
pub const ROWS: u32 = POSITIONS + MAX_REACH;
/// The furthest that the last tap may meet from the first.
pub const MAX_REACH: u32 = 16;
/// The same for channels-first inputs, whose tiles begin up to seven positions before the first.
pub const MAX_REACH_NCL: u32 = MAX_REACH - 7;
/// Positions of a box of a channels-last input: two make a haloed tile.
pub const BOX_ROWS: u32 = ROWS / 2;
/// Positions of a box of a channels-first input: a slab of as many channels.
pub const SLAB_POSITIONS: u32 = 64;

/// Cycles in which three warps transpose a haloed tile of 64 channels while it is multiplied: 128
/// steps of 512 × 512 channels, 5 taps and 32 × 2048 positions in 262.7 µs on an H200, with tiles of 64
/// channels.
pub const TRANSPOSE_CYCLES: u32 = 3400;

/// Bytes of a position of 64 channels.
const ROW_BYTES: u32 = 128;
/// Bytes of 64 channels × 64 positions of the output.
const SLAB_BYTES: u32 = 64 * ROW_BYTES;
/// Slabs that a consumer fills in turn.
const SLABS: u32 = 2;

/// How a kernel uses shared memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HaloTile {
    /// Channels of a tile: 64 or 128.
    pub channels: u32,
    /// Matrices of taps that are loaded ahead.
    pub filter_stages: u32,
    /// Haloed tiles of 64 channels.
    pub buffers: u32,
    /// Whether the input is channels-first, so that slabs of it are transposed.
    pub transposes: bool,
}

/// Pieces of eight positions and 32 channels in a haloed tile.
pub const PIECES: u32 = ROWS / 8 * 2;
/// The same in a slab.
pub const SLAB_PIECES: u32 = SLAB_POSITIONS / 8 * 2;

/// Offset, from the first slab, of the row that `lane` gives to the `ldmatrix.x4.trans` of a piece:
/// eight positions of a channel.
#[must_use]
#[inline(always)]
pub const fn piece_in_slabs(piece: u32, lane: u32) -> u32 {
    let (eight, half) = (piece / 2, piece % 2);
    eight / 8 * SLAB_BYTES + swizzle_128b(32 * half + lane, eight % 8 * 16)
}

/// Offset, in the haloed tile, of the row that `lane` gives to the `stmatrix.x4` of a piece: eight
/// channels of a position.
#[must_use]
#[inline(always)]
pub const fn piece_in_tile(piece: u32, lane: u32) -> u32 {
    let (eight, half) = (piece / 2, piece % 2);
    swizzle_128b(8 * eight + lane % 8, (4 * half + lane / 8) * 16)
}

/// Consumer warpgroups.
const CONSUMERS: u32 = 2;
/// Threads: those of the consumers and of the producer's warpgroup.
const BLOCK_DIM: u32 = 128 * (1 + CONSUMERS);

impl HaloTile {
    /// Consumers that read a stage.
    #[must_use]
    pub const fn readers(self) -> u32 {
        self.channels / 64
    }

    /// Which 64 of a tile's channels a consumer has.
    #[must_use]
    #[inline(always)]
    pub const fn share(self, consumer: u32) -> u32 {
        if self.readers() == 1 { 0 } else { consumer }
    }

    const fn filter_bytes(self) -> u32 {
        self.channels * ROW_BYTES
    }

    // Swizzled tiles first: each of them starts on a multiple of 1024.
    const fn buffer_offset(self) -> u32 {
        self.filter_stages * self.filter_bytes()
    }

    /// Slabs of a channels-first input.
    pub const fn input_slabs(self) -> u32 {
        if self.transposes { ROWS.div_ceil(SLAB_POSITIONS) } else { 0 }
    }

    const fn input_slab_offset(self) -> u32 {
        self.buffer_offset() + self.buffers * ROWS * ROW_BYTES
    }

    const fn slab_offset(self) -> u32 {
        self.input_slab_offset() + self.input_slabs() * SLAB_BYTES
    }

    const fn barrier_offset(self) -> u32 {
        self.slab_offset() + CONSUMERS * SLABS * SLAB_BYTES
    }

    const fn smem_bytes(self) -> u32 {
        self.barrier_offset()
            + RingBarriers::bytes(self.filter_stages)
            + RingBarriers::bytes(self.buffers)
            + RingBarriers::bytes(self.input_slabs())
            + 8 * CONSUMERS
    }
}

/// One row makes a kernel's module, its host-side description and, on the device, its entry.
macro_rules! kernels {
    ($($entry:ident: $element:ident $ptx_type:literal, $input:ident to $output:ident, $channels:literal channels,
        $filter_stages:literal stages, $buffers:literal buffers;)+) => {
        /// Every kernel with a halo, for each element type and pair of layouts from the larger
        /// tile to the smaller.
        pub static KERNELS: [GatherKernel; [$(stringify!($entry)),+].len()] = [$({
            let tile = HaloTile {
                channels: $channels, filter_stages: $filter_stages, buffers: $buffers,
                transposes: matches!(SequenceLayout::$input, SequenceLayout::Ncl),
            };
            GatherKernel {
                dtype: DType::$element,
                input: SequenceLayout::$input,
                output: SequenceLayout::$output,
                cut: Cut::Haloed(tile),
                kernel: hopper_kernel!($entry, BLOCK_DIM, tile.smem_bytes()),
            }
        }),+];
        $(
            #[cfg(all(target_arch = "nvptx64", kasmina_tier = "hopper"))]
            device::entry!(
                $entry, $element, $ptx_type, $input, $output, $channels, $filter_stages, $buffers
            );
        )+
    };
}

kernels! {
    conv1d_halo_bf16_nlc_nlc_64x256: BF16 "bf16", Nlc to Nlc, 64 channels, 10 stages, 3 buffers;
    conv1d_halo_bf16_nlc_ncl_64x256: BF16 "bf16", Nlc to Ncl, 64 channels, 10 stages, 3 buffers;
    conv1d_halo_bf16_ncl_nlc_128x256: BF16 "bf16", Ncl to Nlc, 128 channels, 5 stages, 2 buffers;
    conv1d_halo_bf16_ncl_nlc_64x256: BF16 "bf16", Ncl to Nlc, 64 channels, 10 stages, 2 buffers;
    conv1d_halo_bf16_ncl_ncl_128x256: BF16 "bf16", Ncl to Ncl, 128 channels, 5 stages, 2 buffers;
    conv1d_halo_bf16_ncl_ncl_64x256: BF16 "bf16", Ncl to Ncl, 64 channels, 10 stages, 2 buffers;
    conv1d_halo_f16_nlc_nlc_64x256: F16 "f16", Nlc to Nlc, 64 channels, 10 stages, 3 buffers;
    conv1d_halo_f16_nlc_ncl_64x256: F16 "f16", Nlc to Ncl, 64 channels, 10 stages, 3 buffers;
    conv1d_halo_f16_ncl_nlc_128x256: F16 "f16", Ncl to Nlc, 128 channels, 5 stages, 2 buffers;
    conv1d_halo_f16_ncl_nlc_64x256: F16 "f16", Ncl to Nlc, 64 channels, 10 stages, 2 buffers;
    conv1d_halo_f16_ncl_ncl_128x256: F16 "f16", Ncl to Ncl, 128 channels, 5 stages, 2 buffers;
    conv1d_halo_f16_ncl_ncl_64x256: F16 "f16", Ncl to Ncl, 64 channels, 10 stages, 2 buffers;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conv1d::hopper::SLAB_N;
    use std::collections::HashSet;
    use std::vec;

    #[test]
    fn two_boxes_make_a_haloed_tile_of_whole_groups_of_rows() {
        assert_eq!(2 * BOX_ROWS, ROWS);
        assert!(BOX_ROWS <= 256 && (BOX_ROWS * ROW_BYTES).is_multiple_of(1024));
    }

    #[test]
    fn swizzled_parts_of_shared_memory_start_on_multiples_of_their_period() {
        for row in &KERNELS {
            let Cut::Haloed(tile) = row.cut else { panic!("a kernel with a halo") };
            let (buffers, slabs) = (tile.buffer_offset(), tile.input_slab_offset());
            for offset in [tile.filter_bytes(), buffers, slabs, tile.slab_offset()] {
                assert!(offset.is_multiple_of(1024));
            }
            assert_eq!(tile.barrier_offset() - tile.slab_offset(), 4 * SLAB_N * SLAB_N * 2);
        }
    }

    /// Plays TMA, `ldmatrix.trans` and `stmatrix` on the CPU: each position of the haloed tile must
    /// hold its 64 channels where wgmma looks for them.
    #[test]
    fn slabs_become_a_tile_with_positions_as_rows() {
        let slabs = ROWS.div_ceil(SLAB_POSITIONS) * SLAB_POSITIONS;
        // Slab s holds positions 64·s.. as columns: channel in the upper, position in the lower.
        let mut raw = vec![0u32; (slabs * 64) as usize];
        for position in 0..slabs {
            for channel in 0..64 {
                let byte = position / 64 * SLAB_BYTES + swizzle_128b(channel, position % 64 * 2);
                raw[(byte / 2) as usize] = channel << 16 | position;
            }
        }
        let mut tile = vec![u32::MAX; (ROWS * 64) as usize];
        for piece in 0..PIECES {
            for matrix in 0..4 {
                for row in 0..8 {
                    for column in 0..8 {
                        // Transposed on the way: row and column change places.
                        let from = piece_in_slabs(piece, 8 * matrix + column) / 2 + row;
                        let to = piece_in_tile(piece, 8 * matrix + row) / 2 + column;
                        tile[to as usize] = raw[from as usize];
                    }
                }
            }
        }
        for position in 0..ROWS {
            for channel in 0..64 {
                let place = swizzle_128b(position, channel * 2) / 2;
                assert_eq!(tile[place as usize], channel << 16 | position);
            }
        }
    }

    #[test]
    fn neither_side_of_the_transposition_has_bank_conflicts() {
        for piece in 0..PIECES {
            for matrix in 0..4 {
                let chunks = |offset: fn(u32, u32) -> u32| {
                    let lanes = 8 * matrix..8 * matrix + 8;
                    lanes.map(|lane| offset(piece, lane) % 128 / 16).collect::<HashSet<_>>()
                };
                assert_eq!(chunks(piece_in_slabs).len(), 8);
                assert_eq!(chunks(piece_in_tile).len(), 8);
            }
        }
    }

    #[test]
    fn entry_names_say_what_the_kernel_serves() {
        for row in &KERNELS {
            let [positions, channels] = row.extents();
            let expected = std::format!(
                "conv1d_halo_{}_{}_{}_{channels}x{positions}",
                row.dtype,
                row.input.name(),
                row.output.name()
            );
            assert_eq!(row.kernel.entry, expected);
            assert_eq!(row.kernel.module.entries, [row.kernel.entry]);
        }
    }
}
