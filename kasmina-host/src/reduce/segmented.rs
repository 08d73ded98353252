//! Statistics of the parts of a matrix, each by itself, in one pass and one launch.
#![forbid(unsafe_code)]

use std::num::NonZeroU32;
use std::sync::Arc;

use kasmina_kernels::reduce::{
    self, BandParams, Bands, ColumnParams, Columns, MOST_EXTENT, Moments, Partial, SegmentParams,
    Segments as Cut,
};

use super::pending::PendingMoments;
use super::{NanPolicy, OP, PendingSummaries, TelemetryReducer, lock};
use crate::cpu::reduce::Matrix;
use crate::element::Element;
use crate::error::{Error, Obstacle, Result};
use crate::gpu::{Buffer, Stream as GpuStream};
use crate::tensor::Tensor;

/// How a matrix is cut into segments, each with a summary of its own.
///
/// A tensor of more than two axes counts as a matrix: its last axis are the columns, all others
/// together the rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Segments {
    /// Each row by itself: of activations [batch, features], one summary for each sample.
    Rows,
    /// Each column by itself: one summary for each feature.
    Columns,
    /// So many ranges of neighbouring columns, over all rows: one summary for each chunk of the
    /// features. Where they do not divide, the first chunks have one column more.
    Chunks(usize),
}

/// Memory that launches on one stream use one after the other.
pub(super) struct Workspace {
    /// A counter for each segment, which every launch leaves at 0.
    arrived: Buffer,
    segments: u64,
    partials: Buffer,
    strips: u64,
}

impl Workspace {
    fn new(stream: &Arc<GpuStream>, segments: u64, strips: u64) -> Result<Self> {
        let arrived = stream.allocate(segments as usize * size_of::<u32>())?;
        arrived.fill(&0u32.to_ne_bytes(), segments as usize)?;
        let partials = stream.allocate(strips as usize * size_of::<Partial>())?;
        Ok(Self { arrived, segments, partials, strips })
    }

    /// The one that is kept, or a larger one in its place.
    fn sufficient<'a>(
        kept: &'a mut Option<Self>,
        stream: &Arc<GpuStream>,
        segments: u64,
        strips: u64,
    ) -> Result<&'a Self> {
        let workspace = match kept.take() {
            Some(kept) if kept.segments >= segments && kept.strips >= strips => kept,
            Some(kept) => Self::new(stream, segments.max(kept.segments), strips.max(kept.strips))?,
            None => Self::new(stream, segments, strips)?,
        };
        Ok(kept.insert(workspace))
    }

    pub(super) fn bytes(&self) -> u64 {
        self.segments * size_of::<u32>() as u64 + self.strips * size_of::<Partial>() as u64
    }
}

impl TelemetryReducer {
    /// The statistics of each segment, in order. Waits for them.
    ///
    /// Rows may have gaps between them. The numbers err no more than those of
    /// [`summary`](Self::summary); their bits depend on elements, shape and tier.
    ///
    /// # Errors
    /// As [`summary`](Self::summary), [`Error::Overflow`] for more than 2³¹ − 1 rows or columns
    /// whether or not there are gaps; [`Error::Chunks`] for no chunks, or more than there are
    /// columns.
    pub fn segmented<T: Element>(
        &self,
        tensor: &Tensor<T>,
        segments: Segments,
    ) -> Result<Vec<super::Summary>> {
        self.segmented_async(tensor, segments)?.read()
    }

    /// As [`segmented`](Self::segmented), enqueued only: the results stay on the device until they
    /// are read.
    ///
    /// # Errors
    /// As [`segmented`](Self::segmented).
    pub fn segmented_async<T: Element>(
        &self,
        tensor: &Tensor<T>,
        segments: Segments,
    ) -> Result<PendingSummaries> {
        self.check_device(tensor)?;
        let (rows, columns) = (tensor.shape().rows(), tensor.shape().columns());
        let count = match segments {
            Segments::Rows => rows,
            Segments::Columns => columns,
            Segments::Chunks(chunks) if chunks == 0 || chunks > columns => {
                return Err(Error::Chunks { op: OP, chunks, columns });
            }
            Segments::Chunks(chunks) => chunks,
        };
        if tensor.is_empty() {
            return Ok(PendingSummaries { moments: PendingMoments::Known(Moments::EMPTY), count });
        }
        let (moments, count) = self.enqueue_segments(tensor, segments)?;
        Ok(PendingSummaries { moments, count })
    }

