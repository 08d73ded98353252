//! Summaries of blocks of 16×64 elements by a warp each, for kernels that have just computed them,
//! and how those of a tile become slots and results.

use super::segments::partial_of_team;
use super::*;
use crate::reduce::{SegmentParams, Segments};
use crate::tile_scheduler::div;

/// Vectors of 16 bytes that a lane has below each other in a block.
const STEPS: u32 = 4;
const _: () = assert!(STEPS == VECTORS);

/// Where the elements of a block are read.
pub(crate) trait Source: Copy {
    /// Eight elements of a row, from column `8 · x` on; anything where they do not exist.
    ///
    /// # Safety
    /// They are readable if they exist, and nothing writes them meanwhile.
    unsafe fn load(self, row: u32, x: u32, exists: bool) -> [u32; 4];
}

/// The summary of a block's first rows and columns, in every lane: eight lanes side by side, of eight
/// elements each, and four below each other, as in a strip.
///
/// # Safety
/// The whole warp executes it. That many rows, at most 16, and columns, a multiple of 8 and at most
/// 64, are readable, and nothing writes them meanwhile.
#[inline(always)]
pub(crate) unsafe fn summary_of_block<E: Element>(
    source: impl Source,
    rows: u32,
    columns: u32,
    rule: Rule,
) -> Partial {
    let lane = ptx::opaque_u32(ptx::lane_index());
    let (x, y) = (lane % 8, lane / 8);
    let rows = if x * E::WIDTH < columns { rows } else { 0 };
    let exists = |step: u32| y + 4 * step < rows;
    // SAFETY: the caller's contract.
    let load = |step: u32| unsafe { source.load(y + 4 * step, x, exists(step)) };
    let steps = (rows + 3).saturating_sub(y) / 4;
    let count = (if steps < STEPS { steps } else { STEPS }) * E::WIDTH;
    let mut vectors = [load(0), load(1), load(2), load(3)];
    let measure = Measure {
        pivot: pivot_of_existing::<E>(&mut vectors, exists, count),
        epsilon: rule.epsilon,
        bounds: E::pair_of_bounds(rule.epsilon),
    };
    let mut accumulator = Accumulator::new(measure.pivot);
    let (mut sums, mut pairs) = (Batch::EMPTY, E::NO_PAIRS);
    unroll!(v: u32 in [0 1 2 3] {
        if exists(v) {
            add_whole::<E, Summary>(&mut sums, &mut pairs, vectors[v as usize], measure);
        }
    });
    E::add_pairs(pairs, &mut sums);
    if count > 0 && !accumulator.take(&sums) {
        let mut again = 0;
        while again < STEPS && exists(again) {
            ptx::nounroll();
            // SAFETY: the caller's contract.
            let mut vector = unsafe { source.load(y + 4 * again, x, true) };
            let mut pair = 0;
            while pair < VECTORS {
                ptx::nounroll();
                let [both, b, c, d] = vector;
                accumulator.add_exactly(E::widen(both & 0xFFFF), rule.skip_nan);
                accumulator.add_exactly(E::widen(both >> 16), rule.skip_nan);
                vector = [b, c, d, both];
                pair += 1;
            }
            again += 1;
        }
    }
    // SAFETY: the whole warp.
    unsafe {
        let mut node = Node::of(&accumulator);
        let count = count - node.skipped;
        node = node.rebased_to_first_lane(count).over::<Summary, 32>();
        partial_of_team(&node, ptx::redux_sync_add_u32(count))
    }
}

/// As [`pivot`], of vectors of which some hold anything.
#[inline(always)]
fn pivot_of_existing<E: Element>(
    vectors: &mut [[u32; 4]; VECTORS as usize],
    exists: impl Fn(u32) -> bool,
    count: u32,
) -> f32 {
    unroll!(v: u32 in [0 1 2 3] {
        if !exists(v) {
            vectors[v as usize] = [0; 4];
        }
    });
    pivot::<E>(vectors, count)
}

/// The record of nothing.
pub(crate) const EMPTY: Partial = Partial::EMPTY;

/// Puts a summary where the warp that merges a tile's finds it.
///
/// # Safety
/// `address` is a multiple of 16 and that of 32 bytes of the block's shared memory, which no other
/// thread accesses before the next barrier.
#[inline(always)]
pub(crate) unsafe fn put_record(address: u32, partial: &Partial) {
    let [a, b, c, d] = partial.words();
    let halves = |word: u64| [word as u32, (word >> 32) as u32];
    let ([a, e], [b, f], [c, g], [d, h]) = (halves(a), halves(b), halves(c), halves(d));
    // SAFETY: the caller's contract.
    unsafe {
        ptx::st_shared_v4_u32(address, [a, e, b, f]);
        ptx::st_shared_v4_u32(address + 16, [c, g, d, h]);
    }
}

/// Adds the summary of `len` elements to a record of `so_far`; both with those that were skipped.
///
/// # Safety
/// The whole warp executes it, with the same partial in every lane; nobody else accesses the record.
#[inline(always)]
pub(crate) unsafe fn add_to_record(address: u32, so_far: u32, partial: &Partial, len: u32) {
    // SAFETY: the caller's contract. Every lane has read the record before one writes it.
    unsafe {
        let record = get_record(address);
        ptx::bar_warp_sync();
        let (pivot, usual) = (mean(&record, so_far), Usual::new(len));
        let mut total = Total::EMPTY;
        total.add::<Summary>(&record, so_far, pivot, usual);
        total.add::<Summary>(partial, len, pivot, usual);
        if ptx::opaque_u32(ptx::lane_index()) == 0 {
            put_record(address, &total.partial(so_far + len));
        }
        ptx::bar_warp_sync();
    }
}

