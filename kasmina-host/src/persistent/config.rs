//! What a session is to be.
#![forbid(unsafe_code)]

use std::time::Duration;

use kasmina_kernels::persistent::PART_ROWS;

/// What a [`StreamSession`](super::StreamSession) is to be.
#[derive(Clone, Debug)]
#[must_use = "a config does nothing until a session is opened with it"]
pub struct StreamConfig {
    pub(super) depth: usize,
    pub(super) max_batch: usize,
    pub(super) num_streams: usize,
    pub(super) blocks: Option<u32>,
    pub(super) part_rows: Option<u32>,
    pub(super) lease: Duration,
    pub(super) start_timeout: Duration,
    pub(super) drain_timeout: Duration,
    pub(super) fallback: bool,
    pub(super) bounded: bool,
}

impl Default for StreamConfig {
    /// 64 batches of up to 256 rows in flight, 64 logical streams, a lease of 2 s, the fallback
    /// allowed.
    fn default() -> Self {
        Self {
            depth: 64,
            max_batch: 256,
            num_streams: 64,
            blocks: None,
            part_rows: None,
            lease: Duration::from_secs(2),
            start_timeout: Duration::from_secs(5),
            drain_timeout: Duration::from_secs(2),
            fallback: true,
            bounded: false,
        }
    }
}

impl StreamConfig {
    /// Batches of the largest size that can be in flight or unread; more are refused with
    /// [`Error::QueueFull`](crate::Error::QueueFull). At least 1; cut so that there are at most
    /// 32,768 slots.
    pub const fn depth(mut self, depth: usize) -> Self {
        self.depth = depth;
        self
    }

    /// Rows of the largest batch, 1 to 256.
    pub const fn max_batch(mut self, rows: usize) -> Self {
        self.max_batch = rows;
        self
    }

    /// Logical streams that the session may have at a time, at least 1.
    pub const fn num_streams(mut self, streams: usize) -> Self {
        self.num_streams = streams;
        self
    }

    /// Blocks of the resident grid, each of which occupies a multiprocessor with the weights it
    /// keeps in shared memory; or worker threads on the CPU tier. By default 4 blocks, at most a
    /// quarter of the GPU; on the CPU one thread for every two cores, at most four.
    /// Fewer answer sooner while one batch is under way at a time, as fewer look for work over the
    /// bus; more carry more rows while many are.
    pub const fn blocks(mut self, blocks: u32) -> Self {
        self.blocks = Some(blocks);
        self
    }

    /// Rows of the parts into which a batch is cut, rounded up to 8, 16, 24 or 32. By default a
    /// batch is spread over the blocks that have nothing to do, or over all the threads. The bits
    /// of a resident kernel's results do not depend on it; threads and a launch per batch choose
    /// their order of summation by the rows of a part, so there only equal cuts give equal bits.
    pub const fn part_rows(mut self, rows: u32) -> Self {
        self.part_rows = Some(rows);
        self
    }

    /// How long the resident kernel outlives the process's last sign of life, and waits for the rest
    /// of a batch that a submission has begun to copy.
    pub const fn lease(mut self, lease: Duration) -> Self {
        self.lease = lease;
        self
    }

    /// How long opening the session waits for the kernel to begin.
    pub const fn start_timeout(mut self, timeout: Duration) -> Self {
        self.start_timeout = timeout;
        self
    }

    /// How long dropping the session waits for batches in flight before it stops the kernel.
    pub const fn drain_timeout(mut self, timeout: Duration) -> Self {
        self.drain_timeout = timeout;
        self
    }

    /// Whether a launch per batch may stand in where no kernel can stay resident; it may by
    /// default. [`StreamSession::path`](super::StreamSession::path) says what serves.
    pub const fn fallback(mut self, allowed: bool) -> Self {
        self.fallback = allowed;
        self
    }

    /// The rows of the parts, if they were asked for.
    pub(super) fn cut(&self) -> Option<u32> {
        self.part_rows.map(|rows| rows.clamp(8, PART_ROWS).next_multiple_of(8))
    }

    /// Launches the kernel when a result is waited for and ends it with the last batch submitted,
    /// so that nothing stays: for sanitizers, profilers, debuggers, and under
    /// `CUDA_LAUNCH_BLOCKING=1`. Every wait then costs a launch.
    pub const fn bounded(mut self, bounded: bool) -> Self {
        self.bounded = bounded;
        self
    }
}
