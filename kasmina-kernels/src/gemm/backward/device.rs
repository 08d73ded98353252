//! Device side of the gradient and the sum kernels.

use super::*;
use crate::activation::Activation;
use crate::gemm::element::{Element, F32, OVERLAPS};
use crate::ptx;
use crate::unroll::unroll;

/// Elements in 16 bytes.
const fn width<E: Element>() -> u32 {
    16 / E::SIZE
}

/// A thread's sums of the columns of its vector; a 4-byte type uses the first half.
type Sums = [f32; 8];

/// The activation's gradient of one element, in the accuracy its type is worth.
#[inline(always)]
fn gradient_of<E: Element>(activation: Activation, z: f32, dy: f32) -> f32 {
    if E::SIZE == 4 { activation.gradient(z, dy) } else { activation.gradient_for_16_bits(z, dy) }
}

/// dZ of a vector whose bits, and those of Z, are given; rounded for storing, added to the sums as
/// it was before.
#[inline(always)]
fn gradient_of_vector<E: Element>(
    activation: Activation,
    dy: [u32; 4],
    saved: [u32; 4],
    sums: &mut Sums,
) -> [u32; 4] {
    let mut dz = [0; 4];
    unroll!(element: u32 in [0 1 2 3 4 5 6 7] {
        if element < width::<E>() {
            let (word, shift) = ((element * E::SIZE / 4) as usize, element * E::SIZE % 4 * 8);
            let (dy, z) = (E::widen(dy[word] >> shift), E::widen(saved[word] >> shift));
            let value = gradient_of::<E>(activation, z, dy);
            sums[element as usize] += value;
            dz[word] |= E::round(value) << shift;
        }
    });
    dz
}

/// Where a thread's columns of an operand start, and how to get from row to row.
#[derive(Clone, Copy)]
struct Operand {
    /// 0 if there is none.
    base: u64,
    /// In bytes.
    stride: u64,
}

impl Operand {
    #[inline(always)]
    fn new<E: Element>(base: u64, stride: u64, column: u32) -> Self {
        let size = u64::from(E::SIZE);
        let base = if base == 0 { 0 } else { base.wrapping_add(u64::from(column) * size) };
        Self { base, stride: stride * size }
    }

    #[inline(always)]
    const fn row(self, row: u32) -> u64 {
        self.base.wrapping_add(row as u64 * self.stride)
    }

    #[inline(always)]
    const fn is_aligned(self) -> bool {
        (self.base | self.stride) % 16 == 0
    }

    /// The first `columns` elements of a row, the others 0; all 0 without an operand.
    ///
    /// # Safety
    /// The elements are readable and nothing writes them while the kernel runs; with `vector` they
    /// fill 16 bytes and base and stride are multiples of 16.
    #[inline(always)]
    unsafe fn load<E: Element>(self, row: u32, columns: u32, vector: bool) -> [u32; 4] {
        let mut bits = [0; 4];
        if self.base == 0 {
            return bits;
        }
        let address = self.row(row);
        if vector {
            // SAFETY: the caller's contract.
            return unsafe {
                if OVERLAPS {
                    ptx::ld_global_v4_u32(address)
                } else {
                    ptx::ld_global_nc_v4_u32(address)
                }
            };
        }
        unroll!(element: u32 in [0 1 2 3 4 5 6 7] {
            if element < width::<E>() && element < columns {
                let byte = element * E::SIZE;
                // SAFETY: an existing element.
                let loaded = unsafe { E::load(address + u64::from(byte)) };
                bits[(byte / 4) as usize] |= loaded << (byte % 4 * 8);
            }
        });
        bits
    }

    /// # Safety
    /// As [`load`](Self::load), for writing.
    #[inline(always)]
    unsafe fn store<E: Element>(self, row: u32, columns: u32, vector: bool, bits: [u32; 4]) {
        let address = self.row(row);
        if vector {
            // SAFETY: the caller's contract.
            return unsafe { ptx::st_global_v4_u32(address, bits) };
        }
        unroll!(element: u32 in [0 1 2 3 4 5 6 7] {
            if element < width::<E>() && element < columns {
                let byte = element * E::SIZE;
                let value = bits[(byte / 4) as usize] >> (byte % 4 * 8);
                // SAFETY: an existing element.
                unsafe { E::store(address + u64::from(byte), value) };
            }
        });
    }
}

/// The rows of a thread in its chunk.
#[derive(Clone, Copy)]
struct Rows {
    dy: Operand,
    saved: Operand,
    dz: Operand,
    first: u32,
    end: u32,
    /// How many of the vector's columns exist.
    columns: u32,
}

