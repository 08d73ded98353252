//! Statistics of whole tensors in one pass over them, for watching what a network does.
//!
//! The way of a call: check the tensor → number its chunks → launch; each chunk's summary goes
//! to a slot of the workspace, and the block that started last merges the slots by number. Neither
//! chunks nor order depend on the grid, so the same elements give the same bits on every GPU of a
//! tier. `segmented` does the same for parts of a matrix, each by itself.
#![forbid(unsafe_code)]

mod fused;
mod pending;
mod segmented;
mod summary;
mod workspace;

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kasmina_kernels::abi::Tier;
use kasmina_kernels::reduce::{
    self, Chunks, Moments, NaiveReduceParams, ReduceParams, RowParams, Rule, Statistic,
};

use crate::config::KernelConfig;
use crate::cpu;
use crate::device::Device;
use crate::element::Element;
use crate::error::{Error, Obstacle, Result};
use crate::gpu::{Buffer, Launch, Stream as GpuStream};
use crate::stream::Operation;
use crate::tensor::Tensor;
pub(crate) use fused::PendingParts;
use pending::PendingMoments;
pub use pending::{PendingReduction, PendingSummaries, PendingSummary};
pub use segmented::Segments;
pub use summary::Summary;
use workspace::Workspace;

const OP: &str = Operation::Reduce.name();

/// A number that a tensor is reduced to.
///
/// NaN and infinities are not left out: as in PyTorch, one NaN makes every one of these NaN, unless
/// [`ReducerConfig::nan`] says otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Reduction {
    /// Σ x; 0 for a tensor without elements.
    Sum,
    /// The largest element.
    Max,
    /// The smallest element.
    Min,
    /// Σ x / n
    Mean,
    /// Population variance, Σ (x − mean)² / n.
    Variance,
    /// The largest |x|.
    AbsMax,
    /// √(Σ x²); 0 for a tensor without elements.
    L2,
}

impl Reduction {
    /// Every reduction.
    pub const ALL: [Self; 7] =
        [Self::Sum, Self::Max, Self::Min, Self::Mean, Self::Variance, Self::AbsMax, Self::L2];

    /// What a kernel has to find out for it.
    const fn statistic(self) -> Statistic {
        match self {
            Self::Sum => Statistic::Sum,
            Self::Max => Statistic::Max,
            Self::Min => Statistic::Min,
            Self::Mean | Self::Variance | Self::AbsMax | Self::L2 => Statistic::Summary,
        }
    }

    fn of(self, summary: &Summary) -> Option<f64> {
        match self {
            Self::Sum => Some(summary.sum()),
            Self::Max => summary.max().map(f64::from),
            Self::Min => summary.min().map(f64::from),
            Self::Mean => summary.mean(),
            Self::Variance => summary.variance(),
            Self::AbsMax => summary.abs_max().map(f64::from),
            Self::L2 => Some(summary.l2()),
        }
    }
}

/// What becomes of NaN. Infinities are elements like any other under either.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum NanPolicy {
    /// They are counted as not finite, and make every statistic NaN that they belong to.
    #[default]
    Propagate,
    /// They are counted as not finite, and everything else is as if they were not there: neither
    /// in the number of elements nor in any statistic.
    Skip,
}

/// What a [`TelemetryReducer`] is to do.
#[derive(Clone, Debug)]
#[must_use = "a config does nothing until a reducer is made with it"]
pub struct ReducerConfig {
    epsilon: f32,
    nan: NanPolicy,
    kernel_config: KernelConfig,
    max_blocks: u32,
    single_stage: bool,
}

impl Default for ReducerConfig {
    fn default() -> Self {
        Self {
            epsilon: 1e-6,
            nan: NanPolicy::Propagate,
            kernel_config: KernelConfig::default(),
            max_blocks: u32::MAX,
            single_stage: false,
        }
    }
}

impl ReducerConfig {
    /// Elements of a smaller absolute value count as dead; 1e-6 by default.
    pub const fn epsilon(mut self, epsilon: f32) -> Self {
        self.epsilon = epsilon;
        self
    }

