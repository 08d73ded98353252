//! Device side of the split.

use super::{BLOCKS, PIECE, Piece, SplitParams, THREADS, TILE, TilePlace, word};
use crate::gemm::hopper::split::device::{load_some, split_eight};
use crate::gemm::parts::{Findings, W_SHIFT, of_block};
use crate::ptx;

/// Stores the parts of a piece, which stands `offset` elements into parts of `elements` each.
///
/// # Safety
/// There is room for them at `parts`, which is 16-aligned, and nothing else accesses them.
#[inline(always)]
unsafe fn store_parts(parts: u64, elements: u64, offset: u64, split: [[u32; 4]; 3]) {
    let address = parts + 2 * offset;
    // SAFETY: by the caller's contract; a piece is 16 bytes.
    unsafe {
        ptx::st_global_v4_u32(address, split[0]);
        ptx::st_global_v4_u32(address + 2 * elements, split[1]);
        ptx::st_global_v4_u32(address + 4 * elements, split[2]);
    }
}

/// Splits this thread's pieces of a channels-last input.
///
/// # Safety
/// Called by every thread of the grid; operands and parts are as large as the parameters say (the
/// host checks the ones and allocates the others), and nothing else accesses the parts.
#[inline(always)]
unsafe fn split_rows(params: &SplitParams) -> Findings {
    let (pieces, channels) = (params.input_pieces(), params.channels());
    let mut findings = Findings::NONE;
    let load = |index: u32| {
        let piece = params.input_piece(index);
        let element = u64::from(piece.outer) * params.input.position
            + u64::from(piece.group * channels + piece.channel);
        let address = params.input.address + 4 * element;
        let left = channels - piece.channel;
        // SAFETY: channels of the position that exist.
        let (low, high) = unsafe {
            if address % 16 == 0 && left >= PIECE {
                (ptx::ld_global_v4_u32(address), ptx::ld_global_v4_u32(address + 16))
            } else {
                (load_some(address, left), load_some(address + 16, left.saturating_sub(4)))
            }
        };
        (piece, low, high)
    };
    let mut finish = |(piece, low, high): (Piece, [u32; 4], [u32; 4])| {
        let split = split_eight(low, high, &mut findings);
        // SAFETY: a piece of the input's parts, whose rows are padded.
        unsafe {
            let offset = params.input_offset(piece);
            store_parts(params.input_parts, params.input_elements(), offset, split);
        }
    };
    let mut index = ptx::block_index() * THREADS + ptx::thread_index();
    while index < pieces {
        ptx::nounroll();
        // Two are on their way before one is split; at the end the last is split twice.
        let next = index + ptx::grid_size() * THREADS;
        let (first, second) = (load(index), load(if next < pieces { next } else { index }));
        finish(first);
        finish(second);
        index = next + ptx::grid_size() * THREADS;
    }
    findings
}

