//! Device side of the statistics of each column.

use super::node::{Node, Total};
use super::slots::{Usual, get, mean, put, store_result};
use super::*;
use crate::elementary::fused_multiply_add;
use crate::reduce::columns::{Columns, rows_of_warp};
use crate::reduce::moments::{PIVOT_SCALE, count_if_below, pivot_of};
use crate::reduce::{COLUMN_BLOCKS_PER_MULTIPROCESSOR, ColumnParams};

/// Columns of a lane, at most.
const MOST: usize = 8;
/// Columns of a lane that are merged at the same time, and of a warp.
const AT_ONCE: usize = 4;
const SLOTS: u32 = AT_ONCE as u32 * 32;
/// Bytes of what a warp hands to the block of these: sums, and what else there is.
const HALF_BYTES: u32 = SLOTS * 16;

/// A lane's columns, an element for each in every array.
type Each = [f32; MOST];

/// Sums of a lane's elements relative to pivots.
#[derive(Clone, Copy)]
struct Sums {
    distances: Each,
    squares: Each,
}

impl Sums {
    const EMPTY: Self = Self { distances: [0.0; MOST], squares: [0.0; MOST] };

    /// Adds the others, and empties them.
    #[inline(always)]
    fn take(&mut self, others: &mut Self) {
        unroll!(i: usize in [0 1 2 3 4 5 6 7] {
            self.distances[i] += others.distances[i];
            self.squares[i] += others.squares[i];
        });
        *others = Self::EMPTY;
    }
}

/// Extremes and numbers of dead elements of a lane's columns.
#[derive(Clone, Copy)]
struct Kinds {
    min: Each,
    max: Each,
    dead: Each,
    /// The same of pairs of columns, where they are found in pairs.
    pairs: [super::Pairs; 4],
}

impl Kinds {
    #[inline(always)]
    fn empty<E: Element>() -> Self {
        Self {
            min: [f32::INFINITY; MOST],
            max: [f32::NEG_INFINITY; MOST],
            dead: [0.0; MOST],
            pairs: [E::NO_PAIRS; 4],
        }
    }

    #[inline(always)]
    fn add<E: Element>(&mut self, vector: [u32; 4], measure: Measure) {
        if E::PAIRED {
            unroll!(i: usize in [0 1 2 3] {
                E::add_pair(&mut self.pairs[i], vector[i], measure.bounds);
            });
            return;
        }
        let values = widened::<E>(vector);
        unroll!(i: usize in [0 1 2 3 4 5 6 7] {
            if i < E::WIDTH as usize {
                self.min[i] = self.min[i].min(values[i]);
                self.max[i] = self.max[i].max(values[i]);
                self.dead[i] = count_if_below(self.dead[i], values[i], measure.epsilon);
            }
        });
    }

    /// Splits what was found in pairs.
    #[inline(always)]
    fn split<E: Element>(&mut self) {
        if E::PAIRED {
            unroll!(i: usize in [0 1 2 3] {
                let [low, high] = E::split(self.pairs[i]);
                (self.min[2 * i], self.max[2 * i], self.dead[2 * i]) = low;
                (self.min[2 * i + 1], self.max[2 * i + 1], self.dead[2 * i + 1]) = high;
            });
        }
    }
}

/// The elements of a vector; those beyond its width are 0.
#[inline(always)]
fn widened<E: Element>(vector: [u32; 4]) -> Each {
    let [a, b, c, d] = E::four(vector, false);
    let [e, f, g, h] = if E::WIDTH == 8 { E::four(vector, true) } else { [0.0; 4] };
    [a, b, c, d, e, f, g, h]
}

/// A lane's place: its columns in the rows of its warp.
#[derive(Clone, Copy)]
struct Place {
    /// Address of the lane's first element of the warp's first row.
    address: u64,
    /// Bytes from one of the warp's rows to the next.
    step: u64,
    /// Columns from the lane's first on; it has none if that is not positive.
    left: i32,
    /// Rows of the warp.
    rows: u32,
    aligned: bool,
}