    /// What becomes of NaN; they propagate by default.
    pub const fn nan(mut self, policy: NanPolicy) -> Self {
        self.nan = policy;
        self
    }

    const fn rule(&self) -> Rule {
        Rule { epsilon: self.epsilon, skip_nan: matches!(self.nan, NanPolicy::Skip) }
    }

    /// How kernels are chosen.
    pub fn kernel_config(mut self, config: KernelConfig) -> Self {
        self.kernel_config = config;
        self
    }

    /// Launches at most this many blocks, at least one, where blocks take chunk after chunk. The
    /// result does not depend on it, which is what tests use it for.
    #[doc(hidden)]
    pub const fn max_blocks(mut self, blocks: u32) -> Self {
        self.max_blocks = blocks;
        self
    }

    /// On a GPU, [`Reduction::Sum`] takes the single-stage kernel that benchmarks compare with.
    #[doc(hidden)]
    pub const fn single_stage(mut self, single_stage: bool) -> Self {
        self.single_stage = single_stage;
        self
    }
}

/// Reduces tensors to statistics, in one pass and one launch each.
///
/// A reducer belongs to a device handle, on whose stream it enqueues; a tensor of another stream
/// of the same GPU is ordered around the use. It can be shared between threads.
/// The bits of a result depend on the tensor's elements and the tier alone; those of a view whose
/// rows have gaps between them also on its shape.
///
/// # Workspace
/// On a GPU it keeps memory for the next calls, as much as the calls so far needed at most: 32 bytes
/// for each part of a tensor that a kernel summarises by itself, and 4 for each segment. For tensors of
/// up to 64 GiB that is at most 1.1 MB if they are whole, and for segments, and views with gaps, at
/// most 2.3 MB or, where that is more, a 32nd of the matrix, which many [`Segments::Columns`] of over
/// 1,024 rows come near. [`workspace_bytes`](Self::workspace_bytes) reports it,
/// [`trim`](Self::trim) gives it up. It is no part of a result, which has 56 bytes for each summary.
///
/// A CUDA graph that captured a call uses the workspace of that time whenever it runs: before the
/// capture, make a call as large as any that follows, and trim only when the graph is gone.
///
/// ```
/// use kasmina_host::{Device, Reduction, TelemetryReducer, Tensor};
///
/// let device = Device::cpu();
/// let activations = Tensor::from_slice(&device, &[0.0f32, 1.0, 0.0, 3.0], [2, 2])?;
/// let reducer = TelemetryReducer::new(&device)?;
/// let summary = reducer.summary(&activations)?;
/// assert_eq!((summary.mean(), summary.variance()), (Some(1.0), Some(1.5)));
/// assert_eq!(summary.dead_ratio(), Some(0.5));
/// assert_eq!(reducer.reduce(&activations, Reduction::Max)?, Some(3.0));
/// # Ok::<(), kasmina_host::Error>(())
/// ```
pub struct TelemetryReducer {
    device: Device,
    config: ReducerConfig,
    tier: Tier,
    workspace: Mutex<Option<Workspace>>,
    segment_workspace: Mutex<Option<segmented::Workspace>>,
}

impl TelemetryReducer {
    /// A reducer on this device handle's stream.
    ///
    /// # Errors
    /// [`Error::Unsupported`] or [`Error::DriverTooOld`] if `KASMINA_TIER` forces a tier that the
    /// device does not run.
    pub fn new(device: &Device) -> Result<Self> {
        Self::with_config(device, ReducerConfig::default())
    }

    /// As [`new`](Self::new), with more said about it.
    ///
    /// # Errors
    /// As [`new`](Self::new), also for a tier that the config forces.
    pub fn with_config(device: &Device, config: ReducerConfig) -> Result<Self> {
        let forced = config.kernel_config.forced_tier().or(device.defaults().forced_tier());
        let tier = forced.unwrap_or(device.tier());
        if let Some(reason) = device.obstacle(tier) {
            return Err(reason.refuse(OP, tier));
        }
        let (workspace, segment_workspace) = (Mutex::new(None), Mutex::new(None));
        Ok(Self { device: device.clone(), config, tier, workspace, segment_workspace })
    }

