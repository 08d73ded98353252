//! Device side of the reductions, for every element type and statistic.

use super::moments::{centred, max_nan, min_nan};
use super::{
    Accumulator, BLOCKS_PER_MULTIPROCESSOR, Batch, Counts, Moments, Partial, ReduceParams, Rule,
    SET_BYTES, THREADS, VECTORS, WARP_BYTES, WARPS, share,
};
use crate::ptx;
use crate::unroll::unroll;

mod bands;
#[cfg(kasmina_tier = "hopper")]
mod blocks;
mod chunk;
#[cfg(kasmina_tier = "hopper")]
mod cluster;
mod columns;
mod element;
#[cfg(kasmina_tier = "hopper")]
mod gram;
mod load;
mod naive;
mod node;
#[cfg(kasmina_tier = "hopper")]
mod rows;
mod segments;
mod slots;

pub(super) use bands::bands;
#[cfg(kasmina_tier = "hopper")]
pub(crate) use blocks::{Source, summary_of_blocks};
use chunk::At;
#[cfg(kasmina_tier = "hopper")]
pub(super) use cluster::few;
pub(super) use columns::columns;
pub(crate) use element::{BF16, Element, F16};
pub(super) use element::{F32, Max, Min, Pairs, Statistic, Sum, Summary};
#[cfg(kasmina_tier = "hopper")]
pub(crate) use gram::Gram;
use load::*;
pub(super) use naive::naive;
use node::{Node, Total};
#[cfg(kasmina_tier = "hopper")]
pub(super) use rows::rows;
use segments::merge_slots;
pub(super) use segments::segments;
#[cfg(kasmina_tier = "hopper")]
pub(crate) use slots::put;
#[cfg(not(kasmina_tier = "hopper"))]
use slots::put;
use slots::{Usual, clear, get, mean, quotient, store_result};

/// What ptxas is told first.
#[inline(always)]
fn geometry<const THREADS: u32, const BLOCKS: u32>() {
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
}

/// Lets the next grid start, and waits for what this one overlaps with. Nothing may be read or
/// written before.
#[inline(always)]
fn wait_for_predecessors() {
    #[cfg(kasmina_tier = "hopper")]
    ptx::griddepcontrol_wait();
}

#[inline(always)]
fn start<const THREADS: u32, const BLOCKS: u32>() {
    geometry::<THREADS, BLOCKS>();
    #[cfg(kasmina_tier = "hopper")]
    ptx::griddepcontrol_launch_dependents();
}

/// Whether this is the block's first thread. Opaque, because the compiler knows nothing of
/// exchanges between lanes: from two conditions of which one implies the other it would make two
/// copies of what is between, and lanes in different copies of an exchange wait for ever.
#[inline(always)]
fn is_first_thread() -> bool {
    ptx::opaque_u32(ptx::thread_index()) == 0
}

/// Number of the thread in a block of [`THREADS`], which the compiler then knows it to be below.
#[inline(always)]
fn thread_of_block() -> u32 {
    ptx::thread_index() % THREADS
}

/// Warp and lane, opaque for the same reason as above.
#[inline(always)]
fn warp_and_lane() -> (u32, u32) {
    let thread = ptx::thread_index();
    (ptx::opaque_u32(thread / 32), ptx::opaque_u32(thread % 32))
}

/// Has `len` elements brought into the L2 cache while the grid before still runs, of which at most
/// so many bytes. One thread is enough.
///
/// # Safety
/// They exist and are readable.
#[cfg(kasmina_tier = "hopper")]
#[inline(always)]
unsafe fn prefetch_bytes<E: Element>(address: u64, len: u32, most: u64) {
    let bytes = u64::from(len) << E::LOG2_SIZE;
    let bytes = if bytes < most { bytes } else { most };
    // Whole pieces of 16 bytes from the first that begins in the chunk.
    let aligned = (address + 15) & !15;
    let skipped = aligned - address;
    if bytes >= skipped + 16 {
        // SAFETY: inside the chunk.
        unsafe { ptx::cp_async_bulk_prefetch_l2(aligned, (bytes - skipped) as u32 & !15) };
    }
}

