//! Summaries that a forward kernel makes of its own output, in the workspace of a reducer.
#![forbid(unsafe_code)]

use kasmina_kernels::abi::Tier;
use kasmina_kernels::reduce::{Moments, SegmentParams, Segments as Cut};

use super::pending::PendingMoments;
use super::segmented::Workspace;
use super::{NanPolicy, OP, PendingSummaries, TelemetryReducer, lock};
use crate::element::Element;
use crate::error::{Error, Result};
use crate::stream::Stream;
use crate::tensor::Tensor;

impl TelemetryReducer {
    /// Refuses what [`segmented`](Self::segmented) refuses of so many chunks of this matrix.
    pub(crate) fn check_chunks<T: Element>(&self, tensor: &Tensor<T>, chunks: usize) -> Result<()> {
        self.check_device(tensor)?;
        let columns = tensor.shape().columns();
        if chunks == 0 || chunks > columns {
            return Err(Error::Chunks { op: OP, chunks, columns });
        }
        Ok(())
    }

    /// Whether summaries that a kernel of the `hopper` tier makes are of this reducer's tier.
    pub(crate) fn takes_fused(&self) -> bool {
        self.tier == Tier::Hopper
    }

    /// The stream that the workspace belongs to.
    pub(crate) fn stream(&self) -> &Stream {
        self.device.stream()
    }

    /// Has `enqueue` summarise a matrix with elements that is cut up like this, between the waits
    /// of its stream and the reducer's for each other.
    pub(crate) fn fused<T: Element>(
        &self,
        tensor: &Tensor<T>,
        cut: Cut,
        enqueue: impl FnOnce(SegmentParams) -> Result<()>,
    ) -> Result<Option<PendingSummaries>> {
        let Some(stream) = self.stream().gpu() else {
            return Ok(None);
        };
        let count = cut.count() as usize;
        let results = stream.allocate(count * size_of::<Moments>())?;
        // Held while launching, as for whole tensors.
        let mut kept = lock(&self.segment_workspace);
        let workspace = Workspace::sufficient(&mut kept, stream, cut.count(), cut.strips())?;
        enqueue(SegmentParams {
            data: tensor.as_device_ptr(),
            row_stride: (tensor.row_stride() * size_of::<T>()) as u64,
            segments: cut,
            partials: workspace.partials(),
            arrived: workspace.arrived(),
            results: results.address(),
            epsilon: self.config.epsilon,
            skip_nan: u32::from(self.config.nan == NanPolicy::Skip),
        })?;
        Ok(Some(PendingSummaries { moments: PendingMoments::OnDevice(results), count }))
    }
}
