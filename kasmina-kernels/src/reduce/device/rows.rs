//! Device side of runs of a middling size: a chunk of whole rows for each block.
//!
//! ```text
//! thread    16 or 32 elements ─ f32 sums relative to the chunk's pivot ─ f64 sums    per 4 rows
//! warp      sum over lanes; again, element by element in f64, where these may not stand
//! block     16 warps in shared memory ─ relative to the tensor's pivot → the chunk's slot
//! grid      the block that was the last to start adds up all slots and writes the result
//! ```
//! All lanes of a chunk share a pivot and all slots another, so that sums merge by addition. The
//! next grid may start as soon as there is room: its first bytes are on their way into the L2 cache
//! while this one merges.

use super::cluster::moments;
use super::node::Node;
use super::*;
use crate::elementary::fused_multiply_add;
use crate::reduce::RowParams;
use crate::reduce::moments::{count_if_below, max_nan, min_nan};
use crate::reduce::rows::{
    ROW_BLOCKS_PER_MULTIPROCESSOR, ROW_RECORDS_BYTES, ROW_THREADS, ROW_WARPS, pivot, stand,
};

/// Bytes of a block's chunk that are asked for ahead of the wait.
const AHEAD_BYTES: u64 = 16 << 10;
/// Stands for elements that do not exist: NaN in every type, which extremes and counts pass over.
const MISSING: u32 = 0x7FFF_7FFF;

/// The statistics of all elements.
///
/// # Safety
/// The elements are readable, slots, counters and result writable, and nothing else writes any of
/// them while the kernel runs; the slots are unwritten and the counters 0; the chunks are those of
/// `Chunks::rows`, and there are as many blocks.
#[inline(always)]
pub(in crate::reduce) unsafe fn rows<E: Element, S: Statistic>(params: &RowParams) {
    start::<ROW_THREADS, ROW_BLOCKS_PER_MULTIPROCESSOR>();
    let smem = ptx::dynamic_smem();
    let ticket = smem + 2 * ROW_RECORDS_BYTES;
    let (reduce, rule) = (&params.reduce, params.reduce.rule());
    let chunk = ptx::block_index();
    let (start, len) = chunk_of::<E>(reduce, chunk);
    let place = Place::of::<E, ROW_THREADS>(start, len, reduce.data % 16 == 0);
    // SAFETY: the chunk's elements are readable, from the wait on; records and slots as said at
    // each; whole warps.
    unsafe {
        if is_first_thread() {
            prefetch_bytes::<E>(start, len, AHEAD_BYTES);
            ptx::prefetch_global_l2(reduce.counters);
            ptx::prefetch_global_l2(reduce.partials);
            ptx::prefetch_global_l2(reduce.result);
        }
        place.prefetch();
        let (warp, lane) = warp_and_lane();
        wait_for_predecessors();
        let mut started = 0;
        if is_first_thread() {
            started = ptx::atom_add_relaxed_gpu_u32(reduce.counters, 1);
        }
        let mut firsts = [[MISSING; 4]; 2];
        if S::SQUARES {
            firsts = [
                first_vector::<E>(reduce.data, reduce.chunks.len, place.aligned),
                first_vector::<E>(start, u64::from(len), place.aligned),
            ];
        }
        let (pivots, lane_node) = sums_of_lane::<E, S, ROW_THREADS, 4>(rule, &place, firsts);
        let node = over_warp::<E, S, ROW_THREADS>(&place, lane_node, len, warp, rule);
        if lane == 0 {
            node.put(smem + warp * WARP_BYTES);
        }
        if is_first_thread() {
            ptx::st_shared_u32(ticket, started);
        }
        ptx::bar_sync::<0, ROW_THREADS>();
        if warp == 0 {
            let block = Node::get(smem + lane % ROW_WARPS * WARP_BYTES).over::<S, 16>();
            if is_first_thread() {
                put(reduce.partials, chunk, &relative_to::<S>(&block, pivots, len));
            }
        }
        if ptx::ld_shared_u32(ticket) == ptx::grid_size() - 1 {
            merge::<S>(params, pivots.of_run, smem + ROW_RECORDS_BYTES);
        }
    }
}