    /// The statistics of all elements of a matrix with gaps between its rows.
    pub(super) fn enqueue_strided<T: Element>(&self, tensor: &Tensor<T>) -> Result<PendingMoments> {
        match self.enqueue_segments(tensor, Segments::Chunks(1))?.0 {
            PendingMoments::KnownEach(each) => Ok(PendingMoments::Known(each[0])),
            on_device => Ok(on_device),
        }
    }

    /// Of a matrix with elements, and no more chunks than columns.
    fn enqueue_segments<T: Element>(
        &self,
        tensor: &Tensor<T>,
        segments: Segments,
    ) -> Result<(PendingMoments, usize)> {
        let extent = |quantity, extent: usize| match u32::try_from(extent) {
            Ok(extent) if u64::from(extent) <= MOST_EXTENT => Ok(extent),
            _ => Err(Error::Overflow { op: OP, quantity, limit: MOST_EXTENT }),
        };
        let rows = extent("the number of rows", tensor.shape().rows())?;
        let columns = extent("the number of columns", tensor.shape().columns())?;
        let parts = match segments {
            Segments::Rows => None,
            Segments::Columns => NonZeroU32::new(columns),
            Segments::Chunks(chunks) => NonZeroU32::new(chunks as u32),
        };
        let Some(stream) = self.device.stream().gpu() else {
            let view = tensor.host_view();
            let matrix = Matrix {
                values: view.values(),
                rows: rows as usize,
                columns: columns as usize,
                row_stride: tensor.row_stride(),
            };
            let rule = self.config.rule();
            let each = match parts {
                None => matrix.moments_of_rows(rule),
                Some(parts) => matrix.moments_of_columns(parts, rule),
            };
            let count = each.len();
            return Ok((PendingMoments::KnownEach(each), count));
        };
        let of_columns = parts.filter(|parts| parts.get() == columns);
        if let Some(cut) = of_columns.and_then(|_| Columns::of(rows, columns, T::DTYPE)) {
            let results = stream.allocate(columns as usize * size_of::<Moments>())?;
            self.launch_columns(stream, tensor, cut, &results)?;
            return Ok((PendingMoments::OnDevice(results), columns as usize));
        }
        if let Some(cut) = parts.and_then(|parts| Bands::of(rows, columns, parts, T::DTYPE)) {
            let count = cut.parts.get() as usize;
            let results = stream.allocate(count * size_of::<Moments>())?;
            self.launch_bands(stream, tensor, cut, &results)?;
            return Ok((PendingMoments::OnDevice(results), count));
        }
        let cut = match parts {
            None => Cut::of_rows(rows, columns, T::DTYPE),
            Some(parts) => Cut::of_columns(rows, columns, parts, T::DTYPE),
        };
        let count = cut.count() as usize;
        let results = stream.allocate(count * size_of::<Moments>())?;
        self.launch_segments(stream, tensor, cut, &results)?;
        Ok((PendingMoments::OnDevice(results), count))
    }

    fn launch_segments<T: Element>(
        &self,
        stream: &Arc<GpuStream>,
        tensor: &Tensor<T>,
        cut: Cut,
        results: &Buffer,
    ) -> Result<()> {
        let kernel = reduce::segment_kernel(self.tier, T::DTYPE);
        let kernel = kernel.ok_or_else(|| Obstacle::GpuMemory.refuse(OP, self.tier))?;
        let launcher = self.launcher(stream);
        launcher.prepare(kernel)?;
        let grid = grid_of(cut.grid())?;
        let (segments, strips) = match cut.strips_of_each() {
            1 => (0, 0),
            _ => (cut.count(), cut.strips()),
        };
        // Held while launching, as for whole tensors.
        let mut kept = lock(&self.segment_workspace);
        let workspace = Workspace::sufficient(&mut kept, stream, segments, strips)?;
        let params = SegmentParams {
            data: tensor.as_device_ptr(),
            row_stride: (tensor.row_stride() * size_of::<T>()) as u64,
            segments: cut,
            partials: workspace.partials.address(),
            arrived: workspace.arrived.address(),
            results: results.address(),
            epsilon: self.config.epsilon,
            skip_nan: u32::from(self.config.nan == NanPolicy::Skip),
        };
        self.ordered(tensor, || launcher.run(kernel, grid, &params))
    }

