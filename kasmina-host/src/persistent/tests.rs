//! What becomes of a session whose workers fail, which from outside they cannot be made to, and
//! the queue with batches that stay in flight.
#![forbid(unsafe_code)]

use std::future::{Future, IntoFuture};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Wake};
use std::thread;
use std::time::{Duration, Instant};

use kasmina_kernels::persistent::protocol::{
    self, COMMAND, Command, Descriptor, Layout, Payload, Words,
};

use super::ring::{HostPayload, Part, Request, Ring, RingWords, Slot};
use super::{StreamConfig, StreamSession, Ticket};
use crate::device::Device;
use crate::error::{Error, Result, SessionFault};
use crate::layer::LinearConfig;

/// Far longer than anything here takes.
const TIMEOUT: Duration = Duration::from_secs(20);

fn session() -> StreamSession<f32> {
    let layer = LinearConfig::new(4, 2).build(&Device::cpu()).unwrap();
    layer.persistent(StreamConfig::default().blocks(1)).unwrap()
}

/// A part of three rows that was not published.
fn reserve(session: &StreamSession<f32>) -> Vec<Part<f32>> {
    let stream = session.stream.index;
    let request = Request { op: "test", rows: 3, part_rows: Some(8), stream, columns: 2 };
    session.shared().ring.reserve(request).unwrap().0
}

fn ticket(session: &StreamSession<f32>, parts: Vec<Part<f32>>) -> Ticket<f32> {
    session.ticket(parts, 3, Instant::now(), None)
}

fn fault<U>(outcome: Result<U>) -> Option<SessionFault> {
    match outcome {
        Err(Error::Session { fault, .. }) => Some(fault),
        _ => None,
    }
}

/// Everything ends with the fault: waits, polls, submissions and the close.
fn ends_with(session: &StreamSession<f32>, ticket: &mut Ticket<f32>, expected: SessionFault) {
    let start = Instant::now();
    assert_eq!(fault(session.wait(ticket, TIMEOUT)), Some(expected));
    assert_eq!(fault(session.try_poll(ticket)), Some(expected));
    assert_eq!(fault(session.submit(&[1.0; 4])), Some(expected));
    assert_eq!(fault(session.close(TIMEOUT)), Some(expected));
    assert_eq!(fault(session.wait(ticket, TIMEOUT)), Some(expected));
    assert!(start.elapsed() < TIMEOUT / 2);
}

#[test]
fn a_batch_that_fails_ends_the_session_and_says_why() {
    let session = session();
    let mut parts = reserve(&session);
    parts[0].write(&[1.0]);
    session.shared().ring.publish(&parts[0], 0, None);
    let mut ticket = ticket(&session, parts);
    let cause = "its values are not the rows that it claims";
    ends_with(&session, &mut ticket, SessionFault::Batch { cause });
}

#[test]
fn a_worker_that_panics_ends_the_session_and_says_so() {
    let session = session();
    let parts = reserve(&session);
    let ring = &session.shared().ring;
    // There is no such slot.
    let descriptor = Descriptor { rows: 3, slot: u16::MAX, version: 0, payload: Payload::Present };
    protocol::publish(ring.words(), &ring.layout, parts[0].sequence, descriptor);
    let mut ticket = ticket(&session, parts);
    ends_with(&session, &mut ticket, SessionFault::WorkerPanicked);
}

#[test]
fn waiting_for_what_a_closed_session_never_did_ends_with_its_workers() {
    let session = session();
    let parts = reserve(&session);
    let mut ticket = ticket(&session, parts);
    let ring = &session.shared().ring;
    ring.fail(SessionFault::Closed);
    // Still at work, so the batch may still be done.
    let waited = session.wait(&mut ticket, Duration::from_millis(20));
    assert!(matches!(waited, Err(Error::Timeout { .. })));
    assert!(matches!(session.try_poll(&mut ticket), Ok(None)));
    ring.command(Command::Stop);
    assert_eq!(fault(session.wait(&mut ticket, TIMEOUT)), Some(SessionFault::Closed));
    assert_eq!(fault(session.try_poll(&mut ticket)), Some(SessionFault::Closed));
    let expected = SessionFault::NotDrained { after: TIMEOUT };
    assert_eq!(fault(session.close(TIMEOUT)), Some(expected));
}

#[test]
fn closing_gives_way_to_a_failure_and_not_the_other_way() {
    let session = session();
    let ring = &session.shared().ring;
    for (given, kept) in [
        (SessionFault::Closed, SessionFault::Closed),
        (SessionFault::Ended, SessionFault::Ended),
        (SessionFault::Closed, SessionFault::Ended),
        (SessionFault::WorkerPanicked, SessionFault::Ended),
    ] {
        ring.fail(given);
        assert_eq!(ring.fault(), Some(kept));
    }
}

