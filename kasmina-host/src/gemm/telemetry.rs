//! A forward pass that also tells the statistics of what it computes.
#![forbid(unsafe_code)]

use std::fmt;
use std::num::NonZeroU32;

use kasmina_kernels::abi::Tier;
use kasmina_kernels::gemm::hopper::Tile;
use kasmina_kernels::gemm::hopper::telemetry::{self, TelemetryKernel, TelemetryParams};
use kasmina_kernels::gemm::hopper::unaligned::PlainRows;
use kasmina_kernels::reduce::Segments as Cut;

use super::{Extents, Forward, plain_rows};
use crate::config::KernelConfig;
use crate::element::Element;
use crate::error::Result;
use crate::gpu::Launch;
use crate::reduce::{PendingParts, PendingSummaries, Segments, Summary, TelemetryReducer};
use crate::stream::Operation;
use crate::tensor::Tensor;

/// The statistics of a layer's output by chunks of its features, which are being computed.
#[derive(Debug)]
#[must_use = "telemetry is worth nothing until it is read"]
pub struct LayerTelemetry {
    statistics: Statistics,
    tier: Tier,
}

/// Who makes the statistics.
enum Statistics {
    /// The forward kernel, of parts.
    OfParts(PendingParts),
    /// A reduction of the output.
    OfChunks(PendingSummaries),
}

impl fmt::Debug for Statistics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::OfParts(_) => "OfParts",
            Self::OfChunks(_) => "OfChunks",
        })
    }
}

impl LayerTelemetry {
    /// Waits for the summaries, in the order of the chunks.
    ///
    /// The forward kernel leaves those of 16 rows by up to 256 columns, 32 bytes for each (128 KiB for
    /// an output of 4096×4096), which are copied and merged here.
    ///
    /// # Errors
    /// [`Error::Driver`](crate::Error::Driver) if the pass or an operation before it failed.
    pub fn read(&self) -> Result<Vec<Summary>> {
        match &self.statistics {
            Statistics::OfParts(parts) => parts.read(),
            Statistics::OfChunks(summaries) => summaries.read(),
        }
    }

    /// Whether the summaries have been computed, so that [`read`](Self::read) waits for nothing but
    /// their copy: as [`PendingSummary::is_ready`](crate::PendingSummary::is_ready).
    ///
    /// # Errors
    /// [`Error::Driver`](crate::Error::Driver) if the pass or an operation before it failed.
    pub fn is_ready(&self) -> Result<bool> {
        match &self.statistics {
            Statistics::OfParts(parts) => parts.is_ready(),
            Statistics::OfChunks(summaries) => summaries.is_ready(),
        }
    }

    /// Whether the forward kernel itself made the summaries. Otherwise a reduction of its output
    /// did, enqueued after it.
    #[must_use]
    pub const fn is_fused(&self) -> bool {
        matches!(self.statistics, Statistics::OfParts(_))
    }

    /// The tier that runs the forward pass.
    #[must_use]
    pub const fn tier(&self) -> Tier {
        self.tier
    }
}

/// A kernel that serves a pass, and how it cuts up the output.
struct Plan {
    row: &'static TelemetryKernel,
    cut: Cut,
}