/// The first vector of `len` elements.
///
/// # Safety
/// As [`load_some`].
#[inline(always)]
pub(super) unsafe fn first_vector<E: Element>(address: u64, len: u64, aligned: bool) -> [u32; 4] {
    let exist = if len < u64::from(E::WIDTH) { len as u32 } else { E::WIDTH };
    // SAFETY: the caller's contract.
    unsafe { load_some::<E>(address, exist as i32, aligned) }
}

/// Address of a chunk's first element, and how many it has; all chunks are equal but the last.
#[inline(always)]
pub(super) fn chunk_of<E: Element>(reduce: &ReduceParams, chunk: u32) -> (u64, u32) {
    let usual = reduce.chunks.small_len;
    let first = u64::from(chunk) * u64::from(usual);
    let left = reduce.chunks.len.saturating_sub(first);
    let len = if left < u64::from(usual) { left as u32 } else { usual };
    (reduce.data + (first << E::LOG2_SIZE), len)
}

/// What elements of a chunk are measured from, and what the slots are.
#[derive(Clone, Copy)]
pub(super) struct Pivots {
    pub(super) of_chunk: f32,
    pub(super) of_run: f32,
}

/// A thread's vectors in the rows of its block's chunk.
pub(super) struct Place {
    /// Address of the first.
    address: u64,
    /// Rows that exist as a whole.
    whole: u32,
    /// Elements from the thread's vector on in the row behind these; none if it is not positive.
    left: i32,
    pub(super) aligned: bool,
}

impl Place {
    /// In rows of a vector for each of so many threads.
    #[inline(always)]
    pub(super) fn of<E: Element, const THREADS: u32>(start: u64, len: u32, aligned: bool) -> Self {
        let thread = ptx::thread_index();
        let row = THREADS * E::WIDTH;
        let left = (len % row) as i32 - (thread * E::WIDTH) as i32;
        Self { address: start + u64::from(thread * 16), whole: len / row, left, aligned }
    }

    /// Has the first vector brought into the L2 cache, ahead of the wait. What counts is that the
    /// multiprocessor finds the page, which takes as long as the load.
    #[inline(always)]
    pub(super) fn prefetch(&self) {
        if self.whole > 0 {
            // SAFETY: the vector exists.
            unsafe { ptx::prefetch_global_l2(self.address) };
        }
    }
}

/// A vector of which `valid` elements exist, and the others are [`MISSING`].
///
/// # Safety
/// Those are readable, and nothing writes them while the kernel runs; the address is a multiple of
/// 16 if `aligned`.
#[inline(always)]
pub(super) unsafe fn load_some<E: Element>(address: u64, valid: i32, aligned: bool) -> [u32; 4] {
    if aligned && valid >= E::WIDTH as i32 {
        // SAFETY: the whole vector exists.
        return unsafe { ptx::ld_global_v4_u32(address) };
    }
    let mut vector = [MISSING; 4];
    unroll!(i: u32 in [0 1 2 3 4 5 6 7] {
        if i < E::WIDTH && (i as i32) < valid {
            let byte = i << E::LOG2_SIZE;
            // SAFETY: the element exists.
            let bits = unsafe { E::load(address + u64::from(byte)) };
            let word = &mut vector[(byte / 4 % 4) as usize];
            *word = match (E::WIDTH, i % 2) {
                (8, 0) => *word & 0xFFFF_0000 | bits,
                (8, _) => *word & 0xFFFF | bits << 16,
                _ => bits,
            };
        }
    });
    vector
}

#[inline(always)]
fn pivot_of<E: Element>(vector: [u32; 4]) -> f32 {
    let second = if E::WIDTH == 8 { Some(E::four(vector, true)) } else { None };
    pivot(E::four(vector, false), second)
}

/// f32 sums of a lane since they were last taken, and what there is beside sums.
struct Sums {
    distances: [f32; 4],
    squares: [f32; 2],
    min: f32,
    max: f32,
    dead: f32,
    pairs: Pairs,
}