/// Summary of a chunk of `len` elements from those of the block's threads, in warp 0.
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
    let (warp, lane) = warp_and_lane();
    let mut node = Node::of(accumulator);
    // SAFETY: whole warps; each warp has a place of its own, and the barrier is between.
    unsafe {
        if S::SQUARES {
            let count = share(len, E::WIDTH, THREADS, thread) - node.skipped;
            node = node.rebased_to_first_lane(count);
        }
        node = node.over::<S, 32>();
        if lane == 0 {
            node.put(records + warp * WARP_BYTES);
        }
        ptx::bar_sync::<0, THREADS>();
        if warp != 0 {
            return Partial::EMPTY;
        }
        let warp = lane % WARPS;
        node = Node::get(records + warp * WARP_BYTES);
        if S::SQUARES {
            let count = share(len, E::WIDTH * 32, WARPS, warp) - node.skipped;
            node = node.rebased_to_first_lane(count);
        }
        node = node.over::<S, 8>();
    }
    partial_of::<S>(&node, len)
}

/// Summary of `len` elements, with those that were skipped, from their sums.
#[inline(always)]
fn partial_of<S: Statistic>(node: &Node, len: u32) -> Partial {
    let (mut sum, mut m2) = (node.distances, 0.0);
    if S::SQUARES {
        let count = len - node.skipped;
        if count > 0 {
            sum += f64::from(count) * f64::from(node.pivot);
            let distance = quotient(node.distances, u64::from(count));
            m2 = centred(node.squares, node.distances, distance);
        }
    }
    let mut partial = Partial { sum, m2, ..Partial::EMPTY };
    if S::MIN {
        partial.min = node.min;
    }
    if S::MAX {
        partial.max = node.max;
    }
    partial.counts =
        Counts::new(node.non_finite, node.skipped, if S::COUNTS { node.dead } else { 0 });
    partial
}

/// The result from the first `count` slots, in warp 0. Waits until they are written, and makes
/// them unwritten.
///
/// # Safety
/// The whole block executes it and has left `records`, shared memory for one record per warp; all
/// other blocks that write slots are running or have done so, and nobody else reads any.
#[inline(always)]
unsafe fn merged<S: Statistic>(params: &ReduceParams, count: u32, records: u32) -> Moments {
    let (chunks, partials) = (params.chunks, params.partials);
    let thread = ptx::thread_index();
    let (warp, lane) = warp_and_lane();
    let mut total = Total::EMPTY;
    let (first_len, usual) = (chunks.range(0).1, Usual::new(chunks.small_len));
    let mut pivot = 0.0;
    let mut has_pivot = !S::SQUARES;
    let mut chunk = thread;
    // SAFETY: the slots are the caller's; slot 0, which everybody reads, is cleared behind the
    // barrier; whole warps; each warp has a place of its own, and the barrier is
    // between.
    unsafe {
        while chunk < count {
            ptx::nounroll();
            // Several under way at once; what comes behind one that is not yet written is read
            // again.
            let slot = |chunk: u32| if chunk < count { get(partials, chunk) } else { None };
            let first = if has_pivot { None } else { slot(0) };
            let own = [slot(chunk), slot(chunk + THREADS)];
            if let Some(first) = first {
                pivot = mean(&first, first_len);
                has_pivot = true;
            }
            unroll!(i: usize in [0 1] {
                if let (true, Some(own)) = (has_pivot && (i == 0 || own[0].is_some()), own[i]) {
                    if chunk != 0 {
                        clear(partials, chunk);
                    }
                    total.add::<S>(&own, chunks.range(chunk).1, pivot, usual);
                    chunk += THREADS;
                }
            });
        }
        total = total.over::<S, 32>();
        if lane == 0 {
            total.put(records + warp * WARP_BYTES);
        }
        ptx::bar_sync::<0, THREADS>();
        if warp != 0 {
            return Moments::EMPTY;
        }
        if lane == 0 && count > 0 {
            clear(partials, 0);
        }
        total = Total::get(records + lane % WARPS * WARP_BYTES).over::<S, 8>();
    }
    total.moments::<S>(chunks.len)
}

