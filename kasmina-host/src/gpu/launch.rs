//! Launches kernels with the one parameter struct they take.

use std::path::Path;
use std::ptr;

use kasmina_driver::{CUlaunchAttribute, CUlaunchConfig};
use kasmina_kernels::abi::{Kernel, KernelParams};

use super::{Stream, driver};
use crate::error::Result;
use crate::stream::Operation;

/// Where a kernel runs, and where it comes from.
pub(crate) struct Launch<'a> {
    pub(crate) stream: &'a Stream,
    /// Overrides the built-in PTX.
    pub(crate) ptx_dir: Option<&'a Path>,
    /// What a later error is attributed to.
    pub(crate) operation: Operation,
}

impl Launch<'_> {
    /// Loads the kernel's module, on first use, and enqueues nothing.
    pub(crate) fn prepare<P: KernelParams>(&self, kernel: &'static Kernel<P>) -> Result<()> {
        let gpu = self.stream.gpu();
        gpu.bind()?;
        gpu.function(kernel, self.ptx_dir).map(drop)
    }

    /// Enqueues `blocks` blocks of `kernel`, loading its module on first use.
    ///
    /// Callers are operations, which hold every tensor whose address stands in `params` and have
    /// checked its extents: that is what keeps the kernel within memory.
    pub(crate) fn run<P: KernelParams>(
        &self,
        kernel: &'static Kernel<P>,
        blocks: u32,
        params: &P,
    ) -> Result<()> {
        let gpu = self.stream.gpu();
        gpu.bind()?;
        let function = gpu.function(kernel, self.ptx_dir)?;
        let mut arguments = [ptr::from_ref(params).cast_mut().cast()];
        // SAFETY: the function takes one `P` by value (`Kernel` ties the two), which the driver
        // copies during the call; block size and shared memory are those it was compiled for; the
        // stream lives as long as the borrow; memory it touches is freed in the stream's order,
        // and a kernel that overlaps its predecessor waits for it.
        unsafe {
            // Whether PTX from elsewhere waits for its predecessor is not known.
            let overlaps = kernel.waits_for_predecessors && self.ptx_dir.is_none();
            // One block alone is no cluster.
            let cluster = kernel.one_cluster && blocks > 1;
            if overlaps || cluster {
                let mut attributes = [
                    CUlaunchAttribute::programmatic_stream_serialization(overlaps),
                    CUlaunchAttribute::cluster_dimension([blocks, 1, 1]),
                ];
                let (grid, block) = ([blocks, 1, 1], [kernel.block_dim, 1, 1]);
                let stream = self.stream.raw();
                let mut config = CUlaunchConfig::new(grid, block, kernel.smem_bytes, stream);
                config.attributes = attributes.as_mut_ptr();
                config.attribute_count = if cluster { 2 } else { 1 };
                driver!(cuLaunchKernelEx(
                    &raw const config,
                    function,
                    arguments.as_mut_ptr(),
                    ptr::null_mut(),
                ))
            } else {
                driver!(cuLaunchKernel(
                    function,
                    blocks,
                    1,
                    1,
                    kernel.block_dim,
                    1,
                    1,
                    kernel.smem_bytes,
                    self.stream.raw(),
                    arguments.as_mut_ptr(),
                    ptr::null_mut(),
                ))
            }
        }
        .map_err(|error| self.stream.failed(error))?;
        self.stream.note(self.operation);
        Ok(())
    }
}