impl Sums {
    /// Adds a vector of which `valid` elements exist.
    #[inline(always)]
    fn add<E: Element, S: Statistic>(&mut self, vector: [u32; 4], valid: i32, measure: Measure) {
        if S::SQUARES && E::PAIRED {
            unroll!(i: usize in [0 1 2 3] {
                E::add_pair(&mut self.pairs, vector[i], measure.bounds);
            });
        }
        // Opaque, so that elements are widened where they are used.
        let vector = if E::WIDTH == 8 { vector.map(ptx::opaque_u32) } else { vector };
        self.add_four::<E, S>(E::four(vector, false), valid, measure);
        if E::WIDTH == 8 {
            let vector = vector.map(ptx::opaque_u32);
            self.add_four::<E, S>(E::four(vector, true), valid - 4, measure);
        }
    }

    #[inline(always)]
    fn add_four<E: Element, S: Statistic>(&mut self, four: [f32; 4], valid: i32, measure: Measure) {
        unroll!(i: usize in [0 1 2 3] {
            let exists = (i as i32) < valid;
            if S::SQUARES {
                let distance = if exists { four[i] - measure.pivot } else { 0.0 };
                // Two sums of each kind, for want of registers.
                self.distances[i % 2] += distance;
                self.squares[i % 2] = fused_multiply_add(distance, distance, self.squares[i % 2]);
                if !E::PAIRED {
                    self.min = self.min.min(four[i]);
                    self.max = self.max.max(four[i]);
                    self.dead = count_if_below(self.dead, four[i], measure.epsilon);
                }
            } else if S::SUM {
                self.distances[i] += if exists { four[i] } else { 0.0 };
            } else if exists {
                if S::MIN {
                    self.min = min_nan(self.min, four[i]);
                }
                if S::MAX {
                    self.max = max_nan(self.max, four[i]);
                }
            }
        });
    }

    /// Empties the sums into f64.
    #[inline(always)]
    fn take<E: Element, S: Statistic>(&mut self, distances: &mut f64, squares: &mut f64) {
        if !S::SUM {
            return;
        }
        let [a, b, c, d] = self.distances;
        *distances += f64::from(if S::SQUARES { a + b } else { (a + b) + (c + d) });
        self.distances = [0.0; 4];
        if S::SQUARES {
            *squares += f64::from(self.squares[0] + self.squares[1]);
            self.squares = [0.0; 2];
            if E::PAIRED {
                // 16-bit numbers count few elements exactly.
                let [(.., low), (.., high)] = E::split(self.pairs);
                self.dead += low + high;
                self.pairs = self.pairs.without_dead();
            }
        }
    }
}

/// What a lane finds in its block's chunk, measured from what is in the midst of the two vectors
/// `firsts`, those of the run and of the chunk. It has `DEPTH` vectors under way, 4 or 8.
///
/// # Safety
/// The elements are readable, and nothing writes them while the kernel runs.
#[inline(always)]
pub(super) unsafe fn sums_of_lane<
    E: Element,
    S: Statistic,
    const THREADS: u32,
    const DEPTH: u32,
