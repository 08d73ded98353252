//! Layers that stay resident and answer a stream of small batches without a launch.
//!
//! The way of a batch: cut into parts → a slot and a sequence for each, under one lock → payload
//! into the slot → descriptor into the ring, or the other way round where the kernel reads the
//! payload as it arrives. A block of the resident grid, or a thread, takes the
//! sequence, computes, stores the result and then the completion word of the ring's position. Who
//! waits for a result in pinned memory polls its elements, which the host had set to all ones; for
//! other results, the completion word. The ring's rules are in
//! `kasmina_kernels::persistent::protocol`.
#![forbid(unsafe_code)]

mod answer;
mod config;
mod decision;
mod ring;
mod shared;
mod stack;
mod statistics;
#[cfg(test)]
mod tests;
mod ticket;
mod workers;

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use kasmina_kernels::abi::Tier;
use kasmina_kernels::persistent::part_rows;

pub use answer::Answer;
pub use config::StreamConfig;
pub use decision::{PersistentTrial, should_use_persistent};
pub use statistics::StreamStats;
pub use ticket::{Pipelined, Ticket};

use crate::element::Element;
use crate::error::{Error, Result, SessionFault};
use crate::layer::KasminaLayer;
use crate::shape::Shape;
use crate::tensor::{Tensor, zeroed};
use ring::Request;
use shared::Shared;
use statistics::quantile;

const OP: &str = "KasminaLayer::persistent";
/// Rows of the largest batch that any session takes.
const MAX_BATCH: usize = 256;

/// What serves a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum StreamPath {
    /// A kernel that stays on the GPU.
    Resident,
    /// A forward pass for each batch, launched by a thread: the fallback.
    LaunchPerBatch,
    /// Threads of the CPU tier.
    Threads,
}

/// A layer, or a stack of layers, that stays resident.
///
/// Batches of 1 to 256 rows go in from host memory with [`submit`](Self::submit), or from tensors
/// with [`submit_tensors`](Self::submit_tensors); results are taken from tickets. Batches of one
/// logical stream begin in the order in which they were submitted, and logical streams share the
/// slots evenly. A clone is another handle of the same logical stream;
/// [`new_stream`](Self::new_stream) gives one of another. Both can be used from any thread.
///
/// While a session is open, its kernel holds its blocks' multiprocessors, and the driver cannot
/// free memory, which waits for every kernel: the library keeps what it frees until the last
/// session ends, but another library's `cudaFree` waits. Nor does the driver load kernels: one that
/// is used for the first time is refused with
/// [`SessionFault::LoadBeside`](crate::SessionFault::LoadBeside), so
/// [`warmup`](KasminaLayer::warmup) layers before a session is opened.
///
/// Dropping the last handle and ticket lets what is in flight finish, for no longer than the
/// config's `drain_timeout`, and ends the kernel.
///
/// ```
/// use kasmina_host::{Device, LinearConfig, StreamConfig};
/// use std::time::Duration;
///
/// let layer = LinearConfig::new(4, 2).build(&Device::cpu())?;
/// let stream = layer.persistent::<f32>(StreamConfig::default())?;
/// let mut ticket = stream.submit(&[1.0, 2.0, 3.0, 4.0])?;
/// let y = stream.wait(&mut ticket, Duration::from_secs(5))?;
/// assert_eq!(y.len(), 2);
/// # Ok::<(), kasmina_host::Error>(())
/// ```
pub struct StreamSession<T: Element> {
    stream: Arc<LogicalStream<T>>,
}

struct LogicalStream<T: Element> {
    shared: Arc<Shared<T>>,
    index: usize,
}

impl<T: Element> Drop for LogicalStream<T> {
    fn drop(&mut self) {
        self.shared.ring.close_stream(self.index);
    }
}

impl<T: Element> Clone for StreamSession<T> {
    fn clone(&self) -> Self {
        Self { stream: Arc::clone(&self.stream) }
    }
}

