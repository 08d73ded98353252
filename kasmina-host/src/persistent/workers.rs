//! Consumers that are threads: the CPU tier, and a launch per batch where no grid can stay.
#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use kasmina_kernels::persistent::protocol::{self, COMMAND, Command, Descriptor, Words};

use super::ring::{HostPayload, Ring, lock};
use super::stack::Stack;
use crate::element::Element;
use crate::error::{Error, SessionFault};

/// Polls before a worker lets others run, and before it sleeps between polls.
const SPINS: u32 = 100;
const YIELDS: u32 = 200;
const NAP: Duration = Duration::from_micros(50);

pub(super) struct Workers<T: Element> {
    job: Arc<Job<T>>,
    threads: Vec<JoinHandle<()>>,
}

/// What the threads share.
struct Job<T: Element> {
    ring: Arc<Ring<T>>,
    payloads: Arc<[Mutex<HostPayload<T>>]>,
    counter: AtomicU64,
    /// Of even and of odd versions.
    stacks: [RwLock<Arc<Stack<T>>>; 2],
}

impl<T: Element> Workers<T> {
    pub(super) fn new(
        ring: &Arc<Ring<T>>,
        payloads: Arc<[Mutex<HostPayload<T>>]>,
        stack: Stack<T>,
    ) -> Self {
        let stack = Arc::new(stack);
        let job = Arc::new(Job {
            ring: Arc::clone(ring),
            payloads,
            counter: AtomicU64::new(0),
            stacks: [RwLock::new(Arc::clone(&stack)), RwLock::new(stack)],
        });
        let threads = (0..ring.layout.consumers)
            .map(|_| {
                let job = Arc::clone(&job);
                thread::spawn(move || job.work())
            })
            .collect();
        Self { job, threads }
    }

    /// Puts a stack where that of `version` is.
    pub(super) fn replace(&self, version: u32, stack: Stack<T>) {
        let place = &self.job.stacks[version as usize % 2];
        *place.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(stack);
    }

    /// Whether all threads have ended.
    pub(super) fn have_ended(&self) -> bool {
        self.threads.iter().all(JoinHandle::is_finished)
    }
}

/// Fails the session if its thread panics, so that nobody waits for what it had taken.
struct OnPanic<'a, T: Element>(&'a Ring<T>);

impl<T: Element> Drop for OnPanic<'_, T> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.fail(SessionFault::WorkerPanicked);
        }
    }
}

/// What a batch's error means for its session.
const fn fault_of(error: &Error) -> SessionFault {
    let cause = match error {
        &Error::Driver { code, name, .. } => return SessionFault::Kernel { code, name },
        &Error::Session { fault, .. } => return fault,
        Error::OutOfMemory { .. } => "memory ran out",
        Error::Unsupported { .. } => "no kernel takes it",
        Error::Shape { .. } => "its values are not the rows that it claims",
        _ => "the log tells",
    };
    SessionFault::Batch { cause }
}

impl<T: Element> Job<T> {
    fn work(&self) {
        let _guard = OnPanic(&self.ring);
        loop {
            let sequence = self.counter.fetch_add(1, Ordering::Relaxed);
            let Some(descriptor) = self.await_unit(sequence) else { return };
            if let Err(error) = self.compute(descriptor) {
                tracing::error!(%error, "a batch of a stream session failed");
                self.ring.fail(fault_of(&error));
                return;
            }
            protocol::complete(self.ring.words(), &self.ring.layout, sequence);
        }
    }

    fn await_unit(&self, sequence: u64) -> Option<Descriptor> {
        let words = self.ring.words();
        let mut polls = 0;
        loop {
            let descriptor = protocol::poll(words, &self.ring.layout, sequence);
            if descriptor.is_some() {
                return descriptor;
            }
            if Command::decode(words.load(COMMAND)).ends(sequence) {
                return None;
            }
            polls += 1;
            if polls < SPINS {
                std::hint::spin_loop();
            } else if polls < YIELDS {
                thread::yield_now();
            } else {
                thread::sleep(NAP);
            }
        }
    }

    fn compute(&self, descriptor: Descriptor) -> crate::error::Result<()> {
        let rows = usize::from(descriptor.rows);
        if rows == 0 {
            return Ok(());
        }
        let place = &self.stacks[descriptor.version as usize % 2];
        let stack = Arc::clone(&place.read().unwrap_or_else(PoisonError::into_inner));
        let mut payload = lock(&self.payloads[usize::from(descriptor.slot)]);
        payload.output = stack.run(rows, &payload.input)?;
        Ok(())
    }
}