impl Place {
    /// The vectors of four rows from row `row` on, as [`load_vectors`] takes them.
    #[inline(always)]
    fn four(&self, row: u32) -> [(u64, i32); 4] {
        let at = |row: u32| {
            let address = self.address + u64::from(row) * self.step;
            (address, if row < self.rows { self.left } else { 0 })
        };
        [at(row), at(row + 1), at(row + 2), at(row + 3)]
    }

    /// # Safety
    /// The rows are readable, and nothing writes them while the kernel runs.
    #[inline(always)]
    unsafe fn load<E: Element>(&self, row: u32) -> Vectors {
        if self.aligned && self.left >= E::WIDTH as i32 && row + 4 <= self.rows {
            let first = self.address + u64::from(row) * self.step;
            // SAFETY: four whole vectors.
            return unsafe {
                [
                    ptx::ld_global_v4_u32(first),
                    ptx::ld_global_v4_u32(first + self.step),
                    ptx::ld_global_v4_u32(first + 2 * self.step),
                    ptx::ld_global_v4_u32(first + 3 * self.step),
                ]
            };
        }
        // SAFETY: only existing elements are loaded.
        unsafe { load_vectors::<E>(self.four(row), self.aligned) }
    }
}

/// The statistics of each column.
///
/// # Safety
/// The elements are readable, slots, counters and results writable, and nothing else writes any of
/// them while the kernel runs; the counters are 0; the grid is that of the columns.
#[inline(always)]
pub(in crate::reduce) unsafe fn columns<E: Element>(params: &ColumnParams) {
    start::<THREADS, COLUMN_BLOCKS_PER_MULTIPROCESSOR>();
    wait_for_predecessors();
    let cut = params.columns;
    let (warp, lane) = warp_and_lane();
    let groups = cut.columns.div_ceil(32 * E::WIDTH);
    let stripe = ptx::block_index() / groups.max(1);
    let group = ptx::block_index() - stripe * groups;
    let rows = cut.rows_of(stripe);
    let column = (group * 32 + lane) * E::WIDTH;
    let start = params.data
        + (u64::from(column) << E::LOG2_SIZE)
        + u64::from(stripe * cut.stripe + warp) * params.row_stride;
    let place = Place {
        address: start,
        step: u64::from(WARPS) * params.row_stride,
        left: cut.columns as i32 - column as i32,
        rows: rows_of_warp(rows, warp),
        aligned: (params.data | params.row_stride) % 16 == 0,
    };
    let rule = params.rule();
    let smem = ptx::dynamic_smem();
    // SAFETY: the caller's contract; the whole block.
    unsafe {
        let lane_sums = sums_of_lane::<E>(&place, rule);
        merge_block::<E>(params, &place, &lane_sums, rows, group, stripe, smem);
        if cut.stripes == 1 {
            return;
        }
        // Every thread's slots are written before thread 0 counts the block in; whoever is last has
        // acquired what all others released, and hands it on to its block.
        ptx::bar_sync::<0, THREADS>();
        if is_first_thread() {
            let counter = params.arrived + u64::from(group) * 4;
            let last = ptx::atom_add_acq_rel_gpu_u32(counter, 1) == cut.stripes - 1;
            if last {
                ptx::st_global_u32(counter, 0);
            }
            ptx::st_shared_u32(smem, u32::from(last));
        }
        ptx::bar_sync::<0, THREADS>();
        if ptx::ld_shared_u32(smem) == 0 {
            return;
        }
        merge_stripes::<E>(params, group);
    }
}

/// What a lane found: of each column sums relative to a pivot, and the rest.
struct Found {
    pivot: Each,
    sums: Sums,
    kinds: Kinds,
}

