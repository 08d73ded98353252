//! Summaries that a forward kernel makes of the parts of its own output, which are merged when they
//! are read: the merging at the end of the kernel would take longer than all the rest of it.
#![forbid(unsafe_code)]

use kasmina_kernels::abi::Tier;
use kasmina_kernels::reduce::{Moments, Partial, SegmentParams, Segments as Cut};

use super::{NanPolicy, OP, Summary, TelemetryReducer};
use crate::element::Element;
use crate::error::{Error, Result};
use crate::gpu::Buffer;
use crate::stream::Stream;
use crate::tensor::{Region, Tensor};

const SLOT_BYTES: usize = size_of::<Partial>();

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

    /// The stream that the slots belong to.
    pub(crate) fn stream(&self) -> &Stream {
        self.device.stream()
    }

    /// Has `enqueue` summarise the parts of a matrix with elements that is cut up like this, between
    /// the waits of its stream and the reducer's for each other.
    pub(crate) fn fused<T: Element>(
        &self,
        tensor: &Tensor<T>,
        cut: Cut,
        enqueue: impl FnOnce(SegmentParams) -> Result<()>,
    ) -> Result<Option<PendingParts>> {
        let Some(stream) = self.stream().gpu() else {
            return Ok(None);
        };
        let slots = stream.allocate(cut.strips() as usize * SLOT_BYTES)?;
        enqueue(SegmentParams {
            data: tensor.as_device_ptr(),
            row_stride: (tensor.row_stride() * size_of::<T>()) as u64,
            segments: cut,
            partials: slots.address(),
            arrived: 0,
            results: 0,
            epsilon: self.config.epsilon,
            skip_nan: u32::from(self.config.nan == NanPolicy::Skip),
        })?;
        Ok(Some(PendingParts { slots, cut }))
    }
}

/// Statistics of the parts of a matrix on the device, of which several make a segment.
pub(crate) struct PendingParts {
    slots: Buffer,
    cut: Cut,
}

impl PendingParts {
    /// Whether reading would wait for nothing but the copy.
    pub(crate) fn is_ready(&self) -> Result<bool> {
        self.slots.is_ready()
    }

    /// Waits for the parts and merges those of each segment, in their order.
    pub(crate) fn read(&self) -> Result<Vec<Summary>> {
        let mut bytes = vec![0; self.cut.strips() as usize * SLOT_BYTES];
        let (row_bytes, row_stride) = (bytes.len(), bytes.len());
        self.slots.read(Region { offset: 0, rows: 1, row_bytes, row_stride }, &mut bytes)?;
        Ok(merged(&self.cut, bytes.as_chunks().0))
    }
}

/// The summary of each segment from the slots of its strips.
fn merged(cut: &Cut, slots: &[[u8; SLOT_BYTES]]) -> Vec<Summary> {
    let each = cut.strips_of_each() as usize;
    let segment = |(segment, slots): (usize, &[[u8; SLOT_BYTES]])| {
        let moments = slots.iter().enumerate().map(|(index, slot)| {
            let (words, _) = slot.as_chunks::<8>();
            let words = std::array::from_fn(|word| u64::from_ne_bytes(words[word]));
            let partial = Partial::from_words(words).unwrap_or(Partial::EMPTY);
            partial.moments(cut.elements(segment as u32, index as u32))
        });
        Summary::of(in_pairs(&moments.collect::<Vec<_>>()))
    };
    slots.chunks(each).enumerate().map(segment).collect()
}

/// Merged as a tree: errors grow with the logarithm of the number of parts.
fn in_pairs(parts: &[Moments]) -> Moments {
    match parts {
        [] => Moments::EMPTY,
        [one] => *one,
        several => {
            let (first, last) = several.split_at(several.len() / 2);
            in_pairs(first).merge(in_pairs(last))
        }
    }
}
