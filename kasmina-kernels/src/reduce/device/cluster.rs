//! Few elements, reduced by one cluster of blocks, with a chunk for each team of a block's threads:
//! what a warp found goes straight into the shared memory of the first block, without a way through
//! the L2 cache and back.

use super::node::Node;
use super::*;
use crate::reduce::{
    CLUSTER_RECORD_BYTES, CLUSTER_RECORDS_AT, CLUSTER_TEAMS, CLUSTER_THREADS, CLUSTER_WARPS,
};

/// The statistics of all elements.
///
/// # Safety
/// The elements are readable and the result writable, and nothing else writes them while the kernel
/// runs; the grid is one cluster, with a team for each chunk, of which there is at least one and
/// that have at most 2²⁰ elements together.
#[inline(always)]
pub(in crate::reduce) unsafe fn few<E: Element, S: Statistic>(params: &ReduceParams) {
    start::<CLUSTER_THREADS, 1>();
    let (chunks, rule) = (params.chunks, params.rule());
    let (barrier, rank, thread) = (ptx::dynamic_smem(), ptx::block_index(), thread_of_team());
    let team = rank * CLUSTER_TEAMS + ptx::thread_index() / THREADS;
    let num_records = ptx::grid_size() * CLUSTER_WARPS;
    // SAFETY: one thread prepares the barrier, and the cluster waits for it: all its blocks run
    // from then on, and the first does until all records have come.
    unsafe {
        if rank == 0 && is_first_thread() {
            ptx::mbarrier_init(barrier, 1);
            ptx::fence_mbarrier_init();
        }
        if team < chunks.count && ptx::opaque_u32(thread) == 0 {
            prefetch::<E>(params, team);
        }
        ptx::barrier_cluster_relaxed();
        // Records may come before: the phase cannot end without this arrival.
        if rank == 0 && is_first_thread() {
            ptx::mbarrier_arrive_expect_tx(barrier, num_records * CLUSTER_RECORD_BYTES);
        }
    }
    wait_for_predecessors();

    let aligned = params.data % 16 == 0;
    // SAFETY: the chunk's elements are readable by the caller's contract.
    let mut at = unsafe { At::<E>::begin(first_batch::<E>(params, team), aligned) };
    let len = at.left;
    let mut measure = Measure::new::<E, S>(rule);
    if S::SQUARES {
        measure.pivot = at.pivot();
    }
    let mut accumulator = Accumulator::new(number_or_zero(measure.pivot));
    // SAFETY: as above.
    unsafe { at.add_chunk::<S>(&mut accumulator, measure, rule, || (0, 0)) };

    let (warp, lane) = warp_and_lane();
    let mut node = Node::of(&accumulator);
    // SAFETY: whole warps; each warp of the cluster has a place of its own, and the barrier is
    // between writing and reading it.
    unsafe {
        if S::SQUARES {
            let count = share(len, E::WIDTH, THREADS, thread) - node.skipped;
            node = node.rebased_to_first_lane(count);
        }
        node = node.over::<S, 32>();
        if lane == 0 {
            let elements = share(len, E::WIDTH * 32, WARPS, warp % WARPS);
            let record =
                barrier + CLUSTER_RECORDS_AT + (rank * CLUSTER_WARPS + warp) * CLUSTER_RECORD_BYTES;
            node.send(
                ptx::mapa_shared_cluster(record, 0),
                elements,
                ptx::mapa_shared_cluster(barrier, 0),
            );
        }
        if rank != 0 || warp != 0 {
            return;
        }
        while !ptx::mbarrier_try_wait_parity(barrier, 0) {
            ptx::nounroll();
        }
        let first = f32::from_bits(ptx::ld_shared_u32(barrier + CLUSTER_RECORDS_AT + 16));
        let mut all = Node::of(&Accumulator::new(first));
        // There are 32 records for each pair of blocks.
        let mut number = lane;
        while number < num_records {
            ptx::nounroll();
            let record = barrier + CLUSTER_RECORDS_AT + number * CLUSTER_RECORD_BYTES;
            let (one, elements) = Node::received(record);
            all.absorb::<S>(&one, elements - one.skipped);
            number += 32;
        }
        all = all.over::<S, 32>();
        if ptx::opaque_u32(lane) == 0 {
            let partial = partial_of::<S>(&all, chunks.len as u32);
            store_result(params.result, &alone::<S>(&partial, chunks.len));
        }
    }
}