/// Where a thread's vector 0 of the chunk's first batch is, and how many elements the chunk has: 0
/// if there is no such chunk.
#[inline(always)]
fn first_batch<E: Element>(params: &ReduceParams, chunk: u32) -> (u64, u32) {
    if chunk >= params.chunks.count {
        return (0, 0);
    }
    let (first, len) = params.chunks.range(chunk);
    let element = first + u64::from(thread_of_block() * E::WIDTH);
    (params.data + (element << E::LOG2_SIZE), len)
}

/// The next chunk that is nobody's.
///
/// # Safety
/// The counter is the grid's.
#[inline(always)]
unsafe fn draw(params: &ReduceParams, workers: u32) -> u32 {
    // SAFETY: the caller's contract.
    let drawn = unsafe { ptx::atom_add_relaxed_gpu_u32(params.counters + 4, 1) };
    drawn.saturating_add(workers)
}

/// The statistics of all elements.
///
/// # Safety
/// The elements are readable, slots, counters and result writable, and nothing else writes any of
/// them while the kernel runs; the slots are unwritten and the counters 0; there is at least one
/// chunk, and at most one block more than chunks.
#[inline(always)]
pub(super) unsafe fn reduce<E: Element, S: Statistic>(params: &ReduceParams) {
    start::<THREADS, BLOCKS_PER_MULTIPROCESSOR>();
    let blocks = ptx::grid_size();
    // The last of several blocks has no chunk. It mostly starts last, and merges what the others
    // find. What it runs for that, the multiprocessor has not run lately; so it goes through it
    // once while nothing is there to merge, and waits for the instructions before anybody waits
    // for it.
    let workers = if blocks > 1 { blocks - 1 } else { 1 };
    // Opaque, so that there is one copy of the instructions.
    let mut rehearsal = ptx::opaque_u32(u32::from(ptx::block_index() >= workers)) != 0;
    let smem = ptx::dynamic_smem();
    let mut records = smem;
    if ptx::block_index() < workers {
        // SAFETY: the caller's contract.
        match unsafe { work::<E, S>(params, workers) } {
            Some(set) => records = set,
            None => return,
        }
    }
    loop {
        ptx::nounroll();
        let count = if rehearsal { 0 } else { params.chunks.count };
        // SAFETY: but for the rehearsal, every block has drawn its ticket before this one drew the
        // last. The two sets take turns, with a barrier between. A block draws its chunks before
        // it writes the slot of the last, so the counters are nobody's once all slots are written.
        unsafe {
            let moments = merged::<S>(params, count, records);
            if !rehearsal {
                if is_first_thread() {
                    ptx::st_global_u32(params.counters, 0);
                    ptx::st_global_u32(params.counters + 4, 0);
                    store_result(params.result, &moments);
                }
                return;
            }
            rehearsal = ptx::opaque_u32(0) != 0;
            wait_for_predecessors();
            let ticket = smem + 2 * SET_BYTES;
            if is_first_thread() {
                let started = ptx::atom_add_relaxed_gpu_u32(params.counters, 1);
                ptx::st_shared_u32(ticket, started);
            }
            ptx::bar_sync::<0, THREADS>();
            if ptx::ld_shared_u32(ticket) != blocks - 1 {
                return;
            }
            records = smem + (records - smem ^ SET_BYTES);
        }
    }
}

