//! Device side of the reductions, for every element type and statistic.

use super::moments::{centred, max_nan, min_nan};
use super::{
    Accumulator, BLOCKS_PER_MULTIPROCESSOR, Batch, Moments, Partial, ReduceParams, THREADS,
    VECTORS, WARP_BYTES, WARPS, share,
};
use crate::ptx;

mod element;
mod naive;
mod node;

pub(super) use element::{BF16, Element, F16, F32, Max, Min, Statistic, Sum, Summary};
pub(super) use naive::naive;
use node::*;

/// Repeats a block with a name bound to each literal. A loop would be unrolled too late (or not
/// at all) for the arrays it indexes to become registers.
macro_rules! unroll {
    ($index:ident: $type:ident in [$($literal:literal)+] $body:block) => {
        $({
            let $index: $type = $literal;
            $body
        })+
    };
}

/// Elements of a block between a thread's vectors, and in a batch.
const fn row<E: Element>() -> u32 {
    THREADS * E::WIDTH
}
const fn batch<E: Element>() -> u32 {
    VECTORS * row::<E>()
}

/// A thread's elements of one batch.
type Vectors = [[u32; 4]; VECTORS as usize];

/// Address of vector `index` if that of vector 0 is `address`.
#[inline(always)]
fn address_of(address: u64, index: u32) -> u64 {
    address + u64::from(index * THREADS * 16)
}

/// Loads a thread's vectors of a full batch, the first of which is at `address`.
///
/// # Safety
/// The batch is full and readable, and nothing writes it while the kernel runs; `address` is a
/// multiple of 16.
#[inline(always)]
unsafe fn load_full(address: u64) -> Vectors {
    // SAFETY: the caller's contract.
    unsafe {
        [
            ptx::ld_global_v4_u32(address),
            ptx::ld_global_v4_u32(address_of(address, 1)),
            ptx::ld_global_v4_u32(address_of(address, 2)),
            ptx::ld_global_v4_u32(address_of(address, 3)),
        ]
    }
}

/// Elements that exist from the start of a thread's vector 0 on, where `left` exist from the start
/// of the batch on; none of the thread's do if it is not positive.
#[inline(always)]
fn left_of_thread<E: Element>(left: u32) -> i32 {
    // Beyond a batch it makes no difference, and this cannot overflow.
    let left = if left < batch::<E>() { left } else { batch::<E>() };
    left as i32 - (ptx::opaque_u32(ptx::thread_index()) * E::WIDTH) as i32
}

/// Loads those of a thread's elements that exist.
///
/// # Safety
/// As [`load_vector`], for the `left` elements of the batch.
#[inline(always)]
unsafe fn load_some<E: Element>(address: u64, left: u32, aligned: bool) -> Vectors {
    let left = left_of_thread::<E>(left);
    // SAFETY: the caller's contract.
    let load = |v: u32| unsafe {
        load_vector::<E>(address_of(address, v), left - (v * row::<E>()) as i32, aligned)
    };
    [load(0), load(1), load(2), load(3)]
}

/// Loads the first `left` elements of a vector, all at once only if `aligned`. The others are zero.
///
/// # Safety
/// They are readable, and nothing writes them while the kernel runs; `address` is a multiple of 16
/// if `aligned`.
#[inline(always)]
unsafe fn load_vector<E: Element>(address: u64, left: i32, aligned: bool) -> [u32; 4] {
    let mut vector = [0; 4];
    if aligned && left >= E::WIDTH as i32 {
        // SAFETY: the vector exists.
        vector = unsafe { ptx::ld_global_v4_u32(address) };
    } else {
        unroll!(i: u32 in [0 1 2 3 4 5 6 7] {
            if i < E::WIDTH && (i as i32) < left {
                let byte = i << E::LOG2_SIZE;
                // SAFETY: the element exists.
                let bits = unsafe { E::load(address + u64::from(byte)) };
                vector[(byte / 4 % 4) as usize] |= bits << (byte % 4 * 8);
            }
        });
    }
    vector
}

