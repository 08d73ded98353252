//! Device side of the depthwise kernels.

use super::*;
use crate::activation::Activation;
use crate::gemm::element::{BF16, Element, F16, F32};
use crate::gemm::portable::bf16_from_f32;
use crate::ptx;
#[cfg(kasmina_tier = "portable")]
use crate::tile_scheduler::div;
use crate::unroll::unroll;

#[cfg(kasmina_tier = "portable")]
mod wgrad;
#[cfg(kasmina_tier = "portable")]
pub(in crate::conv1d) use wgrad::wgrad;

/// Whether one instruction rounds two f32 to a 16-bit type: not on sm_75.
const ROUNDS_PAIRS: bool = cfg!(kasmina_tier = "hopper");

/// Rounds two results at once, as that is cheaper than one after the other.
pub(in crate::conv1d) trait Pack: Element {
    /// The two, of which 16-bit types share the first word.
    fn pack(a: f32, b: f32) -> [u32; 2];
}

impl Pack for F32 {
    #[inline(always)]
    fn pack(a: f32, b: f32) -> [u32; 2] {
        [a.to_bits(), b.to_bits()]
    }
}

impl Pack for F16 {
    #[inline(always)]
    fn pack(a: f32, b: f32) -> [u32; 2] {
        if ROUNDS_PAIRS {
            return [ptx::cvt_rn_f16x2_f32(b, a), 0];
        }
        [Self::round(a) | (Self::round(b) << 16), 0]
    }
}

impl Pack for BF16 {
    #[inline(always)]
    fn pack(a: f32, b: f32) -> [u32; 2] {
        if ROUNDS_PAIRS {
            return [ptx::cvt_rn_bf16x2_f32(b, a), 0];
        }
        // One test for both and no selection: NaN is rare, and rounding is most of what these
        // kernels compute.
        if a.is_nan() || b.is_nan() {
            return [u32::from(bf16_from_f32(a)) | (u32::from(bf16_from_f32(b)) << 16), 0];
        }
        // To nearest, ties to even; no finite value overflows (`bf16_from_f32`).
        let nearest = |value: f32| {
            let bits = value.to_bits();
            bits.wrapping_add(0x7FFF + ((bits >> 16) & 1))
        };
        [(nearest(a) >> 16) | (nearest(b) & 0xFFFF_0000), 0]
    }
}

/// Applies the activation, chosen once for all eight, in place.
#[inline(always)]
pub(in crate::conv1d) fn activate(activation: Activation, values: &mut [f32; 8]) {
    macro_rules! each {
        ($($variant:ident)+) => {
            match activation {
                $(Activation::$variant => {
                    unroll!(i: usize in [0 1 2 3 4 5 6 7] {
                        values[i] = Activation::$variant.apply(values[i]);
                    });
                })+
            }
        };
    }
    each!(None Relu Gelu GeluTanh Silu);
}

/// Eight elements, of which 16-bit types use the first half.
pub(in crate::conv1d) type Raw = [u32; 8];

/// How many blocks are to share a multiprocessor, for elements of `size` bytes: as many as leave
/// enough registers.
#[cfg(kasmina_tier = "portable")]
const fn blocks_per_multiprocessor(size: u32) -> u32 {
    if size == 4 { 2 } else { 3 }
}

/// Number `index` of eight elements, as f32.
#[inline(always)]
fn widened<E: Element>(raw: &Raw, index: usize) -> f32 {
    if E::SIZE == 4 {
        E::widen(raw[index])
    } else if index % 2 == 0 {
        E::widen(raw[index / 2] & 0xFFFF)
    } else {
        E::widen(raw[index / 2] >> 16)
    }
}

/// Vector `index` of a row of `count` vectors at `row`; zeros where there is none.
///
/// # Safety
/// The row is readable, 16-aligned, and nothing writes it while the kernel runs.
#[inline(always)]
pub(in crate::conv1d) unsafe fn load_vector<E: Element>(row: u64, index: u32, count: u32) -> Raw {
    let mut raw = [0; 8];
    // As unsigned, an index before the first is beyond the last.
    if index < count {
        let at = row + u64::from(index) * u64::from(RUN * E::SIZE);
        // SAFETY: an existing vector.
        unsafe {
            [raw[0], raw[1], raw[2], raw[3]] = ptx::ld_global_nc_v4_u32(at);
            if E::SIZE == 4 {
                [raw[4], raw[5], raw[6], raw[7]] = ptx::ld_global_nc_v4_u32(at + 16);
            }
        }
    }
    raw
}