    fn launch_bands<T: Element>(
        &self,
        stream: &Arc<GpuStream>,
        tensor: &Tensor<T>,
        cut: Bands,
        results: &Buffer,
    ) -> Result<()> {
        let kernel = reduce::band_kernel(self.tier, T::DTYPE);
        let kernel = kernel.ok_or_else(|| Obstacle::GpuMemory.refuse(OP, self.tier))?;
        let launcher = self.launcher(stream);
        launcher.prepare(kernel)?;
        let grid = grid_of(cut.grid())?;
        let parts = if cut.bands > 1 { u64::from(cut.parts.get()) } else { 0 };
        let mut kept = lock(&self.segment_workspace);
        let workspace = Workspace::sufficient(&mut kept, stream, parts, cut.slots())?;
        let params = BandParams {
            data: tensor.as_device_ptr(),
            row_stride: (tensor.row_stride() * size_of::<T>()) as u64,
            bands: cut,
            partials: workspace.partials.address(),
            arrived: workspace.arrived.address(),
            results: results.address(),
            epsilon: self.config.epsilon,
            skip_nan: u32::from(self.config.nan == NanPolicy::Skip),
        };
        self.ordered(tensor, || launcher.run(kernel, grid, &params))
    }

    fn launch_columns<T: Element>(
        &self,
        stream: &Arc<GpuStream>,
        tensor: &Tensor<T>,
        cut: Columns,
        results: &Buffer,
    ) -> Result<()> {
        let kernel = reduce::column_kernel(self.tier, T::DTYPE);
        let kernel = kernel.ok_or_else(|| Obstacle::GpuMemory.refuse(OP, self.tier))?;
        let launcher = self.launcher(stream);
        launcher.prepare(kernel)?;
        let grid = grid_of(cut.grid(T::DTYPE))?;
        let mut kept = lock(&self.segment_workspace);
        let groups = u64::from(cut.groups(T::DTYPE));
        let workspace = Workspace::sufficient(&mut kept, stream, groups, cut.slots())?;
        let params = ColumnParams {
            data: tensor.as_device_ptr(),
            row_stride: (tensor.row_stride() * size_of::<T>()) as u64,
            columns: cut,
            partials: workspace.partials.address(),
            arrived: workspace.arrived.address(),
            results: results.address(),
            epsilon: self.config.epsilon,
            skip_nan: u32::from(self.config.nan == NanPolicy::Skip),
        };
        self.ordered(tensor, || launcher.run(kernel, grid, &params))
    }
}

/// As many blocks as a grid may have.
fn grid_of(blocks: u64) -> Result<u32> {
    let limit = i32::MAX as u64;
    match u32::try_from(blocks) {
        Ok(grid) if blocks <= limit => Ok(grid),
        _ => Err(Error::Overflow { op: OP, quantity: "the number of blocks", limit }),
    }
}

#[cfg(test)]
mod tests {
    use kasmina_kernels::abi::DType;

    use super::*;
    use crate::device::Device;

    fn matrix() -> Tensor<f32> {
        let values: Vec<f32> = (0..15).map(|i| i as f32).collect();
        Tensor::from_slice(&Device::cpu(), &values, [3, 5]).unwrap()
    }

    fn sums(tensor: &Tensor<f32>, segments: Segments) -> Vec<f64> {
        let reducer = TelemetryReducer::new(tensor.device()).unwrap();
        let summaries = reducer.segmented(tensor, segments).unwrap();
        summaries.iter().map(super::super::Summary::sum).collect()
    }

