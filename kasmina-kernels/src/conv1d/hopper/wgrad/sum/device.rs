//! Device side of the second kernel.

use super::{BIAS_SLOT, PartsSumParams, SumParams, THREADS};
use crate::gemm::hopper::device::{BF16, Element, F16};
use crate::gemm::parts::words_need_repair;
use crate::ptx;

/// The type of the gradients.
trait Type {
    const SIZE: u64;
    /// # Safety
    /// `address` is that of a readable element.
    unsafe fn load(address: u64) -> f32;
    /// # Safety
    /// `address` is that of a writable element, which no other thread accesses.
    unsafe fn store(address: u64, value: f32);
}

macro_rules! narrow {
    ($($type:ident)+) => {
        $(impl Type for $type {
            const SIZE: u64 = 2;
            #[inline(always)]
            unsafe fn load(address: u64) -> f32 {
                // SAFETY: by the caller's contract.
                Self::widen(unsafe { ptx::ld_global_u16(address) })
            }
            #[inline(always)]
            unsafe fn store(address: u64, value: f32) {
                // SAFETY: by the caller's contract.
                unsafe { ptx::st_global_u16(address, Self::pack(0.0, value) as u16) };
            }
        })+
    };
}
narrow!(BF16 F16);

struct F32;
impl Type for F32 {
    const SIZE: u64 = 4;
    #[inline(always)]
    unsafe fn load(address: u64) -> f32 {
        // SAFETY: by the caller's contract.
        f32::from_bits(unsafe { ptx::ld_global_u32(address) })
    }
    #[inline(always)]
    unsafe fn store(address: u64, value: f32) {
        // SAFETY: by the caller's contract.
        unsafe { ptx::st_global_u32(address, value.to_bits()) };
    }
}

/// The floats that one element is summed from.
#[derive(Clone, Copy)]
struct Column {
    first: u64,
    stride: u64,
    count: u32,
}

impl Column {
    /// Adds every `step`th float from `start` on.
    ///
    /// # Safety
    /// The floats lie in the workspace, complete.
    #[inline(always)]
    unsafe fn sum(self, start: u32, step: u32) -> f32 {
        let mut sum = 0.0f32;
        let mut index = start;
        let at = |index: u32| self.first + index as u64 * self.stride;
        // SAFETY: below `count`, by the caller's contract. Eight loads are in flight at a time.
        unsafe {
            while index + 7 * step < self.count {
                let bits = [
                    ptx::ld_global_u32(at(index)),
                    ptx::ld_global_u32(at(index + step)),
                    ptx::ld_global_u32(at(index + 2 * step)),
                    ptx::ld_global_u32(at(index + 3 * step)),
                    ptx::ld_global_u32(at(index + 4 * step)),
                    ptx::ld_global_u32(at(index + 5 * step)),
                    ptx::ld_global_u32(at(index + 6 * step)),
                    ptx::ld_global_u32(at(index + 7 * step)),
                ];
                let [a, b, c, d, e, f, g, h] = bits.map(f32::from_bits);
                sum += ((a + b) + (c + d)) + ((e + f) + (g + h));
                index += 8 * step;
            }
            while index < self.count {
                sum += f32::from_bits(ptx::ld_global_u32(at(index)));
                index += step;
            }
        }
        sum
    }
}

/// # Safety
/// The whole block calls it, after the grid before has ended; parameters that the host's `conv1d/hopper.rs` has derived from a
/// checked shape.
#[inline(always)]
unsafe fn sum<T: Type>(params: SumParams) {
    let smem = ptx::dynamic_smem();
    let elements = crate::tile_scheduler::div(THREADS, params.lanes);
    let lane = crate::tile_scheduler::div(ptx::thread_index(), elements);
    let within = ptx::thread_index() - lane * elements;
    let number = ptx::block_index() * elements + within;
    let filter = params.filter_elements();
    let (mut value, mut out) = (0.0f32, 0u64);
    if number < filter {
        if params.dw != 0 {
            let element = params.element(number);
            let (slot, count) = params.split.slots(element.tile);
            let slot_bytes = (params.block_m * params.block_n) as u64 * 4;
            let first = params.partials + slot as u64 * slot_bytes + element.index as u64 * 4;
            // SAFETY: the slots of the element's tile.
            value = unsafe { Column { first, stride: slot_bytes, count }.sum(lane, params.lanes) };
            out = params.dw + T::SIZE * element.offset;
        }
    } else if number - filter < params.out_channels && params.db != 0 {
        let channel = number - filter;
        let (place, row) = params.row(channel);
        let stride = BIAS_SLOT as u64 * 4;
        let mut column = 0;
        while column < params.walk.tiles_n {
            let (slot, count) = params.split.slots(params.walk.tile(place) + column);
            let first = params.bias_partials + slot as u64 * stride + row as u64 * 4;
            // SAFETY: the slots of the tiles of the channel's row; of 64 rows there are two sums.
            unsafe {
                value += Column { first, stride, count }.sum(lane, params.lanes);
                if params.block_m == 64 {
                    let first = first + 64 * 4;
                    value += Column { first, stride, count }.sum(lane, params.lanes);
                }
            }
            column += 1;
        }
        out = params.db + T::SIZE * channel as u64;
    }
    let place = smem + 4 * ptx::thread_index();
    // SAFETY: every thread has its place; the first lane reads those of its element after the
    // barrier, and it alone writes the element.
    unsafe {
        ptx::st_shared_f32(place, value);
        ptx::bar_sync_all();
        if lane == 0 && out != 0 {
            let mut other = 1;
            while other < params.lanes {
                value += f32::from_bits(ptx::ld_shared_u32(place + 4 * other * elements));
                other += 1;
            }
            if params.accumulate != 0 {
                value += T::load(out);
            }
            T::store(out, value);
        }
    }
}

macro_rules! entry {
    ($entry:ident, $type:ident) => {
        /// # Safety
        /// Launched by `launch` on the host with the geometry of its `Kernel` and parameters that
        /// the host's `conv1d/hopper.rs` has derived from a checked shape.
        #[unsafe(no_mangle)]
        pub(super) unsafe extern "ptx-kernel" fn $entry(params: SumParams) {
            // SAFETY: a comment for `cargo xtask ptx`; the whole block calls `sum`.
            unsafe {
                core::arch::asm!("// kasmina: .maxntid {threads}, 1, 1", threads = const THREADS,
                    options(nomem, nostack, preserves_flags));
                ptx::griddepcontrol_launch_dependents();
                ptx::griddepcontrol_wait();
                sum::<$type>(params);
            }
        }
    };
}

entry!(conv1d_wgrad_sum_bf16, BF16);
entry!(conv1d_wgrad_sum_f16, F16);

/// # Safety
/// As the others, of the host's `conv1d/parts/wgrad.rs`, and the findings are readable.
#[unsafe(no_mangle)]
pub(super) unsafe extern "ptx-kernel" fn conv1d_wgrad_sum_f32(params: PartsSumParams) {
    // SAFETY: a comment for `cargo xtask ptx`; the whole block calls `sum`, or none of it.
    unsafe {
        core::arch::asm!("// kasmina: .maxntid {threads}, 1, 1", threads = const THREADS,
            options(nomem, nostack, preserves_flags));
        ptx::griddepcontrol_launch_dependents();
        ptx::griddepcontrol_wait();
        // What a repair computes may be added to what is there, which is left as it is then.
        if !words_need_repair(params.findings, params.num_findings, THREADS) {
            sum::<F32>(params.sum);
        }
    }
}