/// What is subtracted from a thread's elements of a chunk: the mean of its first batch, or where
/// that is cut short its first element.
#[inline(always)]
fn pivot<E: Element>(vectors: &Vectors, full: bool) -> f32 {
    let mut sums = [0.0; 4];
    unroll!(v: usize in [0 1 2 3] {
        // Opaque, so that widened elements do not stay in registers until they are used again.
        let vector = vectors[v].map(ptx::opaque_u32);
        sums = sum_of_lanes(sums, E::four(vector, false));
        if E::WIDTH == 8 {
            sums = sum_of_lanes(sums, E::four(vector, true));
        }
    });
    let [a, b, c, d] = sums;
    let mean = ((a + b) + (c + d)) * (1.0 / (VECTORS * E::WIDTH) as f32);
    let [first, ..] = E::four(vectors[0], false);
    Accumulator::pivot(if full { mean } else { first })
}

#[inline(always)]
fn sum_of_lanes(a: [f32; 4], b: [f32; 4]) -> [f32; 4] {
    [a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3]]
}

/// Adds four elements, of which the first `valid` exist.
#[inline(always)]
fn add_four<S: Statistic>(sums: &mut Batch, four: [f32; 4], valid: i32, pivot: f32, epsilon: f32) {
    if S::SQUARES {
        sums.add_first(four, valid, pivot, epsilon);
    } else if S::SUM {
        // Those that do not exist are zero.
        sums.distances = sum_of_lanes(sums.distances, four);
    } else {
        unroll!(i: usize in [0 1 2 3] {
            if S::MIN && (i as i32) < valid {
                sums.min = min_nan(sums.min, four[i]);
            }
            if S::MAX && (i as i32) < valid {
                sums.max = max_nan(sums.max, four[i]);
            }
        });
    }
}

/// Adds the elements of a vector, of which the first `valid` exist.
#[inline(always)]
fn add_vector<E: Element, S: Statistic>(
    sums: &mut Batch,
    vector: [u32; 4],
    valid: i32,
    pivot: f32,
    epsilon: f32,
) {
    add_four::<S>(sums, E::four(vector, false), valid, pivot, epsilon);
    if E::WIDTH == 8 {
        add_four::<S>(sums, E::four(vector, true), valid - 4, pivot, epsilon);
    }
}

/// Adds a batch's sums, or if they left the range of f32 its elements one by one in f64, read
/// again.
///
/// # Safety
/// As [`load_some`].
#[inline(always)]
unsafe fn add_batch<E: Element, S: Statistic>(
    accumulator: &mut Accumulator,
    sums: &Batch,
    address: u64,
    left: u32,
) {
    let taken = if S::SQUARES {
        accumulator.take(sums)
    } else if S::SUM {
        accumulator.take_distances(sums)
    } else {
        accumulator.min = min_nan(accumulator.min, sums.min);
        accumulator.max = max_nan(accumulator.max, sums.max);
        true
    };
    if taken {
        return;
    }
    let left = left_of_thread::<E>(left);
    let mut i = 0;
    while i < VECTORS * E::WIDTH {
        // Seldom run; unrolled it would take registers that the elements need.
        ptx::nounroll();
        let (vector, element) = (i / E::WIDTH, i % E::WIDTH);
        if ((vector * row::<E>() + element) as i32) < left {
            let address = address_of(address, vector) + u64::from(element << E::LOG2_SIZE);
            // SAFETY: the element exists.
            accumulator.add_exactly(E::widen(unsafe { E::load(address) }));
        }
        i += 1;
    }
}

