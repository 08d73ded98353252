//! The rules of the queue: what there is room for, in which order results come, and who may take
//! them.

use std::thread;
use std::time::{Duration, Instant};

use half::bf16;
use kasmina::{Device, Error, SessionFault, Tensor, Tier};
use libtest_mimic::Failed;

use crate::random::Random;
use crate::reference::{Poison, Stack, batch};
use crate::{TIMEOUT, bf16_layer, compare, config, open, reduced, require};

pub(crate) fn pipelined(device: &Device, tier: Tier) -> Result<(), Failed> {
    let layer = bf16_layer(device, tier)?;
    let session = open::<bf16>(&[&layer], tier, config())?;
    let mut random = Random::of("pipelined");
    let count = if reduced() { 5 } else { 200 };
    let batches: Vec<Vec<bf16>> = (0..count).map(|_| batch(1 + random.below(40), 16)).collect();
    let stack = Stack::of(&[&layer])?;
    let mut count = 0;
    for (y, x) in session.pipelined(&batches, 16, TIMEOUT).zip(&batches) {
        stack.compare(x, &y?, tier)?;
        count += 1;
    }
    require(count == batches.len(), || format!("{count} results"))
}

pub(crate) fn deep_pipeline(device: &Device, tier: Tier) -> Result<(), Failed> {
    let layer = bf16_layer(device, tier)?;
    let x = batch::<bf16>(256, 16);
    let count = if reduced() { 20 } else { 300 };
    // Room for 16 of them, so most of the depth finds none.
    let session = open::<bf16>(&[&layer], tier, config().depth(16))?;
    let stack = Stack::of(&[&layer])?;
    let start = Instant::now();
    let mut taken = 0;
    for y in session.pipelined(std::iter::repeat_n(&x, count), 128, TIMEOUT) {
        stack.compare(&x, &y?, tier)?;
        taken += 1;
    }
    require(taken == count, || format!("{taken} results"))?;
    require(start.elapsed() < TIMEOUT, || "a batch waited for its own pipeline".to_owned())
}

pub(crate) fn refused_in_pipeline(device: &Device, tier: Tier) -> Result<(), Failed> {
    let layer = bf16_layer(device, tier)?;
    let session = open::<bf16>(&[&layer], tier, config())?;
    let batches = [batch::<bf16>(3, 16), vec![bf16::ONE; 15], batch::<bf16>(5, 16)];
    let results: Vec<_> = session.pipelined(&batches, 8, TIMEOUT).collect();
    let [Ok(first), Err(Error::Shape { .. }), Ok(last)] = &results[..] else {
        return Err(format!("{results:?}").into());
    };
    let stack = Stack::of(&[&layer])?;
    stack.compare(&batches[0], first, tier)?;
    Ok(stack.compare(&batches[2], last, tier)?)
}

pub(crate) fn cut(device: &Device, tier: Tier) -> Result<(), Failed> {
    let layer = bf16_layer(device, tier)?;
    let stack = Stack::of(&[&layer])?;
    for part_rows in [None, Some(1), Some(8), Some(16), Some(24), Some(100)] {
        for blocks in [1, 3] {
            let config = config().depth(1).blocks(blocks);
            let config = part_rows.map_or(config.clone(), |rows| config.part_rows(rows));
            compare(&open::<bf16>(&[&layer], tier, config)?, &stack, 256)
                .map_err(|error| format!("{part_rows:?}, {blocks} blocks: {error:?}"))?;
        }
    }
    Ok(())
}

pub(crate) fn wrong_tickets(device: &Device, tier: Tier) -> Result<(), Failed> {
    let layer = bf16_layer(device, tier)?;
    let stack = Stack::of(&[&layer])?;
    let session = open::<bf16>(&[&layer], tier, config())?;
    let other = open::<bf16>(&[&layer], tier, config())?;
    let values = batch::<bf16>(5, 16);
    let x = Tensor::from_slice(device, &values, [5, 16])?;
    let mut y = Tensor::from_slice(device, &[bf16::POISON; 5 * 16], [5, 16])?;
    let mut got = vec![bf16::POISON; 5 * 16];

    let mut plain = session.submit(&values)?;
    let mut tensors = session.submit_tensors(&x, &mut y)?;
    let elsewhere = [
        other.wait(&mut plain, TIMEOUT).err(),
        other.wait_into(&mut plain, &mut got, TIMEOUT).err(),
        other.wait_tensors(&mut tensors, TIMEOUT).err(),
        other.try_poll(&mut plain).err(),
    ];
    let unlike = [
        session.wait(&mut tensors, TIMEOUT).err(),
        session.wait_into(&mut tensors, &mut got, TIMEOUT).err(),
        session.try_poll(&mut tensors).err(),
        session.wait_tensors(&mut plain, TIMEOUT).err(),
    ];
    for refused in elsewhere {
        let typed =
            matches!(refused, Some(Error::Session { fault: SessionFault::OtherSession, .. }));
        require(typed, || format!("{refused:?}"))?;
    }
    for refused in unlike {
        let typed =
            matches!(refused, Some(Error::Session { fault: SessionFault::TicketKind { .. }, .. }));
        require(typed, || format!("{refused:?}"))?;
    }
    // Another logical stream is of the same session, and nothing was lost.
    session.new_stream()?.wait_into(&mut plain, &mut got, TIMEOUT)?;
    stack.compare(&values, &got, tier)?;
    session.wait_tensors(&mut tensors, TIMEOUT)?;
    stack.compare(&values, &y.to_vec()?, tier)?;
    for refused in [
        session.wait(&mut tensors, TIMEOUT).err(),
        session.wait_tensors(&mut tensors, TIMEOUT).err(),
    ] {
        let typed = matches!(refused, Some(Error::Session { fault: SessionFault::Spent, .. }));
        require(typed, || format!("{refused:?}"))?;
    }
    Ok(())
}