    /// The statistics of all elements. Waits for them.
    ///
    /// Counts, minimum and maximum are exact. A few elements are added in f32, relative to a mean
    /// of their neighbourhood, and everything after that is f64. With u = 2⁻²⁴ the sum errs by at
    /// most 170·u·Σ|x| (or, up to 128 MiB on Hopper, 40·u·√(n·Σx²)), and typically far less;
    /// the variance by at most 204·u of itself, about 10⁻⁵, however large the mean: it never comes
    /// from Σx² − n·mean². On the CPU, fewer elements make that mean, and the factors are 650 and 780.
    ///
    /// # Errors
    /// [`Error::DeviceMismatch`] for a tensor of another device, [`Error::Overflow`] for one whose
    /// rows have gaps between them and that has more than 2³¹ − 1 rows or columns,
    /// [`Error::OutOfMemory`] for want of a workspace or of room for the result. On the first use of a
    /// kernel: [`Error::ModuleRejected`], [`Error::EntryMissing`], [`Error::PtxUnreadable`]. Always:
    /// [`Error::Driver`].
    pub fn summary<T: Element>(&self, tensor: &Tensor<T>) -> Result<Summary> {
        self.summary_async(tensor)?.read()
    }

    /// As [`summary`](Self::summary), enqueued only: the result stays on the device until it is
    /// read.
    ///
    /// # Errors
    /// As [`summary`](Self::summary).
    pub fn summary_async<T: Element>(&self, tensor: &Tensor<T>) -> Result<PendingSummary> {
        Ok(PendingSummary { moments: self.enqueue(tensor, Statistic::Summary)? })
    }

    /// One number; of a tensor without elements, 0 for sum and norm and `None` for the others.
    /// Waits for it. Sum, maximum and minimum alone may take less time than the
    /// [`summary`](Self::summary), which the others take.
    ///
    /// # Errors
    /// As [`summary`](Self::summary).
    pub fn reduce<T: Element>(
        &self,
        tensor: &Tensor<T>,
        reduction: Reduction,
    ) -> Result<Option<f64>> {
        self.reduce_async(tensor, reduction)?.read()
    }

    /// As [`reduce`](Self::reduce), enqueued only.
    ///
    /// # Errors
    /// As [`summary`](Self::summary).
    pub fn reduce_async<T: Element>(
        &self,
        tensor: &Tensor<T>,
        reduction: Reduction,
    ) -> Result<PendingReduction> {
        let moments = self.enqueue(tensor, reduction.statistic())?;
        Ok(PendingReduction { moments, reduction })
    }

    /// The device handle on whose stream it enqueues.
    #[must_use]
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The tier that serves every call.
    #[must_use]
    pub fn tier(&self) -> Tier {
        self.tier
    }

    /// Bytes of device memory kept for the next calls, before the pool of the stream rounds them up;
    /// 0 on the CPU, which keeps none, and until a call needs some.
    #[must_use]
    pub fn workspace_bytes(&self) -> u64 {
        let whole = lock(&self.workspace).as_ref().map_or(0, |kept| Workspace::bytes(kept.slots));
        whole + lock(&self.segment_workspace).as_ref().map_or(0, segmented::Workspace::bytes)
    }

    /// Hands the workspace to the pool of the stream, from where [`Device::trim`] gives it back to
    /// the driver. The next call that needs one makes another. What is enqueued is not disturbed, and
    /// not waited for: memory is reused in the stream's order.
    pub fn trim(&self) {
        *lock(&self.workspace) = None;
        *lock(&self.segment_workspace) = None;
    }