/// The taps of a channel in the order of the walk, zero beyond the last, and its bias.
///
/// # Safety
/// The filter is readable, the bias 0 or readable; the channel exists.
#[inline(always)]
pub(in crate::conv1d) unsafe fn load_taps<E: Element>(
    params: &DepthwiseParams,
    channel: u32,
) -> ([f32; MAX_TAPS as usize], f32) {
    let size = u64::from(E::SIZE);
    let filter = params.filter + u64::from(channel) * params.filter_channel * size;
    let mut taps = [0.0; MAX_TAPS as usize];
    unroll!(t: u32 in [0 1 2 3 4 5 6 7] {
        if t < params.taps {
            let at = u64::from(t).wrapping_mul(params.filter_tap).wrapping_mul(size);
            // SAFETY: an existing tap.
            taps[t as usize] = E::widen(unsafe { E::load(filter.wrapping_add(at)) });
        }
    });
    let mut bias = 0.0;
    if params.bias != 0 {
        // SAFETY: an existing channel.
        bias = E::widen(unsafe { E::load(params.bias + u64::from(channel) * size) });
    }
    (taps, bias)
}

/// Eight results of `count` taps from three vectors, the first tap of the first result at element
/// `SHIFT`.
#[inline(always)]
pub(in crate::conv1d) fn convolve<E: Element, const SHIFT: usize>(
    count: u32,
    window: [&Raw; 3],
    taps: &[f32; 8],
    bias: f32,
) -> [f32; 8] {
    let mut sums = [bias; 8];
    unroll!(t: usize in [0 1 2 3 4 5 6 7] {
        // Not a product with a zero: that would carry an infinity of a neighbour over.
        if (t as u32) < count {
            unroll!(i: usize in [0 1 2 3 4 5 6 7] {
                let at = SHIFT + t + i;
                let value = widened::<E>(window[at / 8], at % 8);
                sums[i] = ptx::fma_rn_f32(value, taps[t], sums[i]);
            });
        }
    });
    sums
}

/// Stores vector `index` of a row at `row`.
///
/// # Safety
/// The vector exists, is 16-aligned and this thread's own.
#[inline(always)]
pub(in crate::conv1d) unsafe fn store_vector<E: Pack>(row: u64, index: u32, sums: [f32; 8]) {
    let [a, b, c, d, e, f, g, h] = sums;
    let [[a, b], [c, d], [e, f], [g, h]] =
        [E::pack(a, b), E::pack(c, d), E::pack(e, f), E::pack(g, h)];
    let at = row + u64::from(index) * u64::from(RUN * E::SIZE);
    // SAFETY: the caller's contract.
    unsafe {
        if E::SIZE == 4 {
            ptx::st_global_v4_u32(at, [a, b, c, d]);
            ptx::st_global_v4_u32(at + 16, [e, f, g, h]);
        } else {
            ptx::st_global_v4_u32(at, [a, c, e, g]);
        }
    }
}

/// A thread's part of a row: every `1 << log2_row_threads`th vector from `first` on.
///
/// # Safety
/// As [`ncl`]; `input` and `output` are the row's addresses.
#[cfg(kasmina_tier = "portable")]
#[inline(always)]
unsafe fn row<E: Pack>(
    params: &DepthwiseParams,
    [input, output]: [u64; 2],
    channel: u32,
    first: u32,
) {
    let (in_vectors, out_vectors) = (params.in_length / RUN, params.out_length / RUN);
    let ahead = (params.first >> 3) as u32;
    let shift = params.first as u32 & 7;
    // The window ends before the third vector for few taps.
    let needs_third = shift + params.taps > 9;
    let activation = Activation::from_code(params.activation);
    let threads = 1 << params.log2_row_threads;
    // The first vectors of this window and of the next three.
    let mut coming = [[0; 8]; 4];
    unroll!(v: u32 in [0 1 2 3] {
        let vector = (first + v * threads).wrapping_add(ahead);
        // SAFETY: the caller's contract.
        coming[v as usize] = unsafe { load_vector::<E>(input, vector, in_vectors) };
    });
    // After these, so as not to wait for the taps first.
    // SAFETY: the channel exists.
    let (taps, bias) = unsafe { load_taps::<E>(params, channel) };
    let mut vector = first;
    while vector < out_vectors {
        ptx::nounroll();
        let own = coming[0];
        unroll!(v: usize in [0 1 2] {
            coming[v] = coming[v + 1];
        });
        let next = vector.wrapping_add(ahead).wrapping_add(1);
        // SAFETY: the caller's contract.
        let (second, third) = unsafe {
            let later = (vector + 4 * threads).wrapping_add(ahead);
            coming[3] = load_vector::<E>(input, later, in_vectors);
            let second = load_vector::<E>(input, next, in_vectors);
            let after = if needs_third { next.wrapping_add(1) } else { u32::MAX };
            (second, load_vector::<E>(input, after, in_vectors))
        };
        let window = [&own, &second, &third];
        macro_rules! by_shift {
            ($($shift:literal)+) => {
                match shift {
                    $($shift => convolve::<E, $shift>(params.taps, window, &taps, bias),)+
                    _ => convolve::<E, 0>(params.taps, window, &taps, bias),
                }
            };
        }
        let mut sums = by_shift!(1 2 3 4 5 6 7);
        activate(activation, &mut sums);
        // SAFETY: an existing vector of this thread's own.
        unsafe { store_vector::<E>(output, vector, sums) };
        vector += threads;
    }
}