/// Summary of a chunk from those of the block's threads, in warp 0.
///
/// # Safety
/// The whole block executes it; `records` is shared memory for one record per warp, which nobody
/// accesses from the barrier before to the barrier after.
#[inline(always)]
unsafe fn partial<E: Element, S: Statistic>(
    accumulator: &Accumulator,
    len: u32,
    records: u32,
) -> Partial {
    let thread = ptx::thread_index();
    let (warp, lane) = (thread / 32, thread % 32);
    let mut node = Node {
        sum: 0.0,
        distances: accumulator.distances,
        squares: accumulator.squares,
        non_finite: u64::from(accumulator.non_finite),
        dead: u64::from(accumulator.dead),
        min: accumulator.min,
        max: accumulator.max,
    };
    let mut pivot = accumulator.pivot;
    // SAFETY: whole warps; each warp has a place of its own, and the barrier is between.
    unsafe {
        if S::SQUARES {
            (node, pivot) = rebased(node, pivot, share(len, E::WIDTH, THREADS, thread));
        }
        node = node.over_lanes::<S, false>();
        if lane == 0 {
            node.sum = f64::from(pivot);
            node.put(records + warp * WARP_BYTES);
        }
        ptx::bar_sync::<0, THREADS>();
        if warp != 0 {
            return Partial::EMPTY;
        }
        let warp = lane % WARPS;
        node = Node::get(records + warp * WARP_BYTES);
        if S::SQUARES {
            pivot = node.sum as f32;
            (node, pivot) = rebased(node, pivot, share(len, E::WIDTH * 32, WARPS, warp));
        }
        node = node.over_warps::<S, false>();
    }
    let count = f64::from(len);
    let (mut sum, mut m2) = (node.distances, 0.0);
    if S::SQUARES {
        sum += count * f64::from(pivot);
        m2 = centred(node.squares, node.distances, count);
    }
    let mut partial = Partial { sum, m2, ..Partial::EMPTY };
    if S::MIN {
        partial.min = node.min;
    }
    if S::MAX {
        partial.max = node.max;
    }
    if S::COUNTS {
        (partial.non_finite, partial.dead) = (node.non_finite as u32, node.dead as u32);
    }
    partial
}

/// Whether this block is the last of the grid to come here; then it sees what the others wrote
/// before, and the ticket is 0 again.
///
/// # Safety
/// The whole block executes it once; `ticket` is a u32 in global memory that is 0 before the grid
/// and nothing else uses; `flag` is 4 bytes of shared memory that nothing else uses.
#[inline(always)]
unsafe fn is_last(ticket: u64, flag: u32) -> bool {
    // SAFETY: the caller's contract; a barrier is between write and read. The last block resets
    // the ticket after every other has taken its own.
    unsafe {
        if ptx::thread_index() == 0 {
            let last = ptx::grid_size() - 1;
            let is_last = ptx::atom_add_acq_rel_gpu_u32(ticket, 1) == last;
            if is_last {
                ptx::st_global_u32(ticket, 0);
            }
            ptx::st_shared_u32(flag, u32::from(is_last));
        }
        ptx::bar_sync::<0, THREADS>();
        ptx::ld_shared_u32(flag) != 0
    }
}

/// Writes the chunk's summary to its slot.
///
/// # Safety
/// One thread of the grid calls it for this chunk; `partials` has a slot for it.
#[inline(always)]
unsafe fn store_partial(partials: u64, chunk: u32, partial: &Partial) {
    let address = partials + u64::from(chunk) * size_of::<Partial>() as u64;
    let (sum, m2) = (partial.sum.to_bits(), partial.m2.to_bits());
    let first = [sum as u32, (sum >> 32) as u32, m2 as u32, (m2 >> 32) as u32];
    let second = [partial.min.to_bits(), partial.max.to_bits(), partial.non_finite, partial.dead];
    // SAFETY: the caller's contract; slots are multiples of 16 bytes.
    unsafe {
        ptx::st_global_v4_u32(address, first);
        ptx::st_global_v4_u32(address + 16, second);
    }
}

/// # Safety
/// The slot is written, and the writer's release has been acquired.
#[inline(always)]
unsafe fn load_partial(partials: u64, chunk: u32) -> Partial {
    let address = partials + u64::from(chunk) * size_of::<Partial>() as u64;
    // SAFETY: the caller's contract; slots are multiples of 16 bytes.
    let ([a, b, c, d], [min, max, non_finite, dead]) =
        unsafe { (ptx::ld_relaxed_gpu_v4_u32(address), ptx::ld_relaxed_gpu_v4_u32(address + 16)) };
    Partial {
        sum: f64::from_bits(joined(a, b)),
        m2: f64::from_bits(joined(c, d)),
        min: f32::from_bits(min),
        max: f32::from_bits(max),
        non_finite,
        dead,
    }
}