#[test]
fn who_closes_behind_a_stop_does_not_make_consumers_go_on() {
    let session = session();
    let ring = &session.shared().ring;
    let commanded = || Command::decode(ring.words().load(COMMAND));
    ring.command(Command::Drain(3));
    assert_eq!(commanded(), Command::Drain(3));
    ring.command(Command::Stop);
    ring.command(Command::Drain(4));
    assert_eq!(commanded(), Command::Stop);
}

#[test]
fn a_batch_is_cut_into_no_more_parts_than_its_stream_may_still_hold() {
    let layer = LinearConfig::new(4, 2).build(&Device::cpu()).unwrap();
    let config = StreamConfig::default().blocks(4).depth(2).max_batch(32);
    let session: StreamSession<f32> =
        layer.persistent(config.drain_timeout(Duration::from_millis(1))).unwrap();
    let _other = session.new_stream().unwrap();
    let ring = &session.shared().ring;
    let share = session.statistics().capacity / 2;
    let stream = session.stream.index;
    let request = |rows, part_rows| Request { op: "test", rows, part_rows, stream, columns: 2 };
    for _ in 1..share {
        ring.reserve(request(1, Some(1))).unwrap();
    }
    assert_eq!(ring.reserve(request(24, None)).unwrap().0.len(), 1);
}

#[test]
fn an_express_slot_goes_to_no_sequence_that_a_consumer_may_have_taken_before() {
    let layout = Layout::new(2, 16).with_express(4);
    let words = (0..layout.words()).map(|_| AtomicU64::new(0)).collect();
    let memory: Arc<[_]> = (0..layout.slots)
        .map(|_| Mutex::new(HostPayload { input: Vec::new(), output: Vec::new() }))
        .collect();
    let slots = (0..layout.slots as u16)
        .map(|index| Slot::Host { index, memory: Arc::clone(&memory) })
        .collect();
    let ring: Ring<f32> = Ring::new(layout, RingWords::Host(words), slots, 1, true);
    let stream = ring.open_stream("test").unwrap();
    let reserve = |columns| {
        let request = Request { op: "test", rows: 1, part_rows: Some(8), stream, columns };
        let parts = ring.reserve(request).unwrap().0;
        protocol::complete(ring.words(), &layout, parts[0].sequence);
        parts
    };
    let is_express = |parts: &[Part<f32>]| {
        let own = layout.express_slot(parts[0].sequence);
        let slot = u32::from(parts[0].slot.index());
        assert!(slot == own || slot >= layout.express);
        slot == own
    };
    let mut held: Vec<_> = (0..3).map(|_| reserve(1)).collect();
    assert!(held.iter().all(|parts| is_express(parts)));
    // Sequence 3 is the last given out: the two consumers may have taken 4 and 5.
    held.push(reserve(1));
    ring.give_back(stream, &mut held[0]);
    let four = reserve(1);
    assert!(!is_express(&four));
    ring.give_back(stream, &mut held[2]);
    ring.give_back(stream, &mut held[3]);
    // They may have taken 5 and 6 now, and 1 still holds the slot of 5.
    let (five, six, seven) = (reserve(1), reserve(1), reserve(1));
    assert_eq!([&five, &six, &seven].map(|parts| is_express(parts)), [false, false, true]);
    // Where no result is to lie in it, a slot is of no use for that.
    assert!(!is_express(&reserve(0)));
    drop(four);
}

/// Wakes by panicking, or by counting.
struct Bell {
    panics: bool,
    rung: AtomicU32,
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        assert!(!self.panics, "this waker panics");
        self.rung.fetch_add(1, Ordering::Relaxed);
    }
}

#[test]
fn a_waker_that_panics_leaves_the_others_theirs_and_each_task_has_one() {
    let session = session();
    let [bad, good] =
        [true, false].map(|panics| Arc::new(Bell { panics, rung: AtomicU32::new(0) }));
    let mut tasks: Vec<_> =
        (0..2).map(|_| Box::pin(ticket(&session, reserve(&session)).into_future())).collect();
    for (task, bell) in tasks.iter_mut().zip([&bad, &good]) {
        let waker = Arc::clone(bell).into();
        for _ in 0..5 {
            assert!(task.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
        }
    }
    session.shared().ring.fail(SessionFault::WorkerPanicked);
    let start = Instant::now();
    while good.rung.load(Ordering::Relaxed) == 0 {
        assert!(start.elapsed() < TIMEOUT, "it was not woken");
        thread::yield_now();
    }
    assert_eq!(good.rung.load(Ordering::Relaxed), 1);
}
