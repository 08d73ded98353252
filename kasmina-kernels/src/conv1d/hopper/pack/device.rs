//! Device side of the filter's copy.

use super::{PIECE, PackParams, THREADS, TILE_IN, TILE_OUT, pitch};
use crate::ptx;
use crate::tile_scheduler::div;

/// What a block copies.
#[derive(Clone, Copy)]
struct Tile {
    smem: u32,
    /// Device address of its first element.
    filter: u64,
    /// Channels that exist.
    outs: u32,
    ins: u32,
    taps: u32,
}

impl Tile {
    /// Address in shared memory of an element: output channel, and place in its run of input
    /// channels and taps.
    #[inline(always)]
    fn at(self, out: u32, place: u32) -> u32 {
        self.smem + 2 * (out * pitch(self.taps) + place)
    }

    /// Loads the filter in pieces.
    ///
    /// # Safety
    /// The whole block calls it; the pieces are aligned, and the tile's channels exist.
    #[inline(always)]
    unsafe fn load_pieces(self, params: &PackParams) {
        let of_row = TILE_IN * self.taps / PIECE;
        let pieces = TILE_OUT * of_row;
        let load = |piece: u32| {
            let out = div(piece, of_row);
            let place = (piece - out * of_row) * PIECE;
            let at = self.filter + 2 * (out as u64 * params.out_stride + place as u64);
            let inside = out < self.outs && place < self.ins * self.taps;
            // SAFETY: inside the filter; runs are whole pieces.
            (
                self.at(out, place),
                if inside { unsafe { ptx::ld_global_v4_u32(at) } } else { [0; 4] },
            )
        };
        let store = |(at, words): (u32, [u32; 4])| {
            // SAFETY: this thread's place in shared memory.
            unsafe {
                ptx::st_shared_u32(at, words[0]);
                ptx::st_shared_u32(at + 4, words[1]);
                ptx::st_shared_u32(at + 8, words[2]);
                ptx::st_shared_u32(at + 12, words[3]);
            }
        };
        // Of each tap a piece for every thread. Three are on their way before one is used; at the
        // end the last is copied more than once.
        let mut piece = ptx::thread_index();
        while piece < pieces {
            ptx::nounroll();
            let last = piece + (pieces - 1 - piece) / THREADS * THREADS;
            let least = |piece: u32| if piece < last { piece } else { last };
            let [a, b, c] =
                [load(piece), load(least(piece + THREADS)), load(least(piece + 2 * THREADS))];
            store(a);
            store(b);
            store(c);
            piece += 3 * THREADS;
        }
    }

    /// Loads the filter by elements.
    ///
    /// # Safety
    /// As [`load_pieces`](Self::load_pieces), with elements for pieces.
    #[inline(always)]
    unsafe fn load_elements(self, params: &PackParams) {
        let of_row = TILE_IN * self.taps;
        let mut element = ptx::thread_index();
        while element < TILE_OUT * of_row {
            let out = div(element, of_row);
            let place = element - out * of_row;
            let input = div(place, self.taps);
            let tap = place - input * self.taps;
            let at = out as u64 * params.out_stride
                + input as u64 * params.in_stride
                + tap as u64 * params.tap_stride;
            let inside = out < self.outs && input < self.ins;
            // SAFETY: inside the filter, and this thread's place in shared memory.
            unsafe {
                let bits = if inside { ptx::ld_global_u16(self.filter + 2 * at) } else { 0 };
                ptx::st_shared_u16(self.at(out, place), bits);
            }
            element += THREADS;
        }
    }

    /// Eight elements, `step` bytes from one to the next, from `at` on.
    ///
    /// # Safety
    /// The tile is in shared memory.
    #[inline(always)]
    unsafe fn gather(at: u32, step: u32) -> [u32; 4] {
        let pair = |index: u32| {
            let at = at + 2 * index * step;
            // SAFETY: inside the tile, by the caller's contract.
            let (low, high) = unsafe { (ptx::ld_shared_u16(at), ptx::ld_shared_u16(at + step)) };
            u32::from(low) | (u32::from(high) << 16)
        };
        [pair(0), pair(1), pair(2), pair(3)]
    }
}

/// # Safety
/// Launched by `launch` on the host with the geometry of `KERNEL` and parameters that the host's
/// `conv1d/hopper.rs` has derived from a checked shape.
#[unsafe(no_mangle)]
pub(super) unsafe extern "ptx-kernel" fn conv1d_pack_filter(params: PackParams) {
    // SAFETY: a comment for `cargo xtask ptx`.
    unsafe {
        core::arch::asm!("// kasmina: .maxntid {threads}, 1, 1", threads = const THREADS,
            options(nomem, nostack, preserves_flags));
    }
    let thread = ptx::thread_index();
    let [group, out, input, first_tap] = params.place(ptx::block_index());
    let first = (group * params.group_out + out) as u64 * params.out_stride
        + input as u64 * params.in_stride
        + first_tap as u64 * params.tap_stride;
    let least = |left: u32, most: u32| if left < most { left } else { most };
    let tile = Tile {
        smem: ptx::dynamic_smem(),
        filter: params.filter + 2 * first,
        outs: least(params.group_out - out, TILE_OUT),
        ins: least(params.group_in - input, TILE_IN),
        taps: params.block_taps,
    };
    ptx::griddepcontrol_launch_dependents();
    ptx::griddepcontrol_wait();
    // SAFETY: the whole block; the tile lies inside the filter, and pieces are aligned where the
    // parameters say that they are.
    unsafe {
        if params.in_pieces != 0 {
            tile.load_pieces(&params);
        } else {
            tile.load_elements(&params);
        }
        ptx::bar_sync_all();
    }
    let columns_are_in = params.rows_are_out != 0;
    // The thread's piece of a row: its first channels in the tile, and what follows in it.
    let (near_out, near_in) = if columns_are_in {
        (thread / (TILE_IN / PIECE), thread % (TILE_IN / PIECE) * PIECE)
    } else {
        (thread % (TILE_OUT / PIECE) * PIECE, thread / (TILE_OUT / PIECE))
    };
    if near_out >= tile.outs || near_in >= tile.ins {
        return;
    }
    let (row, column, step) = if columns_are_in {
        (out + near_out, input + near_in, 2 * tile.taps)
    } else {
        (input + near_in, out + near_out, 2 * pitch(tile.taps))
    };
    let mut tap = 0;
    while tap < tile.taps {
        let matrix = (first_tap + tap) as u64 * params.groups as u64 + group as u64;
        let element =
            (matrix * params.rows() as u64 + row as u64) * params.packed_stride + column as u64;
        // SAFETY: inside the packed filter, whose rows have room for whole pieces.
        unsafe {
            let words = Tile::gather(tile.at(near_out, near_in * tile.taps + tap), step);
            ptx::st_global_v4_u32(params.packed + 2 * element, words);
        }
        tap += 1;
    }
}