impl Rows {
    /// dZ of all rows, and the sums of its columns.
    ///
    /// # Safety
    /// As the kernel's; with `VECTOR` all columns exist and every operand is aligned.
    #[inline(always)]
    unsafe fn gradient<E: Element, const VECTOR: bool>(self, activation: Activation) -> Sums {
        let mut sums = [0.0; 8];
        let mut row = self.first;
        while row < self.end {
            // One by one the elements would be too many to have in flight, and code to have twice.
            ptx::nounroll();
            let in_flight = if VECTOR { ROWS_IN_FLIGHT } else { 1 };
            let mut dy = [[0; 4]; ROWS_IN_FLIGHT as usize];
            let mut saved = [[0; 4]; ROWS_IN_FLIGHT as usize];
            unroll!(i: u32 in [0 1 2 3] {
                let at = row + i * SLOTS;
                if i < in_flight && at < self.end {
                    // SAFETY: an existing row, by the caller's contract.
                    unsafe {
                        dy[i as usize] = self.dy.load::<E>(at, self.columns, VECTOR);
                        saved[i as usize] = self.saved.load::<E>(at, self.columns, VECTOR);
                    }
                }
            });
            unroll!(i: u32 in [0 1 2 3] {
                let at = row + i * SLOTS;
                if i < in_flight && at < self.end {
                    let (dy, saved) = (dy[i as usize], saved[i as usize]);
                    let dz = gradient_of_vector::<E>(activation, dy, saved, &mut sums);
                    if self.dz.base != 0 {
                        // SAFETY: an existing row, by the caller's contract.
                        unsafe { self.dz.store::<E>(at, self.columns, VECTOR, dz) };
                    }
                }
            });
            row += in_flight * SLOTS;
        }
        sums
    }
}

/// What ptxas and the scheduler are told first: four blocks a multiprocessor, which leave 64
/// registers a thread.
#[inline(always)]
fn start() {
    // SAFETY: comments for `cargo xtask ptx`.
    unsafe {
        core::arch::asm!(
            "// kasmina: .maxntid {threads}, 1, 1",
            "// kasmina: .minnctapersm 4",
            threads = const THREADS,
            options(nomem, nostack, preserves_flags),
        );
    }
    if OVERLAPS {
        // In this order everything before the predecessor is complete, too, when a grid starts.
        ptx::griddepcontrol_wait();
        ptx::griddepcontrol_launch_dependents();
    }
}

/// Adds to what an element of a result holds, if asked to, and stores it.
///
/// # Safety
/// `address` is that of a writable element that no other thread accesses.
#[inline(always)]
unsafe fn store_result<E: Element>(address: u64, value: f32, accumulate: u32) {
    // SAFETY: the caller's contract. Not through the read-only path, as it is written next.
    unsafe {
        let mut value = value;
        if accumulate != 0 {
            let before = if E::SIZE == 4 {
                ptx::ld_global_u32(address)
            } else {
                u32::from(ptx::ld_global_u16(address))
            };
            value += E::widen(before);
        }
        E::store(address, E::round(value));
    }
}

/// dZ of a strip and chunk, and the sums of its columns.
///
/// # Safety
/// The operands are readable, what the parameters name as results is writable, nothing else writes
/// any of them while the kernel runs, and the block's index names a strip and chunk.
#[inline(always)]
pub(super) unsafe fn gradient<E: Element>(params: &GradientParams) {
    start();
    let thread = ptx::thread_index() % THREADS;
    let (lane, slot) = (thread % LANES, thread / LANES);
    let (chunk, strip) = params.grid.tile(ptx::block_index());
    let strip_columns = LANES * width::<E>();
    let strip_start = strip * strip_columns;
    let column = strip_start + lane * width::<E>();
    let first_row = chunk * params.chunk_rows;
    let rows_left = params.m - first_row;
    let left = params.n.saturating_sub(column);
    let rows = Rows {
        dy: Operand::new::<E>(params.dy, params.dy_stride, column),
        saved: Operand::new::<E>(params.saved, params.saved_stride, column),
        dz: Operand::new::<E>(params.dz, params.dz_stride, column),
        first: first_row + slot,
        end: first_row + if rows_left < params.chunk_rows { rows_left } else { params.chunk_rows },
        columns: if left < width::<E>() { left } else { width::<E>() },
    };
    let aligned = |operand: Operand| operand.base == 0 || operand.is_aligned();
    let vector =
        rows.columns == width::<E>() && aligned(rows.dy) && aligned(rows.saved) && aligned(rows.dz);

    // The activation is chosen once, not for every element.
    macro_rules! of_each {
        ($($variant:ident)+) => {
            match Activation::from_code(params.activation) {
                // SAFETY: the caller's contract; `vector` says what it must.
                $(Activation::$variant => unsafe {
                    if vector {
                        rows.gradient::<E, true>(Activation::$variant)
                    } else {
                        rows.gradient::<E, false>(Activation::$variant)
                    }
                },)+
            }
        };
    }
    let mut sums = of_each!(None Relu Gelu GeluTanh Silu);
    if params.db == 0 && params.partials == 0 {
        return;
    }

    // Lanes 8 and 16 apart have the same columns of other rows.
    unroll!(i: usize in [0 1 2 3 4 5 6 7] {
        if i < width::<E>() as usize {
            // SAFETY: the whole warp is here.
            unsafe {
                sums[i] += f32::from_bits(ptx::shfl_sync_bfly::<8>(sums[i].to_bits()));
                sums[i] += f32::from_bits(ptx::shfl_sync_bfly::<16>(sums[i].to_bits()));
            }
        }
    });
    let smem = ptx::dynamic_smem();
    let warp_bytes = strip_columns * 4;
    if thread % 32 < LANES {
        let address = smem + thread / 32 * warp_bytes + lane * (width::<E>() * 4);
        unroll!(i: u32 in [0 1 2 3 4 5 6 7] {
            if i < width::<E>() {
                // SAFETY: the warp's own place.
                unsafe { ptx::st_shared_f32(address + 4 * i, sums[i as usize]) };
            }
        });
    }
    // SAFETY: the whole block is here.
    unsafe { ptx::bar_sync::<0, THREADS>() };
    let column = strip_start + thread;
    if thread >= strip_columns || column >= params.n {
        return;
    }
    let mut sum = 0.0;
    let mut warp = 0;
    while warp < THREADS / 32 {
        // SAFETY: written before the barrier.
        sum += f32::from_bits(unsafe { ptx::ld_shared_u32(smem + warp * warp_bytes + thread * 4) });
        warp += 1;
    }
    // SAFETY: an element of the result, which one thread of the grid has.
    unsafe {
        if params.db != 0 {
            let address = params.db + u64::from(column) * u64::from(E::SIZE);
            store_result::<E>(address, sum, params.accumulate);
        } else {
            let element = u64::from(chunk) * u64::from(params.n) + u64::from(column);
            ptx::st_global_u32(params.partials + 4 * element, sum.to_bits());
        }
    }
}

