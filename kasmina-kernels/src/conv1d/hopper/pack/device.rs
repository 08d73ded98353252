//! Device side of the filter's copy.

use super::{PackParams, THREADS, TILE};
use crate::ptx;

/// # Safety
/// Launched by `launch` on the host with the geometry of `KERNEL` and parameters that the host's
/// `conv1d/hopper.rs` has derived from a checked shape.
#[unsafe(no_mangle)]
pub unsafe extern "ptx-kernel" fn conv1d_pack_filter(params: PackParams) {
    // SAFETY: a comment for `cargo xtask ptx`.
    unsafe {
        core::arch::asm!("// kasmina: .maxntid {threads}, 1, 1", threads = const THREADS,
            options(nomem, nostack, preserves_flags));
    }
    let smem = ptx::dynamic_smem();
    let [group, row, column, tap] = params.place(ptx::block_index());
    let (fast, slow) = (ptx::thread_index() % TILE, ptx::thread_index() / TILE);
    let swapped = params.rows_are_neighbours != 0;
    let filter = params.filter + 2 * (group as u64 * params.group_stride);
    ptx::griddepcontrol_launch_dependents();
    ptx::griddepcontrol_wait();
    let mut other = slow;
    while other < TILE {
        let (r, c) = if swapped { (fast, other) } else { (other, fast) };
        let (at_row, at_column) = (row + r, column + c);
        if at_row < params.rows && at_column < params.columns {
            let element = at_row as u64 * params.row_stride
                + at_column as u64 * params.column_stride
                + tap as u64 * params.tap_stride;
            // SAFETY: inside the filter; the place in shared memory is this thread's.
            unsafe {
                let bits = ptx::ld_global_u16(filter + 2 * element);
                ptx::st_shared_u32(smem + 4 * (r * (TILE + 1) + c), bits as u32);
            }
        }
        other += THREADS / TILE;
    }
    // SAFETY: the whole block is here.
    unsafe { ptx::bar_sync_all() };
    let matrix = tap as u64 * params.groups as u64 + group as u64;
    let mut other = slow;
    while other < TILE {
        let (at_row, at_column) = (row + other, column + fast);
        if at_row < params.rows && at_column < params.columns {
            let element = (matrix * params.rows as u64 + at_row as u64)
                * params.packed_stride
                + at_column as u64;
            // SAFETY: inside the packed filter, which has a place for each element.
            unsafe {
                let bits = ptx::ld_shared_u32(smem + 4 * (other * (TILE + 1) + fast));
                ptx::st_global_u16(params.packed + 2 * element, bits as u16);
            }
        }
        other += THREADS / TILE;
    }
}