    #[test]
    fn each_row_column_and_chunk_has_its_own_sum() {
        assert_eq!(sums(&matrix(), Segments::Rows), [10.0, 35.0, 60.0]);
        assert_eq!(sums(&matrix(), Segments::Columns), [15.0, 18.0, 21.0, 24.0, 27.0]);
        assert_eq!(sums(&matrix(), Segments::Chunks(2)), [54.0, 51.0]);
        assert_eq!(sums(&matrix(), Segments::Chunks(1)), [105.0]);
    }

    #[test]
    fn views_leave_out_what_lies_between_their_rows() {
        let view = matrix().columns(1..4).unwrap();
        assert_eq!(sums(&view, Segments::Rows), [6.0, 21.0, 36.0]);
        assert_eq!(sums(&view, Segments::Chunks(3)), [18.0, 21.0, 24.0]);
    }

    #[test]
    fn no_chunks_or_more_than_columns_are_refused() {
        let reducer = TelemetryReducer::new(&Device::cpu()).unwrap();
        for chunks in [0, 6] {
            let error = reducer.segmented(&matrix(), Segments::Chunks(chunks)).unwrap_err();
            assert!(matches!(error, Error::Chunks { columns: 5, .. }), "{error}");
        }
    }

    #[test]
    fn segments_without_elements_have_empty_summaries() {
        let empty = Tensor::<f32>::zeros(&Device::cpu(), [0, 4]).unwrap();
        assert_eq!(sums(&empty, Segments::Columns), [0.0; 4]);
        assert_eq!(sums(&empty, Segments::Rows), [0.0; 0]);
        let empty = Tensor::<f32>::zeros(&Device::cpu(), [4, 0]).unwrap();
        assert_eq!(sums(&empty, Segments::Rows), [0.0; 4]);
    }

    /// What a matrix of these extents needs, cut like this.
    fn workspace_bytes(rows: u32, columns: u32, parts: Option<NonZeroU32>, dtype: DType) -> u64 {
        let of_columns = parts.filter(|parts| parts.get() == columns);
        let (segments, slots) = if let Some(cut) =
            of_columns.and_then(|_| Columns::of(rows, columns, dtype))
        {
            (u64::from(cut.groups(dtype)), cut.slots())
        } else if let Some(cut) = parts.and_then(|parts| Bands::of(rows, columns, parts, dtype)) {
            (if cut.bands > 1 { u64::from(cut.parts.get()) } else { 0 }, cut.slots())
        } else {
            let cut = match parts {
                None => Cut::of_rows(rows, columns, dtype),
                Some(parts) => Cut::of_columns(rows, columns, parts, dtype),
            };
            if cut.strips_of_each() == 1 { (0, 0) } else { (cut.count(), cut.strips()) }
        };
        segments * size_of::<u32>() as u64 + slots * size_of::<Partial>() as u64
    }

    #[test]
    fn workspaces_keep_to_the_bounds_that_are_documented() {
        let around = |log2: u32| [(1u64 << log2) - 1, 1 << log2, (1 << log2) + 1, 5 << log2 >> 2];
        let extents: Vec<u64> = (0..31).flat_map(around).filter(|&n| n > 0).collect();
        for dtype in DType::ALL {
            for (&rows, &columns) in
                extents.iter().flat_map(|r| extents.iter().map(move |c| (r, c)))
            {
                let matrix = rows * columns * dtype.size() as u64;
                if matrix > 64 << 30 {
                    continue;
                }
                let limit = 2_300_000.max(matrix / 32);
                let chunks = [1, 2, 3, 16, 1000, 4096, columns / 64, columns / 3, columns];
                let parts = chunks.map(|chunks| NonZeroU32::new(chunks.min(columns) as u32));
                for parts in [None].into_iter().chain(parts) {
                    let bytes = workspace_bytes(rows as u32, columns as u32, parts, dtype);
                    assert!(bytes <= limit, "{rows} by {columns}, {parts:?} of {dtype}: {bytes}");
                }
            }
        }
    }
}