/// Splits this block's tiles of a channels-first input.
///
/// # Safety
/// As [`split_rows`]; the block has `SMEM_BYTES` of shared memory.
#[inline(always)]
unsafe fn split_tiles(params: &SplitParams) -> Findings {
    let (smem, thread) = (ptx::dynamic_smem(), ptx::thread_index());
    let (tiles, channels) = (params.input_tiles(), params.channels());
    let mut findings = Findings::NONE;
    // Sixteen threads to a channel, four positions to a thread.
    let (row, quad) = (thread / 16, thread % 16 * 4);
    let load = |place: TilePlace| {
        let TilePlace { sequence, position, group, channel } = place;
        let left = params.positions.saturating_sub(position + quad);
        let of_row = |i: u32| {
            let channel = channel + row + 16 * i;
            let element = u64::from(sequence) * params.input.batch
                + u64::from(group * channels + channel) * params.input.channel
                + u64::from(position + quad);
            let address = params.input.address + 4 * element;
            let left = if channel < channels { left } else { 0 };
            // SAFETY: positions of the channel that exist.
            unsafe {
                if left >= 4 && address % 16 == 0 {
                    ptx::ld_global_v4_u32(address)
                } else {
                    load_some(address, left)
                }
            }
        };
        [of_row(0), of_row(1), of_row(2), of_row(3)]
    };
    let mut tile = ptx::block_index();
    let mut place = params.input_tile(tile);
    let mut loaded = if tile < tiles { load(place) } else { [[0; 4]; 4] };
    while tile < tiles {
        ptx::nounroll();
        let TilePlace { sequence, position, group, channel } = place;
        let store = |i: u32, values: [u32; 4]| {
            let at = smem + 4 * word(row + 16 * i, quad);
            // SAFETY: this thread's place in the tile, which no other thread reads before the
            // barrier below or after the last.
            unsafe { ptx::st_shared_v4_u32(at, values) };
        };
        store(0, loaded[0]);
        store(1, loaded[1]);
        store(2, loaded[2]);
        store(3, loaded[3]);
        // SAFETY: the whole block, as loops depend on the block alone.
        unsafe { ptx::bar_sync_all() };
        // The next tile is on its way while this one is split.
        tile += ptx::grid_size();
        if tile < tiles {
            place = params.input_tile(tile);
            loaded = load(place);
        }
        // Eight threads to a position, eight channels to a thread.
        let first = thread % (TILE / PIECE) * PIECE;
        let mut at = thread / (TILE / PIECE);
        while at < TILE {
            ptx::nounroll();
            if channel + first < channels && position + at < params.positions {
                let value = |i: u32| {
                    // SAFETY: in the tile, stored before the barrier above.
                    unsafe { ptx::ld_shared_u32(smem + 4 * word(first + i, at)) }
                };
                let low = [value(0), value(1), value(2), value(3)];
                let high = [value(4), value(5), value(6), value(7)];
                let split = split_eight(low, high, &mut findings);
                let outer = sequence * params.positions + position + at;
                let piece = Piece { outer, group, row: 0, channel: channel + first };
                // SAFETY: a piece of the input's parts, whose rows are padded.
                unsafe {
                    let offset = params.input_offset(piece);
                    store_parts(params.input_parts, params.input_elements(), offset, split);
                }
            }
            at += THREADS / (TILE / PIECE);
        }
        // SAFETY: as above.
        unsafe { ptx::bar_sync_all() };
    }
    findings
}

/// Splits this thread's pieces of the filter.
///
/// # Safety
/// As [`split_rows`].
#[inline(always)]
unsafe fn split_filter(params: &SplitParams) -> Findings {
    let (pieces, channels) = (params.filter_pieces(), params.channels());
    let filter = params.filter;
    let (row_stride, step) = if params.rows_are_out != 0 {
        (filter.out, filter.input)
    } else {
        (filter.input, filter.out)
    };
    let mut findings = Findings::NONE;
    let mut index = ptx::block_index() * THREADS + ptx::thread_index();
    while index < pieces {
        ptx::nounroll();
        let piece = params.filter_piece(index);
        let element = u64::from(piece.group * params.group_out) * filter.out
            + u64::from(piece.outer) * filter.tap
            + u64::from(piece.row) * row_stride
            + u64::from(piece.channel) * step;
        let (address, left) = (filter.address + 4 * element, channels - piece.channel);
        let value = |i: u32| {
            // SAFETY: a channel that exists.
            if i < left {
                unsafe { ptx::ld_global_u32(address + 4 * u64::from(i) * step) }
            } else {
                0
            }
        };
        let low = [value(0), value(1), value(2), value(3)];
        let high = [value(4), value(5), value(6), value(7)];
        let split = split_eight(low, high, &mut findings);
        // SAFETY: a piece of the filter's parts, whose rows are padded.
        unsafe {
            let offset = params.filter_offset(piece);
            store_parts(params.filter_parts, params.filter_elements(), offset, split);
        }
        index += ptx::grid_size() * THREADS;
    }
    findings
}

/// # Safety
/// Launched by `launch` on the host with the geometry of its `Kernel` and parameters that the host's
/// `conv1d/parts.rs` has derived from a checked shape.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "ptx-kernel" fn conv1d_split_f32(params: SplitParams) {
    // SAFETY: comments for `cargo xtask ptx`.
    unsafe {
        core::arch::asm!(
            "// kasmina: .maxntid {threads}, 1, 1",
            "// kasmina: .minnctapersm {blocks}",
            threads = const THREADS,
            blocks = const BLOCKS,
            options(nomem, nostack, preserves_flags),
        );
    }
    ptx::griddepcontrol_launch_dependents();
    ptx::griddepcontrol_wait();
    // SAFETY: every thread of the grid; the host's checks, as above; a word for each block.
    unsafe {
        let filter = split_filter(&params).bits();
        let input =
            if params.channels_last != 0 { split_rows(&params) } else { split_tiles(&params) };
        let findings = of_block((input.bits() << params.shift) | (filter << W_SHIFT));
        if ptx::thread_index() == 0 {
            ptx::st_global_u32(params.findings + 4 * u64::from(ptx::block_index()), findings);
        }
    }
}
