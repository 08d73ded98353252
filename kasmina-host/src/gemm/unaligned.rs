//! Operands and results of 16-bit types that TMA cannot address: operands are copied to rows that
//! it can, and results are stored without it.
#![forbid(unsafe_code)]

use kasmina_kernels::gemm::hopper::unaligned::{
    self, KERNEL, PackJob, PackParams, PlainRows, packed_stride,
};

use super::{check_tiles, extent, row_stride_bytes};
use crate::device::Device;
use crate::element::Element;
use crate::error::Result;
use crate::gpu::Launch;
use crate::tensor::Tensor;

/// An operand as TMA reads it: itself, or memory for a copy of it and what makes that.
///
/// The memory comes from the pool of the stream that the pass runs on, and goes back to it, in the
/// stream's order, when this is dropped.
pub(super) struct Packed<'a, T: Element> {
    source: &'a Tensor<T>,
    copy: Option<(Tensor<T>, PackJob)>,
}

impl<'a, T: Element> Packed<'a, T> {
    /// Makes room on `device` if `source`, which is not empty, needs a copy.
    pub(super) fn new(
        source: &'a Tensor<T>,
        device: &Device,
        launch: &Launch<'_>,
        op: &'static str,
    ) -> Result<Self> {
        if is_addressable(source) {
            return Ok(Self { source, copy: None });
        }
        let rows = extent(op, "the number of rows of an operand", source.shape().rows())?;
        let columns = extent(op, "the number of columns of an operand", source.shape().columns())?;
        let padded = source.shape().with_columns(packed_stride(columns) as usize);
        let padded = Tensor::uninitialised(device, padded, op)?;
        let addresses = [source.as_device_ptr(), padded.as_device_ptr()];
        let job = PackJob::new(addresses, source.row_stride() as u64, [rows, columns]);
        check_tiles(op, job.grid)?;
        launch.prepare(&KERNEL)?;
        Ok(Self { source, copy: Some((padded.columns(0..columns as usize)?, job)) })
    }

    /// What TMA reads, once [`pack`] has run.
    pub(super) fn tensor(&self) -> &Tensor<T> {
        self.copy.as_ref().map_or(self.source, |(copy, _)| copy)
    }

    /// The copy, if there is one.
    pub(super) fn into_copy(self) -> Option<Tensor<T>> {
        self.copy.map(|(copy, _)| copy)
    }

    pub(super) const fn is_copy(&self) -> bool {
        self.copy.is_some()
    }
}

/// Whether TMA can address a matrix as it lies.
pub(super) fn is_addressable<T: Element>(matrix: &Tensor<T>) -> bool {
    unaligned::is_aligned(matrix.as_device_ptr(), row_stride_bytes(matrix))
}

/// Enqueues the copies that are needed, in one launch each two.
pub(super) fn pack<T: Element>(operands: &[&Packed<'_, T>], launch: &Launch<'_>) -> Result<()> {
    let mut jobs = operands.iter().filter_map(|operand| Some(operand.copy.as_ref()?.1));
    while let Some(first) = jobs.next() {
        let params = PackParams { jobs: [first, jobs.next().unwrap_or(PackJob::NONE)] };
        launch.run(&KERNEL, params.blocks(), &params)?;
    }
    Ok(())
}

/// How a result is stored, if TMA cannot: it clips a box to whole pieces of 16 bytes (seen on an
/// H200: of a row that ended inside one, the rest of the piece was overwritten).
pub(super) fn plain_rows<T: Element>(result: &Tensor<T>, [rows, columns]: [u32; 2]) -> PlainRows {
    let whole = (columns as usize * size_of::<T>()).is_multiple_of(16);
    if whole && is_addressable(result) {
        return PlainRows::NONE;
    }
    PlainRows { address: result.as_device_ptr(), stride: result.row_stride() as u64, rows, columns }
}
