//! Fences.

use core::arch::asm;

/// Makes `mbarrier.init` visible to the asynchronous proxy.
#[inline(always)]
pub fn fence_mbarrier_init() {
    // SAFETY: orders memory only.
    unsafe { asm!("fence.mbarrier_init.release.cluster;", options(nostack)) }
}

/// Orders this thread's shared-memory writes before later accesses of the asynchronous proxy
/// (TMA, wgmma), once a barrier has told the thread that issues them.
#[inline(always)]
pub fn fence_proxy_async_shared() {
    // SAFETY: orders memory only.
    unsafe { asm!("fence.proxy.async.shared::cta;", options(nostack)) }
}