impl<T: Element> StreamSession<T> {
    /// A session of layers, each of which takes the output of the one before: `Y` is what their
    /// `forward`s would give one after the other, up to the order in which f32 sums are added.
    ///
    /// It has a copy of the parameters. On the hopper tier f16 and bf16 use tensor cores; f32, and
    /// other GPUs, are served by the portable tier.
    ///
    /// # Errors
    /// [`Error::DType`] if a layer has another element type than `T`, [`Error::DeviceMismatch`],
    /// [`Error::Unsupported`] if a tier is forced that has no such kernel, [`Error::OutOfMemory`],
    /// [`Error::Driver`], those of loading a kernel, and [`Error::Session`]: always if the config
    /// has a value out of its range or the layers do not fit each other; without
    /// [`fallback`](StreamConfig::fallback) also if the device, its load or the layers' size do not let
    /// a kernel stay.
    pub fn of_stack(layers: &[&KasminaLayer], config: StreamConfig) -> Result<Self> {
        let shared = Arc::new(Shared::open(layers, config)?);
        let index = shared.ring.open_stream(OP)?;
        Ok(Self { stream: Arc::new(LogicalStream { shared, index }) })
    }

    /// A handle on another logical stream of the session.
    ///
    /// # Errors
    /// [`Error::Session`] if the session has as many as its config allows.
    pub fn new_stream(&self) -> Result<Self> {
        let index = self.shared().ring.open_stream("StreamSession::new_stream")?;
        let shared = Arc::clone(&self.stream.shared);
        Ok(Self { stream: Arc::new(LogicalStream { shared, index }) })
    }

    fn shared(&self) -> &Shared<T> {
        &self.stream.shared
    }

    /// Submits rows of `in_features` values each, which are copied.
    ///
    /// # Errors
    /// [`Error::Shape`] unless there are 1 to `max_batch` whole rows, [`Error::QueueFull`] if there
    /// is no room now, [`Error::Session`] if the session has ended.
    pub fn submit(&self, batch: &[T]) -> Result<Ticket<T>> {
        let op = "StreamSession::submit";
        let columns = self.shared().in_features;
        let rows = batch.len() / columns;
        self.check_rows(op, rows, batch.len() == rows * columns, batch.len())?;
        let submitted = Instant::now();
        let (mut parts, version) =
            self.shared().ring.reserve(self.request(op, rows, self.shared().out_features))?;
        let ring = &self.shared().ring;
        // Those that are read as they arrive are found while they are written.
        for part in parts.iter().filter(|part| part.arrives) {
            ring.publish(part, version, None);
        }
        let mut rest = batch;
        for part in &mut parts {
            let (own, after) = rest.split_at(part.rows * columns);
            part.write(own);
            if !part.arrives {
                ring.publish(part, version, None);
            }
            rest = after;
        }
        Ok(self.ticket(parts, rows, submitted, None))
    }

    /// As [`submit`](Self::submit), waiting while there is no room.
    ///
    /// # Errors
    /// As [`submit`](Self::submit), and [`Error::Timeout`] in place of [`Error::QueueFull`].
    pub fn submit_blocking(&self, batch: &[T], timeout: Duration) -> Result<Ticket<T>> {
        let op = "StreamSession::submit_blocking";
        let mut start = None;
        loop {
            match self.submit(batch) {
                Err(Error::QueueFull { .. }) => {}
                outcome => return outcome,
            }
            let elapsed = start.get_or_insert_with(Instant::now).elapsed();
            if elapsed >= timeout {
                return Err(Error::Timeout { op, after: timeout });
            }
            self.shared().begin_bounded_work()?;
            if elapsed < Duration::from_millis(1) {
                std::thread::yield_now();
            } else {
                self.shared().check_health();
                std::thread::sleep(Duration::from_micros(20));
            }
        }
    }

