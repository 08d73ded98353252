//! Device side of segmented reductions: a warp, or a team of fewer lanes, summarises a strip.

use super::node::Total;
use super::slots::{Usual, get, mean, put, store_result};
use super::*;
use crate::reduce::segments::{SEGMENT_BLOCKS_PER_MULTIPROCESSOR, SEGMENT_THREADS, Strip};
use crate::reduce::{BATCHES_PER_PIVOT, SegmentParams};

/// Where a lane is in its strip. The steps that the lanes of a team take together are the same for
/// all of them, and those of a warp's teams too.
#[derive(Clone, Copy)]
struct Walk {
    /// Address of the lane's first vector.
    address: u64,
    row_stride: u64,
    /// Columns from the lane's first on, and rows from the lane's first on.
    columns: i32,
    rows: i32,
    log2_across: u32,
    log2_down: u32,
    /// Steps per row of lanes.
    steps_across: u32,
}

/// Steps taken across and down.
#[derive(Clone, Copy)]
struct Position {
    x: u32,
    y: u32,
}

impl Walk {
    /// Address of the lane's vector at a position, and how many of its elements exist; they do not
    /// if that is not positive. Goes on to the next position.
    #[inline(always)]
    fn step<E: Element>(&self, position: &mut Position) -> (u64, i32) {
        let (x, y) = (position.x << self.log2_across, position.y << self.log2_down);
        let address = self.address + u64::from(x * 16) + u64::from(y) * self.row_stride;
        let left = if (y as i32) < self.rows { self.columns - (x * E::WIDTH) as i32 } else { 0 };
        position.x += 1;
        if position.x == self.steps_across {
            *position = Position { x: 0, y: position.y + 1 };
        }
        (address, left)
    }

    /// The vectors of a batch.
    #[inline(always)]
    fn four<E: Element>(&self, position: &mut Position) -> [(u64, i32); 4] {
        [
            self.step::<E>(position),
            self.step::<E>(position),
            self.step::<E>(position),
            self.step::<E>(position),
        ]
    }
}

/// How many of a vector's elements exist, of `left` from its start on.
#[inline(always)]
fn existing<E: Element>(left: i32) -> u32 {
    if left <= 0 {
        0
    } else if left < E::WIDTH as i32 {
        left as u32
    } else {
        E::WIDTH
    }
}

/// Sums of a lane: a run of batches relative to a pivot of its own, and those before relative to
/// the first.
struct Lane {
    run: Accumulator,
    run_count: u32,
    first_pivot: f32,
    distances: f64,
    squares: f64,
    count: u32,
}

impl Lane {
    /// Rebases the run to the first pivot.
    #[inline(always)]
    fn fold(&mut self) {
        let Accumulator { distances, squares, pivot, .. } = self.run;
        let count = self.run_count;
        let (distances, squares) =
            Accumulator::rebased(distances, squares, pivot, self.first_pivot, count);
        self.distances += distances;
        self.squares += squares;
        self.count += count;
        self.run_count = 0;
        (self.run.distances, self.run.squares) = (0.0, 0.0);
    }
}

/// The statistics of each segment.
///
/// # Safety
/// The elements are readable, slots, counters and results writable, and nothing else writes any of
/// them while the kernel runs; the counters are 0; the grid has a team for each strip.
#[inline(always)]
pub(in crate::reduce) unsafe fn segments<E: Element>(params: &SegmentParams) {
    geometry::<SEGMENT_THREADS, SEGMENT_BLOCKS_PER_MULTIPROCESSOR>();
    #[cfg(kasmina_tier = "hopper")]
    ptx::griddepcontrol_launch_dependents();
    wait_for_predecessors();
    let (cut, rule) = (params.segments, params.rule());
    let lane = ptx::thread_index() % 32;
    let warp = u64::from(ptx::block_index()) * u64::from(SEGMENT_THREADS / 32)
        + u64::from(ptx::thread_index() / 32);
    let team_lanes = 1 << cut.log2_team;
    let in_team = lane & (team_lanes - 1);
    let index = (warp << (5 - cut.log2_team)) + u64::from(lane >> cut.log2_team);
    let exists = index < cut.strips();
    // Whole warps go on, as lanes exchange what they have.
    let strip = cut.strip(if exists { index } else { 0 });

    // SAFETY: strips lie in the matrix, which is readable by the caller's contract.
    let (node, count) = unsafe { summary_of_lane::<E>(params, rule, &strip, in_team, exists) };
    // SAFETY: whole warps.
    let (node, count) = unsafe { over_team(node, count, lane, team_lanes) };
    let partial = partial_of_team(&node, count);
    let each = cut.strips_of_each();
    if each == 1 {
        if exists && ptx::opaque_u32(in_team) == 0 {
            let result = params.results + u64::from(strip.segment) * size_of::<Moments>() as u64;
            let len = u64::from(strip.rows * strip.columns);
            // SAFETY: one lane writes the segment's result.
            unsafe { store_result(result, &alone::<Summary>(&partial, len)) };
        }
        return;
    }
    // Teams are warps here. SAFETY: one lane writes the slot, then counts itself in; whoever is
    // last has acquired what all others released, and hands it on to its warp.
    unsafe {
        let slots = params.partials + u64::from(strip.segment) * u64::from(each) * 32;
        let mut last = 0;
        if exists && ptx::opaque_u32(lane) == 0 {
            put(slots, strip.index, &partial);
            let counter = params.arrived + u64::from(strip.segment) * 4;
            last = u32::from(ptx::atom_add_acq_rel_gpu_u32(counter, 1) == each - 1);
            if last == 1 {
                ptx::st_global_u32(counter, 0);
            }
        }
        if ptx::shfl_sync_idx_first(last) == 0 {
            return;
        }
        ptx::bar_warp_sync();
        let result = params.results + u64::from(strip.segment) * size_of::<Moments>() as u64;
        let elements = |index| cut.elements(strip.segment, index);
        merge_slots::<4>(result, slots, each, cut.block * cut.piece, elements);
    }
}

