//! Reductions that are captured once and run many times: every launch must leave its workspace as
//! it found it.

use super::graph::Graph;
use super::*;

/// Replays of a graph.
const REPLAYS: usize = 20;

pub(crate) fn gives_the_same_bits<T: Element>(device: &Device, tier: Tier) -> Result<(), Failed> {
    // Only a stream of its own can be captured.
    let device = device.on_new_stream()?;
    let reducer = reducer(&device, tier)?;
    let lengths: &[usize] =
        if reduced() { &[70_001] } else { &[1000, 20_000, 70_001, 1 << 20, 4_000_037] };
    for &length in lengths {
        let tensor = Tensor::from_slice(&device, &normal::<T>("replay", length), [1, length])?;
        let cut = Segments::Chunks(3);
        // Outside the capture, so that modules are loaded and the workspace is there.
        let expected = summary_bits(&reducer.summary(&tensor)?);
        let of_each: Vec<u64> =
            reducer.segmented(&tensor, cut)?.iter().flat_map(summary_bits).collect();
        let sum = reducer.reduce(&tensor, Reduction::Sum)?.map(f64::to_bits);

        let enqueue = || -> Result<_, Failed> {
            Ok((
                reducer.summary_async(&tensor)?,
                reducer.segmented_async(&tensor, cut)?,
                reducer.reduce_async(&tensor, Reduction::Sum)?,
                reducer.summary_async(&tensor)?,
            ))
        };
        // What it allocates goes to the stream's pool: the driver gives none during a capture.
        drop(enqueue()?);
        device.synchronize()?;
        let mut pending = None;
        let graph = Graph::of(&device, || {
            pending = Some(enqueue()?);
            Ok(())
        })?;
        let (summary, segmented, number, again) = pending.ok_or("nothing was captured")?;
        for replay in 0..REPLAYS {
            graph.launch(&device)?;
            let got: Vec<u64> = segmented.read()?.iter().flat_map(summary_bits).collect();
            let same = summary_bits(&summary.read()?) == expected
                && summary_bits(&again.read()?) == expected
                && got == of_each
                && number.read()?.map(f64::to_bits) == sum;
            require(same, || format!("{length} elements: replay {replay} differs"))?;
        }
    }
    Ok(())
}
