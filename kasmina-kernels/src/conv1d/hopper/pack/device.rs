//! Device side of the filter's copy.

use super::{PackParams, THREADS, TILE};
use crate::ptx;

/// # Safety
/// Launched by `launch` on the host with the geometry of `KERNEL` and parameters that the host's
/// `conv1d/hopper.rs` has derived from a checked shape.
#[unsafe(no_mangle)]
pub(super) unsafe extern "ptx-kernel" fn conv1d_pack_filter(params: PackParams) {
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
    let load = |step: u32| {
        let other = slow + step * (THREADS / TILE);
        let (r, c) = if swapped { (fast, other) } else { (other, fast) };
        let (at_row, at_column) = (row + r, column + c);
        let element = at_row as u64 * params.row_stride
            + at_column as u64 * params.column_stride
            + tap as u64 * params.tap_stride;
        let place = smem + 4 * (r * (TILE + 1) + c);
        let inside = at_row < params.rows && at_column < params.columns;
        // SAFETY: inside the filter.
        (place, if inside { unsafe { ptx::ld_global_u16(filter + 2 * element) } } else { 0 })
    };
    // All are on their way before the first is used.
    let [a, b, c, d] = [load(0), load(1), load(2), load(3)];
    // SAFETY: this thread's places in shared memory.
    unsafe {
        ptx::st_shared_u32(a.0, a.1 as u32);
        ptx::st_shared_u32(b.0, b.1 as u32);
        ptx::st_shared_u32(c.0, c.1 as u32);
        ptx::st_shared_u32(d.0, d.1 as u32);
    }
    // SAFETY: the whole block is here.
    unsafe { ptx::bar_sync_all() };
    let matrix = tap as u64 * params.groups as u64 + group as u64;
    let mut other = slow;
    while other < TILE {
        let (at_row, at_column) = (row + other, column + fast);
        if at_row < params.rows && at_column < params.columns {
            let element = (matrix * params.rows as u64 + at_row as u64) * params.packed_stride
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
