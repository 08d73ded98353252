//! Layers on tensor cores: `mma.m16n8k16` of the packed weights and eight rows of the batch.

use super::{Early, Grid, POLLS, Unit, is_absent};
use crate::activation::EpilogueActivation;
use crate::persistent::{AHEAD_STEPS, LayerPlan, PART_ROWS, SCRATCH_BYTES, THREADS};
use crate::ptx;
use crate::ptx::mma::{ldmatrix_x4, mma_m16n8k16_bf16, mma_m16n8k16_f16};

/// Warps of a block.
const WARPS: u32 = THREADS / 32;
/// Bytes of a packed fragment: 16 per lane.
const FRAGMENT_BYTES: u32 = 512;
/// Bytes of the four fragments of 32 outputs and 32 inputs.
const STEP_BYTES: u32 = 4 * FRAGMENT_BYTES;
/// Steps of 32 inputs whose weights are on their way at a time when they come from the L2 cache.
const STREAM_STEPS: u32 = 4;
/// The same when they come from shared memory, whose bandwidth is then what a layer takes.
const RESIDENT_STEPS: u32 = AHEAD_STEPS;
/// A lane's part of the four fragments of a step, and of so many steps.
type Weights = [[u32; 4]; 4];
type Group = [Weights; RESIDENT_STEPS as usize];

