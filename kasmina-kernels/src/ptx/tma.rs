//! The bulk tensor copy engine. `map` is the generic address of a tensor map in parameter,
//! constant or global space; coordinates are elements, innermost first.

use core::arch::asm;

/// Fetches a tensor map into the descriptor cache.
///
/// # Safety
/// `map` is the 64-aligned address of a valid tensor map.
#[inline(always)]
pub unsafe fn prefetch_tensormap(map: u64) {
    // SAFETY: the caller's contract.
    unsafe { asm!("prefetch.tensormap [{}];", in(reg64) map, options(nostack)) }
}

/// Starts copying the box at `(x, y)` to shared memory; its bytes count on `barrier`. Elements
/// outside the tensor arrive as zeros and count too.
///
/// # Safety
/// `map` is the 64-aligned address of a valid rank-2 map; `dst` has room for its box and the
/// alignment of its swizzle, and nothing reads or writes it until the barrier's phase completes;
/// `barrier` expects these bytes.
#[inline(always)]
pub unsafe fn cp_async_bulk_tensor_2d_load(dst: u32, map: u64, x: u32, y: u32, barrier: u32) {
    // SAFETY: the caller's contract.
    unsafe {
        asm!("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes \
              [{}], [{}, {{{}, {}}}], [{}];",
             in(reg32) dst, in(reg64) map, in(reg32) x, in(reg32) y, in(reg32) barrier,
             options(nostack));
    }
}

/// As [`cp_async_bulk_tensor_2d_load`], to the same place in every block of the cluster whose bit
/// of `mask` is set; the bytes count on the barrier at the same place there.
///
/// # Safety
/// As [`cp_async_bulk_tensor_2d_load`], in each of those blocks.
#[inline(always)]
pub unsafe fn cp_async_bulk_tensor_2d_multicast(
    dst: u32,
    map: u64,
    x: u32,
    y: u32,
    barrier: u32,
    mask: u32,
) {
    // SAFETY: the caller's contract.
    unsafe {
        asm!("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes\
              .multicast::cluster [{}], [{}, {{{}, {}}}], [{}], {};",
             in(reg32) dst, in(reg64) map, in(reg32) x, in(reg32) y, in(reg32) barrier,
             in(reg16) mask as u16, options(nostack));
    }
}

/// Starts fetching the box at `(x, y)` into L2. It reads nothing that the program sees, so it may
/// run ahead of writes to the tensor.
///
/// # Safety
/// `map` is the 64-aligned address of a valid rank-2 map.
#[inline(always)]
pub unsafe fn cp_async_bulk_prefetch_tensor_2d(map: u64, x: u32, y: u32) {
    // SAFETY: the caller's contract.
    unsafe {
        asm!("cp.async.bulk.prefetch.tensor.2d.L2.global.tile [{}, {{{}, {}}}];",
             in(reg64) map, in(reg32) x, in(reg32) y, options(nostack));
    }
}

/// Starts copying a box from shared memory to `(x, y)`; what lies outside the tensor is dropped.
///
/// # Safety
/// `map` is the 64-aligned address of a valid rank-2 map; `src` holds its box, written before a
/// `fence_proxy_async_shared` by each writer and a barrier; nothing writes it until
/// `cp_async_bulk_wait_group_read` has covered the copy.
#[inline(always)]
pub unsafe fn cp_async_bulk_tensor_2d_store(map: u64, x: u32, y: u32, src: u32) {
    // SAFETY: the caller's contract.
    unsafe {
        asm!("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [{}, {{{}, {}}}], [{}];",
             in(reg64) map, in(reg32) x, in(reg32) y, in(reg32) src, options(nostack));
    }
}

/// As [`cp_async_bulk_tensor_2d_store`], but adds the box to what is there, element by element in
/// the tensor's type. Each addition is rounded to nearest even.
///
/// # Safety
/// As [`cp_async_bulk_tensor_2d_store`].
#[inline(always)]
pub unsafe fn cp_reduce_async_bulk_tensor_2d_add(map: u64, x: u32, y: u32, src: u32) {
    // SAFETY: the caller's contract.
    unsafe {
        asm!("cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.tile.bulk_group \
              [{}, {{{}, {}}}], [{}];",
             in(reg64) map, in(reg32) x, in(reg32) y, in(reg32) src, options(nostack));
    }
}

/// [`cp_async_bulk_tensor_2d_load`] for a rank-4 map. Coordinates are signed: they travel as
/// their bits.
///
/// # Safety
/// As there, with a valid rank-4 map.
#[inline(always)]
pub unsafe fn cp_async_bulk_tensor_4d_load(dst: u32, map: u64, at: [u32; 4], barrier: u32) {
    // SAFETY: the caller's contract.
    unsafe {
        asm!("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes \
              [{}], [{}, {{{}, {}, {}, {}}}], [{}];",
             in(reg32) dst, in(reg64) map, in(reg32) at[0], in(reg32) at[1], in(reg32) at[2],
             in(reg32) at[3], in(reg32) barrier, options(nostack));
    }
}

/// [`cp_async_bulk_tensor_2d_store`] for a rank-4 map.
///
/// # Safety
/// As there, with a valid rank-4 map.
#[inline(always)]
pub unsafe fn cp_async_bulk_tensor_4d_store(map: u64, at: [u32; 4], src: u32) {
    // SAFETY: the caller's contract.
    unsafe {
        asm!("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group \
              [{}, {{{}, {}, {}, {}}}], [{}];",
             in(reg64) map, in(reg32) at[0], in(reg32) at[1], in(reg32) at[2], in(reg32) at[3],
             in(reg32) src, options(nostack));
    }
}

/// Closes this thread's current group of bulk stores.
#[inline(always)]
pub fn cp_async_bulk_commit_group() {
    // SAFETY: bookkeeping of the issuing thread.
    unsafe { asm!("cp.async.bulk.commit_group;", options(nostack)) }
}

/// Waits until all groups of this thread have completed: what they store is visible to it.
#[inline(always)]
pub fn cp_async_bulk_wait_group_all() {
    // SAFETY: waits only.
    unsafe { asm!("cp.async.bulk.wait_group 0;", options(nostack)) }
}

/// Waits until all but the newest `PENDING` groups of this thread have read their shared memory.
#[inline(always)]
pub fn cp_async_bulk_wait_group_read<const PENDING: u32>() {
    // SAFETY: waits only.
    unsafe { asm!("cp.async.bulk.wait_group.read {n};", n = const PENDING, options(nostack)) }
}
