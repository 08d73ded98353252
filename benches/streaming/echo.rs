//! The floor: one resident thread that answers numbers through pinned memory.

use std::ffi::{CString, c_void};
use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::ensure;
use kasmina_driver::cust_raw::{CUfunction, CUmodule, CUstream};
use kasmina_driver::{self as driver, check};
use kasmina_kernels::persistent::protocol::LINE;
use kasmina_kernels::persistent::{ECHO, EchoParams};

/// Ends the kernel.
const LAST: u64 = u64::MAX;
/// `CU_STREAM_NON_BLOCKING`.
const NON_BLOCKING: u32 = 1;
/// `CU_MEMHOSTALLOC_PORTABLE | CU_MEMHOSTALLOC_DEVICEMAP`.
const PORTABLE_MAPPED: u32 = 1 | 2;
const LEASE: Duration = Duration::from_secs(2);

pub(crate) struct Echo {
    module: CUmodule,
    function: CUfunction,
    stream: CUstream,
    memory: *mut c_void,
    address: u64,
    number: u64,
}

impl Echo {
    /// Loads and allocates, in the current context, what [`start`](Self::start) needs: the driver
    /// does neither while a kernel stays.
    pub(crate) fn new() -> anyhow::Result<Self> {
        let ptx = CString::new(ECHO.module.ptx())?;
        let entry = CString::new(ECHO.entry)?;
        let (mut module, mut function): (CUmodule, CUfunction) = (ptr::null_mut(), ptr::null_mut());
        let mut stream = ptr::null_mut();
        let (mut memory, mut address) = (ptr::null_mut(), 0);
        let bytes = 2 * LINE as usize * size_of::<u64>();
        // SAFETY: the text and the name end with NUL; the pointers are valid for one handle each;
        // the block has so many bytes.
        unsafe {
            check(
                "cuModuleLoadData",
                driver::cuModuleLoadData(&raw mut module, ptx.as_ptr().cast()),
            )?;
            check(
                "cuModuleGetFunction",
                driver::cuModuleGetFunction(&raw mut function, module, entry.as_ptr()),
            )?;
            check("cuStreamCreate", driver::cuStreamCreate(&raw mut stream, NON_BLOCKING))?;
            check(
                "cuMemHostAlloc",
                driver::cuMemHostAlloc(&raw mut memory, bytes, PORTABLE_MAPPED),
            )?;
            ptr::write_bytes(memory.cast::<u8>(), 0, bytes);
            check(
                "cuMemHostGetDevicePointer_v2",
                driver::cuMemHostGetDevicePointer_v2(&raw mut address, memory, 0),
            )?;
        }
        Ok(Self { module, function, stream, memory, address, number: 0 })
    }

    /// Launches the kernel.
    pub(crate) fn start(&mut self) -> anyhow::Result<()> {
        let mut params =
            EchoParams { words: self.address, last: LAST, lease_ns: LEASE.as_nanos() as u64 };
        let mut arguments = [(&raw mut params).cast()];
        // SAFETY: the function takes one `EchoParams`; the memory lives until it has ended.
        check("cuLaunchKernel", unsafe {
            driver::cuLaunchKernel(
                self.function,
                1,
                1,
                1,
                ECHO.block_dim,
                1,
                1,
                0,
                self.stream,
                arguments.as_mut_ptr(),
                ptr::null_mut(),
            )
        })?;
        Ok(())
    }

    /// Ends the kernel.
    pub(crate) fn stop(&mut self) {
        self.word(0).store(LAST, Ordering::Release);
    }

    fn word(&self, word: u32) -> &AtomicU64 {
        // SAFETY: one of the block's 16 words, which live as long as `self`.
        unsafe { &*self.memory.cast::<AtomicU64>().add(word as usize) }
    }

    /// One number there and back.
    pub(crate) fn ping(&mut self) -> anyhow::Result<()> {
        self.number += 1;
        self.word(0).store(self.number, Ordering::Release);
        let mut looks = 0u32;
        let start = Instant::now();
        while self.word(LINE).load(Ordering::Acquire) != self.number {
            std::hint::spin_loop();
            looks += 1;
            if looks.is_multiple_of(1 << 16) {
                ensure!(start.elapsed() < LEASE, "the echo kernel does not answer");
            }
        }
        Ok(())
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.stop();
        // SAFETY: the kernel ends now, or when its lease is over; each object is destroyed once.
        unsafe {
            driver::cuStreamSynchronize(self.stream);
            driver::cuStreamDestroy_v2(self.stream);
            driver::cuModuleUnload(self.module);
            driver::cuMemFreeHost(self.memory);
        }
    }
}