/// # Safety
/// The rows are readable, and nothing writes them while the kernel runs.
#[inline(always)]
unsafe fn sums_of_lane<E: Element>(place: &Place, rule: Rule) -> Found {
    let measure = Measure::new::<E, Summary>(rule);
    // SAFETY: the caller's contract.
    let first = unsafe {
        [place.load::<E>(0), place.load::<E>(4), place.load::<E>(8), place.load::<E>(12)]
    };
    let mut pivot = [0.0; MOST];
    unroll!(four: usize in [0 1 2 3] {
        unroll!(v: usize in [0 1 2 3] {
            let values = widened::<E>(first[four][v].map(ptx::opaque_u32));
            unroll!(i: usize in [0 1 2 3 4 5 6 7] {
                pivot[i] += PIVOT_SCALE * values[i];
            });
        });
    });
    // The others are loaded again, from a cache, when it is their turn.
    let mut vectors = first[0];
    let of = if place.rows < 16 { place.rows } else { 16 };
    let inverse = ptx::rcp_approx_f32(if of == 0 { 1.0 } else { of as f32 });
    unroll!(i: usize in [0 1 2 3 4 5 6 7] {
        pivot[i] = number_or_zero(pivot_of(pivot[i], inverse));
    });
    let mut kinds = Kinds::empty::<E>();
    let (mut run, mut sums) = (Sums::EMPTY, Sums::EMPTY);
    let mut row = 0;
    while row < place.rows {
        ptx::nounroll();
        // SAFETY: the caller's contract.
        let next = unsafe { place.load::<E>(row + 4) };
        if row + 4 <= place.rows {
            let each = [
                widened::<E>(vectors[0].map(ptx::opaque_u32)),
                widened::<E>(vectors[1].map(ptx::opaque_u32)),
                widened::<E>(vectors[2].map(ptx::opaque_u32)),
                widened::<E>(vectors[3].map(ptx::opaque_u32)),
            ];
            unroll!(i: usize in [0 1 2 3 4 5 6 7] {
                if i < E::WIDTH as usize {
                    let [a, b, c, d] = [
                        each[0][i] - pivot[i],
                        each[1][i] - pivot[i],
                        each[2][i] - pivot[i],
                        each[3][i] - pivot[i],
                    ];
                    run.distances[i] += (a + b) + (c + d);
                    let first = fused_multiply_add(b, b, a * a);
                    run.squares[i] += first + fused_multiply_add(d, d, c * c);
                }
            });
            unroll!(v: usize in [0 1 2 3] {
                kinds.add::<E>(vectors[v], measure);
            });
        } else {
            let mut left = place.rows - row;
            each_vector(&mut vectors, |vector| {
                if left > 0 {
                    let values = widened::<E>(vector.map(ptx::opaque_u32));
                    unroll!(i: usize in [0 1 2 3 4 5 6 7] {
                        let distance = values[i] - pivot[i];
                        run.distances[i] += distance;
                        run.squares[i] = fused_multiply_add(distance, distance, run.squares[i]);
                    });
                    kinds.add::<E>(*vector, measure);
                    left -= 1;
                }
            });
        }
        row += 4;
        if row % 16 == 0 {
            sums.take(&mut run);
        }
        vectors = next;
    }
    sums.take(&mut run);
    kinds.split::<E>();
    Found { pivot, sums, kinds }
}

/// Merges what the warps found, four columns of each lane at a time, into slots or results.
///
/// # Safety
/// The whole block executes it; `smem` is shared memory for two halves per warp; the slots and
/// results are the caller's.
#[inline(always)]
unsafe fn merge_block<E: Element>(
    params: &ColumnParams,
    place: &Place,
    found: &Found,
    rows: u32,
    group: u32,
    stripe: u32,
    smem: u32,
) {
    let (cut, rule) = (params.columns, params.rule());
    let thread = ptx::thread_index();
    let (warp, lane) = warp_and_lane();
    unroll!(first: usize in [0 4] {
        if first < E::WIDTH as usize {
            // SAFETY: each lane has places of its own, and a barrier is between writing and reading.
            unsafe {
                if first > 0 {
                    ptx::bar_sync::<0, THREADS>();
                }
                unroll!(i: usize in [0 1 2 3] {
                    let node = node_of::<E>(place, found, first + i, rule);
                    node.put_in_halves(smem, HALF_BYTES, warp, i as u32 * 32 + lane);
                });
                ptx::bar_sync::<0, THREADS>();
                let place = thread % 32 * E::WIDTH + first as u32 + thread / 32;
                let column = group * 32 * E::WIDTH + place;
                if thread < SLOTS && column < cut.columns {
                    let mut all = Node::get_from_halves(smem, HALF_BYTES, 0, thread);
                    let mut other = 1;
                    while other < WARPS {
                        ptx::nounroll();
                        let one = Node::get_from_halves(smem, HALF_BYTES, other, thread);
                        let count = rows_of_warp(rows, other) - one.skipped;
                        all.absorb::<Summary>(&one, count);
                        other += 1;
                    }
                    let partial = partial_of::<Summary>(&all, rows);
                    if cut.stripes == 1 {
                        let size = size_of::<Moments>() as u64;
                        let result = params.results + u64::from(column) * size;
                        store_result(result, &alone::<Summary>(&partial, u64::from(rows)));
                    } else {
                        let slots = params.partials
                            + u64::from(stripe) * u64::from(cut.columns) * size_of::<Partial>() as u64;
                        put(slots, column, &partial);
                    }
                }
            }
        }
    });
}