/// The result from all slots, in warp 0.
///
/// # Safety
/// The whole block executes it, sees all slots written and has left `records`, shared memory for
/// one record per warp.
#[inline(always)]
unsafe fn merged<S: Statistic>(params: &ReduceParams, records: u32) -> Moments {
    let chunks = params.chunks;
    let thread = ptx::thread_index();
    let (warp, lane) = (thread / 32, thread % 32);
    let full = f64::from(1u32 << chunks.log2_chunk);
    // The reciprocal of a power of two.
    let per_full = f64::from_bits(u64::from(1023 - chunks.log2_chunk) << 52);
    let mut node = Node::EMPTY;
    // SAFETY: slots up to `count` are written; whole warps; each warp has a place of its own, and
    // the barrier is between.
    unsafe {
        // Distances are relative to the mean of the first chunk, which is full.
        let pivot = if S::SQUARES { load_partial(params.partials, 0).sum * per_full } else { 0.0 };
        let mut chunk = thread;
        while chunk < chunks.count {
            let partial = load_partial(params.partials, chunk);
            node.sum += partial.sum;
            if S::SQUARES {
                let (count, mean) = if chunk + 1 < chunks.count {
                    (full, partial.sum * per_full)
                } else {
                    let count = f64::from(chunks.range(chunk).1);
                    (count, partial.sum / count)
                };
                let distance = mean - pivot;
                node.distances += count * distance;
                node.squares += partial.m2 + count * distance * distance;
            }
            node.min = min_nan(node.min, partial.min);
            node.max = max_nan(node.max, partial.max);
            node.non_finite += u64::from(partial.non_finite);
            node.dead += u64::from(partial.dead);
            chunk += THREADS;
        }
        node = node.over_lanes::<S, true>();
        if lane == 0 {
            node.put(records + warp * WARP_BYTES);
        }
        ptx::bar_sync::<0, THREADS>();
        if warp != 0 {
            return Moments::EMPTY;
        }
        node = Node::get(records + lane % WARPS * WARP_BYTES).over_warps::<S, true>();
    }
    let count = chunks.len as f64;
    Moments {
        count: chunks.len,
        sum: node.sum,
        mean: node.sum / count,
        m2: if S::SQUARES { centred(node.squares, node.distances, count) } else { 0.0 },
        non_finite: node.non_finite,
        dead: node.dead,
        min: node.min,
        max: node.max,
    }
}

/// Writes the result.
///
/// # Safety
/// One thread of the grid calls it; `address` is that of a writable [`Moments`].
#[inline(always)]
unsafe fn store_result(address: u64, moments: &Moments) {
    // SAFETY: one thread writes 56 bytes, 8-aligned, in the order of the fields.
    unsafe {
        let mut at = address;
        for value in [
            moments.count,
            moments.sum.to_bits(),
            moments.mean.to_bits(),
            moments.m2.to_bits(),
            moments.non_finite,
            moments.dead,
            joined(moments.min.to_bits(), moments.max.to_bits()),
        ] {
            ptx::st_global_v2_u32(at, [value as u32, (value >> 32) as u32]);
            at += 8;
        }
    }
}

/// What ptxas and the scheduler are told first.
#[inline(always)]
fn start() {
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
    #[cfg(kasmina_tier = "hopper")]
    {
        ptx::griddepcontrol_launch_dependents();
        ptx::griddepcontrol_wait();
    }
}

/// Where a thread's vector 0 of the chunk's first batch is, and how many elements the chunk has: 0
/// if there is no such chunk.
#[inline(always)]
fn first_batch<E: Element>(params: &ReduceParams, chunk: u32) -> (u64, u32) {
    if chunk >= params.chunks.count {
        return (0, 0);
    }
    let (first, len) = params.chunks.range(chunk);
    let element = first + u64::from(ptx::thread_index() * E::WIDTH);
    (params.data + (element << E::LOG2_SIZE), len)
}

