//! Reductions that are captured once and run many times: every launch must leave its workspace as
//! it found it.

use super::graph::Graph;
use super::*;

/// Replays of a graph.
const REPLAYS: usize = 20;
/// Columns of a chunk: 64 vectors of 16-bit elements, 128 of f32.
const CHUNK: usize = 512;

fn segment_bits(segments: &[Summary]) -> Vec<u64> {
    segments.iter().flat_map(summary_bits).collect()
}

pub(crate) fn gives_the_same_bits<T: Element>(device: &Device, tier: Tier) -> Result<(), Failed> {
    // Only a stream of its own can be captured.
    let device = device.on_new_stream()?;
    let reducer = reducer(&device, tier)?;
    let lengths: &[usize] =
        if reduced() { &[70_001] } else { &[1000, 20_000, 70_001, 1 << 20, 4_000_037] };
    for &length in lengths {
        let tensor = Tensor::from_slice(&device, &normal::<T>("replay", length), [1, length])?;
        let cut = Segments::Chunks(3);
        // A wide chunk of which several blocks have a band each.
        let rows = length.div_ceil(CHUNK) + 33;
        let values = normal::<T>("replayed chunks", rows * CHUNK);
        let matrix = Tensor::from_slice(&device, &values, [rows, CHUNK])?;
        // Outside the capture, so that modules are loaded and the workspace is there.
        let expected = summary_bits(&reducer.summary(&tensor)?);
        let of_each = segment_bits(&reducer.segmented(&tensor, cut)?);
        let of_chunk = segment_bits(&reducer.segmented(&matrix, Segments::Chunks(1))?);
        let sum = reducer.reduce(&tensor, Reduction::Sum)?.map(f64::to_bits);

        let enqueue = || -> Result<_, Failed> {
            Ok((
                reducer.summary_async(&tensor)?,
                reducer.segmented_async(&tensor, cut)?,
                reducer.segmented_async(&matrix, Segments::Chunks(1))?,
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
        let (summary, segmented, chunk, number, again) = pending.ok_or("nothing was captured")?;
        for replay in 0..REPLAYS {
            graph.launch(&device)?;
            let same = summary_bits(&summary.read()?) == expected
                && summary_bits(&again.read()?) == expected
                && segment_bits(&segmented.read()?) == of_each
                && segment_bits(&chunk.read()?) == of_chunk
                && number.read()?.map(f64::to_bits) == sum;
            require(same, || format!("{length} elements: replay {replay} differs"))?;
        }
    }
    Ok(())
}
