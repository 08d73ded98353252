//! A batch that was submitted.
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use super::ring::Part;
use super::{LogicalStream, StreamSession};
use crate::element::Element;
use crate::error::{Error, Result};
use crate::tensor::{Tensor, zeroed};

/// How long a waiting thread does nothing but look, and how long it only lets others run.
const SPIN: Duration = Duration::from_micros(50);
const YIELD: Duration = Duration::from_millis(1);
const NAP: Duration = Duration::from_micros(20);
/// Looks between two readings of the clock.
const LOOKS: u32 = 32;

/// A batch that was submitted to a [`StreamSession`], from which its result is taken once.
///
/// A ticket that is dropped gives up its result, and its slot once the batch has been computed.
/// Tickets keep their session alive.
#[must_use = "a ticket that is dropped gives up its result"]
pub struct Ticket<T: Element> {
    pub(super) stream: Arc<LogicalStream<T>>,
    /// Empty once the result was taken.
    pub(super) parts: Vec<Part<T>>,
    /// Parts from the first on that are known to have completed.
    pub(super) completed: usize,
    pub(super) rows: usize,
    pub(super) submitted: Instant,
    pub(super) spent: bool,
    /// Kept while a kernel uses their memory.
    pub(super) tensors: Option<[Tensor<T>; 2]>,
}

impl<T: Element> Ticket<T> {
    /// Rows of the batch.
    #[must_use]
    pub const fn rows(&self) -> usize {
        self.rows
    }

    /// Whether the batch has been computed.
    pub(super) fn is_complete(&mut self) -> bool {
        let ring = &self.stream.shared.ring;
        while self.completed < self.parts.len() {
            if !ring.is_complete(&mut self.parts[self.completed]) {
                return false;
            }
            self.completed += 1;
        }
        true
    }

    /// As [`is_complete`](Self::is_complete), with what is there of the result copied to `values`.
    fn receive(&mut self, values: &mut [T]) -> bool {
        let shared = &self.stream.shared;
        while self.completed < self.parts.len() {
            // Parts have as many rows as the first, but for the last one.
            let first = self.completed * self.parts[0].rows;
            let part = &mut self.parts[self.completed];
            let own = first * shared.out_features..(first + part.rows) * shared.out_features;
            if !shared.ring.receive(part, &mut values[own]) {
                return false;
            }
            self.completed += 1;
        }
        true
    }

    /// Waits until the batch, whose result was not taken yet, has been computed.
    pub(super) fn wait_until_complete(
        &mut self,
        op: &'static str,
        timeout: Duration,
    ) -> Result<()> {
        self.wait_until(op, timeout, Self::is_complete)
    }

    /// Waits until the batch has been computed and takes its result.
    pub(super) fn wait_and_take(
        &mut self,
        op: &'static str,
        timeout: Duration,
        values: &mut [T],
    ) -> Result<()> {
        // What was found before may have been copied elsewhere.
        self.completed = 0;
        for part in &mut self.parts {
            part.forget_present();
        }
        self.wait_until(op, timeout, |ticket| ticket.receive(values))?;
        self.finish();
        Ok(())
    }

    fn wait_until(
        &mut self,
        op: &'static str,
        timeout: Duration,
        mut is_complete: impl FnMut(&mut Self) -> bool,
    ) -> Result<()> {
        let mut start = None;
        let mut idle = true;
        loop {
            for _ in 0..LOOKS {
                if is_complete(self) {
                    return Ok(());
                }
                // Where there is a slot to make ready, this is the time.
                idle = idle && self.stream.shared.ring.clear_one();
                std::hint::spin_loop();
            }
            // The clock is read only now: most batches need no more.
            let elapsed = start.get_or_insert_with(Instant::now).elapsed();
            self.stream.shared.begin_bounded_work()?;
            if elapsed >= SPIN {
                if elapsed < YIELD {
                    thread::yield_now();
                } else {
                    self.stream.shared.check_health();
                    thread::sleep(NAP);
                }
                if let Some(fault) = self.stream.shared.futile()
                    && !is_complete(self)
                {
                    return Err(Error::Session { op, fault });
                }
            }
            if elapsed >= timeout {
                return Err(Error::Timeout { op, after: timeout });
            }
        }
    }