/// An element type of the kernels.
pub(in crate::persistent) trait Stack {
    /// Whether inputs may be looked for before their unit is known.
    const LOOKS_EARLY: bool;
    /// What a thread keeps in registers while it waits for a unit.
    type Ahead;
    /// Loads that, of the weights of a version.
    ///
    /// # Safety
    /// Every thread of the block calls it, after a barrier that follows the loading of the weights.
    unsafe fn ahead(grid: &Grid<'_>, version: u32) -> Self::Ahead;
    /// Computes a unit; false, in every thread, if its input did not arrive within the lease.
    ///
    /// # Safety
    /// Every thread of the block calls it, between two barriers, with a unit of this grid and what
    /// `ahead` gave for the unit's weights.
    unsafe fn compute(grid: &Grid<'_>, unit: Unit, ahead: &Self::Ahead, early: Early) -> bool;
}

/// Sums of two times 16 outputs by two times 8 rows, as `mma` holds them in a lane, over the
/// even and over the odd ones of the 16 inputs: an `mma` waits for the one before it that adds to
/// the same sums.
type Sums = [[[[f32; 4]; 2]; 2]; 2];

/// The body for each number below a bound, at most 2 or 4, as a constant: what is held in registers
/// must not be indexed by a variable.
macro_rules! for_each_below {
    ($bound:ident of 2, $index:ident => $body:block) => {
        for_each_below!(@ $bound, $index, $body, 0 1)
    };
    ($bound:ident of 4, $index:ident => $body:block) => {
        for_each_below!(@ $bound, $index, $body, 0 1 2 3)
    };
    (@ $bound:ident, $index:ident, $body:block, $($number:literal)+) => {
        $(if $number < $bound {
            const $index: usize = $number;
            $body
        })+
    };
}

/// What differs between the element types.
trait Element {
    /// # Safety
    /// As [`mma_m16n8k16_bf16`].
    unsafe fn mma(sum: &mut [f32; 4], a: [u32; 4], b: [u32; 2]);
    /// Two results, rounded; the first in the lower half.
    fn pack(low: f32, high: f32) -> u32;
}

pub(in crate::persistent) struct F16;
pub(in crate::persistent) struct BF16;

impl Element for F16 {
    #[inline(always)]
    unsafe fn mma(sum: &mut [f32; 4], a: [u32; 4], b: [u32; 2]) {
        // SAFETY: the caller's contract.
        unsafe { mma_m16n8k16_f16(sum, a, b) }
    }
    #[inline(always)]
    fn pack(low: f32, high: f32) -> u32 {
        ptx::cvt_rn_f16x2_f32(high, low)
    }
}

impl Element for BF16 {
    #[inline(always)]
    unsafe fn mma(sum: &mut [f32; 4], a: [u32; 4], b: [u32; 2]) {
        // SAFETY: the caller's contract.
        unsafe { mma_m16n8k16_bf16(sum, a, b) }
    }
    #[inline(always)]
    fn pack(low: f32, high: f32) -> u32 {
        ptx::cvt_rn_bf16x2_f32(high, low)
    }
}

impl<E: Element> Stack for E {
    const LOOKS_EARLY: bool = true;
    type Ahead = Group;

    #[inline(always)]
    unsafe fn ahead(grid: &Grid<'_>, version: u32) -> Group {
        // SAFETY: this contract; every stack has a first layer.
        unsafe { Product::of(grid, 0, version, 0, 0).ahead() }
    }

    #[inline(always)]
    unsafe fn compute(grid: &Grid<'_>, unit: Unit, ahead: &Group, early: Early) -> bool {
        // SAFETY: this contract; branches on the unit are the same in every thread.
        unsafe {
            let (buffer, width) = (grid.smem + SCRATCH_BYTES, grid.plan(0, 0));
            let missing = if unit.early > 0 {
                store_early(grid, unit, early, buffer, width)
            } else {
                load_rows(grid, unit, buffer, width)
            };
            pad_rows(grid, unit, buffer, width);
            if ptx::bar_red_or_all(missing) {
                return false;
            }
            if unit.rows <= 8 {
                run::<E, 1>(grid, unit, ahead);
            } else if unit.rows <= 16 {
                run::<E, 2>(grid, unit, ahead);
            } else {
                run::<E, 4>(grid, unit, ahead);
            }
        }
        true
    }
}

/// Computes a unit of at most `8·N` rows, whose input is in the first buffer.
///
/// # Safety
/// As [`Stack::compute`], after a barrier.
#[inline(always)]
unsafe fn run<E: Element, const N: u32>(grid: &Grid<'_>, unit: Unit, ahead: &Group) {
    let mut source = grid.smem + SCRATCH_BYTES;
    let mut target = source + PART_ROWS * grid.params.row_bytes;
    // SAFETY: this contract; both buffers have `PART_ROWS` rows as wide as the widest layer.
    unsafe {
        let mut weights = *ahead;
        let mut layer = 0;
        loop {
            ptx::nounroll();
            let product = Product::of(grid, layer, unit.version, source, target);
            if product.streamed {
                product.run::<E, N, true>(&weights);
            } else {
                product.run::<E, N, false>(&weights);
            }
            layer += 1;
            if layer == grid.params.layers {
                break;
            }
            weights = Product::of(grid, layer, unit.version, source, target).ahead();
            ptx::bar_sync_all();
            (source, target) = (target, source);
        }
        ptx::bar_sync_all();
        store_rows(grid, unit, target, grid.plan(layer - 1, 1));
    }
}

/// Vectors of the input that a thread has under way at a time: each takes a trip over the bus.
const LOADS: u32 = 4;

/// How long a thread waits for what is to arrive.
#[derive(Default)]
struct Patience {
    polls: u32,
    since: u64,
}

impl Patience {
    /// Counts a poll in vain; whether these have gone on for so long.
    #[inline(always)]
    fn is_over(&mut self, nanoseconds: u64) -> bool {
        self.polls += 1;
        if !self.polls.is_multiple_of(POLLS) {
            return false;
        }
        let now = ptx::globaltimer();
        if self.since == 0 {
            self.since = now;
        }
        now.wrapping_sub(self.since) > nanoseconds
    }
}

/// A thread's way through rows of vectors of 16 bytes, without a division.
struct Vectors {
    row: u32,
    column: u32,
    /// Counted through all rows.
    index: u32,
    per_row: u32,
}

impl Vectors {
    #[inline(always)]
    fn new(thread: u32, per_row: u32) -> Self {
        let mut vectors = Self { row: 0, column: thread, index: thread, per_row };
        vectors.wrap();
        vectors
    }

    #[inline(always)]
    fn advance(&mut self) {
        self.index += THREADS;
        self.column += THREADS;
        self.wrap();
    }

    #[inline(always)]
    fn wrap(&mut self) {
        while self.column >= self.per_row {
            ptx::nounroll();
            self.column -= self.per_row;
            self.row += 1;
        }
    }
}

/// Brings the unit's input to shared memory. Whether this thread waited in vain for a part that was
/// to arrive, for longer than the lease.
///
/// # Safety
/// As [`Stack::compute`]; a barrier follows. Only rows of whole vectors arrive
/// ([`StackPlan::takes_arriving`](crate::persistent::StackPlan::takes_arriving)).
#[inline(always)]
unsafe fn load_rows(grid: &Grid<'_>, unit: Unit, buffer: u32, width: u32) -> bool {
    let row_bytes = grid.params.row_bytes;
    let mut missing = false;
    // SAFETY: the input has `rows` rows of `width` elements, one after the other.
    unsafe {
        if width.is_multiple_of(8) && unit.input.is_multiple_of(16) {
            let mut at = Vectors::new(grid.thread, width / 8);
            while at.row < unit.rows && !missing {
                ptx::nounroll();
                let mut places = [u32::MAX; 4];
                let mut values = [[0; 4]; 4];
                let first = unit.input + u64::from(at.index) * 16;
                let load = |load: usize| {
                    ptx::ld_relaxed_sys_v4_u32(first + load as u64 * u64::from(THREADS * 16))
                };
                for_each_below!(LOADS of 4, LOAD => {
                    if at.row < unit.rows {
                        values[LOAD] = load(LOAD);
                        places[LOAD] = buffer + at.row * row_bytes + at.column * 16;
                        at.advance();
                    }
                });
                let mut patience = Patience::default();
                while unit.arriving && !missing {
                    ptx::nounroll();
                    let mut absent = false;
                    for_each_below!(LOADS of 4, LOAD => {
                        if places[LOAD] != u32::MAX && is_absent(values[LOAD]) {
                            absent = true;
                            values[LOAD] = load(LOAD);
                        }
                    });
                    if !absent {
                        break;
                    }
                    missing = patience.is_over(grid.params.lease_ns);
                }
                for_each_below!(LOADS of 4, LOAD => {
                    if places[LOAD] != u32::MAX {
                        ptx::st_shared_v4_u32(places[LOAD], values[LOAD]);
                    }
                });
            }
        } else {
            let mut row = 0;
            while row < unit.rows {
                ptx::nounroll();
                let mut column = grid.thread;
                while column < width {
                    ptx::nounroll();
                    let element = u64::from(row * width + column);
                    let value = ptx::ld_relaxed_sys_u16(unit.input + element * 2);
                    ptx::st_shared_u16(buffer + row * row_bytes + column * 2, value);
                    column += THREADS;
                }
                row += 1;
            }
        }
    }
    missing
}

/// Brings the unit's input to shared memory from the registers where it is, as [`load_rows`] does
/// where it is not.
///
/// # Safety
/// As [`load_rows`]; the unit is what was expected.
#[inline(always)]
unsafe fn store_early(grid: &Grid<'_>, unit: Unit, early: Early, buffer: u32, width: u32) -> bool {
    let mut missing = false;
    if grid.thread < unit.early {
        let mut vector = early.vector;
        let mut patience = Patience::default();
        // SAFETY: this contract; `early` counts vectors of the input's rows.
        unsafe {
            if !early.found {
                loop {
                    ptx::nounroll();
                    vector = ptx::ld_relaxed_sys_v4_u32(unit.input + u64::from(grid.thread * 16));
                    if !is_absent(vector) {
                        break;
                    }
                    missing = patience.is_over(grid.params.lease_ns);
                    if missing {
                        break;
                    }
                }
            }
            let at = Vectors::new(grid.thread, width / 8);
            let place = buffer + at.row * grid.params.row_bytes + at.column * 16;
            ptx::st_shared_v4_u32(place, vector);
        }
    }
    missing
}

/// Makes the columns after the unit's input, up to the next multiple of 32, zeros: what lay there
/// could be NaN, and 0 · NaN is NaN.
///
/// # Safety
/// As [`Stack::compute`]; a barrier follows.
#[inline(always)]
unsafe fn pad_rows(grid: &Grid<'_>, unit: Unit, buffer: u32, width: u32) {
    if grid.thread < width.next_multiple_of(32) - width {
        let mut place = buffer + (width + grid.thread) * 2;
        let mut row = 0;
        while row < unit.rows {
            ptx::nounroll();
            // SAFETY: a buffer's row has room for `width` rounded up to 32.
            unsafe { ptx::st_shared_u16(place, 0) }
            place += grid.params.row_bytes;
            row += 1;
        }
    }
}

/// Writes the unit's result.
///
/// # Safety
/// As [`Stack::compute`]; a barrier came before.
#[inline(always)]
unsafe fn store_rows(grid: &Grid<'_>, unit: Unit, buffer: u32, width: u32) {
    let row_bytes = grid.params.row_bytes;
    // SAFETY: as in `load_rows`, for the output.
    unsafe {
        if width.is_multiple_of(8) && unit.output.is_multiple_of(16) {
            let mut at = Vectors::new(grid.thread, width / 8);
            while at.row < unit.rows {
                let values = ptx::ld_shared_v4_u32(buffer + at.row * row_bytes + at.column * 16);
                ptx::st_relaxed_sys_v4_u32(unit.output + u64::from(at.index) * 16, values);
                at.advance();
            }
        } else {
            let mut row = 0;
            while row < unit.rows {
                ptx::nounroll();
                let mut column = grid.thread;
                while column < width {
                    ptx::nounroll();
                    let value = ptx::ld_shared_u16(buffer + row * row_bytes + column * 2);
                    let element = u64::from(row * width + column);
                    ptx::st_relaxed_sys_u16(unit.output + element * 2, value);
                    column += THREADS;
                }
                row += 1;
            }
        }
    }
}

/// The weights of several steps, and which they are.
struct Held {
    group: Group,
    pair: u32,
    step: u32,
}

/// One layer of one unit.
struct Product {
    /// The packed matrix in shared memory, unless it is streamed, and in global memory.
    smem: u32,
    packed: u64,
    streamed: bool,
    /// Whether the matrix is nowhere but in what `ahead` gives.
    is_ahead: bool,
    bias: u32,
    source: u32,
    target: u32,
    row_bytes: u32,
    /// Pairs of 16 outputs, and steps of 32 inputs.
    pairs: u32,
    steps: u32,
    activation: EpilogueActivation,
    lane: u32,
    warp: u32,
}

impl Product {
    /// # Safety
    /// `layer` is one of the stack's.
    #[inline(always)]
    unsafe fn of(grid: &Grid<'_>, layer: u32, version: u32, source: u32, target: u32) -> Self {
        // SAFETY: this contract.
        unsafe {
            let q = [9, 10, 11, 12, 13, 14, 15].map(|word| f32::from_bits(grid.plan(layer, word)));
            Self {
                smem: grid.smem.wrapping_add(grid.plan(layer, 6)),
                packed: grid.packed(version) + u64::from(grid.plan(layer, 2)),
                streamed: grid.plan(layer, 6) == LayerPlan::STREAMED,
                is_ahead: grid.plan(layer, 6) == LayerPlan::AHEAD,
                bias: grid.smem + grid.plan(layer, 7),
                source,
                target,
                row_bytes: grid.params.row_bytes,
                pairs: grid.plan(layer, 1).div_ceil(32),
                steps: grid.plan(layer, 0).div_ceil(32),
                activation: EpilogueActivation {
                    q,
                    t_max: f32::from_bits(grid.plan(layer, 16)),
                    lower: f32::from_bits(grid.plan(layer, 17)),
                    smooth: grid.plan(layer, 18),
                },
                lane: grid.thread % 32,
                warp: grid.thread / 32,
            }
        }
    }

    /// The first steps of this warp's first outputs, if the matrix has as many and is not streamed;
    /// they may be loaded before the layer's input is there.
    ///
    /// # Safety
    /// After a barrier that follows the loading of the weights.
    #[inline(always)]
    unsafe fn ahead(&self) -> Group {
        let is_mine = self.warp < self.pairs && RESIDENT_STEPS <= self.steps;
        if self.is_ahead && is_mine {
            // SAFETY: this contract.
            [0, 1, 2, 3, 4, 5, 6, 7].map(|step| unsafe { self.streamed(self.warp, step) })
        } else if !self.streamed && is_mine {
            // SAFETY: this contract.
            unsafe { self.group(self.warp, 0) }
        } else {
            [[[0; 4]; 4]; RESIDENT_STEPS as usize]
        }
    }

    /// `8·N` rows, at most two times 8 at a time: weights stay in registers while the sums change.
    ///
    /// # Safety
    /// Every thread of the block calls it, between two barriers, with what `ahead` gave.
    #[inline(always)]
    unsafe fn run<E: Element, const N: u32, const STREAMED: bool>(&self, ahead: &Group) {
        let mut weights = Held { group: *ahead, pair: self.warp, step: 0 };
        let mut pair = self.warp;
        while pair < self.pairs {
            ptx::nounroll();
            // SAFETY: this contract; the pair is one of the packed matrix.
            unsafe {
                if N == 1 {
                    self.pair::<E, 1, STREAMED>(pair, &mut weights);
                } else {
                    let mut rows = Self { ..*self };
                    let mut pass = 0;
                    while pass < N / 2 {
                        ptx::nounroll();
                        rows.pair::<E, 2, STREAMED>(pair, &mut weights);
                        rows.source += 16 * self.row_bytes;
                        rows.target += 16 * self.row_bytes;
                        pass += 1;
                    }
                }
            }
            pair += WARPS;
        }
    }

    /// 32 outputs of `8·N` rows.
    ///
    /// # Safety
    /// As [`run`](Self::run), with a pair of the packed matrix.
    #[inline(always)]
    unsafe fn pair<E: Element, const N: u32, const STREAMED: bool>(
        &self,
        pair: u32,
        weights: &mut Held,
    ) {
        let mut sums = [[[[0.0; 4]; 2]; 2]; 2];
        let mut step = 0;
        // SAFETY: this contract; steps and pairs are those of the packed matrix.
        unsafe {
            if STREAMED {
                while step + STREAM_STEPS <= self.steps {
                    ptx::nounroll();
                    self.streamed_steps::<E, N>(&mut sums, pair, step);
                    step += STREAM_STEPS;
                }
                while step < self.steps {
                    ptx::nounroll();
                    self.step::<E, N>(&mut sums, step, self.streamed(pair, step));
                    step += 1;
                }
            } else {
                while step + RESIDENT_STEPS <= self.steps {
                    ptx::nounroll();
                    if pair != weights.pair || step != weights.step {
                        *weights = Held { group: self.group(pair, step), pair, step };
                        // All of them under way before the first is used: the assembler would
                        // put loads off to save registers.
                        ptx::bar_warp_sync();
                    }
                    let [w0, w1, w2, w3, w4, w5, w6, w7] = weights.group;
                    self.step::<E, N>(&mut sums, step, w0);
                    self.step::<E, N>(&mut sums, step + 1, w1);
                    self.step::<E, N>(&mut sums, step + 2, w2);
                    self.step::<E, N>(&mut sums, step + 3, w3);
                    self.step::<E, N>(&mut sums, step + 4, w4);
                    self.step::<E, N>(&mut sums, step + 5, w5);
                    self.step::<E, N>(&mut sums, step + 6, w6);
                    self.step::<E, N>(&mut sums, step + 7, w7);
                    step += RESIDENT_STEPS;
                }
                while step < self.steps {
                    ptx::nounroll();
                    self.step::<E, N>(&mut sums, step, self.resident(pair, step));
                    step += 1;
                }
            }
            self.finish::<E, N>(&sums, pair);
        }
    }

    /// Several steps whose weights are all loaded before the first is used.
    ///
    /// # Safety
    /// As [`run`](Self::run), with `STREAM_STEPS` steps from `step` on.
    #[inline(always)]
    unsafe fn streamed_steps<E: Element, const N: u32>(
        &self,
        sums: &mut Sums,
        pair: u32,
        step: u32,
    ) {
        // SAFETY: this contract.
        unsafe {
            let weights = [0, 1, 2, 3].map(|ahead| self.streamed(pair, step + ahead));
            self.step::<E, N>(sums, step, weights[0]);
            self.step::<E, N>(sums, step + 1, weights[1]);
            self.step::<E, N>(sums, step + 2, weights[2]);
            self.step::<E, N>(sums, step + 3, weights[3]);
        }
    }

    /// The fragments of several steps, from shared memory.
    ///
    /// # Safety
    /// The matrix stays in shared memory and has `RESIDENT_STEPS` steps from `step` on.
    #[inline(always)]
    unsafe fn group(&self, pair: u32, step: u32) -> Group {
        // SAFETY: this contract.
        [0, 1, 2, 3, 4, 5, 6, 7].map(|ahead| unsafe { self.resident(pair, step + ahead) })
    }

    /// The four fragments of a step, from shared memory.
    ///
    /// # Safety
    /// The matrix stays in shared memory and has the step.
    #[inline(always)]
    unsafe fn resident(&self, pair: u32, step: u32) -> Weights {
        let at = self.smem + (pair * self.steps + step) * STEP_BYTES + self.lane * 16;
        // SAFETY: this contract.
        [0, 1, 2, 3]
            .map(|fragment| unsafe { ptx::ld_shared_v4_u32(at + fragment * FRAGMENT_BYTES) })
    }

    /// The four fragments of a step, from the L2 cache: not from the L1, which may hold what the
    /// weights were before an update.
    ///
    /// # Safety
    /// The matrix has the step.
    #[inline(always)]
    unsafe fn streamed(&self, pair: u32, step: u32) -> Weights {
        let offset = (pair * self.steps + step) * STEP_BYTES + self.lane * 16;
        let at = self.packed + u64::from(offset);
        [0, 1, 2, 3].map(|fragment: u32| {
            // SAFETY: this contract.
            unsafe { ptx::ld_relaxed_gpu_v4_u32(at + u64::from(fragment * FRAGMENT_BYTES)) }
        })
    }

    /// 32 outputs of `8·N` rows by 32 inputs.
    ///
    /// # Safety
    /// As [`run`](Self::run).
    #[inline(always)]
    unsafe fn step<E: Element, const N: u32>(&self, sums: &mut Sums, step: u32, weights: Weights) {
        // Lane l gives row l % 8 of the matrix of the inputs 8·(l / 8) and the next seven.
        let at = self.source + self.lane % 8 * self.row_bytes + self.lane / 8 * 16 + step * 64;
        for_each_below!(N of 2, ROWS => {
            // SAFETY: this contract; the buffer has `PART_ROWS` rows.
            unsafe {
                let [b0, b1, b2, b3] = ldmatrix_x4(at + ROWS as u32 * 8 * self.row_bytes);
                E::mma(&mut sums[0][ROWS][0], weights[0], [b0, b1]);
                E::mma(&mut sums[1][ROWS][0], weights[2], [b0, b1]);
                E::mma(&mut sums[0][ROWS][1], weights[1], [b2, b3]);
                E::mma(&mut sums[1][ROWS][1], weights[3], [b2, b3]);
            }
        });
    }

    /// Bias, activation, rounding, and the results into the target's rows.
    ///
    /// # Safety
    /// As [`run`](Self::run).
    #[inline(always)]
    unsafe fn finish<E: Element, const N: u32>(&self, sums: &Sums, pair: u32) {
        // m16n8k16: this lane holds outputs `lane / 4` and that plus 8 of each half, of the rows
        // `2·(lane % 4)` and the next.
        let output = self.bias + (pair * 32 + self.lane / 4) * 4;
        // Lane l says where row l % 8 of the matrix of the outputs 8·(l / 8) and the next seven goes.
        let at = self.target + self.lane % 8 * self.row_bytes + (pair * 32 + self.lane / 8 * 8) * 2;
        // SAFETY: biases are padded to a multiple of 32, as rows are; the buffer has `PART_ROWS`
        // rows, which begin at multiples of 16 bytes.
        unsafe {
            let bias =
                [0, 8, 16, 24].map(|ahead| f32::from_bits(ptx::ld_shared_u32(output + ahead * 4)));
            for_each_below!(N of 2, ROWS => {
                let [first, second] = [0, 1].map(|half| {
                    let [even, odd] = sums[half][ROWS];
                    let [low, high] = [bias[half * 2], bias[half * 2 + 1]];
                    let [c0, c1, c2, c3] = self.activate([
                        even[0] + odd[0] + low,
                        even[1] + odd[1] + low,
                        even[2] + odd[2] + high,
                        even[3] + odd[3] + high,
                    ]);
                    [E::pack(c0, c1), E::pack(c2, c3)]
                });
                let rows = at + ROWS as u32 * 8 * self.row_bytes;
                ptx::stmatrix_x4_trans(rows, first[0], first[1], second[0], second[1]);
            });
        }
    }

    #[inline(always)]
    fn activate(&self, values: [f32; 4]) -> [f32; 4] {
        if self.activation.smooth == 0 {
            values.map(|value| ptx::max_nan_f32(value, self.activation.lower))
        } else {
            values.map(|value| {
                let power = ptx::ex2_approx_f32(self.activation.sigmoid_exponent(value));
                value * ptx::rcp_approx_f32(1.0 + power)
            })
        }
    }
}