    /// Submits the rows of `x`, on the session's device, whose result is to go to `y`. The resident
    /// kernel uses both where they are; everything enqueued on their streams is waited for first.
    /// Take the ticket with [`wait_tensors`](Self::wait_tensors); until then neither may be used.
    ///
    /// # Errors
    /// As [`submit`](Self::submit); [`Error::DeviceMismatch`]; [`Error::Strided`] if rows have gaps
    /// between them; [`Error::Overlap`]; [`Error::Driver`].
    pub fn submit_tensors(&self, x: &Tensor<T>, y: &mut Tensor<T>) -> Result<Ticket<T>> {
        let op = "StreamSession::submit_tensors";
        let shared = self.shared();
        let (rows, columns) = (x.shape().rows(), shared.in_features);
        self.check_rows(op, rows, x.shape().columns() == columns, x.len())?;
        let (expected, got) = (x.shape().with_columns(shared.out_features), *y.shape());
        if got != expected {
            return Err(Error::Shape { op, operand: "y", expected, got });
        }
        for (operand, tensor) in [("x", x), ("y", &*y)] {
            let (expected, got) = (shared.device.id(), tensor.device().id());
            if got != expected {
                return Err(Error::DeviceMismatch { op, operand, expected, got });
            }
            let (columns, row_stride) = (tensor.shape().columns(), tensor.row_stride());
            if rows > 1 && row_stride != columns {
                return Err(Error::Strided { op, operand, columns, row_stride });
            }
        }
        if x.overlaps(y) {
            return Err(Error::Overlap { op, operand: "x" });
        }
        let submitted = Instant::now();
        if shared.path() != StreamPath::Resident {
            // Threads take their payloads from the slots.
            let mut ticket = self.submit(&x.to_vec()?)?;
            ticket.tensors = Some([x.clone(), y.clone()]);
            return Ok(ticket);
        }
        x.device().synchronize()?;
        y.device().synchronize()?;
        let (parts, version) = shared.ring.reserve(self.request(op, rows, 0))?;
        let size = size_of::<T>() as u64;
        let mut addresses = [x.as_device_ptr(), y.as_device_ptr()];
        // Kept by the ticket before a kernel can know of them.
        let ticket = self.ticket(parts, rows, submitted, Some([x.clone(), y.clone()]));
        for part in &ticket.parts {
            shared.ring.publish(part, version, Some(addresses));
            addresses[0] += (part.rows * columns) as u64 * size;
            addresses[1] += (part.rows * shared.out_features) as u64 * size;
        }
        Ok(ticket)
    }

    /// Waits for a batch and takes its result, `out_features` values for each row.
    ///
    /// # Errors
    /// [`Error::Timeout`], after which the ticket can be waited for again; [`Error::Session`] if
    /// the session failed or was closed before it did the batch, the result was taken before, or
    /// the ticket is of another session or of [`submit_tensors`](Self::submit_tensors).
    pub fn wait(&self, ticket: &mut Ticket<T>, timeout: Duration) -> Result<Vec<T>> {
        let op = "StreamSession::wait";
        self.check_ticket(op, ticket, false)?;
        // Asked for while the batch is being computed.
        let mut values = zeroed(ticket.rows * self.shared().out_features)?;
        ticket.wait_and_take(op, timeout, &mut values)?;
        Ok(values)
    }

    /// As [`wait`](Self::wait), into memory that exists. After an error it may hold parts of a result.
    ///
    /// # Errors
    /// As [`wait`](Self::wait), and [`Error::Shape`] if `values` has another length than the
    /// result.
    pub fn wait_into(
        &self,
        ticket: &mut Ticket<T>,
        values: &mut [T],
        timeout: Duration,
    ) -> Result<()> {
        let op = "StreamSession::wait_into";
        self.check_ticket(op, ticket, false)?;
        let expected = ticket.rows * self.shared().out_features;
        if values.len() != expected {
            let (expected, got) = ([expected].into(), [values.len()].into());
            return Err(Error::Shape { op, operand: "values", expected, got });
        }
        ticket.wait_and_take(op, timeout, values)
    }