/// # Safety
/// As [`put_record`], behind the barrier.
#[inline(always)]
unsafe fn get_record(address: u32) -> Partial {
    // SAFETY: the caller's contract.
    let ([a, e, b, f], [c, g, d, h]) =
        unsafe { (ptx::ld_shared_v4_u32(address), ptx::ld_shared_v4_u32(address + 16)) };
    let word = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
    let words = [word(a, e), word(b, f), word(c, g), word(d, h)];
    Partial::from_words(words).unwrap_or(Partial::EMPTY)
}

impl Total {
    /// Summary of `len` elements, with those that were skipped.
    #[inline(always)]
    fn partial(&self, len: u32) -> Partial {
        let counts = Counts::new(self.non_finite as u32, self.skipped as u32, self.dead as u32);
        let count = u64::from(len) - self.skipped;
        let mut m2 = 0.0;
        if count > 0 {
            m2 = centred(self.squares, self.distances, quotient(self.distances, count));
        }
        Partial { sum: self.sum, m2, min: self.min, max: self.max, counts }
    }
}

/// Merges up to 32 records, given by address and number of elements with those that were skipped,
/// to slot `index` of a segment. Whoever writes the last slot of a segment writes its result.
///
/// # Safety
/// The whole warp executes it, behind the barrier after [`put_record`]; `params` names slots for
/// its segments, also where these have one each, and for each a counter of those that are written.
#[inline(always)]
pub(crate) unsafe fn write_slot(
    params: &SegmentParams,
    (segment, index): (u32, u32),
    num_records: u32,
    record: impl Fn(u32) -> (u32, u32),
) {
    let lane = ptx::opaque_u32(ptx::lane_index());
    let each = params.segments.strips_of_each();
    let slots = params.partials + u64::from(segment) * u64::from(each) * 32;
    // SAFETY: the caller's contract; whole warps. One lane writes the slot, then counts itself in;
    // whoever is last has acquired what all others released, and hands it on to its warp.
    unsafe {
        let (mut total, mut len) = (Total::EMPTY, 0);
        let (first, elements) = record(0);
        let pivot = mean(&get_record(first), elements);
        let usual = Usual::new(elements);
        if lane < num_records {
            let (address, elements) = record(lane);
            total.add::<Summary>(&get_record(address), elements, pivot, usual);
            len = elements;
        }
        total = total.over::<Summary, 32>();
        len = ptx::redux_sync_add_u32(len);
        let mut last = 0;
        if ptx::opaque_u32(lane) == 0 {
            put(slots, index, &total.partial(len));
            let counter = params.arrived + u64::from(segment) * 4;
            last = u32::from(ptx::atom_add_acq_rel_gpu_u32(counter, 1) == each - 1);
            if last == 1 {
                ptx::st_global_u32(counter, 0);
            }
        }
        if ptx::shfl_sync_idx_first(last) != 0 {
            ptx::bar_warp_sync();
            merge_slots(params, segment, slots, each);
        }
    }
}

/// Elements of slot `index` of a segment, whose strips are all inside the matrix.
#[inline(always)]
fn elements_of_slot(cut: &Segments, index: u32) -> u32 {
    let block = div(index, cut.pieces.get());
    let piece = index - block * cut.pieces.get();
    let rows = cut.rows - block * cut.block;
    let columns = cut.width - piece * cut.piece;
    let rows = if rows < cut.block { rows } else { cut.block };
    rows * if columns < cut.piece { columns } else { cut.piece }
}

/// Writes the result of a segment from its slots.
///
/// # Safety
/// The whole warp executes it, and sees all slots written; nobody else writes the result.
#[inline(always)]
unsafe fn merge_slots(params: &SegmentParams, segment: u32, slots: u64, each: u32) {
    let cut = &params.segments;
    let lane = ptx::opaque_u32(ptx::lane_index());
    let mut total = Total::EMPTY;
    // SAFETY: the caller's contract; whole warps.
    unsafe {
        let first = get(slots, 0).unwrap_or(Partial::EMPTY);
        // A first slot whose elements were skipped gives 0, which is as good.
        let elements = elements_of_slot(cut, 0);
        let (pivot, usual) = (mean(&first, elements), Usual::new(elements));
        let mut index = lane;
        while index < each {
            ptx::nounroll();
            // Several under way at once.
            let at = |step: u32| index + 32 * step;
            let slot = |step: u32| if at(step) < each { get(slots, at(step)) } else { None };
            let found = [slot(0), slot(1)];
            unroll!(i: usize in [0 1] {
                if let Some(partial) = found[i] {
                    let count = elements_of_slot(cut, at(i as u32));
                    total.add::<Summary>(&partial, count, pivot, usual);
                }
            });
            index += 64;
        }
        total = total.over::<Summary, 32>();
        if ptx::opaque_u32(lane) == 0 {
            let result = params.results + u64::from(segment) * size_of::<Moments>() as u64;
            let len = u64::from(cut.rows) * u64::from(cut.width);
            store_result(result, &total.moments::<Summary>(len));
        }
    }
}
