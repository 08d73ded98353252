//! Clusters of blocks and their distributed shared memory.

use core::arch::asm;

/// Waits until every thread of the cluster has arrived, and orders their memory accesses.
///
/// # Safety
/// Every thread of the cluster executes it equally often.
#[inline(always)]
pub unsafe fn barrier_cluster() {
    // SAFETY: the caller's contract.
    unsafe {
        asm!("barrier.cluster.arrive.release;", "barrier.cluster.wait.acquire;", options(nostack));
    }
}

/// Waits until every thread of the cluster has arrived. Orders nothing but the initialisation of
/// mbarriers before a `fence_mbarrier_init`.
///
/// # Safety
/// As [`barrier_cluster`].
#[inline(always)]
pub unsafe fn barrier_cluster_relaxed() {
    // SAFETY: the caller's contract.
    unsafe {
        asm!("barrier.cluster.arrive.relaxed;", "barrier.cluster.wait.acquire;", options(nostack));
    }
}

/// The address, in the cluster's shared window, of `address` in the block of this `rank`.
#[must_use]
#[inline(always)]
pub fn mapa_shared_cluster(address: u32, rank: u32) -> u32 {
    let value: u32;
    // SAFETY: arithmetic on an address.
    unsafe {
        asm!("mapa.shared::cluster.u32 {}, {}, {};", out(reg32) value, in(reg32) address,
             in(reg32) rank, options(pure, nomem, nostack, preserves_flags));
    }
    value
}

/// Loads four f32 from the shared memory of a block of the cluster.
///
/// # Safety
/// `address` is one of `mapa_shared_cluster`, 16-aligned and inside the dynamic shared memory of a
/// block that runs; nobody writes there without a barrier of the cluster between.
#[must_use]
#[inline(always)]
pub unsafe fn ld_shared_cluster_v4_f32(address: u32) -> [f32; 4] {
    let (a, b, c, d): (f32, f32, f32, f32);
    // SAFETY: the caller's contract.
    unsafe {
        asm!("ld.shared::cluster.v4.f32 {{{}, {}, {}, {}}}, [{}];", out(reg32) a, out(reg32) b,
             out(reg32) c, out(reg32) d, in(reg32) address, options(readonly, nostack));
    }
    [a, b, c, d]
}

/// As [`ld_shared_cluster_v4_f32`], 32 bits.
///
/// # Safety
/// As there; `address` is 4-aligned.
#[must_use]
#[inline(always)]
pub unsafe fn ld_shared_cluster_u32(address: u32) -> u32 {
    let value: u32;
    // SAFETY: the caller's contract.
    unsafe {
        asm!("ld.shared::cluster.u32 {}, [{}];", out(reg32) value, in(reg32) address,
             options(readonly, nostack));
    }
    value
}

/// Starts copying `bytes` bytes from this block's shared memory to another's; they count on
/// `barrier`, which is in the other block.
///
/// # Safety
/// `src` is a 16-aligned address of this block, written before a `fence_proxy_async_shared` by
/// each writer and a barrier, and not written again before the copy has completed; `dst` and
/// `barrier` are addresses of `mapa_shared_cluster` for the same block, which runs until the copy
/// completes and whose barrier expects the bytes; `bytes` is a multiple of 16.
#[inline(always)]
pub unsafe fn cp_async_bulk_shared_cluster(dst: u32, src: u32, bytes: u32, barrier: u32) {
    // SAFETY: the caller's contract.
    unsafe {
        asm!("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes \
              [{}], [{}], {}, [{}];",
             in(reg32) dst, in(reg32) src, in(reg32) bytes, in(reg32) barrier, options(nostack));
    }
}

/// Arrives once at a barrier of another block.
///
/// # Safety
/// `barrier` is an address of `mapa_shared_cluster` of an initialised barrier; its block runs.
#[inline(always)]
pub unsafe fn mbarrier_arrive_shared_cluster(barrier: u32) {
    // SAFETY: the caller's contract.
    unsafe {
        asm!("mbarrier.arrive.shared::cluster.b64 _, [{}];", in(reg32) barrier, options(nostack));
    }
}

/// Starts storing 16 bytes in the shared memory of another block of the cluster; they count on
/// `barrier` there.
///
/// # Safety
/// `address`, 16-aligned, and `barrier` are addresses of `mapa_shared_cluster` for the same block,
/// which runs until the barrier's phase ends and whose barrier expects the bytes; nobody else
/// accesses the 16 bytes before that.
#[inline(always)]
pub unsafe fn st_async_shared_cluster_v4_u32(address: u32, values: [u32; 4], barrier: u32) {
    let [a, b, c, d] = values;
    // SAFETY: the caller's contract.
    unsafe {
        asm!("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 \
              [{}], {{{}, {}, {}, {}}}, [{}];",
             in(reg32) address, in(reg32) a, in(reg32) b, in(reg32) c, in(reg32) d,
             in(reg32) barrier, options(nostack));
    }
}