pub(crate) fn full(device: &Device, tier: Tier) -> Result<(), Failed> {
    let layer = bf16_layer(device, tier)?;
    let config = config().depth(4).max_batch(32).part_rows(32).blocks(2).num_streams(1);
    let session = open::<bf16>(&[&layer], tier, config)?;
    let x = batch::<bf16>(8, 16);
    let mut tickets = Vec::new();
    let refused = loop {
        match session.submit(&x) {
            Ok(ticket) => tickets.push(ticket),
            Err(error) => break error,
        }
        require(tickets.len() <= 6, || "more tickets than slots".to_owned())?;
    };
    require(matches!(refused, Error::QueueFull { .. }), || refused.to_string())?;
    require(tickets.len() == 6, || format!("{} tickets fit", tickets.len()))?;
    let refused = session.submit_blocking(&x, Duration::from_millis(20)).err();
    require(matches!(refused, Some(Error::Timeout { .. })), || format!("{refused:?}"))?;
    let stack = Stack::of(&[&layer])?;
    for mut ticket in tickets {
        stack.compare(&x, &session.wait(&mut ticket, TIMEOUT)?, tier)?;
    }
    compare(&session, &stack, 32)
}

pub(crate) fn fair(device: &Device, tier: Tier) -> Result<(), Failed> {
    let layer = bf16_layer(device, tier)?;
    let config = config().depth(6).max_batch(32).part_rows(32).blocks(2).num_streams(2);
    let greedy = open::<bf16>(&[&layer], tier, config)?;
    let modest = greedy.new_stream()?;
    let refused = greedy.new_stream().err();
    let typed =
        matches!(refused, Some(Error::Session { fault: SessionFault::Streams { limit: 2 }, .. }));
    require(typed, || format!("{refused:?}"))?;
    let x = batch::<bf16>(8, 16);
    let mut tickets = Vec::new();
    while let Ok(ticket) = greedy.submit(&x) {
        tickets.push(ticket);
    }
    require(tickets.len() == 4, || format!("half of 8 slots, not {}", tickets.len()))?;
    modest.submit_and_wait(&x, TIMEOUT)?;
    drop(tickets);
    drop(modest);
    // With the other stream gone, all slots are this one's.
    let tickets = (0..6).map(|_| greedy.submit_blocking(&x, TIMEOUT));
    tickets.collect::<Result<Vec<_>, _>>().map(drop)?;
    Ok(())
}

pub(crate) fn dropped(device: &Device, tier: Tier) -> Result<(), Failed> {
    let layer = bf16_layer(device, tier)?;
    let session = open::<bf16>(&[&layer], tier, config().depth(2).max_batch(32).blocks(1))?;
    let x = batch::<bf16>(32, 16);
    for _ in 0..if reduced() { 5 } else { 200 } {
        drop(session.submit_blocking(&x, TIMEOUT)?);
    }
    compare(&session, &Stack::of(&[&layer])?, 32)
}

pub(crate) fn once_only(device: &Device, tier: Tier) -> Result<(), Failed> {
    let layer = bf16_layer(device, tier)?;
    let session = open::<bf16>(&[&layer], tier, config())?;
    let mut ticket = session.submit(&batch::<bf16>(3, 16))?;
    while session.try_poll(&mut ticket)?.is_none() {
        thread::yield_now();
    }
    for refused in [session.wait(&mut ticket, TIMEOUT).err(), session.try_poll(&mut ticket).err()] {
        let typed = matches!(refused, Some(Error::Session { fault: SessionFault::Spent, .. }));
        require(typed, || format!("{refused:?}"))?;
    }
    Ok(())
}
