//! Layers on tensor cores: `mma.m16n8k16` of the packed weights and eight rows of the batch.

use super::{Grid, Unit};
use crate::activation::EpilogueActivation;
use crate::persistent::{LayerPlan, PART_ROWS, SCRATCH_BYTES, THREADS};
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
const RESIDENT_STEPS: u32 = 8;
/// A lane's part of the four fragments of a step, and of so many steps.
type Weights = [[u32; 4]; 4];
type Group = [Weights; RESIDENT_STEPS as usize];

/// An element type of the kernels.
pub(in crate::persistent) trait Stack {
    /// What a thread keeps in registers while it waits for a unit.
    type Ahead;
    /// Loads that, of the weights in shared memory.
    ///
    /// # Safety
    /// Every thread of the block calls it, after a barrier that follows the loading of the weights.
    unsafe fn ahead(grid: &Grid<'_>) -> Self::Ahead;
    /// Computes a unit.
    ///
    /// # Safety
    /// Every thread of the block calls it, between two barriers, with a unit of this grid and what
    /// `ahead` gave for the unit's weights.
    unsafe fn compute(grid: &Grid<'_>, unit: Unit, ahead: &Self::Ahead);
}

/// Sums of two times 16 outputs by up to four times 8 rows, as `mma` holds them in a lane.
type Sums = [[[f32; 4]; 4]; 2];

/// The body for each number below `N`, at most 4, as a constant: what is held in registers must
/// not be indexed by a variable.
macro_rules! for_each_below {
    ($bound:ident, $index:ident => $body:block) => {
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
    type Ahead = Group;

    #[inline(always)]
    unsafe fn ahead(grid: &Grid<'_>) -> Group {
        // SAFETY: this contract; every stack has a first layer.
        unsafe { Product::of(grid, 0, 0, 0, 0).ahead() }
    }

    #[inline(always)]
    unsafe fn compute(grid: &Grid<'_>, unit: Unit, ahead: &Group) {
        // SAFETY: this contract; the branch is the same in every thread.
        unsafe {
            if unit.rows <= 8 {
                run::<E, 1>(grid, unit, ahead);
            } else if unit.rows <= 16 {
                run::<E, 2>(grid, unit, ahead);
            } else {
                run::<E, 4>(grid, unit, ahead);
            }
        }
    }
}

/// Computes a unit of at most `8·N` rows.
///
/// # Safety
/// As [`Stack::compute`].
#[inline(always)]
unsafe fn run<E: Element, const N: u32>(grid: &Grid<'_>, unit: Unit, ahead: &Group) {
    let mut source = grid.smem + SCRATCH_BYTES;
    let mut target = source + PART_ROWS * grid.params.row_bytes;
    // SAFETY: this contract; both buffers have `PART_ROWS` rows as wide as the widest layer.
    unsafe {
        load_rows(grid, unit, source, grid.plan(0, 0));
        ptx::bar_sync_all();
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

/// Brings the unit's input to shared memory, the columns up to the next multiple of 32 as zeros:
/// what lay there could be NaN, and 0 · NaN is NaN.
///
/// # Safety
/// As [`Stack::compute`]; a barrier follows.
#[inline(always)]
unsafe fn load_rows(grid: &Grid<'_>, unit: Unit, buffer: u32, width: u32) {
    let row_bytes = grid.params.row_bytes;
    // SAFETY: the input has `rows` rows of `width` elements, one after the other; a buffer's row
    // has room for `width` rounded up to 32.
    unsafe {
        if width.is_multiple_of(8) && unit.input.is_multiple_of(16) {
            let mut at = Vectors::new(grid.thread, width / 8);
            // Several loads on their way at a time: each takes a trip over the bus.
            while at.row < unit.rows {
                ptx::nounroll();
                let mut places = [u32::MAX; 4];
                let mut values = [[0; 4]; 4];
                const LOADS: u32 = 4;
                for_each_below!(LOADS, LOAD => {
                    if at.row < unit.rows {
                        let address = unit.input + u64::from(at.index) * 16;
                        values[LOAD] = ptx::ld_relaxed_sys_v4_u32(address);
                        places[LOAD] = buffer + at.row * row_bytes + at.column * 16;
                        at.advance();
                    }
                });
                for_each_below!(LOADS, LOAD => {
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
        if grid.thread < width.next_multiple_of(32) - width {
            let mut row = 0;
            while row < unit.rows {
                ptx::nounroll();
                ptx::st_shared_u16(buffer + row * row_bytes + (width + grid.thread) * 2, 0);
                row += 1;
            }
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

/// One layer of one unit.
struct Product {
    /// The packed matrix in shared memory, unless it is streamed, and in global memory.
    smem: u32,
    packed: u64,
    streamed: bool,
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

    /// The first steps of this warp's first outputs, if the matrix stays in shared memory and has
    /// as many; they may be loaded before the layer's input is there.
    ///
    /// # Safety
    /// After a barrier that follows the loading of the weights.
    #[inline(always)]
    unsafe fn ahead(&self) -> Group {
        if !self.streamed && self.warp < self.pairs && RESIDENT_STEPS <= self.steps {
            // SAFETY: this contract.
            unsafe { self.group(self.warp, 0) }
        } else {
            [[[0; 4]; 4]; RESIDENT_STEPS as usize]
        }
    }

    /// # Safety
    /// Every thread of the block calls it, between two barriers, with what `ahead` gave.
    #[inline(always)]
    unsafe fn run<E: Element, const N: u32, const STREAMED: bool>(&self, ahead: &Group) {
        let mut weights = *ahead;
        let mut pair = self.warp;
        while pair < self.pairs {
            ptx::nounroll();
            let mut sums = [[[0.0; 4]; 4]; 2];
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
                        if pair != self.warp || step > 0 {
                            weights = self.group(pair, step);
                            // All of them under way before the first is used: the assembler would
                            // put loads off to save registers.
                            ptx::bar_warp_sync();
                        }
                        let [w0, w1, w2, w3, w4, w5, w6, w7] = weights;
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
            pair += WARPS;
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
        for_each_below!(N, ROWS => {
            // SAFETY: this contract; the buffer has `PART_ROWS` rows.
            unsafe {
                let [b0, b1, b2, b3] = ldmatrix_x4(at + ROWS as u32 * 8 * self.row_bytes);
                E::mma(&mut sums[0][ROWS], weights[0], [b0, b1]);
                E::mma(&mut sums[1][ROWS], weights[2], [b0, b1]);
                E::mma(&mut sums[0][ROWS], weights[1], [b2, b3]);
                E::mma(&mut sums[1][ROWS], weights[3], [b2, b3]);
            }
        });
    }

    /// Bias, activation, rounding, and the results into the target's rows.
    ///
    /// # Safety
    /// As [`run`](Self::run).
    #[inline(always)]
    unsafe fn finish<E: Element, const N: u32>(&self, sums: &Sums, pair: u32) {
        const HALVES: u32 = 2;
        for_each_below!(HALVES, HALF => {
            // m16n8k16: this lane holds outputs `lane / 4` and that plus 8, of the rows
            // `2·(lane % 4)` and the next.
            let output = pair * 32 + HALF as u32 * 16 + self.lane / 4;
            // SAFETY: biases are padded to a multiple of 32, as rows are.
            unsafe {
                let low = f32::from_bits(ptx::ld_shared_u32(self.bias + output * 4));
                let high = f32::from_bits(ptx::ld_shared_u32(self.bias + output * 4 + 32));
                for_each_below!(N, ROWS => {
                    let [c0, c1, c2, c3] = sums[HALF][ROWS];
                    let [c0, c1, c2, c3] =
                        self.activate([c0 + low, c1 + low, c2 + high, c3 + high]);
                    let (first, second) = (E::pack(c0, c2), E::pack(c1, c3));
                    let row = ROWS as u32 * 8 + self.lane % 4 * 2;
                    let at = self.target + row * self.row_bytes + output * 2;
                    ptx::st_shared_u16(at, first as u16);
                    ptx::st_shared_u16(at + 16, (first >> 16) as u16);
                    ptx::st_shared_u16(at + self.row_bytes, second as u16);
                    ptx::st_shared_u16(at + self.row_bytes + 16, (second >> 16) as u16);
                });
            }
        });
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
