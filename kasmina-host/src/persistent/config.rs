//! What a session is to be.
#![forbid(unsafe_code)]

use std::time::Duration;

use kasmina_kernels::persistent::PART_ROWS;

use super::{MAX_BATCH, OP};
use crate::error::{Error, Result, SessionFault};

/// Slots of a session besides one for each block.
pub(super) const MAX_SLOTS: usize = 1 << 15;
/// More than any GPU holds; with the others they leave the numbers of slots within 16 bits.
const MAX_BLOCKS: usize = 1 << 13;
/// Heartbeats come ten times as often, and no thread wakes up much more often than that.
const SHORTEST_LEASE: Duration = Duration::from_millis(1);
/// So long may a process that stands still hold the GPU.
const LONGEST_LEASE: Duration = Duration::from_secs(3600);

/// What a [`StreamSession`](super::StreamSession) is to be.
///
/// Opening a session with a value out of its range is refused with
/// [`SessionFault::Setting`](crate::SessionFault::Setting) or
/// [`SessionFault::Lease`](crate::SessionFault::Lease) before anything is allocated, whether or not
/// the fallback is allowed.
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
    /// [`Error::QueueFull`](crate::Error::QueueFull). 1 to 32,768; cut so that there are at most
    /// 32,768 slots for their parts.
    pub const fn depth(mut self, depth: usize) -> Self {
        self.depth = depth;
        self
    }

    /// Rows of the largest batch, 1 to 256.
    pub const fn max_batch(mut self, rows: usize) -> Self {
        self.max_batch = rows;
        self
    }

    /// Logical streams that the session may have at a time, 1 to 32,768.
    pub const fn num_streams(mut self, streams: usize) -> Self {
        self.num_streams = streams;
        self
    }

    /// Blocks of the resident grid, each of which occupies a multiprocessor with the weights it
    /// keeps in shared memory; or worker threads on the CPU tier. 1 to 8,192, of which a GPU holds far
    /// fewer ([`SessionFault::NoRoom`](crate::SessionFault::NoRoom)). By default 4 blocks, at most a
    /// quarter of the GPU; on the CPU one thread for every two cores, at most four.
    /// Fewer answer sooner while one batch is under way at a time, as fewer look for work over the
    /// bus; more carry more rows while many are.
    pub const fn blocks(mut self, blocks: u32) -> Self {
        self.blocks = Some(blocks);
        self
    }

    /// Rows of the parts into which a batch is cut, 1 to 256: rounded up to 8, 16, 24 or 32, and down
    /// to that. By default a
    /// batch is spread over the blocks that have nothing to do, or over all the threads. The bits
    /// of a resident kernel's results do not depend on it; threads and a launch per batch choose
    /// their order of summation by the rows of a part, so there only equal cuts give equal bits.
    pub const fn part_rows(mut self, rows: u32) -> Self {
        self.part_rows = Some(rows);
        self
    }

    /// How long the resident kernel outlives the process's last sign of life, and waits for the rest
    /// of a batch that a submission has begun to copy. 1 ms to 1 h. It is too short where the process
    /// may stand still for as long: in a debugger, or suspended.
    pub const fn lease(mut self, lease: Duration) -> Self {
        self.lease = lease;
        self
    }

    /// How long opening the session waits for the kernel to begin: then other work holds the GPU, or
    /// other processes share it in time slices, which the driver does not tell otherwise.
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
    ///
    /// Without it, what stands in the way is an error: `CUDA_LAUNCH_BLOCKING=1`
    /// ([`SessionFault::LaunchBlocking`](crate::SessionFault::LaunchBlocking)), a GPU that lacks what
    /// is needed or whose kernels have a time limit
    /// ([`SessionFault::Device`](crate::SessionFault::Device)), one in an exclusive compute mode
    /// ([`SessionFault::Exclusive`](crate::SessionFault::Exclusive)), one on which the kernel does not
    /// begin in time ([`SessionFault::NotStarted`](crate::SessionFault::NotStarted)) or finds no room
    /// ([`SessionFault::NoRoom`](crate::SessionFault::NoRoom)), and layers that are too large
    /// ([`SessionFault::Stack`](crate::SessionFault::Stack)).
    pub const fn fallback(mut self, allowed: bool) -> Self {
        self.fallback = allowed;
        self
    }

    /// Refuses values that no session can have.
    pub(super) fn check(&self) -> Result<()> {
        let refused = |fault| Err(Error::Session { op: OP, fault });
        for (setting, got, limit) in [
            ("depth", self.depth, MAX_SLOTS),
            ("max_batch", self.max_batch, MAX_BATCH),
            ("num_streams", self.num_streams, MAX_SLOTS),
            ("blocks", self.blocks.unwrap_or(1) as usize, MAX_BLOCKS),
            ("part_rows", self.part_rows.unwrap_or(1) as usize, MAX_BATCH),
        ] {
            if !(1..=limit).contains(&got) {
                return refused(SessionFault::Setting { setting, got, limit });
            }
        }
        if !(SHORTEST_LEASE..=LONGEST_LEASE).contains(&self.lease) {
            let (shortest, longest) = (SHORTEST_LEASE, LONGEST_LEASE);
            return refused(SessionFault::Lease { got: self.lease, shortest, longest });
        }
        Ok(())
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Device, LinearConfig};

    fn refused(config: StreamConfig) -> Option<SessionFault> {
        let layer = LinearConfig::new(4, 2).build(&Device::cpu()).unwrap();
        match layer.persistent::<f32>(config) {
            Ok(_) => None,
            Err(Error::Session { op: OP, fault }) => Some(fault),
            Err(other) => panic!("{other}"),
        }
    }

    #[test]
    fn settings_out_of_range_are_refused_by_name() {
        let config = StreamConfig::default;
        for (config, setting, got, limit) in [
            (config().depth(0), "depth", 0, 32_768),
            (config().depth(usize::MAX), "depth", usize::MAX, 32_768),
            (config().max_batch(0), "max_batch", 0, 256),
            (config().max_batch(257), "max_batch", 257, 256),
            (config().num_streams(0), "num_streams", 0, 32_768),
            (config().num_streams(usize::MAX), "num_streams", usize::MAX, 32_768),
            (config().blocks(0), "blocks", 0, 8192),
            (config().blocks(u32::MAX), "blocks", u32::MAX as usize, 8192),
            (config().part_rows(0), "part_rows", 0, 256),
            (config().part_rows(257), "part_rows", 257, 256),
        ] {
            let fault = SessionFault::Setting { setting, got, limit };
            assert_eq!(refused(config.clone()), Some(fault));
            assert_eq!(refused(config.fallback(false)), Some(fault));
            let message = fault.to_string();
            assert!(message.contains(setting) && message.contains(&limit.to_string()), "{message}");
        }
    }

    #[test]
    fn a_lease_of_nothing_or_without_end_is_refused() {
        for got in [Duration::ZERO, Duration::from_micros(999), Duration::MAX] {
            let fault = refused(StreamConfig::default().lease(got));
            let (shortest, longest) = (SHORTEST_LEASE, LONGEST_LEASE);
            assert_eq!(fault, Some(SessionFault::Lease { got, shortest, longest }));
        }
        let fault = refused(StreamConfig::default().lease(Duration::from_secs(3601)));
        assert!(fault.is_some_and(|fault| fault.to_string().contains("3600")), "{fault:?}");
    }

    #[test]
    fn the_ends_of_every_range_are_taken() {
        let least = StreamConfig::default().depth(1).max_batch(1).num_streams(1).blocks(1);
        assert_eq!(refused(least.part_rows(1).lease(SHORTEST_LEASE)), None);
        let most = StreamConfig::default().depth(32_768).max_batch(256).num_streams(32_768);
        assert_eq!(refused(most.part_rows(256).lease(LONGEST_LEASE)), None);
    }
}
