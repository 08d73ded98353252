//! Device side of the copy, and the stores of results that TMA cannot store.

use super::{PIECE, PIECES_PER_THREAD, PackJob, PackParams, PlainRows, THREADS, shifted};
use crate::gemm::hopper::device::{Element, wait_for_predecessors};
use crate::gemm::hopper::{CONSUMER_M, SLAB_N};
use crate::ptx;
use crate::smem_layout::swizzle_128b;

/// # Safety
/// Launched by `launch` on the host with the geometry of `KERNEL` and jobs that describe memory
/// which is valid on the device (`gemm/unaligned.rs` on the host).
#[unsafe(no_mangle)]
pub(super) unsafe extern "ptx-kernel" fn pack_rows(params: PackParams) {
    // SAFETY: a comment for `cargo xtask ptx`.
    unsafe {
        core::arch::asm!("// kasmina: .maxntid {threads}, 1, 1", "// kasmina: .minnctapersm 4",
            threads = const THREADS, options(nomem, nostack, preserves_flags));
    }
    let first_blocks = params.jobs[0].grid.num_tiles();
    let block = ptx::block_index();
    wait_for_predecessors();
    // SAFETY: the caller's contract.
    unsafe {
        if block < first_blocks {
            pack(&params.jobs[0], block);
        } else {
            pack(&params.jobs[1], block - first_blocks);
        }
    }
}

/// What a thread copies: a piece of the packed row, and what it is made of.
#[derive(Clone, Copy)]
struct Copy {
    /// Of the first element.
    source: u64,
    target: u64,
    /// Elements of it that exist.
    elements: u32,
    /// The element of the source's own piece that the first is.
    by: u32,
    loaded: Option<[[u32; 4]; 2]>,
}

/// # Safety
/// The job's matrices are valid; `tile` is one of its tiles.
#[inline(always)]
unsafe fn pack(job: &PackJob, tile: u32) {
    let [first, piece, step] = job.place(tile, ptx::thread_index());
    let column = piece * PIECE;
    if column >= job.columns {
        return;
    }
    let left = job.columns - column;
    let elements = if left < PIECE { left } else { PIECE };
    // Whole pieces between these may be read, also where they hold what is not the matrix's.
    let last_row = (job.rows - 1) as u64 * job.source_stride;
    let (begin, end) = (job.source, job.source + 2 * (last_row + job.columns as u64));
    let copy = |i: u32| {
        let row = first + i * step;
        let exists = row < job.rows;
        let source = job.source + 2 * (row as u64 * job.source_stride + column as u64);
        let by = (source >> 1) as u32 % PIECE;
        let low = source - 2 * by as u64;
        let whole = exists && low >= begin && low + 16 <= end;
        let two = by != 0 && low + 32 <= end;
        // The second is not needed where no element of it is.
        let enough = two || by + elements <= PIECE;
        // SAFETY: inside the matrix.
        let loaded = unsafe {
            let first = ptx::ld_global_v4_u32_if(low, whole);
            [first, ptx::ld_global_v4_u32_if(low + 16, whole && two)]
        };
        Copy {
            source,
            target: job.target + 2 * (row as u64 * job.target_stride + column as u64),
            elements: if exists { elements } else { 0 },
            by,
            loaded: if whole && enough { Some(loaded) } else { None },
        }
    };
    // All are on their way before the first is used.
    let copies: [Copy; PIECES_PER_THREAD as usize] = [copy(0), copy(1), copy(2), copy(3)];
    // SAFETY: pieces of the packed matrix, each of which one thread of the grid has.
    unsafe {
        finish(copies[0]);
        finish(copies[1]);
        finish(copies[2]);
        finish(copies[3]);
    }
}

/// # Safety
/// The copy's elements and its piece of the packed matrix exist.
#[inline(always)]
unsafe fn finish(copy: Copy) {
    if copy.elements == 0 {
        return;
    }
    // SAFETY: the caller's contract.
    unsafe {
        let values = match copy.loaded {
            Some([first, second]) => shifted(first, second, copy.by),
            None => one_by_one(copy.source, copy.elements),
        };
        ptx::st_global_v4_u32(copy.target, values);
    }
}

/// Up to eight elements, and zeros behind them.
///
/// # Safety
/// They exist.
#[inline(always)]
unsafe fn one_by_one(source: u64, elements: u32) -> [u32; 4] {
    let load = |i: u32| {
        // SAFETY: by the caller's contract.
        if i < elements { unsafe { ptx::ld_global_u16(source + 2 * i as u64) as u32 } } else { 0 }
    };
    let pair = |i: u32| load(i) | load(i + 1) << 16;
    [pair(0), pair(2), pair(4), pair(6)]
}

/// Rows of a slab of 64 columns in shared memory, and where in the result they belong.
#[derive(Clone, Copy)]
pub(crate) struct Slab {
    /// Address of the swizzled slab, 1024-aligned.
    pub(crate) buffer: u32,
    /// First row of the slab.
    pub(crate) first: u32,
    /// How many rows.
    pub(crate) rows: u32,
    /// Row of the result that the first is.
    pub(crate) row: u32,
    /// Column of the result that the slab's first is.
    pub(crate) column: u32,
}