impl<T: Element> Forward<'_, T> {
    /// As [`run`](Self::run), and enqueues the statistics of each of `chunks` ranges of Y's columns
    /// over all rows, as [`TelemetryReducer::segmented`] gives them for
    /// [`Segments::Chunks`]: of the elements of Y, rounded as they are
    /// stored, with the reducer's ε and [`NanPolicy`](crate::NanPolicy).
    ///
    /// For f16 and bf16 on the `hopper` tier the forward kernel does both, if
    /// - there is one chunk, or the chunks have equal widths that are multiples of 64 (half the width
    ///   of a tile, of which the narrowest has 128 columns),
    /// - the rows of X, W and Y start at multiples of 16 bytes, and those of Y are as long,
    /// - neither a split of k, nor more than one block per weight, nor a tile without such a kernel is
    ///   forced.
    ///
    /// Otherwise the reducer reads Y once more. A forced ping-pong is not heeded by a fused pass.
    ///
    /// Parts of 16 rows by up to 256 columns are added up by tensor cores while they are in registers,
    /// with relative errors of at most 170·2⁻²⁴ for the variance and 35·2⁻²⁴·Σ|x| for the sum, given
    /// that these accumulate as measurements show and no manual promises. Parts of which the mean is
    /// larger than the standard deviation, or with NaN, infinities or very large or small numbers,
    /// are read back as they are stored and summarised as the reducer does: if all are, the pass is
    /// slower. Bits may differ from those of a reduction. They depend on the elements of Y,
    /// its shape, the number of chunks and the tile, which the shape and the number of multiprocessors
    /// decide.
    ///
    /// # Errors
    /// As [`run`](Self::run) and [`TelemetryReducer::segmented`]; what they refuse before anything
    /// is enqueued is refused before the pass is.
    pub fn run_with_telemetry(
        &self,
        y: &mut Tensor<T>,
        config: &KernelConfig,
        reducer: &TelemetryReducer,
        chunks: usize,
    ) -> Result<LayerTelemetry> {
        let extents = self.check(y)?;
        reducer.check_chunks(y, chunks)?;
        let tier = self.choose_tier(extents, config)?;
        if let Some(parts) = self.run_fused(extents, y, config, reducer, (tier, chunks))? {
            return Ok(LayerTelemetry { statistics: Statistics::OfParts(parts), tier });
        }
        let tier = self.run(y, config)?;
        let summaries = reducer.segmented_async(y, Segments::Chunks(chunks))?;
        Ok(LayerTelemetry { statistics: Statistics::OfChunks(summaries), tier })
    }

    /// Enqueues the fused pass, if a kernel serves it.
    fn run_fused(
        &self,
        extents: Extents,
        y: &Tensor<T>,
        config: &KernelConfig,
        reducer: &TelemetryReducer,
        (tier, chunks): (Tier, usize),
    ) -> Result<Option<PendingParts>> {
        let device = self.w.device();
        let Some(stream) = device.stream().gpu() else {
            return Ok(None);
        };
        if tier != Tier::Hopper || !reducer.takes_fused() || y.is_empty() {
            return Ok(None);
        }
        let lies_well = plain_rows(y, [extents.m, extents.n]) == PlainRows::NONE;
        if !lies_well || !self.is_addressable() || config.left_out().is_some() {
            return Ok(None);
        }
        let sm_count = stream.gpu().capability().sm_count;
        let Some(Plan { row, cut }) = self.plan_fused(extents, config, sm_count, chunks) else {
            return Ok(None);
        };
        let gemm = self.hopper_params(extents, row.tile, row.tile.store_rows(), y, stream.gpu())?;
        let blocks =
            row.tile.num_blocks(gemm.tiles.num_tiles(), stream.gpu().free_multiprocessors());
        let launch = Launch {
            stream,
            ptx_dir: config.ptx_override().or(device.defaults().ptx_override()),
            operation: Operation::GemmForward,
        };
        launch.prepare(&row.kernel)?;
        reducer.fused(y, cut, |segments| {
            let params = TelemetryParams { gemm, segments };
            self.ordered_with(y, reducer.stream(), || launch.run(&row.kernel, blocks, &params))
        })
    }

    fn plan_fused(
        &self,
        extents: Extents,
        config: &KernelConfig,
        multiprocessors: u32,
        chunks: usize,
    ) -> Option<Plan> {
        let problem = self.problem(extents);
        let forced = config.forced_hopper();
        let chunks = NonZeroU32::new(u32::try_from(chunks).ok()?)?;
        let cut = |tile: Tile| tile.cut(extents.m, extents.n, chunks);
        let serves = |tile: Tile| cut(tile).is_some();
        let row =
            telemetry::select(T::DTYPE, self.layout, problem, multiprocessors, forced, serves)?;
        let cut = cut(row.tile)?;
        Some(Plan { row, cut })
    }
}