>(
    rule: Rule,
    place: &Place,
    firsts: [[u32; 4]; 2],
) -> (Pivots, Node) {
    let width = E::WIDTH as i32;
    let mut measure = Measure::new::<E, S>(rule);
    let mut pivots = Pivots { of_chunk: 0.0, of_run: 0.0 };
    let mut sums = Sums {
        distances: [0.0; 4],
        squares: [0.0; 2],
        min: f32::INFINITY,
        max: f32::NEG_INFINITY,
        dead: 0.0,
        pairs: E::NO_PAIRS,
    };
    let (mut distances, mut squares) = (0.0, 0.0);
    let (mut at, mut rows) = (place.address, place.whole);
    // SAFETY: rows that are whole exist, and of the last so much as `left` says.
    unsafe {
        let row = |at: u64, v: u32| at + u64::from(v * THREADS * 16);
        let mut vectors = [[0; 4]; 8];
        if place.aligned {
            unroll!(v: u32 in [0 1 2 3 4 5 6 7] {
                if v < DEPTH {
                    vectors[v as usize] = ptx::ld_global_v4_u32_if(row(at, v), v < rows);
                }
            });
        }
        let mut rest = [MISSING; 4];
        if place.left > 0 {
            rest = load_some::<E>(row(at, rows), place.left, place.aligned);
        }
        if S::SQUARES {
            let [of_run, of_chunk] = firsts.map(pivot_of::<E>);
            pivots = Pivots { of_chunk, of_run };
            measure.pivot = of_chunk;
        }
        if place.aligned {
            while rows > DEPTH {
                ptx::nounroll();
                at = row(at, DEPTH);
                if rows >= 2 * DEPTH {
                    unroll!(v: u32 in [0 1 2 3 4 5 6 7] {
                        if v < DEPTH {
                            sums.add::<E, S>(vectors[v as usize], width, measure);
                            vectors[v as usize] = ptx::ld_global_v4_u32(row(at, v));
                            if v == 3 && DEPTH == 8 {
                                sums.take::<E, S>(&mut distances, &mut squares);
                            }
                        }
                    });
                } else {
                    unroll!(v: u32 in [0 1 2 3 4 5 6 7] {
                        if v < DEPTH {
                            sums.add::<E, S>(vectors[v as usize], width, measure);
                            let exists = DEPTH + v < rows;
                            vectors[v as usize] = ptx::ld_global_v4_u32_if(row(at, v), exists);
                            if v == 3 && DEPTH == 8 {
                                sums.take::<E, S>(&mut distances, &mut squares);
                            }
                        }
                    });
                }
                sums.take::<E, S>(&mut distances, &mut squares);
                rows -= DEPTH;
            }
            // What is left out is jumped over at once.
            'tail: {
                unroll!(v: u32 in [0 1 2 3 4 5 6 7] {
                    if v >= DEPTH || v >= rows {
                        break 'tail;
                    }
                    if v == 4 {
                        sums.take::<E, S>(&mut distances, &mut squares);
                    }
                    sums.add::<E, S>(vectors[v as usize], width, measure);
                });
            }
            sums.take::<E, S>(&mut distances, &mut squares);
        } else {
            // The same sums of the same elements, a row at a time.
            let mut number = 0;
            while number < rows {
                ptx::nounroll();
                let vector = load_some::<E>(row(at, number), width, false);
                sums.add::<E, S>(vector, width, measure);
                number += 1;
                if number % VECTORS == 0 || number == rows {
                    sums.take::<E, S>(&mut distances, &mut squares);
                }
            }
        }
        if place.left > 0 {
            sums.add::<E, S>(rest, place.left, measure);
            sums.take::<E, S>(&mut distances, &mut squares);
        }
    }
    if S::SQUARES && E::PAIRED {
        let [(low_min, low_max, _), (high_min, high_max, _)] = E::split(sums.pairs);
        (sums.min, sums.max) = (low_min.min(high_min), low_max.max(high_max));
    }
    let node = Node {
        distances,
        squares,
        pivot: pivots.of_chunk,
        min: sums.min,
        max: sums.max,
        non_finite: 0,
        skipped: 0,
        dead: sums.dead as u32,
    };
    (pivots, node)
}

/// What a warp found in its chunk of `len` elements, in every lane.
///
/// # Safety
/// The whole warp executes it; the elements are readable, and nothing writes them while the kernel
/// runs.
#[inline(always)]
pub(super) unsafe fn over_warp<E: Element, S: Statistic, const THREADS: u32>(
    place: &Place,
    mut of_lane: Node,
    len: u32,
    warp: u32,
    rule: Rule,
) -> Node {
    // Opaque, so that there is one copy of the exchanges.
    let mut in_f64 = ptx::opaque_u32(0) != 0;
    loop {
        ptx::nounroll();
        // SAFETY: the whole warp, as all its lanes have the same sums and go the same way.
        let node = unsafe { of_lane.over::<S, 32>() };
        let stands = if S::SQUARES {
            let count = share(len, E::WIDTH * 32, THREADS / 32, warp);
            stand(node.distances, node.squares, node.min >= node.max, count, E::WIDTH)
        } else if S::SUM {
            node.distances.is_finite()
        } else {
            !rule.skip_nan || !(S::MIN && node.min.is_nan() || S::MAX && node.max.is_nan())
        };
        if in_f64 || stands {
            return node;
        }
        // SAFETY: the caller's contract.
        let accumulator =
            unsafe { added_in_f64::<E, THREADS>(place, of_lane.pivot, rule.skip_nan) };
        of_lane = Node { dead: of_lane.dead, ..Node::of(&accumulator) };
        in_f64 = ptx::opaque_u32(1) != 0;
    }
}