    fn enqueue<T: Element>(
        &self,
        tensor: &Tensor<T>,
        statistic: Statistic,
    ) -> Result<PendingMoments> {
        self.check_device(tensor)?;
        if tensor.is_empty() {
            return Ok(PendingMoments::Known(Moments::EMPTY));
        }
        if tensor.row_stride() != tensor.shape().columns() && tensor.shape().rows() > 1 {
            return self.enqueue_strided(tensor);
        }
        let Some(stream) = self.device.stream().gpu() else {
            let view = tensor.host_view();
            let values = &view.values()[..tensor.len()];
            return Ok(PendingMoments::Known(cpu::reduce::moments(values, self.config.rule())));
        };

        let result = stream.allocate(size_of::<Moments>())?;
        if self.config.single_stage && statistic == Statistic::Sum {
            self.launch_single_stage(stream, tensor, &result)?;
            return Ok(PendingMoments::SumOnDevice { count: tensor.len() as u64, sum: result });
        }
        self.launch(stream, tensor, statistic, &result)?;
        Ok(PendingMoments::OnDevice(result))
    }

    fn check_device<T: Element>(&self, tensor: &Tensor<T>) -> Result<()> {
        let (expected, got) = (self.device.id(), tensor.device().id());
        if got != expected {
            return Err(Error::DeviceMismatch { op: OP, operand: "tensor", expected, got });
        }
        Ok(())
    }

    fn launcher<'a>(&'a self, stream: &'a GpuStream) -> Launch<'a> {
        let own = self.config.kernel_config.ptx_override();
        let ptx_dir = own.or(self.device.defaults().ptx_override());
        Launch { stream, ptx_dir, operation: Operation::Reduce }
    }

    /// Enqueues between the streams' waits for each other.
    fn ordered<T: Element>(
        &self,
        tensor: &Tensor<T>,
        enqueue: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let (own, of_tensor) = (self.device.stream(), tensor.device().stream());
        own.wait(of_tensor)?;
        enqueue()?;
        // A stream that does not wait might give the tensor's memory away while it is read.
        of_tensor.wait(own).or_else(|error| own.synchronize().and(Err(error)))
    }

    fn launch<T: Element>(
        &self,
        stream: &Arc<GpuStream>,
        tensor: &Tensor<T>,
        statistic: Statistic,
        result: &Buffer,
    ) -> Result<()> {
        let len = tensor.len() as u64;
        let launcher = self.launcher(stream);
        let few = reduce::few_kernel(self.tier, T::DTYPE, statistic);
        if let Some((kernel, chunks)) = few.zip(Chunks::few(len, T::DTYPE)) {
            launcher.prepare(kernel)?;
            let params = RowParams::new(self.params(tensor, chunks, None, result));
            return self
                .ordered(tensor, || launcher.run(kernel, reduce::cluster_blocks(chunks), &params));
        }
        // What is skipped has no place in its sums, which merge by addition.
        let rows = reduce::rows_kernel(self.tier, T::DTYPE, statistic)
            .zip(Chunks::rows(len, T::DTYPE))
            .filter(|_| self.config.nan == NanPolicy::Propagate);
        if let Some((kernel, chunks)) = rows {
            launcher.prepare(kernel)?;
            return self.with_slots(stream, chunks.count, |workspace| {
                let params = RowParams::new(self.params(tensor, chunks, Some(workspace), result));
                self.ordered(tensor, || launcher.run(kernel, chunks.count, &params))
            });
        }
        let kernel = reduce::kernel(self.tier, T::DTYPE, statistic);
        let kernel = kernel.ok_or_else(|| Obstacle::GpuMemory.refuse(OP, self.tier))?;
        launcher.prepare(kernel)?;
        let chunks = Chunks::of(len, T::DTYPE);
        let blocks = reduce::blocks(chunks, stream.gpu().capability().sm_count);
        let blocks = blocks.min(self.config.max_blocks).max(1);
        self.with_slots(stream, chunks.count, |workspace| {
            let params = self.params(tensor, chunks, Some(workspace), result);
            self.ordered(tensor, || launcher.run(kernel, blocks, &params))
        })
    }