    /// The result of a batch that was not taken yet, if it has been computed.
    pub(super) fn try_take(&mut self, op: &'static str) -> Result<Option<Vec<T>>> {
        if !self.is_complete() {
            self.stream.shared.begin_bounded_work()?;
            self.stream.shared.ring.clear_one();
            if self.submitted.elapsed() > YIELD {
                self.stream.shared.check_health();
            }
            let futile = self.stream.shared.futile();
            if !self.is_complete() {
                return futile.map_or(Ok(None), |fault| Err(Error::Session { op, fault }));
            }
        }
        let mut values = zeroed(self.rows * self.stream.shared.out_features)?;
        self.take(&mut values);
        Ok(Some(values))
    }

    /// Copies the result of a completed batch and gives the slots back.
    pub(super) fn take(&mut self, values: &mut [T]) {
        let columns = self.stream.shared.out_features;
        let mut rest = values;
        for part in &mut self.parts {
            let (own, after) = rest.split_at_mut((part.rows * columns).min(rest.len()));
            if !own.is_empty() {
                part.slot.take(own);
            }
            rest = after;
        }
        self.finish();
    }

    /// Gives the slots of a completed batch back.
    pub(super) fn finish(&mut self) {
        let shared = &self.stream.shared;
        shared.histogram().add(self.submitted.elapsed());
        shared.ring.give_back(self.stream.index, &mut self.parts);
        self.spent = true;
        self.tensors = None;
    }
}

impl<T: Element> Drop for Ticket<T> {
    fn drop(&mut self) {
        if self.spent {
            return;
        }
        if let Some(tensors) = self.tensors.take()
            && !self.is_complete()
            && self.wait_until_complete("Ticket::drop", self.stream.shared.drain_timeout()).is_err()
            && !matches!(self.stream.shared.has_ended(), Ok(true))
        {
            // A kernel may still write there.
            std::mem::forget(tensors);
        }
        self.stream.shared.ring.abandon(self.stream.index, &mut self.parts);
    }
}

impl<T: Element> fmt::Debug for Ticket<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ticket")
            .field("rows", &self.rows)
            .field("parts", &self.parts.len())
            .field("spent", &self.spent)
            .finish_non_exhaustive()
    }
}

/// The results of batches, in the order of the batches; made by [`StreamSession::pipelined`].
#[must_use = "nothing is submitted before the iterator is advanced"]
pub struct Pipelined<'a, T: Element, I: Iterator> {
    pub(super) session: &'a StreamSession<T>,
    pub(super) batches: I,
    /// A batch that found no room.
    pub(super) pending: Option<I::Item>,
    /// A batch that was refused keeps its place.
    pub(super) in_flight: VecDeque<Result<Ticket<T>>>,
    pub(super) depth: usize,
    pub(super) timeout: Duration,
}

impl<T: Element, B: AsRef<[T]>, I: Iterator<Item = B>> Iterator for Pipelined<'_, T, I> {
    type Item = Result<Vec<T>>;

    fn next(&mut self) -> Option<Self::Item> {
        while self.in_flight.len() < self.depth {
            let Some(batch) = self.pending.take().or_else(|| self.batches.next()) else { break };
            let outcome = match self.session.submit(batch.as_ref()) {
                Err(Error::QueueFull { .. }) if !self.in_flight.is_empty() => {
                    // The slots may be those of the tickets here, of which the oldest goes first.
                    self.pending = Some(batch);
                    break;
                }
                // All the slots are others'.
                Err(Error::QueueFull { .. }) => {
                    self.session.submit_blocking(batch.as_ref(), self.timeout)
                }
                outcome => outcome,
            };
            self.in_flight.push_back(outcome);
        }
        let outcome = self.in_flight.pop_front()?;
        Some(outcome.and_then(|mut ticket| self.session.wait(&mut ticket, self.timeout)))
    }
}

impl<T: Element, I: Iterator> fmt::Debug for Pipelined<'_, T, I> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pipelined")
            .field("in_flight", &self.in_flight.len())
            .field("depth", &self.depth)
            .finish_non_exhaustive()
    }
}
