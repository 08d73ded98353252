//! Results that stay on the device until they are read.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::*;

pub(crate) fn in_any_order(device: &Device) -> Result<(), Failed> {
    let reducer = TelemetryReducer::new(device)?;
    let lengths = [1usize, 100_000, 0, 5, 3_000_000, 70_000];
    let mut pending = Vec::new();
    for length in lengths {
        let tensor = Tensor::full(device, [length], 2.0f32)?;
        let largest = reducer.reduce_async(&tensor, Reduction::Max)?;
        pending.push((length, reducer.summary_async(&tensor)?, largest));
    }
    for (length, summary, largest) in pending.into_iter().rev() {
        let (summary, largest) = (summary.read()?, largest.read()?);
        let expected = (length as u64, 2.0 * length as f64, (length > 0).then_some(2.0));
        let got = (summary.count(), summary.sum(), largest);
        require(got == expected, || format!("got {got:?}, expected {expected:?}"))?;
    }
    Ok(())
}

/// Asking does not wait, and ends in a yes.
pub(crate) fn ready(device: &Device) -> Result<(), Failed> {
    // Of its own, as other trials enqueue on the one that is shared.
    let device = device.on_new_stream()?;
    let reducer = TelemetryReducer::new(&device)?;
    let (length, repetitions) = if reduced() { (1 << 16, 2) } else { (1 << 27, 500) };
    let tensor = Tensor::full(&device, [length], bf16::ONE)?;
    reducer.summary(&tensor)?;
    let mut last = reducer.summary_async(&tensor)?;
    for _ in 1..repetitions {
        last = reducer.summary_async(&tensor)?;
    }
    // 256 MiB are read more slowly than a launch is enqueued, so that most of it is yet to run.
    require(reduced() || !last.is_ready()?, || "it is ready before it can be".to_owned())?;
    let start = Instant::now();
    while !last.is_ready()? {
        require(start.elapsed() < Duration::from_secs(60), || "it is never ready".to_owned())?;
        thread::yield_now();
    }
    let count = last.read()?.count();
    require(count == length as u64, || format!("{count} elements"))?;
    drop((last, tensor));
    Ok(device.trim()?)
}

/// The extremes of records, read where the device has them.
pub(crate) fn addresses(device: &Device) -> Result<(), Failed> {
    let reducer = TelemetryReducer::new(device)?;
    let tensor = Tensor::from_slice(device, &[3.0f32, -4.0, 0.5, 1.0, 2.0, -1.0], [2, 3])?;
    let extremes = |address: u64, owner: Arc<dyn std::any::Any + Send + Sync>| {
        // SAFETY: minimum and maximum are two f32 behind six fields of 8 bytes each, kept by their
        // owner and written on this device handle's stream.
        let record = unsafe { Tensor::<f32>::from_raw(device, address + 48, [2], 2, owner) };
        record.and_then(|record| record.to_vec())
    };
    let summary = Arc::new(reducer.summary_async(&tensor)?);
    let got = extremes(summary.as_device_ptr(), summary)?;
    require(got == [-4.0, 3.0], || format!("of a summary: {got:?}"))?;
    let rows = Arc::new(reducer.segmented_async(&tensor, Segments::Rows)?);
    let second = rows.as_device_ptr() + 56;
    let got = extremes(second, rows)?;
    require(got == [-1.0, 2.0], || format!("of the second row: {got:?}"))?;
    let largest = Arc::new(reducer.reduce_async(&tensor, Reduction::Max)?);
    let got = extremes(largest.as_device_ptr(), largest)?;
    require(got[1] == 3.0, || format!("of a maximum: {got:?}"))?;
    let none = reducer.summary_async(&Tensor::<f32>::zeros(device, [0])?)?;
    require(none.as_device_ptr() == 0, || "no elements have an address".to_owned())
}