    /// Enqueues what needs so many slots. They are held meanwhile: a workspace that grows is freed in
    /// the stream's order, so nothing that uses it may be enqueued after that.
    fn with_slots(
        &self,
        stream: &Arc<GpuStream>,
        slots: u32,
        enqueue: impl FnOnce(&Buffer) -> Result<()>,
    ) -> Result<()> {
        let mut kept = lock(&self.workspace);
        let sufficient = kept.take().filter(|kept| kept.slots >= slots);
        let workspace = kept.insert(match sufficient {
            Some(workspace) => workspace,
            None => Workspace::new(stream, slots)?,
        });
        enqueue(&workspace.buffer)
    }

    fn params<T: Element>(
        &self,
        tensor: &Tensor<T>,
        chunks: Chunks,
        workspace: Option<&Buffer>,
        result: &Buffer,
    ) -> ReduceParams {
        let counters = workspace.map_or(0, Buffer::address);
        ReduceParams {
            data: tensor.as_device_ptr(),
            chunks,
            partials: counters + workspace::SLOTS_AT,
            counters,
            result: result.address(),
            epsilon: self.config.epsilon,
            skip_nan: u32::from(self.config.nan == NanPolicy::Skip),
        }
    }

    fn launch_single_stage<T: Element>(
        &self,
        stream: &Arc<GpuStream>,
        tensor: &Tensor<T>,
        result: &Buffer,
    ) -> Result<()> {
        let kernel = reduce::naive_kernel(self.tier, T::DTYPE);
        let kernel = kernel.ok_or_else(|| Obstacle::GpuMemory.refuse(OP, self.tier))?;
        let launcher = self.launcher(stream);
        launcher.prepare(kernel)?;
        result.fill(&0.0f32.to_ne_bytes(), 1)?;
        let (data, len) = (tensor.as_device_ptr(), tensor.len() as u64);
        let params = NaiveReduceParams { data, len, result: result.address() };
        self.ordered(tensor, || launcher.run(kernel, reduce::naive_blocks(len), &params))
    }
}

impl fmt::Debug for TelemetryReducer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TelemetryReducer")
            .field("device", &self.device)
            .field("config", &self.config)
            .field("tier", &self.tier)
            .field("workspace_bytes", &self.workspace_bytes())
            .finish()
    }
}

