//! Summaries of blocks of 16×64 elements by a warp each, for kernels that have just stored them.

use super::segments::partial_of_team;
use super::*;

/// Columns of a block.
const BLOCK: u32 = 64;
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
unsafe fn summary_of_block<E: Element>(
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
    let mut accumulator = Accumulator::new(number_or_zero(measure.pivot));
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

/// The summary of some rows, at most 16, and columns, a multiple of 8, from the blocks that `block`
/// gives by their first column.
///
/// # Safety
/// As [`summary_of_block`].
#[inline(always)]
pub(crate) unsafe fn summary_of_blocks<E: Element, S: Source>(
    block: impl Fn(u32) -> S,
    rows: u32,
    columns: u32,
    rule: Rule,
) -> Partial {
    let (mut total, mut pivot, mut column) = (Total::EMPTY, 0.0, 0);
    while column < columns {
        ptx::nounroll();
        let left = columns - column;
        let width = if left < BLOCK { left } else { BLOCK };
        // SAFETY: the caller's contract.
        let partial = unsafe { summary_of_block::<E>(block(column), rows, width, rule) };
        let len = rows * width;
        if column == 0 {
            pivot = mean(&partial, len);
        }
        total.add::<Summary>(&partial, len, pivot, Usual::new(len));
        column += BLOCK;
    }
    total.partial(rows * columns)
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