    /// Waits for a batch of [`submit_tensors`](Self::submit_tensors), whose result then is in its
    /// tensor.
    ///
    /// # Errors
    /// As [`wait`](Self::wait), of which it takes the tickets that `wait` refuses;
    /// [`Error::Driver`].
    pub fn wait_tensors(&self, ticket: &mut Ticket<T>, timeout: Duration) -> Result<()> {
        let op = "StreamSession::wait_tensors";
        self.check_ticket(op, ticket, true)?;
        ticket.wait_until_complete(op, timeout)?;
        if self.path() == StreamPath::Resident {
            ticket.finish();
            return Ok(());
        }
        let mut values = zeroed(ticket.rows * self.shared().out_features)?;
        let tensors = ticket.tensors.take();
        ticket.take(&mut values);
        tensors.map_or(Ok(()), |[_, mut y]| y.copy_from_slice(&values))
    }

    /// The result of a batch if it has been computed.
    ///
    /// # Errors
    /// [`Error::Session`] as [`wait`](Self::wait), [`Error::Driver`] if a `bounded` session's kernel
    /// cannot be launched, [`Error::OutOfMemory`] if there is no memory for the result.
    pub fn try_poll(&self, ticket: &mut Ticket<T>) -> Result<Option<Vec<T>>> {
        let op = "StreamSession::try_poll";
        self.check_ticket(op, ticket, false)?;
        ticket.try_take(op)
    }

    /// [`submit_blocking`](Self::submit_blocking) and [`wait`](Self::wait) in one.
    ///
    /// # Errors
    /// As these.
    pub fn submit_and_wait(&self, batch: &[T], timeout: Duration) -> Result<Vec<T>> {
        let mut ticket = self.submit_blocking(batch, timeout)?;
        self.wait(&mut ticket, timeout)
    }

    /// How long an answer without any work takes.
    ///
    /// # Errors
    /// As [`submit`](Self::submit) and [`wait`](Self::wait).
    pub fn ping(&self, timeout: Duration) -> Result<Duration> {
        let op = "StreamSession::ping";
        let start = Instant::now();
        let (parts, version) = self.shared().ring.reserve(self.request(op, 0, 0))?;
        let mut ticket = self.ticket(parts, 0, start, None);
        self.shared().ring.publish(&ticket.parts[0], version, None);
        ticket.wait_until_complete(op, timeout)?;
        let elapsed = start.elapsed();
        ticket.finish();
        Ok(elapsed)
    }