/// A workspace is put in place or taken out whole, so poison is no reason to stop.
fn lock<W>(workspace: &Mutex<Option<W>>) -> MutexGuard<'_, Option<W>> {
    workspace.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Obstacle;

    fn reducer() -> TelemetryReducer {
        TelemetryReducer::new(&Device::cpu()).unwrap()
    }

    fn summary(values: &[f32]) -> Summary {
        let tensor = Tensor::from_slice(&Device::cpu(), values, [values.len()]).unwrap();
        reducer().summary(&tensor).unwrap()
    }

    #[test]
    fn a_tensor_without_elements_has_a_sum_and_a_norm_of_0_and_nothing_else() {
        let summary = summary(&[]);
        assert_eq!((summary.count(), summary.sum(), summary.l2()), (0, 0.0, 0.0));
        assert_eq!((summary.min(), summary.max(), summary.abs_max()), (None, None, None));
        assert_eq!((summary.mean(), summary.variance(), summary.dead_ratio()), (None, None, None));
        assert_eq!((summary.signal_to_noise(), summary.non_finite()), (None, 0));
        let empty = Tensor::<f32>::zeros(&Device::cpu(), [0, 7]).unwrap();
        for reduction in Reduction::ALL {
            let expected = matches!(reduction, Reduction::Sum | Reduction::L2).then_some(0.0);
            assert_eq!(reducer().reduce(&empty, reduction).unwrap(), expected, "{reduction:?}");
        }
    }

    #[test]
    fn reductions_are_the_numbers_of_the_summary() {
        let values: Vec<f32> = (0..100_000).map(|i| (i as f32).sin() + 0.25).collect();
        let tensor = Tensor::from_slice(&Device::cpu(), &values, [100, 1000]).unwrap();
        let summary = reducer().summary(&tensor).unwrap();
        for reduction in Reduction::ALL {
            let number = reducer().reduce(&tensor, reduction).unwrap();
            assert_eq!(number, reduction.of(&summary), "{reduction:?}");
        }
    }

    #[test]
    fn rows_with_gaps_between_them_are_reduced_without_the_gaps() {
        let values: Vec<f32> = (0..12).map(|i| i as f32).collect();
        let matrix = Tensor::from_slice(&Device::cpu(), &values, [3, 4]).unwrap();
        let middle = reducer().summary(&matrix.columns(1..3).unwrap()).unwrap();
        assert_eq!((middle.count(), middle.sum()), (6, 33.0));
        assert_eq!((middle.min(), middle.max()), (Some(1.0), Some(10.0)));
        let column = matrix.columns(3..4).unwrap();
        assert_eq!(reducer().reduce(&column, Reduction::Mean).unwrap(), Some(7.0));
        let row = matrix.rows(1..2).unwrap();
        assert_eq!(reducer().reduce(&row, Reduction::Sum).unwrap(), Some(22.0));
    }

    #[test]
    fn skipped_nan_are_counted_and_nothing_else() {
        let config = ReducerConfig::default().nan(NanPolicy::Skip);
        let reducer = TelemetryReducer::with_config(&Device::cpu(), config).unwrap();
        let values = [1.0, f32::NAN, 4.0, f32::NAN, 0.0];
        let tensor = Tensor::from_slice(&Device::cpu(), &values, [5]).unwrap();
        let summary = reducer.summary(&tensor).unwrap();
        assert_eq!((summary.count(), summary.non_finite(), summary.sum()), (3, 2, 5.0));
        assert_eq!((summary.min(), summary.max()), (Some(0.0), Some(4.0)));
        assert_eq!(summary.dead_ratio(), Some(1.0 / 3.0));
        assert_eq!(reducer.reduce(&tensor, Reduction::Max).unwrap(), Some(4.0));
        let nothing_else = Tensor::from_slice(&Device::cpu(), &[f32::NAN; 3], [3]).unwrap();
        let summary = reducer.summary(&nothing_else).unwrap();
        assert_eq!((summary.count(), summary.non_finite(), summary.mean()), (0, 3, None));
    }

    #[test]
    fn a_gpu_tier_is_refused_on_the_cpu() {
        let kernel_config = KernelConfig::default().tier(Tier::Portable);
        let config = ReducerConfig::default().kernel_config(kernel_config);
        let error = TelemetryReducer::with_config(&Device::cpu(), config).unwrap_err();
        assert!(matches!(error, Error::Unsupported { reason: Obstacle::HostMemory, .. }));
    }

    #[test]
    fn epsilon_decides_what_is_dead() {
        let tensor = Tensor::from_slice(&Device::cpu(), &[0.5f32, -0.5, 1.0, 0.0], [4]).unwrap();
        for (epsilon, ratio) in [(0.0, 0.0), (0.5, 0.25), (0.75, 0.75)] {
            let config = ReducerConfig::default().epsilon(epsilon);
            let reducer = TelemetryReducer::with_config(&Device::cpu(), config).unwrap();
            assert_eq!(reducer.summary(&tensor).unwrap().dead_ratio(), Some(ratio));
        }
    }

    #[test]
    fn the_cpu_keeps_no_workspace() {
        let tensor = Tensor::from_slice(&Device::cpu(), &[1.0f32; 6], [2, 3]).unwrap();
        let reducer = reducer();
        reducer.summary(&tensor).unwrap();
        reducer.segmented(&tensor, Segments::Columns).unwrap();
        reducer.trim();
        assert_eq!(reducer.workspace_bytes(), 0);
    }

    #[test]
    fn reducers_and_what_they_return_can_be_shared_between_threads() {
        fn send_sync<T: Send + Sync>() {}
        send_sync::<TelemetryReducer>();
        send_sync::<PendingSummary>();
        send_sync::<PendingReduction>();
    }
}
