//! Layers without tensor cores: each thread an output, eight rows of the batch at a time.

use super::{Early, Grid, Unit};
use crate::activation::Activation;
use crate::gemm::portable::bf16_from_f32;
use crate::persistent::{LayerPlan, PORTABLE_ROWS, SCRATCH_BYTES, THREADS};
use crate::ptx;

const ROWS: usize = PORTABLE_ROWS as usize;

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
    /// Computes a unit, whose input is there; false never.
    ///
    /// # Safety
    /// Every thread of the block calls it, between two barriers, with a unit of this grid and what
    /// `ahead` gave for the unit's weights.
    unsafe fn compute(grid: &Grid<'_>, unit: Unit, ahead: &Self::Ahead, early: Early) -> bool;
}

/// What differs between the element types. Bits travel in the lower end of a `u32`.
trait Element {
    const SIZE: u32;
    /// All bits one, which says that a result is not there yet.
    const ABSENT: u32 = u32::MAX >> (32 - Self::SIZE * 8);
    fn widen(bits: u32) -> f32;
    fn round(value: f32) -> u32;
    /// # Safety
    /// As [`ptx::ld_relaxed_sys_u32`], for `SIZE` bytes.
    unsafe fn load(address: u64) -> u32;
    /// # Safety
    /// As [`ptx::ld_shared_u32`], for `SIZE` bytes.
    unsafe fn load_shared(address: u32) -> u32;
    /// # Safety
    /// As [`ptx::st_relaxed_sys_u32`], for `SIZE` bytes.
    unsafe fn store(address: u64, bits: u32);
}

pub(in crate::persistent) struct F32;
pub(in crate::persistent) struct F16;
pub(in crate::persistent) struct BF16;

impl Element for F32 {
    const SIZE: u32 = 4;
    #[inline(always)]
    fn widen(bits: u32) -> f32 {
        f32::from_bits(bits)
    }
    #[inline(always)]
    fn round(value: f32) -> u32 {
        value.to_bits()
    }
    #[inline(always)]
    unsafe fn load(address: u64) -> u32 {
        // SAFETY: the caller's contract.
        unsafe { ptx::ld_relaxed_sys_u32(address) }
    }
    #[inline(always)]
    unsafe fn load_shared(address: u32) -> u32 {
        // SAFETY: the caller's contract.
        unsafe { ptx::ld_shared_u32(address) }
    }
    #[inline(always)]
    unsafe fn store(address: u64, bits: u32) {
        // SAFETY: the caller's contract.
        unsafe { ptx::st_relaxed_sys_u32(address, bits) }
    }
}

macro_rules! sixteen_bit_element {
    ($name:ident, $widen:expr, $round:expr) => {
        impl Element for $name {
            const SIZE: u32 = 2;
            #[inline(always)]
            fn widen(bits: u32) -> f32 {
                $widen(bits)
            }
            #[inline(always)]
            fn round(value: f32) -> u32 {
                u32::from($round(value))
            }
            #[inline(always)]
            unsafe fn load(address: u64) -> u32 {
                // SAFETY: the caller's contract.
                u32::from(unsafe { ptx::ld_relaxed_sys_u16(address) })
            }
            #[inline(always)]
            unsafe fn load_shared(address: u32) -> u32 {
                // SAFETY: the caller's contract.
                u32::from(unsafe { ptx::ld_shared_u16(address) })
            }
            #[inline(always)]
            unsafe fn store(address: u64, bits: u32) {
                // SAFETY: the caller's contract.
                unsafe { ptx::st_relaxed_sys_u16(address, bits as u16) }
            }
        }
    };
}
sixteen_bit_element!(F16, |bits: u32| ptx::cvt_f32_f16(bits as u16), ptx::cvt_rn_f16_f32);
sixteen_bit_element!(BF16, |bits: u32| f32::from_bits(bits << 16), bf16_from_f32);

impl<E: Element> Stack for E {
    const LOOKS_EARLY: bool = false;
    type Ahead = ();

