//! Many items from many producers: none lost, duplicated, reordered within a stream, or wrong.

use std::collections::VecDeque;
use std::env;
use std::fs;
use std::thread;

use half::bf16;
use kasmina::{Activation, DType, Device, Tensor, Tier};
use libtest_mimic::Failed;

use crate::reference::numbered;
use crate::{TIMEOUT, config, linear, open, reduced, require};

const PRODUCERS: u64 = 8;
const WIDTH: usize = 16;
/// Items that a producer has in flight.
const IN_FLIGHT: usize = 8;

/// Every producer has a logical stream and submits items that tell their number. The layer is the
/// identity, so an answer tells which item it is of.
pub(crate) fn run(device: &Device, tier: Tier, default_items: u64) -> Result<(), Failed> {
    let items = match env::var("KASMINA_TEST_SOAK") {
        Ok(items) => items.parse().map_err(|_| "KASMINA_TEST_SOAK is a number")?,
        Err(_) if reduced() => 64,
        Err(_) => default_items,
    };
    let mut layer = linear(tier, DType::BF16, [WIDTH, WIDTH])
        .activation(Activation::None)
        .bias(false)
        .build(device)?;
    let identity: Vec<f32> =
        (0..WIDTH * WIDTH).map(|i| if i % (WIDTH + 1) == 0 { 1.0 } else { 0.0 }).collect();
    layer.set_weight(&identity)?;
    // What the layer itself gives for one of them.
    let first = Tensor::from_slice(device, &numbered(0, WIDTH), [1, WIDTH])?;
    require(layer.forward(&first)?.to_vec()? == numbered(0, WIDTH), || "no identity".to_owned())?;

    let session = open::<bf16>(&[&layer], tier, config())?;
    let memory_before = resident_kilobytes();
    let each = items / PRODUCERS;
    let checked = thread::scope(|scope| {
        let producers: Vec<_> = (0..PRODUCERS)
            .map(|producer| {
                let stream = session.new_stream();
                scope.spawn(move || -> Result<u64, Failed> {
                    let stream = stream?;
                    let mut in_flight = VecDeque::with_capacity(IN_FLIGHT);
                    let mut y = vec![bf16::ZERO; WIDTH];
                    let mut taken = 0;
                    for number in 0..=each {
                        while in_flight.len() == IN_FLIGHT
                            || (number == each && !in_flight.is_empty())
                        {
                            let Some((mut ticket, item)) = in_flight.pop_front() else { break };
                            stream.wait_into(&mut ticket, &mut y, TIMEOUT)?;
                            require(y == numbered(item, WIDTH), || {
                                format!("item {item}: got {y:?}")
                            })?;
                            taken += 1;
                        }
                        if number < each {
                            let item = number * PRODUCERS + producer;
                            let x = numbered(item, WIDTH);
                            in_flight.push_back((stream.submit_blocking(&x, TIMEOUT)?, item));
                        }
                    }
                    Ok(taken)
                })
            })
            .collect();
        let mut checked = 0;
        for producer in producers {
            checked += producer.join().map_err(|_| "a producer panicked")??;
        }
        Ok::<u64, Failed>(checked)
    })?;
    require(checked == each * PRODUCERS, || format!("{checked} of {items} items came back"))?;
    let statistics = session.statistics();
    require(statistics.depth == 0, || format!("slots were lost: {statistics:?}"))?;
    require(statistics.completed == checked, || format!("{checked} checked: {statistics:?}"))?;
    if let (Some(before), Some(after)) = (memory_before, resident_kilobytes()) {
        // Threads' stacks and the allocator's arenas; items would add hundreds of bytes each.
        require(after < before + 65_536, || format!("memory grew from {before} to {after} kB"))?;
    }
    Ok(())
}

/// Memory of this process, where the system tells.
fn resident_kilobytes() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.split_whitespace().next()?.parse().ok()
}