/// The statistics of all elements.
///
/// # Safety
/// The elements are readable, partials, ticket and result writable, and nothing else writes any of
/// them while the kernel runs; the ticket is 0; there is at least one chunk.
#[inline(always)]
pub(super) unsafe fn reduce<E: Element, S: Statistic>(params: &ReduceParams) {
    start();
    let chunks = params.chunks;
    let smem = ptx::dynamic_smem();
    let flag = smem + 2 * WARPS * WARP_BYTES;
    // Two sets in turn, so that one barrier per chunk is enough: warp 0 has read a set before it
    // comes to the barrier after which the others write to it again.
    let mut records = smem;
    let aligned = params.data % 16 == 0;
    // Whether a batch of which so many elements are left is loaded ahead.
    let ahead = |left: u32| aligned && left >= batch::<E>();

    let mut chunk = ptx::block_index();
    let (mut address, mut left) = first_batch::<E>(params, chunk);
    let mut vectors = [[0; 4]; VECTORS as usize];
    if ahead(left) {
        // SAFETY: a full batch of aligned elements.
        vectors = unsafe { load_full(address) };
    }
    while chunk < chunks.count {
        let len = left;
        let next_chunk = chunk.saturating_add(ptx::grid_size());
        let mut first = 0.0;
        if S::SQUARES {
            first = if ahead(left) {
                pivot::<E>(&vectors, true)
            } else {
                // SAFETY: as many elements are left, readable by the caller's contract.
                let vectors = unsafe { load_some::<E>(address, left, aligned) };
                pivot::<E>(&vectors, left >= batch::<E>())
            };
        }
        let mut accumulator = Accumulator::new(first);
        loop {
            let more = left > batch::<E>();
            let (next_address, next_left) = if more {
                (address + u64::from(batch::<E>() << E::LOG2_SIZE), left - batch::<E>())
            } else {
                first_batch::<E>(params, next_chunk)
            };
            let mut sums = Batch::EMPTY;
            // SAFETY: elements that are left are readable by the caller's contract, and only full
            // batches of aligned ones are loaded ahead.
            unsafe {
                if ahead(left) {
                    let next_too = ahead(next_left);
                    unroll!(v: u32 in [0 1 2 3] {
                        let vector = vectors[v as usize];
                        add_vector::<E, S>(&mut sums, vector, 8, first, params.epsilon);
                        if next_too {
                            let next = address_of(next_address, v);
                            vectors[v as usize] = ptx::ld_global_v4_u32(next);
                        }
                    });
                } else {
                    // With a pivot the first batch is in the L1 cache already, and a loop that is
                    // not unrolled leaves registers to the other branch.
                    let valid = left_of_thread::<E>(left);
                    let mut v = 0;
                    while v < VECTORS {
                        if S::SQUARES {
                            ptx::nounroll();
                        }
                        let (at, valid) = (address_of(address, v), valid - (v * row::<E>()) as i32);
                        let vector = load_vector::<E>(at, valid, aligned);
                        add_vector::<E, S>(&mut sums, vector, valid, first, params.epsilon);
                        v += 1;
                    }
                    vectors = [[0; 4]; VECTORS as usize];
                    if ahead(next_left) {
                        vectors = load_full(next_address);
                    }
                }
                add_batch::<E, S>(&mut accumulator, &sums, address, left);
            }
            (address, left) = (next_address, next_left);
            if !more {
                break;
            }
        }
        // SAFETY: the whole block, as chunks are the block's; the set is free as said above. One
        // thread writes the chunk's slot, or the result if it is the only chunk.
        unsafe {
            let partial = partial::<E, S>(&accumulator, len, records);
            if ptx::thread_index() == 0 {
                if chunks.count == 1 {
                    store_result(params.result, &partial.moments(chunks.len));
                } else {
                    store_partial(params.partials, chunk, &partial);
                }
            }
        }
        records = smem + (records - smem ^ WARPS * WARP_BYTES);
        chunk = next_chunk;
    }
    if chunks.count == 1 {
        return;
    }
    // SAFETY: the thread that wrote the slots is the one that takes the ticket. The set in turn
    // was read before the last barrier but one.
    unsafe {
        if is_last(params.ticket, flag) {
            let moments = merged::<S>(params, records);
            if ptx::thread_index() == 0 {
                store_result(params.result, &moments);
            }
        }
    }
}