    #[inline(always)]
    unsafe fn ahead(_: &Grid<'_>, _: u32) {}

    #[inline(always)]
    unsafe fn compute(grid: &Grid<'_>, unit: Unit, (): &(), _: Early) -> bool {
        let mut first = 0;
        while first < unit.rows {
            ptx::nounroll();
            let left = unit.rows - first;
            let rows = if left < PORTABLE_ROWS { left } else { PORTABLE_ROWS };
            // SAFETY: this contract.
            unsafe { run::<E>(grid, unit, first, rows) }
            first += PORTABLE_ROWS;
        }
        true
    }
}

/// Computes `rows` rows from `first` on.
///
/// # Safety
/// As [`Stack::compute`].
#[inline(always)]
unsafe fn run<E: Element>(grid: &Grid<'_>, unit: Unit, first: u32, rows: u32) {
    let row_bytes = grid.params.row_bytes;
    let mut source = grid.smem + SCRATCH_BYTES;
    let mut target = source + PORTABLE_ROWS * row_bytes;
    // SAFETY: this contract; both buffers have `PORTABLE_ROWS` rows as wide as the widest layer.
    unsafe {
        // The rows before may still be on their way out of the buffer.
        ptx::bar_sync_all();
        let width = grid.plan(0, 0);
        let mut row = 0;
        while row < rows {
            ptx::nounroll();
            let mut column = grid.thread;
            // The loop over k goes by fours: what lies beyond could be NaN, and 0 · NaN is NaN.
            while column < width.next_multiple_of(4) {
                ptx::nounroll();
                let element = u64::from((first + row) * width + column);
                let value = if column < width {
                    E::widen(E::load(unit.input + element * u64::from(E::SIZE)))
                } else {
                    0.0
                };
                ptx::st_shared_f32(source + row * row_bytes + column * 4, value);
                column += THREADS;
            }
            row += 1;
        }
        ptx::bar_sync_all();
        let mut layer = 0;
        while layer < grid.params.layers {
            ptx::nounroll();
            if grid.plan(layer, 6) == LayerPlan::STREAMED {
                product::<E, true>(grid, layer, unit.version, source, target);
            } else {
                product::<E, false>(grid, layer, unit.version, source, target);
            }
            ptx::bar_sync_all();
            (source, target) = (target, source);
            layer += 1;
        }
        let width = grid.plan(layer - 1, 1);
        let mut row = 0;
        while row < rows {
            ptx::nounroll();
            let mut column = grid.thread;
            while column < width {
                ptx::nounroll();
                let value = ptx::ld_shared_u32(source + row * row_bytes + column * 4);
                let element = u64::from((first + row) * width + column);
                let address = unit.output + element * u64::from(E::SIZE);
                let bits = E::round(f32::from_bits(value));
                // Arithmetic gives positive NaNs; should one be negative, it is the same NaN.
                E::store(address, if bits == E::ABSENT { bits >> 1 } else { bits });
                column += THREADS;
            }
            row += 1;
        }
    }
}

/// One layer: results rounded to the element type, and widened again.
///
/// # Safety
/// As [`run`], between two barriers.
#[inline(always)]
unsafe fn product<E: Element, const STREAMED: bool>(
    grid: &Grid<'_>,
    layer: u32,
    version: u32,
    source: u32,
    target: u32,
) {
    let row_bytes = grid.params.row_bytes;
    // SAFETY: `layer` is one of the stack's.
    let [depth, width, weight_at, weight_smem, bias, activation] =
        [0, 1, 2, 6, 7, 8].map(|word| unsafe { grid.plan(layer, word) });
    let activation = Activation::from_code(activation);
    let packed = grid.packed(version) + u64::from(weight_at);
    let weight = |k: u32, column: u32| {
        let at = (k * width + column) * E::SIZE;
        // SAFETY: the matrix has `depth` rows of `width` elements.
        E::widen(unsafe {
            if STREAMED {
                E::load(packed + u64::from(at))
            } else {
                E::load_shared(grid.smem + weight_smem + at)
            }
        })
    };
    let mut column = grid.thread;
    while column < width.next_multiple_of(4) {
        ptx::nounroll();
        let inside = column < width;
        let mut sums = [0.0f32; ROWS];
        let mut k = 0;
        while k < depth && inside {
            ptx::nounroll();
            let mut weights = [0.0f32; 4];
            let mut step = 0;
            while step < 4 {
                if k + (step as u32) < depth {
                    weights[step] = weight(k + step as u32, column);
                }
                step += 1;
            }
            let mut row = 0;
            while row < ROWS {
                // SAFETY: the source has `ROWS` rows, padded to a multiple of four.
                let x = unsafe { ptx::ld_shared_v4_f32(source + row as u32 * row_bytes + k * 4) };
                let mut step = 0;
                while step < 4 {
                    sums[row] = ptx::fma_rn_f32(x[step], weights[step], sums[row]);
                    step += 1;
                }
                row += 1;
            }
            k += 4;
        }
        // SAFETY: biases are padded to a multiple of 32.
        let bias = f32::from_bits(unsafe { ptx::ld_shared_u32(grid.smem + bias + column * 4) });
        // Not unrolled, as the activation is long: the sums move through the registers instead.
        let mut row = 0;
        while row < ROWS as u32 {
            ptx::nounroll();
            let value = if inside { activation.apply(sums[0] + bias) } else { 0.0 };
            sums = [sums[1], sums[2], sums[3], sums[4], sums[5], sums[6], sums[7], sums[0]];
            // SAFETY: the target has `ROWS` rows, padded to a multiple of four.
            unsafe {
                let rounded = E::widen(E::round(value));
                ptx::st_shared_f32(target + row * row_bytes + column * 4, rounded);
            }
            row += 1;
        }
        column += THREADS;
    }
}