/// The row of a thread.
#[cfg(kasmina_tier = "portable")]
struct OwnRow {
    /// Where it begins in the input and in the output.
    addresses: [u64; 2],
    /// Its channel.
    channel: u32,
    /// The thread's number among those that share it.
    thread: u32,
}

/// The row of this thread, where there is one.
#[cfg(kasmina_tier = "portable")]
#[inline(always)]
fn own_row<E: Element>(params: &DepthwiseParams) -> Option<OwnRow> {
    let log2 = params.log2_row_threads;
    let thread = ptx::thread_index();
    let index =
        u64::from(ptx::block_index()) * u64::from(THREADS >> log2) + u64::from(thread >> log2);
    let batch = index.checked_div(u64::from(params.channels)).unwrap_or(0);
    if batch >= u64::from(params.batch) {
        return None;
    }
    let channel = index - batch * u64::from(params.channels);
    let at = |tensor: &Strided| {
        let element = batch * tensor.batch + channel * tensor.channel;
        tensor.address + element * u64::from(E::SIZE)
    };
    Some(OwnRow {
        addresses: [at(&params.input), at(&params.output)],
        channel: channel as u32,
        thread: thread & ((1 << log2) - 1),
    })
}

/// Rows of a tensor whose positions are contiguous.
///
/// # Safety
/// As the entries': [`serves_ncl`] holds, the tensors are as the strides say, and nothing else
/// writes them while the kernel runs.
#[inline(always)]
#[cfg(kasmina_tier = "portable")]
pub(in crate::conv1d) unsafe fn ncl<E: Pack>(params: &DepthwiseParams) {
    // SAFETY: comments for `cargo xtask ptx`.
    unsafe {
        core::arch::asm!(
            "// kasmina: .maxntid {threads}, 1, 1",
            "// kasmina: .minnctapersm {blocks}",
            threads = const THREADS,
            blocks = const blocks_per_multiprocessor(E::SIZE),
            options(nomem, nostack, preserves_flags),
        );
    }
    let Some(own) = own_row::<E>(params) else { return };
    let OwnRow { addresses, channel, thread } = own;
    // SAFETY: the channel exists; rows as the strides say.
    unsafe { row::<E>(params, addresses, channel, thread) };
}

/// Two neighbouring channels of one position, of which 16-bit types use the first word.
#[cfg(kasmina_tier = "portable")]
type Pair = [u32; 2];

/// Loads a pair; zeros where there is none.
///
/// # Safety
/// The tensor is readable, pairs are aligned, and nothing writes it while the kernel runs.
#[inline(always)]
#[cfg(kasmina_tier = "portable")]
unsafe fn load_pair<E: Element>(base: u64, stride: u64, position: u32, length: u32) -> Pair {
    // As unsigned, a position before the first is beyond the last.
    if position >= length {
        return [0; 2];
    }
    let at = base + u64::from(position) * stride;
    // SAFETY: an existing position.
    unsafe {
        if E::SIZE == 4 { ptx::ld_global_nc_v2_u32(at) } else { [ptx::ld_global_nc_u32(at), 0] }
    }
}

/// A pair as f32.
#[inline(always)]
#[cfg(kasmina_tier = "portable")]
fn widened_pair<E: Element>([a, b]: Pair) -> [f32; 2] {
    if E::SIZE == 4 {
        [E::widen(a), E::widen(b)]
    } else {
        [E::widen(a & 0xFFFF), E::widen(a >> 16)]
    }
}

