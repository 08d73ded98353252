//! Layers on tensor cores: `mma.m16n8k16` of the packed weights and eight rows of the batch.

use super::rows::{load_rows, pad_rows, store_early, store_rows};
use super::{Early, Grid, Unit};
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
