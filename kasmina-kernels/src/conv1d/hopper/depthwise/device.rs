//! Device side of the depthwise kernels.

use super::{LOG2_WARP, run_of_warp};
use crate::activation::Activation;
use crate::conv1d::depthwise::device::{
    OwnRow, Pack, Raw, activate, convolve, load_taps, load_vector, own_row, store_vector,
};
use crate::conv1d::depthwise::{DepthwiseParams, RUN};
use crate::conv1d::portable::THREADS;
use crate::ptx;
use crate::unroll::unroll;

/// Blocks that share a multiprocessor.
const BLOCKS_PER_MULTIPROCESSOR: u32 = 3;

/// The vector so many lanes on: the step's own, and beyond the last lane those of the step after.
///
/// # Safety
/// The whole warp calls it.
#[inline(always)]
unsafe fn further<const LANES: u32, const WORDS: usize>(own: &Raw, after: &Raw, lane: u32) -> Raw {
    let mut raw = [0; 8];
    unroll!(word: usize in [0 1 2 3] {
        if word < WORDS {
            // The first lanes are asked by the last ones alone.
            let value = if lane < LANES { after[word] } else { own[word] };
            // SAFETY: the whole warp, by the caller's contract.
            raw[word] = unsafe { ptx::shfl_sync_idx(value, (lane + LANES) % 32) };
        }
    });
    raw
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
    let Some(row) = own_row::<E>(params) else { return };
    let OwnRow { addresses: [input, output], channel, thread } = row;
    let (in_vectors, out_vectors) = (params.in_length / RUN, params.out_length / RUN);
    // Where the first tap falls: vectors further on, and elements into that vector.
    let ahead = (params.first >> 3) as u32;
    let shift = params.first as u32 & 7;
    let run = run_of_warp(out_vectors, params.log2_row_threads);
    let lane = thread % 32;
    let first = (thread >> LOG2_WARP) * run;
    let left = out_vectors.saturating_sub(first);
    let end = first + if run < left { run } else { left };
    // Of the step after the last, two lanes' vectors.
    let wanted = |vector: u32| {
        if vector < end.next_multiple_of(32) + 2 { vector.wrapping_add(ahead) } else { u32::MAX }
    };
    let mut vector = first + lane;
    let mut coming = [[0; 8]; 4];
    unroll!(step: u32 in [0 1 2 3] {
        // SAFETY: the caller's contract.
        coming[step as usize] =
            unsafe { load_vector::<E>(input, wanted(vector + 32 * step), in_vectors) };
    });
    // After these, so as not to wait for the taps first.
    // SAFETY: the channel exists.
    let (taps, bias) = unsafe { load_taps::<E>(params, channel) };
    let activation = Activation::from_code(params.activation);
    // Elements of the third vector that a window reaches.
    let third_elements = shift + params.taps + 7;
    while vector - lane < end {
        ptx::nounroll();
        let [own, after, ..] = coming;
        unroll!(step: usize in [0 1 2] {
            coming[step] = coming[step + 1];
        });
        // SAFETY: the caller's contract; the whole warp is here.
        let (second, third) = unsafe {
            coming[3] = load_vector::<E>(input, wanted(vector + 128), in_vectors);
            let second = further::<1, 4>(&own, &after, lane);
            let third = if third_elements > 18 {
                further::<2, 3>(&own, &after, lane)
            } else if third_elements > 16 {
                further::<2, 1>(&own, &after, lane)
            } else {
                [0; 8]
            };
            (second, third)
        };
        let window = [&own, &second, &third];
        macro_rules! by_shift {
            ($($shift:literal)+) => {
                match shift {
                    $($shift => convolve::<E, $shift>(params, window, &taps, bias),)+
                    _ => convolve::<E, 0>(params, window, &taps, bias),
                }
            };
        }
        let mut sums = by_shift!(1 2 3 4 5 6 7);
        activate(activation, &mut sums);
        if vector < end {
            // SAFETY: an existing vector of this thread's own.
            unsafe { store_vector::<E>(output, vector, sums) };
        }
        vector += 32;
    }
}