/// What a lane found of its column number `column`.
///
/// # Safety
/// As [`sums_of_lane`].
#[inline(always)]
unsafe fn node_of<E: Element>(place: &Place, found: &Found, column: usize, rule: Rule) -> Node {
    let mut accumulator = Accumulator::new(found.pivot[column]);
    let batch = Batch {
        distances: [found.sums.distances[column], 0.0, 0.0, 0.0],
        squares: [found.sums.squares[column], 0.0, 0.0, 0.0],
        min: found.kinds.min[column],
        max: found.kinds.max[column],
        dead: found.kinds.dead[column],
    };
    if !accumulator.take(&batch) {
        let mut address = place.address + ((column as u64) << E::LOG2_SIZE);
        let mut row = if (column as i32) < place.left { 0 } else { place.rows };
        while row < place.rows {
            ptx::nounroll();
            // SAFETY: the element exists.
            let bits = unsafe { E::load(address) };
            accumulator.add_exactly(E::widen(bits), rule.skip_nan);
            address += place.step;
            row += 1;
        }
    }
    Node::of(&accumulator)
}

/// The results of a group's columns from the slots of all stripes.
///
/// # Safety
/// The whole block executes it, and sees all slots written; nobody else writes these results.
#[inline(always)]
unsafe fn merge_stripes<E: Element>(params: &ColumnParams, group: u32) {
    let cut = params.columns;
    let usual = Usual::new(cut.stripe);
    let mut in_group = ptx::thread_index();
    while in_group < 32 * E::WIDTH {
        ptx::nounroll();
        let column = group * 32 * E::WIDTH + in_group;
        if column < cut.columns {
            // SAFETY: the caller's contract.
            unsafe { merge_column(params, &cut, column, usual) };
        }
        in_group += THREADS;
    }
}

/// # Safety
/// As [`merge_stripes`], of one column.
#[inline(always)]
unsafe fn merge_column(params: &ColumnParams, cut: &Columns, column: u32, usual: Usual) {
    let slots = params.partials + u64::from(column) * size_of::<Partial>() as u64;
    let step = u64::from(cut.columns) * size_of::<Partial>() as u64;
    let mut total = Total::EMPTY;
    let mut pivot = 0.0;
    let mut stripe = 0;
    // SAFETY: the caller's contract.
    unsafe {
        while stripe < cut.stripes {
            ptx::nounroll();
            // Several under way at once.
            let slot = |ahead: u32| match stripe + ahead {
                stripe if stripe < cut.stripes => get(slots + u64::from(stripe) * step, 0),
                _ => None,
            };
            let partials = [slot(0), slot(1), slot(2), slot(3)];
            unroll!(i: usize in [0 1 2 3] {
                if let Some(partial) = partials[i] {
                    let count = cut.rows_of(stripe + i as u32);
                    if i == 0 && stripe == 0 {
                        // Of skipped elements alone it is 0, which is as good.
                        pivot = mean(&partial, count);
                    }
                    total.add::<Summary>(&partial, count, pivot, usual);
                }
            });
            stripe += 4;
        }
        let result = params.results + u64::from(column) * size_of::<Moments>() as u64;
        store_result(result, &total.moments::<Summary>(u64::from(cut.rows)));
    }
}