/// Adds partial results.
///
/// # Safety
/// The partials are readable, the results writable, and nothing else writes any of them while the
/// kernel runs; the block's index is below the two jobs' blocks.
#[inline(always)]
pub(super) unsafe fn sum<E: Element>(params: &SumParams) {
    start();
    let first_blocks = params.jobs[0].grid.num_tiles();
    let block = ptx::block_index();
    // SAFETY: the caller's contract. The whole block takes one job.
    unsafe {
        if block < first_blocks {
            sum_job::<E>(&params.jobs[0], block);
        } else {
            sum_job::<E>(&params.jobs[1], block - first_blocks);
        }
    }
}

/// # Safety
/// As [`sum`]; the whole block calls it.
#[inline(always)]
unsafe fn sum_job<E: Element>(job: &SumJob, block: u32) {
    let thread = ptx::thread_index() % THREADS;
    let (row, part) = job.grid.tile(block);
    let (groups, within, group) = if job.shared != 0 {
        (SUM_GROUPS, thread % (THREADS / SUM_GROUPS), thread / (THREADS / SUM_GROUPS))
    } else {
        (1, thread, 0)
    };
    let column = part * (if job.shared != 0 { THREADS / SUM_GROUPS } else { THREADS }) + within;
    let exists = column < job.columns;
    let mut sum = 0.0f32;
    if exists {
        let plane = u64::from(job.grid.tiles_m) * u64::from(job.columns) * 4;
        let element = u64::from(row) * u64::from(job.columns) + u64::from(column);
        let step = plane * u64::from(groups);
        let mut address = job.partials + 4 * element + plane * u64::from(group);
        let mut i = group;
        // Four in flight, added in order.
        while i + 3 * groups < job.count {
            // SAFETY: existing partials, by the caller's contract.
            let loaded = unsafe {
                [
                    F32::load(address),
                    F32::load(address + step),
                    F32::load(address + 2 * step),
                    F32::load(address + 3 * step),
                ]
            };
            sum += f32::from_bits(loaded[0]);
            sum += f32::from_bits(loaded[1]);
            sum += f32::from_bits(loaded[2]);
            sum += f32::from_bits(loaded[3]);
            address += 4 * step;
            i += 4 * groups;
        }
        while i < job.count {
            ptx::nounroll();
            // SAFETY: an existing partial.
            sum += f32::from_bits(unsafe { F32::load(address) });
            address += step;
            i += groups;
        }
    }
    if job.shared != 0 {
        let smem = ptx::dynamic_smem();
        // SAFETY: the thread's own place; the whole block takes this branch.
        unsafe {
            ptx::st_shared_f32(smem + 4 * thread, sum);
            ptx::bar_sync::<0, THREADS>();
        }
        if group != 0 {
            return;
        }
        let mut other = 1;
        while other < SUM_GROUPS {
            let address = smem + 4 * (other * (THREADS / SUM_GROUPS) + within);
            // SAFETY: written before the barrier.
            sum += f32::from_bits(unsafe { ptx::ld_shared_u32(address) });
            other += 1;
        }
    }
    if exists {
        let element = u64::from(row) * job.out_stride + u64::from(column);
        // SAFETY: an element of the result, which one thread of the grid has.
        unsafe {
            store_result::<E>(job.out + element * u64::from(E::SIZE), sum, job.accumulate);
        }
    }
}