/// A lane's sums, and of how many elements, without those that were skipped.
///
/// # Safety
/// The strip is readable, and nothing writes it while the kernel runs.
#[inline(always)]
unsafe fn summary_of_lane<E: Element>(
    params: &SegmentParams,
    rule: Rule,
    strip: &Strip,
    in_team: u32,
    exists: bool,
) -> (Node, u32) {
    let cut = params.segments;
    let across = 1 << cut.log2_across;
    let (x, y) = (in_team & (across - 1), in_team >> cut.log2_across);
    let start = params.data
        + (u64::from(strip.first_column) << E::LOG2_SIZE)
        + u64::from(strip.first_row) * params.row_stride;
    let aligned = (start | params.row_stride) % 16 == 0;
    let log2_down = cut.log2_team - cut.log2_across;
    let walk = Walk {
        address: start + u64::from(x * 16) + u64::from(y) * params.row_stride,
        row_stride: params.row_stride,
        columns: strip.columns as i32 - (x * E::WIDTH) as i32,
        rows: if exists { strip.rows as i32 - y as i32 } else { 0 },
        log2_across: cut.log2_across,
        log2_down,
        // The same for every team of the warp, whichever strips they have.
        steps_across: (cut.piece + across * E::WIDTH - 1) >> (cut.log2_across + E::WIDTH.ilog2()),
    };
    let end = (cut.block + (1 << log2_down) - 1) >> log2_down;
    let mut measure = Measure::new::<E, Summary>(rule);
    let mut sums_of_lane = Lane {
        run: Accumulator::new(0.0),
        run_count: 0,
        first_pivot: 0.0,
        distances: 0.0,
        squares: 0.0,
        count: 0,
    };
    // Of the batch that `vectors` hold.
    let mut here = Position { x: 0, y: 0 };
    let mut next = here;
    let at = walk.four::<E>(&mut next);
    // SAFETY: only existing elements are loaded.
    let mut vectors = unsafe { load_vectors::<E>(at, aligned) };
    let mut count: u32 = at.map(|(_, left)| existing::<E>(left)).iter().sum();
    let mut batches = 0;
    loop {
        if batches % BATCHES_PER_PIVOT == 0 {
            measure.pivot = pivot::<E>(&vectors, count);
            let of_run = number_or_zero(measure.pivot);
            if batches == 0 {
                sums_of_lane.first_pivot = of_run;
            } else {
                sums_of_lane.fold();
            }
            sums_of_lane.run.pivot = of_run;
        }
        batches += 1;
        let (mut sums, mut pairs) = (Batch::EMPTY, E::NO_PAIRS);
        let of_next = next;
        let mut loaded = false;
        let mut next_count = 0;
        if count == VECTORS * E::WIDTH {
            loaded = aligned;
            unroll!(v: usize in [0 1 2 3] {
                add_whole::<E, Summary>(&mut sums, &mut pairs, vectors[v], measure);
                let (address, left) = walk.step::<E>(&mut next);
                let whole = aligned && left >= E::WIDTH as i32;
                // SAFETY: the vector exists if it is loaded.
                vectors[v] = unsafe { ptx::ld_global_v4_u32_if(address, whole) };
                next_count += existing::<E>(left);
                loaded = loaded && (whole || left <= 0);
            });
            if E::PAIRED {
                E::add_pairs(pairs, &mut sums);
            }
        } else if count > 0 {
            let mut position = here;
            each_vector(&mut vectors, |vector| {
                let (_, valid) = walk.step::<E>(&mut position);
                if valid > 0 {
                    add_some::<E, Summary>(&mut sums, *vector, valid, measure);
                }
            });
        }
        if !loaded && of_next.y < end {
            next = of_next;
            let at = walk.four::<E>(&mut next);
            // SAFETY: only existing elements are loaded.
            vectors = unsafe { load_vectors::<E>(at, aligned) };
            next_count = at.map(|(_, left)| existing::<E>(left)).iter().sum();
        }
        sums_of_lane.run_count += count;
        if count > 0 && !take::<Summary>(&mut sums_of_lane.run, &sums, rule) {
            let skipped = sums_of_lane.run.skipped;
            let mut v = 0;
            while v < VECTORS {
                ptx::nounroll();
                let (address, valid) = walk.step::<E>(&mut here);
                // SAFETY: only existing elements are read.
                unsafe { add_exactly::<E>(&mut sums_of_lane.run, address, valid, rule) };
                v += 1;
            }
            sums_of_lane.run_count -= sums_of_lane.run.skipped - skipped;
        }
        if of_next.y >= end {
            break;
        }
        (here, count) = (of_next, next_count);
    }
    sums_of_lane.fold();
    let mut node = Node::of(&sums_of_lane.run);
    node.pivot = sums_of_lane.first_pivot;
    (node.distances, node.squares) = (sums_of_lane.distances, sums_of_lane.squares);
    (node, sums_of_lane.count)
}