/// Runs of positions of a tensor whose channels are contiguous.
///
/// # Safety
/// As the entries': [`serves_nlc`] holds, the tensors are as the strides say, and nothing else
/// writes them while the kernel runs.
#[inline(always)]
#[cfg(kasmina_tier = "portable")]
pub(in crate::conv1d) unsafe fn nlc<E: Pack>(params: &DepthwiseParams) {
    // SAFETY: comments for `cargo xtask ptx`.
    unsafe {
        core::arch::asm!(
            "// kasmina: .maxntid {threads}, 1, 1",
            "// kasmina: .minnctapersm {blocks}",
            threads = const THREADS,
            blocks = const 2,
            options(nomem, nostack, preserves_flags),
        );
    }
    let (warp, lane) = (ptx::thread_index() / 32, ptx::thread_index() % 32);
    let channel_tiles = (params.channels / 2).div_ceil(32);
    let runs = params.out_length.div_ceil(POSITIONS);
    // Warps of a block follow each other along the positions, whose halos they share.
    let index = ptx::block_index() * (THREADS / 32) + warp;
    let tile = div(index, runs);
    let run = index - tile * runs;
    let batch = div(tile, channel_tiles);
    let channel = ((tile - batch * channel_tiles) * 32 + lane) * 2;
    if batch >= params.batch || channel >= params.channels {
        return;
    }
    let size = u64::from(E::SIZE);
    let (from, to) = (&params.input, &params.output);
    let input = from.address + (u64::from(batch) * from.batch + u64::from(channel)) * size;
    let output = to.address + (u64::from(batch) * to.batch + u64::from(channel)) * size;
    let (in_stride, out_stride) = (from.position * size, to.position * size);
    // SAFETY: both channels exist, as their number is even.
    let ([taps_a, taps_b], [bias_a, bias_b]) = unsafe {
        let (a, bias_a) = load_taps::<E>(params, channel);
        let (b, bias_b) = load_taps::<E>(params, channel + 1);
        ([a, b], [bias_a, bias_b])
    };
    let activation = Activation::from_code(params.activation);
    let start = run * POSITIONS;
    let left = params.out_length - start;
    let end = start + if left < POSITIONS { left } else { POSITIONS };
    let mut window = [[0.0; 2]; 16];
    let mut at = (start as i32).wrapping_add(params.first) as u32;
    unroll!(i: u32 in [0 1 2 3 4 5 6 7] {
        // SAFETY: the caller's contract.
        let pair = unsafe {
            load_pair::<E>(input, in_stride, at.wrapping_add(i), params.in_length)
        };
        window[8 + i as usize] = widened_pair::<E>(pair);
    });
    let mut ahead = [[0; 2]; 8];
    macro_rules! fetch {
        () => {
            unroll!(i: u32 in [0 1 2 3 4 5 6 7] {
                // SAFETY: the caller's contract.
                ahead[i as usize] = unsafe {
                    load_pair::<E>(input, in_stride, at.wrapping_add(i), params.in_length)
                };
            });
        };
    }
    at = at.wrapping_add(8);
    fetch!();
    let mut position = start;
    while position < end {
        ptx::nounroll();
        unroll!(i: usize in [0 1 2 3 4 5 6 7] {
            window[i] = window[i + 8];
            window[i + 8] = widened_pair::<E>(ahead[i]);
        });
        at = at.wrapping_add(8);
        fetch!();
        // One channel after the other, which takes fewer registers than both at once.
        macro_rules! channel {
            ($channel:literal, $taps:ident, $bias:ident) => {{
                let mut sums = [$bias; 8];
                unroll!(t: usize in [0 1 2 3 4 5 6 7] {
                    // Not a product with a zero: that would carry an infinity of a neighbour over.
                    if (t as u32) < params.taps {
                        unroll!(i: usize in [0 1 2 3 4 5 6 7] {
                            let value = window[i + t][$channel];
                            sums[i] = ptx::fma_rn_f32(value, $taps[t], sums[i]);
                        });
                    }
                });
                activate(activation, &mut sums);
                sums
            }};
        }
        let (a, b) = (channel!(0, taps_a, bias_a), channel!(1, taps_b, bias_b));
        unroll!(i: u32 in [0 1 2 3 4 5 6 7] {
            if position + i < end {
                let to = output + u64::from(position + i) * out_stride;
                let [first, second] = E::pack(a[i as usize], b[i as usize]);
                // SAFETY: an existing position, aligned pairs, of this thread's own.
                unsafe {
                    if E::SIZE == 4 {
                        ptx::st_global_v2_u32(to, [first, second]);
                    } else {
                        ptx::st_global_u32(to, first);
                    }
                }
            }
        });
        position += 8;
    }
}