/// A lane's elements, added one by one in f64.
///
/// # Safety
/// They are readable, and nothing writes them while the kernel runs.
#[inline(always)]
unsafe fn added_in_f64<E: Element, const THREADS: u32>(
    place: &Place,
    pivot: f32,
    skip_nan: bool,
) -> Accumulator {
    let mut accumulator = Accumulator::new(pivot);
    let (mut address, mut row) = (place.address, 0);
    while row <= place.whole {
        ptx::nounroll();
        let valid = if row < place.whole { E::WIDTH as i32 } else { place.left };
        // SAFETY: as many elements exist.
        let mut vector = unsafe { load_some::<E>(address, valid, place.aligned) };
        let mut element = 0;
        while element < E::WIDTH && (element as i32) < valid {
            ptx::nounroll();
            let [word, b, c, d] = vector;
            accumulator.add_exactly(E::widen(word), skip_nan);
            // The next element, where it is looked for.
            vector = match (E::WIDTH, element % 2) {
                (8, 0) => [word >> 16, b, c, d],
                _ => [b, c, d, word],
            };
            element += 1;
        }
        address += u64::from(THREADS * 16);
        row += 1;
    }
    accumulator
}

/// A chunk's sums relative to the tensor's pivot, as its slot keeps them: sum and squares of the
/// distances from it.
#[inline(always)]
fn relative_to<S: Statistic>(node: &Node, pivots: Pivots, len: u32) -> Partial {
    let (mut sum, mut m2) = (node.distances, 0.0);
    if S::SQUARES {
        (sum, m2) = Accumulator::rebased(sum, node.squares, pivots.of_chunk, pivots.of_run, len);
    }
    let counts = Counts::new(node.non_finite, 0, node.dead);
    Partial { sum, m2, min: node.min, max: node.max, counts }
}

/// Adds up the slots as they are written, makes them unwritten, and writes the result.
///
/// # Safety
/// The whole block executes it, which has records for its warps at `records`; all other blocks have
/// started, and nobody else reads slots.
#[inline(always)]
unsafe fn merge<S: Statistic>(params: &RowParams, pivot: f32, records: u32) {
    let reduce = &params.reduce;
    let thread = ptx::thread_index();
    // Opaque once more: these exchanges are not those before under the same condition.
    let (warp, lane) = warp_and_lane();
    let mut node = Node::of(&Accumulator::new(pivot));
    // SAFETY: a slot for each thread but the last ones; the blocks that write them are running.
    // Whole warps; each warp has a place of its own, and the barrier is between.
    unsafe {
        let mut waits = thread < reduce.chunks.count;
        while waits {
            ptx::nounroll();
            if let Some(partial) = get(reduce.partials, thread) {
                clear(reduce.partials, thread);
                node.distances = partial.sum;
                node.squares = partial.m2;
                (node.min, node.max) = (partial.min, partial.max);
                node.non_finite = partial.counts.non_finite() as u32;
                node.dead = partial.counts.dead() as u32;
                waits = false;
            }
        }
        node = node.over::<S, 32>();
        if lane == 0 {
            node.put(records + warp * WARP_BYTES);
        }
        ptx::bar_sync::<0, ROW_THREADS>();
        if warp == 0 {
            node = Node::get(records + lane % ROW_WARPS * WARP_BYTES).over::<S, 16>();
            node.pivot = pivot;
            if is_first_thread() {
                ptx::st_global_u32(reduce.counters, 0);
                store_result(reduce.result, &moments::<S>(params, &node));
            }
        }
    }
}