/// What a block with chunks does. If it started last of all blocks and has to merge, it gives the
/// set of records that it may use next.
///
/// # Safety
/// As [`reduce`]; the block's number is below that of the `workers`.
#[inline(always)]
unsafe fn work<E: Element, S: Statistic>(params: &ReduceParams, workers: u32) -> Option<u32> {
    wait_for_predecessors();
    let (chunks, rule) = (params.chunks, params.rule());
    let smem = ptx::dynamic_smem();
    // Two sets in turn, so that one barrier per chunk is enough: warp 0 has read a set before it
    // comes to the barrier after which the others write to it again.
    let mut records = smem;
    let aligned = params.data % 16 == 0;
    let blocks = ptx::grid_size();
    let several = chunks.count > 1;

    let mut chunk = ptx::block_index();
    // SAFETY: the chunk's elements are readable by the caller's contract.
    let mut at = unsafe { At::<E>::begin(first_batch::<E>(params, chunk), aligned) };
    let mut next_chunk = u32::MAX;
    // SAFETY: the counters are the grid's; nobody else writes these places, and a barrier is
    // before they are read.
    unsafe {
        let draws = smem + 2 * SET_BYTES;
        if several && is_first_thread() {
            let started = ptx::atom_add_relaxed_gpu_u32(params.counters, 1);
            ptx::st_shared_u32(draws, started);
            if workers < chunks.count {
                // The block that merges draws nothing, unless there is no other.
                let draws_too = started != blocks - 1 || workers == 1;
                let drawn = if draws_too { draw(params, workers) } else { u32::MAX };
                ptx::st_shared_u32(draws + 4, drawn);
            }
        }
        if several && workers < chunks.count {
            ptx::bar_sync::<0, THREADS>();
            next_chunk = ptx::ld_shared_u32(draws + 4);
        }
    }
    let mut measure = Measure::new::<E, S>(rule);
    let last_started;
    loop {
        let len = at.left;
        if S::SQUARES {
            measure.pivot = at.pivot();
        }
        let mut accumulator = Accumulator::new(number_or_zero(measure.pivot));
        let mut drawn = u32::MAX;
        if is_first_thread() && next_chunk < chunks.count {
            // SAFETY: the counter is the grid's. Looked at when the chunk is done.
            drawn = unsafe { draw(params, workers) };
        }
        // SAFETY: the chunks' elements are readable by the caller's contract.
        unsafe {
            at.add_chunk::<S>(&mut accumulator, measure, rule, || {
                first_batch::<E>(params, next_chunk)
            });
        }
        // SAFETY: the whole block, as chunks are the block's; the set is free as said above. One
        // thread writes the chunk's slot, or the result if it is the only chunk.
        unsafe {
            let flags = records + WARPS * WARP_BYTES;
            if is_first_thread() {
                ptx::st_shared_u32(flags, drawn);
            }
            let partial = partial::<E, S>(&accumulator, len, records);
            if !several {
                if is_first_thread() {
                    store_result(params.result, &alone::<S>(&partial, chunks.len));
                }
                return None;
            }
            if is_first_thread() {
                put(params.partials, chunk, &partial);
            }
            if next_chunk >= chunks.count {
                last_started = ptx::ld_shared_u32(smem + 2 * SET_BYTES) == blocks - 1;
                break;
            }
            chunk = next_chunk;
            next_chunk = ptx::ld_shared_u32(flags);
        }
        records = smem + (records - smem ^ SET_BYTES);
    }
    // The set in turn was read before the last barrier but one.
    if last_started { Some(smem + (records - smem ^ SET_BYTES)) } else { None }
}

/// The statistics of a chunk that is alone.
#[inline(always)]
fn alone<S: Statistic>(partial: &Partial, len: u64) -> Moments {
    let count = len - partial.counts.skipped();
    let non_finite = if S::COUNTS { partial.counts.non_finite() } else { 0 };
    if count == 0 {
        return Moments { non_finite, ..Moments::EMPTY };
    }
    Moments {
        count,
        sum: partial.sum,
        mean: quotient(partial.sum, count),
        m2: partial.m2,
        non_finite,
        dead: partial.counts.dead(),
        min: partial.min,
        max: partial.max,
    }
}
