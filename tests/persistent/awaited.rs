//! Answers that tasks wait for, on an executor of the tests' own.

use std::future::{Future, IntoFuture};
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake};
use std::thread::{self, Thread};
use std::time::Instant;

use half::bf16;
use kasmina::{Device, Error, SessionFault, Tensor, Tier};
use libtest_mimic::Failed;

use crate::reference::{Stack, batch};
use crate::{TIMEOUT, bf16_layer, config, open, reduced, require};

/// Unparks the thread that runs the task.
struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// Runs a task on this thread, which sleeps until the task is woken. A lost wake-up ends in the
/// error.
fn run<F: Future>(task: F) -> Result<F::Output, Failed> {
    let waker = Arc::new(Unpark(thread::current())).into();
    let mut task = pin!(task);
    let start = Instant::now();
    loop {
        if let Poll::Ready(output) = task.as_mut().poll(&mut Context::from_waker(&waker)) {
            return Ok(output);
        }
        thread::park_timeout(TIMEOUT);
        require(start.elapsed() < TIMEOUT, || "the task was not woken".to_owned())?;
    }
}

pub(crate) fn answers(device: &Device, tier: Tier) -> Result<(), Failed> {
    let layer = bf16_layer(device, tier)?;
    let session = open::<bf16>(&[&layer], tier, config())?;
    let stack = Stack::of(&[&layer])?;
    for rows in if reduced() { vec![3] } else { vec![1, 2, 33, 256, 7, 64] } {
        // Several under way, awaited in the other order.
        let x = batch::<bf16>(rows, 16);
        let first = session.submit(&x)?;
        let second = session.submit(&x)?;
        let results = run(async { [second.await, first.await] })?;
        for y in results {
            stack.compare(&x, &y?, tier)?;
        }
    }
    // One that is given up leaves no trace.
    let x = batch::<bf16>(5, 16);
    let mut task = Box::pin(session.submit(&x)?.into_future());
    let _first_look =
        task.as_mut().poll(&mut Context::from_waker(&Arc::new(Unpark(thread::current())).into()));
    drop(task);
    stack.compare(&x, &run(session.submit(&x)?.into_future())??, tier)?;
    Ok(())
}

pub(crate) fn refusals(device: &Device, tier: Tier) -> Result<(), Failed> {
    let layer = bf16_layer(device, tier)?;
    let session = open::<bf16>(&[&layer], tier, config())?;
    let x = batch::<bf16>(2, 16);
    let mut task = session.submit(&x)?.into_future();
    run(&mut task)??;
    let refused = run(&mut task)?.err();
    let typed = matches!(refused, Some(Error::Session { fault: SessionFault::Spent, .. }));
    require(typed, || format!("{refused:?}"))?;

    let tensor = Tensor::from_slice(device, &x, [2, 16])?;
    let mut y = Tensor::<bf16>::zeros(device, [2, 16])?;
    let refused = run(session.submit_tensors(&tensor, &mut y)?.into_future())?.err();
    let typed = matches!(
        refused,
        Some(Error::Session {
            fault: SessionFault::TicketKind { use_instead: "wait_tensors" },
            ..
        })
    );
    require(typed, || format!("{refused:?}"))?;

    // A closed session has done what was submitted, and its results can be awaited.
    let last = session.submit(&x)?;
    session.close(TIMEOUT)?;
    Stack::of(&[&layer])?.compare(&x, &run(last.into_future())??, tier)?;
    Ok(())
}
