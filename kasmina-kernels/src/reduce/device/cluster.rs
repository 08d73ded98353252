//! Few elements, reduced by one cluster of blocks, with a chunk of whole rows for each block.
//!
//! ```text
//! thread    vectors of 16 bytes, all under way at once ─ f32 sums relative to the run's pivot ─ f64
//! warp      sum over lanes → its place in the shared memory of the first block
//! cluster   the first warp of the first block adds up what all warps sent
//! ```
//! So nothing goes through the L2 cache and back, and what is measured from one pivot merges by
//! addition.

use super::node::Node;
use super::rows::{Place, chunk_of, first_vector, over_warp, sums_of_lane};
use super::slots::divided;
use super::*;
use crate::reduce::{
    CLUSTER_HALF_BYTES, CLUSTER_RECORDS_AT, CLUSTER_THREADS, CLUSTER_WARPS, RowParams,
};

/// Bytes of a block's chunk that are asked for ahead of the wait: all that there are.
const AHEAD_BYTES: u64 = 64 << 10;

/// The statistics of all elements.
///
/// # Safety
/// The elements are readable and the result writable, and nothing else writes them while the kernel
/// runs; the grid is one cluster, with a block for each chunk, of which there is at least one and
/// that have at most 2²⁰ elements together.
#[inline(always)]
pub(in crate::reduce) unsafe fn few<E: Element, S: Statistic>(params: &RowParams) {
    start::<CLUSTER_THREADS, 1>();
    let (reduce, rule) = (&params.reduce, params.reduce.rule());
    let (barrier, rank) = (ptx::dynamic_smem(), ptx::block_index());
    let records = barrier + CLUSTER_RECORDS_AT;
    let num_records = ptx::grid_size() * CLUSTER_WARPS;
    let (start, len) = chunk_of::<E>(reduce, rank);
    // SAFETY: one thread prepares the barrier, and the cluster waits for it: all its blocks run
    // from then on, and the first does until all records have come.
    unsafe {
        if rank == 0 && is_first_thread() {
            ptx::mbarrier_init(barrier, 1);
            ptx::fence_mbarrier_init();
        }
        if is_first_thread() {
            prefetch_bytes::<E>(start, len, AHEAD_BYTES);
            ptx::prefetch_global_l2(reduce.data);
            ptx::prefetch_global_l2(reduce.result);
        }
        ptx::barrier_cluster_relaxed();
        // Records may come before: the phase cannot end without this arrival.
        if rank == 0 && is_first_thread() {
            ptx::mbarrier_arrive_expect_tx(barrier, num_records * 32);
        }
    }
    let place = Place::of::<E, CLUSTER_THREADS>(start, len, reduce.data % 16 == 0);
    let (warp, lane) = warp_and_lane();
    // SAFETY: the elements are readable by the caller's contract; whole warps; each warp of the
    // cluster has a place of its own, and the barrier is between writing and reading it.
    unsafe {
        wait_for_predecessors();
        let mut first = [0; 4];
        if S::SQUARES {
            first = first_vector::<E>(reduce.data, reduce.chunks.len, place.aligned);
        }
        let (pivots, of_lane) = sums_of_lane::<E, S, CLUSTER_THREADS, 8>(rule, &place, [first; 2]);
        let node = over_warp::<E, S, CLUSTER_THREADS>(&place, of_lane, len, warp, rule);
        let record = records + (rank * CLUSTER_WARPS + warp) * 16;
        if ptx::grid_size() == 1 {
            // A block without a cluster has no other stores.
            if lane == 0 {
                node.put_halves(record, CLUSTER_HALF_BYTES);
            }
            ptx::bar_sync::<0, CLUSTER_THREADS>();
            if warp != 0 {
                return;
            }
        } else {
            if lane == 0 {
                node.send_halves(
                    ptx::mapa_shared_cluster(record, 0),
                    CLUSTER_HALF_BYTES,
                    ptx::mapa_shared_cluster(barrier, 0),
                );
            }
            if rank != 0 || warp != 0 {
                return;
            }
            while !ptx::mbarrier_try_wait_parity(barrier, 0) {
                ptx::nounroll();
            }
        }
        let mut all = Node::of(&Accumulator::new(pivots.of_run));
        let mut number = lane;
        while number < num_records {
            ptx::nounroll();
            unroll!(i: u32 in [0 1 2 3] {
                let number = number + 32 * i;
                let one = Node::received_in_halves(records + number * 16, CLUSTER_HALF_BYTES);
                if number < num_records {
                    all.add::<S>(&one);
                }
            });
            number += 128;
        }
        all = all.over::<S, 32>();
        if ptx::opaque_u32(lane) == 0 {
            store_result(reduce.result, &moments::<S>(params, &all));
        }
    }
}

/// The statistics from the sums of all elements relative to their pivot.
#[inline(always)]
pub(super) fn moments<S: Statistic>(params: &RowParams, node: &Node) -> Moments {
    let len = params.reduce.chunks.len;
    let count = len - u64::from(node.skipped);
    let (mut elements, mut inverse) = (params.count, params.inverse);
    if node.skipped != 0 {
        elements = count as f64;
        inverse = if count == 0 { 0.0 } else { 1.0 / elements };
    }
    let (mut sum, mut m2) = (node.distances, 0.0);
    if S::SQUARES {
        sum += elements * f64::from(node.pivot);
        m2 = centred(node.squares, node.distances, node.distances * inverse);
    }
    // What remains when infinity is divided is NaN.
    let mean = divided(sum, elements, inverse);
    Moments {
        count,
        sum,
        mean: if sum.is_finite() { mean } else { sum },
        m2,
        non_finite: if S::COUNTS { u64::from(node.non_finite) } else { 0 },
        dead: if S::COUNTS { u64::from(node.dead) } else { 0 },
        min: if S::MIN { node.min } else { f32::INFINITY },
        max: if S::MAX { node.max } else { f32::NEG_INFINITY },
    }
}
