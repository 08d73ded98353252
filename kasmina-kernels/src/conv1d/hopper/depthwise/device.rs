//! Device side of the depthwise kernels.

use super::{UNITS, WARP, parts_of_row};
use crate::activation::Activation;
use crate::conv1d::depthwise::device::{
    Pack, Raw, activate, convolve, load_taps, load_vector, store_vector,
};
use crate::conv1d::depthwise::{DepthwiseParams, RUN};
use crate::conv1d::portable::{Strided, THREADS};
use crate::ptx;
use crate::tile_scheduler::div;
use crate::unroll::unroll;

/// Blocks that share a multiprocessor.
const BLOCKS_PER_MULTIPROCESSOR: u32 = 4;

/// What a vector's results are made from: the vector, and its neighbours before and after.
#[derive(Clone, Copy)]
struct Window {
    before: Raw,
    own: Raw,
    after: Raw,
}

/// The neighbours of every lane's vector, as far as results need them: their words from `from` on
/// before it, and below `to` after it. `beyond` is what the warp has not: of the first lane the one
/// before, of the last the one after.
///
/// # Safety
/// The whole warp calls it with the same `from` and `to`.
#[inline(always)]
unsafe fn window(own: Raw, beyond: Raw, lane: u32, from: u32, to: u32) -> Window {
    let (mut before, mut after) = (beyond, beyond);
    macro_rules! exchange {
        ($side:ident, $other:expr, $edge:literal, $word:literal) => {
            // SAFETY: the whole warp, by the caller's contract.
            let value = unsafe { ptx::shfl_sync_idx(own[$word], $other % 32) };
            if lane != $edge {
                $side[$word] = value;
            }
        };
    }
    if from < 2 {
        exchange!(before, lane + 31, 0, 0);
        exchange!(before, lane + 31, 0, 1);
    }
    if from < 4 {
        exchange!(before, lane + 31, 0, 2);
        exchange!(before, lane + 31, 0, 3);
    }
    if to > 0 {
        exchange!(after, lane + 1, 31, 0);
    }
    if to > 1 {
        exchange!(after, lane + 1, 31, 1);
        exchange!(after, lane + 1, 31, 2);
    }
    Window { before, own, after }
}

/// # Safety
/// As the entries'.
#[inline(always)]
pub(super) unsafe fn rows<E: Pack>(params: &DepthwiseParams) {
    // SAFETY: comments for `cargo xtask ptx`.
    unsafe {
        core::arch::asm!(
            "// kasmina: .maxntid {threads}, 1, 1",
            "// kasmina: .minnctapersm {blocks}",
            threads = const THREADS,
            blocks = const BLOCKS_PER_MULTIPROCESSOR,
            options(nomem, nostack, preserves_flags),
        );
    }
    let thread = ptx::thread_index();
    let lane = thread % WARP;
    let index = ptx::block_index() * (THREADS / WARP) + thread / WARP;
    let parts = parts_of_row(params.out_length);
    let row = div(index, parts);
    let part = index - row * parts;
    let batch = div(row, params.channels);
    if batch >= params.batch {
        return;
    }
    let channel = row - batch * params.channels;
    let (from, to) = (&params.input, &params.output);
    let at = |tensor: &Strided| {
        let elements = u64::from(batch) * tensor.batch + u64::from(channel) * tensor.channel;
        tensor.address + elements * u64::from(E::SIZE)
    };
    let (input, output) = (at(from), at(to));
    let (in_vectors, out_vectors) = (params.in_length / RUN, params.out_length / RUN);
    // Where the first tap falls: vectors further on, and elements into that vector.
    let ahead = (params.first >> 3) as u32;
    let shift = params.first as u32 & 7;
    let first = part * (UNITS * WARP) + lane;
    // A thread loads the second of its three vectors, and at the ends of the warp another one.
    let edge = match lane {
        0 => ahead,
        31 => ahead.wrapping_add(2),
        _ => 0,
    };
    let at_edge = lane == 0 || lane == WARP - 1;
    let mut own = [[0; 8]; UNITS as usize];
    let mut beyond = [[0; 8]; UNITS as usize];
    unroll!(unit: u32 in [0 1] {
        let vector = first + unit * WARP;
        let second = vector.wrapping_add(ahead).wrapping_add(1);
        // SAFETY: the caller's contract.
        own[unit as usize] = unsafe { load_vector::<E>(input, second, in_vectors) };
    });
    unroll!(unit: u32 in [0 1] {
        let vector = (first + unit * WARP).wrapping_add(edge);
        let vector = if at_edge { vector } else { u32::MAX };
        // SAFETY: the caller's contract.
        beyond[unit as usize] = unsafe { load_vector::<E>(input, vector, in_vectors) };
    });
    // SAFETY: the channel exists.
    let (taps, bias) = unsafe { load_taps::<E>(params, channel) };
    let activation = Activation::from_code(params.activation);
    // Words of the neighbours that windows reach.
    let from = shift / 2;
    let to = (shift + params.taps).saturating_sub(8).div_ceil(2);
    unroll!(unit: usize in [0 1] {
        // SAFETY: the whole warp is here.
        let window = unsafe { window(own[unit], beyond[unit], lane, from, to) };
        let window = [&window.before, &window.own, &window.after];
        macro_rules! by_shift {
            ($taps:expr; $($shift:literal)+) => {
                match shift {
                    $($shift => convolve::<E, $shift>($taps, window, &taps, bias),)+
                    _ => convolve::<E, 0>($taps, window, &taps, bias),
                }
            };
        }
        macro_rules! by_taps {
            ($($count:literal)+) => {
                match params.taps {
                    $($count => by_shift!($count; 1 2 3 4 5 6 7),)+
                    _ => by_shift!(8; 1 2 3 4 5 6 7),
                }
            };
        }
        let mut sums = by_taps!(1 2 3 4 5 6 7);
        activate(activation, &mut sums);
        let vector = first + unit as u32 * WARP;
        if vector < out_vectors {
            // SAFETY: an existing vector of this thread's own.
            unsafe { store_vector::<E>(output, vector, sums) };
        }
    });
}
