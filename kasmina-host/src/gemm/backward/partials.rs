//! Partial results and their sums, on a GPU.

use std::sync::Arc;

use kasmina_kernels::abi::Tier;
use kasmina_kernels::gemm::backward::{SumJob, SumParams, blocks, sum_kernel};

use super::OP;
use crate::element::Element;
use crate::error::{Error, Obstacle, Result};
use crate::gemm::{check_tiles, extent};
use crate::gpu::{Buffer, Launch, Stream as GpuStream};
use crate::tensor::Tensor;

/// Partial results that are to be summed, and their memory.
pub(super) struct Partials<'a> {
    stream: &'a Arc<GpuStream>,
    /// The tier of the elementwise kernels.
    tier: Tier,
    jobs: Vec<SumJob>,
    buffers: Vec<Buffer>,
}

impl<'a> Partials<'a> {
    pub(super) const fn new(stream: &'a Arc<GpuStream>, tier: Tier) -> Self {
        Self { stream, tier, jobs: Vec::new(), buffers: Vec::new() }
    }

    pub(super) const fn tier(&self) -> Tier {
        self.tier
    }

    /// Lets `out` become the sum of `count` partial results in f32 without gaps, and gives the
    /// address where they go.
    pub(super) fn add<T: Element>(
        &mut self,
        count: u32,
        out: &Tensor<T>,
        accumulate: bool,
    ) -> Result<u64> {
        let rows = extent(OP, "the number of rows of a gradient", out.shape().rows())?;
        let columns = extent(OP, "the number of columns of a gradient", out.shape().columns())?;
        let bytes = (out.len() as u64).saturating_mul(u64::from(count)).saturating_mul(4);
        let (quantity, limit) = ("the partial results' size in bytes", isize::MAX as u64);
        let overflow = Error::Overflow { op: OP, quantity, limit };
        let partials = self.stream.allocate(usize::try_from(bytes).map_err(|_| overflow)?)?;
        let address = partials.address();
        let (pointer, stride) = (out.as_device_ptr(), out.row_stride() as u64);
        let job = SumJob::new(address, count, [rows, columns], pointer, stride, accumulate);
        check_tiles(OP, job.grid)?;
        self.jobs.push(job);
        self.buffers.push(partials);
        Ok(address)
    }

    /// Enqueues the sums; the memory of the partial results goes back in the stream's order.
    pub(super) fn enqueue<T: Element>(self, launch: &Launch<'_>) -> Result<()> {
        let kernel = sum_kernel(self.tier, T::DTYPE);
        let kernel = kernel.ok_or_else(|| Obstacle::GpuMemory.refuse(OP, self.tier))?;
        for jobs in self.jobs.chunks(2) {
            let jobs = [jobs[0], jobs.get(1).copied().unwrap_or(SumJob::NONE)];
            launch.run(kernel, blocks(&jobs), &SumParams { jobs })?;
        }
        Ok(())
    }
}