    /// The results of a sequence of batches, in its order, with up to `depth` of them in flight, or
    /// as many as there is room for. `timeout` is for each.
    ///
    /// A batch that is refused gives its error in its place, and the next ones follow.
    pub fn pipelined<B: AsRef<[T]>, I: IntoIterator<Item = B>>(
        &self,
        batches: I,
        depth: usize,
        timeout: Duration,
    ) -> Pipelined<'_, T, I::IntoIter> {
        Pipelined {
            session: self,
            batches: batches.into_iter(),
            pending: None,
            in_flight: VecDeque::new(),
            depth: depth.max(1),
            timeout,
        }
    }

    /// Makes batches submitted from now on use the present parameters of these layers, which have
    /// the shapes of those that the session was opened with. Batches in flight finish with the
    /// ones before. At most two sets of parameters are in use, so a third waits for the first.
    ///
    /// # Errors
    /// [`Error::Shape`] if a layer differs in shape or activation, [`Error::DType`], [`Error::DeviceMismatch`],
    /// [`Error::Timeout`] if batches of the first set are still in flight after that time,
    /// [`Error::Session`], [`Error::Driver`].
    pub fn update(&self, layers: &[&KasminaLayer], timeout: Duration) -> Result<()> {
        self.shared().update(layers, timeout)
    }

    /// What the session has done so far.
    #[must_use]
    pub fn statistics(&self) -> StreamStats {
        let shared = self.shared();
        let histogram = shared.histogram();
        let counts = histogram.counts();
        let completed: u64 = counts.iter().sum();
        StreamStats {
            submitted: shared.submitted.load(Ordering::Relaxed),
            completed,
            depth: shared.ring.depth(),
            capacity: shared.ring.capacity(),
            p50: quantile(&counts, 0.5),
            p99: quantile(&counts, 0.99),
            p999: quantile(&counts, 0.999),
            items_per_second: completed as f64 / histogram.age().as_secs_f64(),
        }
    }

    /// Forgets the times counted so far.
    pub fn reset_statistics(&self) {
        self.shared().reset_statistics();
    }

    /// What serves the session.
    #[must_use]
    pub fn path(&self) -> StreamPath {
        self.shared().path()
    }

    /// The tier that computes.
    #[must_use]
    pub fn tier(&self) -> Tier {
        self.shared().tier
    }

    /// Refuses new batches, waits for those in flight and ends the kernel. Results that were
    /// computed can still be taken.
    ///
    /// # Errors
    /// [`Error::Session`] if batches were not computed, because they were still in flight after
    /// `timeout`, or for the reason for which the session had ended before; [`Error::Driver`] if
    /// the kernel had failed.
    pub fn close(&self, timeout: Duration) -> Result<()> {
        self.shared().close(timeout)
    }

    /// `columns` is 0 if the result is not to lie in its slot.
    fn request(&self, op: &'static str, rows: usize, columns: usize) -> Request {
        let shared = self.shared();
        let part_rows = shared.config.cut().or_else(|| {
            // Threads' bits depend on the cut, which therefore is not to depend on the load.
            let fixed = shared.path() != StreamPath::Resident;
            fixed.then(|| part_rows(rows as u32, shared.ring.layout.consumers))
        });
        Request { op, rows, part_rows, stream: self.stream.index, columns }
    }

    /// Whether this session gave the ticket, and its result goes where the caller expects it.
    fn check_ticket(&self, op: &'static str, ticket: &Ticket<T>, tensors: bool) -> Result<()> {
        let fault = if !Arc::ptr_eq(&self.stream.shared, &ticket.stream.shared) {
            SessionFault::OtherSession
        } else if ticket.spent {
            SessionFault::Spent
        } else if ticket.tensors.is_some() != tensors {
            let use_instead = if tensors { "wait" } else { "wait_tensors" };
            SessionFault::TicketKind { use_instead }
        } else {
            return Ok(());
        };
        Err(Error::Session { op, fault })
    }

    fn check_rows(&self, op: &'static str, rows: usize, whole: bool, len: usize) -> Result<()> {
        let shared = self.shared();
        let most = shared.config.max_batch;
        if whole && rows >= 1 && rows <= most {
            return Ok(());
        }
        let expected = Shape::from([rows.clamp(1, most), shared.in_features]);
        let got = if whole { Shape::from([rows, shared.in_features]) } else { [len].into() };
        Err(Error::Shape { op, operand: "batch", expected, got })
    }

    fn ticket(
        &self,
        parts: Vec<ring::Part<T>>,
        rows: usize,
        submitted: Instant,
        tensors: Option<[Tensor<T>; 2]>,
    ) -> Ticket<T> {
        self.shared().submitted.fetch_add(1, Ordering::Relaxed);
        let stream = Arc::clone(&self.stream);
        Ticket { stream, parts, completed: 0, rows, submitted, spent: false, tensors }
    }
}

impl<T: Element> fmt::Debug for StreamSession<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StreamSession")
            .field("dtype", &T::DTYPE)
            .field("tier", &self.tier())
            .field("path", &self.path())
            .field("stream", &self.stream.index)
            .finish_non_exhaustive()
    }
}