/// What a thread has of a row of a slab.
#[derive(Clone, Copy)]
struct Part {
    exists: bool,
    /// Address of the row's first element in the result.
    start: u64,
    /// Row in shared memory.
    buffer_row: u32,
    /// Elements ahead of the first whole piece.
    head: u32,
    piece: [u32; 4],
    /// One of the elements ahead of the whole pieces and behind them: which, and its bits.
    element: u32,
    bits: u16,
}

/// Stores a slab's rows, or adds them to what is there.
///
/// # Safety
/// 128 threads call it, `thread` from 0 on, after a barrier behind the writers of the slab, which is
/// not written before one behind this. The result is valid.
#[inline(always)]
pub(crate) unsafe fn store_slab<E: Element>(
    out: PlainRows,
    slab: Slab,
    thread: u32,
    accumulate: bool,
) {
    let piece = thread % 8;
    let left = out.columns.saturating_sub(slab.column);
    let width = if left < SLAB_N { left } else { SLAB_N };
    let row = thread / 8;
    let address =
        out.address + 2 * (u64::from(slab.row + row) * out.stride + u64::from(slab.column));
    let part = |i: u32| {
        let row = row + 16 * i;
        let start = address + u64::from(32 * i) * out.stride;
        let head = 0u32.wrapping_sub((start >> 1) as u32) % PIECE;
        // Rows that do not exist read some row of the slab all the same.
        let buffer_row = (slab.first + row) % CONSUMER_M;
        let at = |element: u32| slab.buffer + swizzle_128b(buffer_row, 2 * element);
        let next = if piece < 7 { piece + 1 } else { 7 };
        let element = if piece < head { piece } else { SLAB_N - PIECE + piece };
        // SAFETY: inside the slab.
        unsafe {
            let first = ptx::ld_shared_v4_u32(at(PIECE * piece));
            let second = ptx::ld_shared_v4_u32(at(PIECE * next));
            Part {
                exists: row < slab.rows && slab.row + row < out.rows,
                start,
                buffer_row,
                head,
                piece: shifted(first, second, head),
                element,
                bits: ptx::ld_shared_u16(at(element)),
            }
        }
    };
    // SAFETY: elements of the result that only this thread has, of the slab's row.
    let store = |part: Part| unsafe {
        if !part.exists {
            return;
        }
        let from = part.head + PIECE * piece;
        let address = part.start + 2 * u64::from(from);
        if from + PIECE <= width {
            store_piece::<E>(address, part.piece, accumulate);
        } else if width < SLAB_N {
            let mut i = 0;
            while i < PIECE && from + i < width {
                ptx::nounroll();
                let source = swizzle_128b(part.buffer_row, 2 * (from + i));
                let bits = ptx::ld_shared_u16(slab.buffer + source);
                store_element::<E>(address + 2 * u64::from(i), bits, accumulate);
                i += 1;
            }
        }
        // Unless the loop above has those behind.
        let behind = width == SLAB_N && part.head != 0;
        if (piece < part.head && part.element < width) || (piece >= part.head && behind) {
            let address = part.start + 2 * u64::from(part.element);
            store_element::<E>(address, part.bits, accumulate);
        }
    };
    // All are on their way before the first is used: row after row took a tenth of the time of
    // 4096×4095×4096 on an H200.
    let parts: [Part; (CONSUMER_M / 16) as usize] = [part(0), part(1), part(2), part(3)];
    store(parts[0]);
    store(parts[1]);
    store(parts[2]);
    store(parts[3]);
}

/// # Safety
/// `address` is that of 16 bytes, 16-aligned, that only this thread accesses.
#[inline(always)]
unsafe fn store_piece<E: Element>(address: u64, values: [u32; 4], accumulate: bool) {
    let mut values = values;
    // SAFETY: the caller's contract.
    unsafe {
        if accumulate {
            let [a, b, c, d] = ptx::ld_global_v4_u32(address);
            let [e, f, g, h] = values;
            values = [add::<E>(a, e), add::<E>(b, f), add::<E>(c, g), add::<E>(d, h)];
        }
        ptx::st_global_v4_u32(address, values);
    }
}

/// # Safety
/// `address` is that of an element that only this thread accesses.
#[inline(always)]
unsafe fn store_element<E: Element>(address: u64, bits: u16, accumulate: bool) {
    let mut bits = bits;
    // SAFETY: the caller's contract.
    unsafe {
        if accumulate {
            bits = add::<E>(ptx::ld_global_u16(address).into(), bits.into()) as u16;
        }
        ptx::st_global_u16(address, bits);
    }
}

/// The sums of two pairs.
#[inline(always)]
fn add<E: Element>(a: u32, b: u32) -> u32 {
    let ((a_low, a_high), (b_low, b_high)) = (E::widen_pair(a), E::widen_pair(b));
    E::pack(a_high + b_high, a_low + b_low)
}
