//! Answers for asynchronous code, on any executor.
#![forbid(unsafe_code)]

use std::future::{Future, IntoFuture};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::{Arc, Condvar, Mutex, PoisonError, Weak};
use std::task::{Context, Poll, Waker};
use std::thread;
use std::time::{Duration, Instant};

use super::Ticket;
use super::ring::lock;
use super::shared::Shared;
use crate::element::Element;
use crate::error::{Error, Result, SessionFault};

/// How long the thread that wakes tasks only lets others run between two looks, how long it naps
/// then, and how often it looks at the session's health.
const YIELD: Duration = Duration::from_micros(200);
const NAP: Duration = Duration::from_micros(20);
const HEALTH: Duration = Duration::from_millis(1);
/// How long it outlives the last task that waits.
const LINGER: Duration = Duration::from_millis(200);

/// A batch's result to come; made by awaiting a [`Ticket`].
///
/// It needs no particular executor: a thread of the session, which lives while tasks wait, looks
/// for results and wakes the tasks. That costs a change of threads for each; where microseconds
/// count, wait on a thread with [`StreamSession::wait`](super::StreamSession::wait). Dropping it
/// gives up the result.
///
/// It fails as [`StreamSession::try_poll`](super::StreamSession::try_poll) does, and has no
/// timeout: a session whose kernel fails, or is closed, ends it.
///
/// ```
/// # use std::pin::pin;
/// # use std::task::{Context, Poll, Waker};
/// use kasmina_host::{Device, LinearConfig, Result, StreamConfig, StreamSession};
///
/// async fn forward(session: &StreamSession<f32>, x: &[f32]) -> Result<Vec<f32>> {
///     session.submit(x)?.await
/// }
///
/// let layer = LinearConfig::new(4, 2).build(&Device::cpu())?;
/// let session = layer.persistent::<f32>(StreamConfig::default())?;
/// # let mut task = pin!(forward(&session, &[1.0, 2.0, 3.0, 4.0]));
/// # let y = loop {
/// #     if let Poll::Ready(y) = task.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
/// #         break y?;
/// #     }
/// # };
/// # assert_eq!(y.len(), 2);
/// # Ok::<(), kasmina_host::Error>(())
/// ```
#[derive(Debug)]
#[must_use = "a future does nothing unless it is awaited"]
pub struct Answer<T: Element> {
    ticket: Ticket<T>,
}

impl<T: Element> IntoFuture for Ticket<T> {
    type Output = Result<Vec<T>>;
    type IntoFuture = Answer<T>;

    fn into_future(self) -> Answer<T> {
        Answer { ticket: self }
    }
}

impl<T: Element> Future for Answer<T> {
    type Output = Result<Vec<T>>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let op = "Ticket::await";
        let ticket = &mut self.get_mut().ticket;
        let fault = if ticket.spent {
            Some(SessionFault::Spent)
        } else if ticket.tensors.is_some() {
            Some(SessionFault::TicketKind { use_instead: "wait_tensors" })
        } else {
            None
        };
        if let Some(fault) = fault {
            return Poll::Ready(Err(Error::Session { op, fault }));
        }
        match ticket.try_take(op) {
            Ok(None) => {
                let shared = &ticket.stream.shared;
                shared.wakers.add(shared, ticket.parts[ticket.completed].sequence, context.waker());
                Poll::Pending
            }
            Ok(Some(values)) => Poll::Ready(Ok(values)),
            Err(error) => Poll::Ready(Err(error)),
        }
    }
}

/// The tasks of a session that wait, each for a sequence to be done.
#[derive(Default)]
pub(super) struct Wakers {
    state: Mutex<Waiting>,
    changed: Condvar,
}

#[derive(Default)]
struct Waiting {
    tasks: Vec<(u64, Waker)>,
    /// Whether there is a thread that looks.
    served: bool,
}

impl Wakers {
    /// Wakes the task once the sequence is done, or the session has ended.
    fn add<T: Element>(self: &Arc<Self>, shared: &Arc<Shared<T>>, sequence: u64, waker: &Waker) {
        let mut state = lock(&self.state);
        // A sequence is of one ticket, whose last waker is the one that counts.
        match state.tasks.iter_mut().find(|(of, _)| *of == sequence) {
            Some((_, last)) => last.clone_from(waker),
            None => state.tasks.push((sequence, waker.clone())),
        }
        if state.served {
            drop(state);
            self.changed.notify_one();
            return;
        }
        // It does not keep the session alive: tickets do, and without them nobody waits.
        let (wakers, shared) = (Arc::clone(self), Arc::downgrade(shared));
        let thread = thread::Builder::new().name("kasmina answers".into());
        if thread.spawn(move || wakers.serve(&shared)).is_ok() {
            state.served = true;
        } else {
            // The task looks again by itself.
            state.tasks.retain(|(of, _)| *of != sequence);
            drop(state);
            waker.wake_by_ref();
        }
    }

    fn serve<T: Element>(&self, shared: &Weak<Shared<T>>) {
        let mut since = Instant::now();
        let mut health = since;
        while self.have_tasks() {
            let Some(session) = shared.upgrade() else { return };
            // Its failure is the session's, which the tasks find.
            let begun = session.begin_bounded_work();
            if health.elapsed() >= HEALTH {
                health = Instant::now();
                session.check_health();
            }
            let ended = begun.is_err() || session.futile().is_some();
            let done: Vec<Waker> = {
                let mut state = lock(&self.state);
                let tasks = &mut state.tasks;
                tasks
                    .extract_if(.., |(sequence, _)| ended || session.ring.is_done(*sequence))
                    .map(|(_, waker)| waker)
                    .collect()
            };
            // Perhaps the last handle, which closes the session; not while anything is locked.
            drop(session);
            if !done.is_empty() {
                since = Instant::now();
                for waker in done {
                    // It is the executor's code, and others wait for theirs.
                    if catch_unwind(AssertUnwindSafe(|| waker.wake())).is_err() {
                        tracing::warn!("a waker panicked");
                    }
                }
            } else if since.elapsed() < YIELD {
                thread::yield_now();
            } else {
                thread::sleep(NAP);
            }
        }
    }

    /// Waits a while for tasks; without any, the thread is to end.
    fn have_tasks(&self) -> bool {
        let state = lock(&self.state);
        let (mut state, _) = self
            .changed
            .wait_timeout_while(state, LINGER, |state| state.tasks.is_empty())
            .unwrap_or_else(PoisonError::into_inner);
        state.served = !state.tasks.is_empty();
        state.served
    }
}