/// Sums of a team's lanes, in all of them, and of how many elements.
///
/// # Safety
/// The whole warp executes it; teams have `lanes` lanes, a power of two.
#[inline(always)]
unsafe fn over_team(mut node: Node, mut count: u32, lane: u32, lanes: u32) -> (Node, u32) {
    // SAFETY: the caller's contract; all lanes take the same way.
    unsafe {
        let first = ptx::shfl_sync_idx(node.pivot.to_bits(), lane & !(lanes - 1));
        let first = f32::from_bits(first);
        (node.distances, node.squares) =
            Accumulator::rebased(node.distances, node.squares, node.pivot, first, count);
        node.pivot = first;
        let unusual = ptx::vote_any(node.non_finite != 0);
        let mut mask = lanes / 2;
        while mask > 0 {
            ptx::nounroll();
            let other = |value: u32| ptx::shfl_sync_bfly_by(value, mask);
            let other_f64 = |value: f64| {
                let bits = value.to_bits();
                let (low, high) = (other(bits as u32), other((bits >> 32) as u32));
                f64::from_bits(u64::from(low) | u64::from(high) << 32)
            };
            let other_f32 = |value: f32| f32::from_bits(other(value.to_bits()));
            node.distances += other_f64(node.distances);
            node.squares += other_f64(node.squares);
            node.min = min_nan(node.min, other_f32(node.min));
            node.max = max_nan(node.max, other_f32(node.max));
            node.dead += other(node.dead);
            count += other(count);
            if unusual {
                node.non_finite += other(node.non_finite);
                node.skipped += other(node.skipped);
            }
            mask /= 2;
        }
    }
    (node, count)
}

/// Summary of `count` elements, without those that were skipped.
#[inline(always)]
pub(super) fn partial_of_team(node: &Node, count: u32) -> Partial {
    let mut partial = Partial {
        min: node.min,
        max: node.max,
        counts: Counts::new(node.non_finite, node.skipped, node.dead),
        ..Partial::EMPTY
    };
    if count > 0 {
        let distance = quotient(node.distances, u64::from(count));
        partial.sum = node.distances + f64::from(count) * f64::from(node.pivot);
        partial.m2 = centred(node.squares, node.distances, distance);
    }
    partial
}

/// The result of a segment from its `each` slots, most of them of `usual` elements. A lane has `AHEAD`
/// of them under way at once, at most four.
///
/// # Safety
/// The whole warp executes it, and sees all slots written; nobody else writes the result.
#[inline(always)]
pub(super) unsafe fn merge_slots<const AHEAD: u32>(
    result: u64,
    slots: u64,
    each: u32,
    usual: u32,
    elements: impl Fn(u32) -> u32,
) {
    let lane = ptx::thread_index() % 32;
    let mut total = Total::EMPTY;
    let mut len = 0u64;
    // SAFETY: the caller's contract; whole warps.
    unsafe {
        let first = get(slots, 0).unwrap_or(Partial::EMPTY);
        // A first strip without elements, or skipped ones, gives 0, which is as good.
        let pivot = mean(&first, elements(0));
        let usual = Usual::new(usual);
        let mut index = lane;
        while index < each {
            ptx::nounroll();
            let at = |step: u32| index + 32 * step;
            let exists = |step: u32| step < AHEAD && at(step) < each;
            let slot = |step: u32| if exists(step) { get(slots, at(step)) } else { None };
            let found = [slot(0), slot(1), slot(2), slot(3)];
            unroll!(i: usize in [0 1 2 3] {
                if let Some(partial) = found[i] {
                    let count = elements(at(i as u32));
                    total.add::<Summary>(&partial, count, pivot, usual);
                    len += u64::from(count);
                }
            });
            index += 32 * AHEAD;
        }
        total = total.over::<Summary, 32>();
        let mut all = len;
        unroll!(i: u32 in [16 8 4 2 1] {
            let (low, high) = (all as u32, (all >> 32) as u32);
            let low = ptx::shfl_sync_bfly_by(low, i);
            all += u64::from(low) | u64::from(ptx::shfl_sync_bfly_by(high, i)) << 32;
        });
        if ptx::opaque_u32(lane) == 0 {
            store_result(result, &total.moments::<Summary>(all));
        }
    }
}
