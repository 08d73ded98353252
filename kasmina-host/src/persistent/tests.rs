//! What becomes of a session whose workers fail, which from outside they cannot be made to.
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use kasmina_kernels::persistent::protocol::{self, Command, Descriptor};

use super::ring::{Part, Request};
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
    parts[0].slot.write(&[1.0]);
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
    let descriptor = Descriptor { rows: 3, slot: u16::MAX, version: 0, by_address: false };
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
