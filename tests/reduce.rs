//! Telemetry reductions against a float64 reference, on every tier.
//!
//! `KASMINA_TEST_SEED` repeats a run, `KASMINA_TEST_REDUCED=1` takes lists short enough for
//! compute-sanitizer.

/// Wide chunks of columns.
#[path = "reduce/bands.rs"]
mod bands;
/// Columns of wide matrices.
#[path = "reduce/columns.rs"]
mod columns;
#[path = "support/gpu.rs"]
mod gpu;
#[path = "support/graph.rs"]
mod graph;
#[path = "support/moments.rs"]
mod moments;
/// Elements that are not finite.
#[path = "reduce/nan.rs"]
mod nan;
/// Results that stay on the device.
#[path = "reduce/pending.rs"]
mod pending;
#[path = "support/random.rs"]
mod random;
/// Captured reductions.
#[path = "reduce/replay.rs"]
mod replay;
/// Segments of matrices.
#[path = "reduce/segmented.rs"]
mod segmented;

use std::collections::BTreeSet;
use std::env;
use std::process::ExitCode;
use std::thread;

use gpu::Gpu;
use half::{bf16, f16};
use kasmina::{
    DType, Device, Element, Error, KernelConfig, NanPolicy, ReducerConfig, Reduction, Segments,
    Summary, TelemetryReducer, Tensor, Tier,
};
use kasmina_kernels::reduce::Chunks;
use libtest_mimic::{Arguments, Failed, Trial};
use moments::Reference;
use random::{Random, seed};

type Check = fn(&Device, Tier) -> Result<(), Failed>;

/// Dead are, of normally distributed numbers, about one in ten.
const EPSILON: f32 = 0.125;

fn main() -> ExitCode {
    let gpu = Gpu::find();
    let mut trials = Vec::new();
    for (name, check) in claims(Tier::Cpu) {
        trials.push(Trial::test(name, move || check(&Device::cpu(), Tier::Cpu)));
    }
    let found = Device::cuda(0).ok().and_then(|device| device.capability());
    for tier in [Tier::Portable, Tier::Hopper] {
        // No requirement can give a GPU what it lacks.
        if found.is_some_and(|gpu| !tier.runs_on(gpu.major, gpu.minor)) {
            continue;
        }
        for (name, check) in claims(tier).into_iter().chain(gpu_claims(tier)) {
            trials.push(gpu.trial(name, move |device| check(device, tier)));
        }
    }
    trials.extend([
        gpu.trial("streams_are_ordered_around_a_tensor_they_share", streams_are_ordered),
        gpu.trial("the_workspace_stays_as_it_is_over_repetitions", workspace),
        gpu.trial("pending_results_do_not_disturb_each_other", pending::in_any_order),
        gpu.trial("a_pending_result_is_ready_once_it_has_been_computed", pending::ready),
        gpu.trial("a_pending_result_is_where_it_says", pending::addresses),
        gpu.trial("threads_may_share_a_reducer", threads),
        gpu.trial("what_a_reducer_cannot_take_is_refused", refusals),
    ]);
    for bits in [31, 32] {
        let name = format!("elements_beyond_{bits}_bits_are_all_counted");
        let beyond = gpu.trial(name, move |device| all_counted(device, bits));
        // Both may be there at the same time, in blocks of up to an eighth more.
        let needed = 2 * (beyond_bits(31) + beyond_bits(bits)) as u64 * 9 / 8 + RESERVE;
        let too_small = found.is_some_and(|gpu| gpu.total_memory < needed);
        trials.push(if too_small || (found.is_some() && reduced()) {
            beyond.with_ignored_flag(true)
        } else {
            beyond
        });
    }

    let conclusion = libtest_mimic::run(&Arguments::from_args(), trials);
    println!("seed {}", seed());
    conclusion.exit_code()
}

/// What is claimed of every tier, for each element type.
fn claims(tier: Tier) -> Vec<(String, Check)> {
    fn of<T: Element>() -> Vec<(&'static str, Check)> {
        vec![
            ("lengths_around_every_edge_match_reference", lengths::<T>),
            ("more_than_2_to_the_24_elements_match_reference", many::<T>),
            ("adversarial_values_match_reference", adversarial::<T>),
            ("unit_noise_on_a_large_mean_keeps_its_variance", large_mean::<T>),
            ("non_finite_elements_are_counted_and_propagate", nan::count_and_propagate::<T>),
            ("results_do_not_depend_on_where_the_data_starts", unaligned::<T>),
            ("the_same_elements_give_the_same_bits_twice", repeats::<T>),
            ("skipped_nan_are_counted_and_the_rest_matches_reference", nan::are_skipped::<T>),
            ("segments_match_reference", segmented::match_reference::<T>),
            ("segments_of_views_leave_out_the_gaps", segmented::of_views::<T>),
            ("segments_keep_their_bits_over_repetitions_and_alignments", segmented::keep_bits::<T>),
            ("columns_of_adversarial_values_match_reference", columns::match_reference::<T>),
            ("columns_without_their_nan_match_reference", columns::skip_nan::<T>),
            ("wide_chunks_of_adversarial_values_match_reference", bands::match_reference::<T>),
            ("wide_chunks_without_their_nan_match_reference", bands::skip_nan::<T>),
            ("wide_chunks_of_views_have_the_bits_of_whole_matrices", bands::of_views::<T>),
        ]
    }
    of_each_type(tier, of::<f32>(), of::<f16>(), of::<bf16>())
}

/// What is claimed beyond that of tiers that have grids.
fn gpu_claims(tier: Tier) -> Vec<(String, Check)> {
    fn of<T: Element>() -> Vec<(&'static str, Check)> {
        vec![
            ("results_do_not_depend_on_the_grid", grids::<T>),
            ("two_streams_give_the_bits_of_one", streams_agree::<T>),
            ("a_replayed_graph_gives_the_same_bits_every_time", replay::gives_the_same_bits::<T>),
        ]
    }
    of_each_type(tier, of::<f32>(), of::<f16>(), of::<bf16>())
}

fn of_each_type(
    tier: Tier,
    f32s: Vec<(&'static str, Check)>,
    f16s: Vec<(&'static str, Check)>,
    bf16s: Vec<(&'static str, Check)>,
) -> Vec<(String, Check)> {
    [(DType::F32, f32s), (DType::F16, f16s), (DType::BF16, bf16s)]
        .into_iter()
        .flat_map(|(dtype, claims)| {
            claims
                .into_iter()
                .map(move |(sentence, check)| (format!("{tier}_{dtype}_{sentence}"), check))
        })
        .collect()
}

fn reduced() -> bool {
    env::var_os("KASMINA_TEST_REDUCED").is_some_and(|value| value == "1")
}

fn config(tier: Tier) -> ReducerConfig {
    let kernel_config = KernelConfig::default().tier(tier);
    ReducerConfig::default().epsilon(EPSILON).kernel_config(kernel_config)
}

fn reducer(device: &Device, tier: Tier) -> Result<TelemetryReducer, Failed> {
    let reducer = TelemetryReducer::with_config(device, config(tier))?;
    require(reducer.tier() == tier, || format!("{} serves instead", reducer.tier()))?;
    Ok(reducer)
}

fn normal<T: Element>(purpose: &str, count: usize) -> Vec<T> {
    let mut random = Random::of(&format!("{purpose} {count} {}", T::DTYPE));
    random.normal(count).into_iter().map(T::from_f32).collect()
}

fn vector<T: Element>(device: &Device, values: &[T]) -> Result<Tensor<T>, Failed> {
    Ok(Tensor::from_slice(device, values, [values.len()])?)
}

/// Compares the summary and every reduction of these values with the reference.
fn compare<T: Element>(reducer: &TelemetryReducer, values: &[T]) -> Result<(), String> {
    let told = |error: Error| error.to_string();
    let reference = Reference::of(values, EPSILON, reducer.tier());
    let tensor = Tensor::from_slice(reducer.device(), values, [values.len()]).map_err(told)?;
    reference.compare(&reducer.summary(&tensor).map_err(told)?)?;
    for reduction in Reduction::ALL {
        let got = reducer.reduce(&tensor, reduction).map_err(told)?;
        reference.compare_one(reduction, got).map_err(|error| format!("reduce alone: {error}"))?;
    }
    Ok(())
}

/// Lengths on both sides of warps, of vectors of them, and of every chunk size that occurs.
fn edge_lengths(dtype: DType) -> Vec<usize> {
    let mut lengths =
        BTreeSet::from([0, 1, 2, 3, 5, 31, 32, 33, 97, 1009, 10_007, 100_003, 999_983]);
    let largest = if reduced() { 14 } else { 20 };
    for log2 in 2..=largest {
        let chunk = Chunks::of(1 << log2, dtype).small_len as usize;
        // Where one cluster takes all.
        let few = Chunks::few(1 << log2, dtype).map_or(chunk, |few| few.small_len as usize);
        for edge in [1 << log2, chunk, 3 * chunk, few, 3 * few] {
            lengths.extend([edge - 1, edge, edge + 1]);
        }
    }
    lengths.retain(|&length| length <= 3 << largest);
    if reduced() {
        lengths.retain(|&length| length <= 20_000);
    }
    // Those of which every block takes one chunk of whole rows, and around where they begin.
    let first = (1 << 20) / dtype.size();
    let whole =
        if reduced() { &[130][..] } else { &[128, 129, 132, 133, 264, 265, 512, 513, 528, 530] };
    for &rows in whole {
        let edge = rows * first / 128;
        lengths.extend([edge - 1, edge, edge + 1, edge + 37, edge + first / 128 - 3]);
    }
    lengths.into_iter().collect()
}

fn lengths<T: Element>(device: &Device, tier: Tier) -> Result<(), Failed> {
    let reducer = reducer(device, tier)?;
    let values = normal::<T>("lengths", edge_lengths(T::DTYPE).last().copied().unwrap_or(0));
    for length in edge_lengths(T::DTYPE) {
        compare(&reducer, &values[values.len() - length..])
            .map_err(|error| format!("{length} elements: {error}"))?;
    }
    Ok(())
}

fn many<T: Element>(device: &Device, tier: Tier) -> Result<(), Failed> {
    let reducer = reducer(device, tier)?;
    let length = if reduced() { (1 << 17) + 1 } else { (1 << 24) + 1 };
    let values = normal::<T>("many", (1 << 16) + 3);
    let values: Vec<T> = values.into_iter().cycle().take(length).collect();
    compare(&reducer, &values)?;
    if reduced() {
        return Ok(());
    }
    // Beyond 128 MiB, where blocks take one chunk after the other.
    let part = &values[..(1 << 16) + 3];
    let times = (128 << 20) / size_of_val(&part[..1 << 16]);
    let tensor = vector(device, &part.repeat(times))?;
    let reference = Reference::of(part, EPSILON, reducer.tier()).repeated(times as u64);
    reference.compare(&reducer.summary(&tensor)?)?;
    reference.compare_one(Reduction::Sum, reducer.reduce(&tensor, Reduction::Sum)?)?;
    Ok(())
}

/// The largest finite value, and the smallest of all.
fn extremes<T: Element>() -> [f32; 2] {
    match T::DTYPE {
        DType::F16 => [f16::MAX.to_f32(), f16::from_bits(1).to_f32()],
        DType::BF16 => [bf16::MAX.to_f32(), bf16::from_bits(1).to_f32()],
        _ => [f32::MAX, f32::from_bits(1)],
    }
}

fn adversarial<T: Element>(device: &Device, tier: Tier) -> Result<(), Failed> {
    let reducer = reducer(device, tier)?;
    let [largest, smallest] = extremes::<T>();
    let count = if reduced() { 20_011 } else { 1_200_028 / size_of::<T>() };
    let noise = Random::of(&format!("noise {}", T::DTYPE)).normal(count);
    let signs = || (0..count).map(|i| if i % 2 == 0 { 1.0 } else { -1.0 });
    // A root keeps the spread within the narrowest type.
    let spread = || noise.iter().map(|&x: &f32| (3.0 * x).exp2());
    let cases: [(&str, Vec<f32>); 14] = [
        ("a large mean", noise.iter().map(|x| x + 1e4).collect()),
        ("a larger mean", noise.iter().map(|x| 0.01 * x - 3e4).collect()),
        ("a trend", (0..count).map(|i| i as f32 / count as f32).collect()),
        ("magnitudes that cancel", spread().zip(signs()).map(|(x, sign)| x * sign).collect()),
        (
            "halves that cancel",
            (0..count).map(|i| if 2 * i < count { 3e4 } else { -3e4 }).collect(),
        ),
        ("one large among small", (0..count).map(|i| if i == 777 { 6e4 } else { 1e-3 }).collect()),
        (
            "each chunk far from its first elements",
            noise.iter().enumerate().map(|(i, x)| if i % 2048 < 8 { 3e4 } else { *x }).collect(),
        ),
        (
            "steps within chunks",
            noise.iter().enumerate().map(|(i, x)| x + (i / 1500 % 2 * 1000) as f32).collect(),
        ),
        ("subnormal numbers", noise.iter().map(|x| (16.0 * x).round() * smallest).collect()),
        ("zeros of both signs", signs().map(|sign| 0.0 * sign).collect()),
        ("all equal", vec![0.1; count]),
        ("the largest value throughout", vec![largest; count]),
        ("the largest value in both signs", signs().map(|sign| largest * sign).collect()),
        ("squares that overflow", noise.iter().map(|x| largest / 64.0 * x).collect()),
    ];
    for (name, values) in cases {
        let values: Vec<T> = values.into_iter().map(T::from_f32).collect();
        for values in [&values[..], &values[..1000], &values[..37]] {
            compare(&reducer, values)
                .map_err(|error| format!("{name}, {} elements: {error}", values.len()))?;
        }
    }
    Ok(())
}

/// Noise of variance 1 around 10⁴, where Σx² − n·mean² in f32 would leave nothing of it.
fn large_mean<T: Element>(device: &Device, tier: Tier) -> Result<(), Failed> {
    let reducer = reducer(device, tier)?;
    let count = if reduced() { 1 << 14 } else { 1 << 20 };
    let noise = Random::of("large mean").normal(count);
    let values: Vec<T> = noise.into_iter().map(|x| T::from_f32(1e4 + x)).collect();
    // bf16 leaves one value of them, and what is left of the noise in f16 is rounded.
    let wide = || values.iter().map(|value| f64::from(value.to_f32()));
    let mean = wide().sum::<f64>() / count as f64;
    let expected = wide().map(|x| (x - mean).powi(2)).sum::<f64>() / count as f64;
    let got = reducer.summary(&vector(device, &values)?)?.variance();
    let error = (got.unwrap_or(f64::NAN) - expected).abs();
    require(error <= 1e-5 * expected, || format!("got {got:?}, expected {expected}"))
}

/// Every bit that a reducer's results consist of.
fn bits<T: Element>(reducer: &TelemetryReducer, tensor: &Tensor<T>) -> Result<Vec<u64>, Failed> {
    let mut bits = summary_bits(&reducer.summary(tensor)?);
    for reduction in Reduction::ALL {
        bits.push(reducer.reduce(tensor, reduction)?.map_or(u64::MAX, f64::to_bits));
    }
    Ok(bits)
}

fn summary_bits(summary: &Summary) -> Vec<u64> {
    let doubles = [
        Some(summary.sum()),
        summary.mean(),
        summary.variance(),
        summary.dead_ratio(),
        summary.min().map(f64::from),
        summary.max().map(f64::from),
    ];
    let mut bits = vec![summary.count(), summary.non_finite()];
    bits.extend(doubles.map(|double| double.map_or(u64::MAX, f64::to_bits)));
    bits
}

fn unaligned<T: Element>(device: &Device, tier: Tier) -> Result<(), Failed> {
    let reducer = reducer(device, tier)?;
    let lengths: &[usize] =
        if reduced() { &[1, 5000, 600_011] } else { &[1, 31, 5000, 70_001, 600_011, 1_200_007] };
    for &length in lengths {
        let values = normal::<T>("unaligned", length);
        let expected = bits(&reducer, &vector(device, &values)?)?;
        for offset in 1..=9 {
            // What lies before and after would show in every statistic.
            let mut whole = vec![T::from_f32(f32::NAN); offset];
            whole.extend(&values);
            whole.extend([T::from_f32(f32::INFINITY); 16]);
            let view = vector(device, &whole)?.columns(offset..offset + length)?;
            let got = bits(&reducer, &view)?;
            require(got == expected, || format!("{length} elements {offset} off an alignment"))?;
        }
    }
    Ok(())
}

fn repeats<T: Element>(device: &Device, tier: Tier) -> Result<(), Failed> {
    let reducer = reducer(device, tier)?;
    // By turns, so that one leaves the workspace to the other.
    let lengths = if reduced() { [3000, 70_001] } else { [3000, 1_200_007] };
    let tensors = [
        vector(device, &normal::<T>("repeats", lengths[0]))?,
        vector(device, &normal::<T>("repeats", lengths[1]))?,
    ];
    let expected = [bits(&reducer, &tensors[0])?, bits(&reducer, &tensors[1])?];
    for repetition in 0..if reduced() { 2 } else { 20 } {
        for (tensor, expected) in tensors.iter().zip(&expected) {
            let got = bits(&reducer, tensor)?;
            require(got == *expected, || format!("repetition {repetition}: the bits differ"))?;
        }
    }
    let copy = vector(device, &tensors[1].to_vec()?)?;
    require(bits(&reducer, &copy)? == expected[1], || "a copy has other bits".to_owned())
}

fn grids<T: Element>(device: &Device, tier: Tier) -> Result<(), Failed> {
    let lengths: &[usize] = if reduced() {
        &[70_001, 600_011]
    } else {
        &[5000, 70_001, 1 << 20, 4_000_037, 70_000_001]
    };
    for &length in lengths {
        let values = normal::<T>("grids", length.min(4_000_037));
        let values: Vec<T> = values.into_iter().cycle().take(length).collect();
        let tensor = vector(device, &values)?;
        let expected = bits(&reducer(device, tier)?, &tensor)?;
        for blocks in [1, 2, 3, 7, 64, 131] {
            let config = config(tier).max_blocks(blocks);
            let reducer = TelemetryReducer::with_config(device, config)?;
            let got = bits(&reducer, &tensor)?;
            require(got == expected, || format!("{length} elements, {blocks} blocks"))?;
        }
    }
    Ok(())
}

fn streams_agree<T: Element>(device: &Device, tier: Tier) -> Result<(), Failed> {
    let tensor = vector(device, &normal::<T>("streams", 1_000_003))?;
    let other = device.on_new_stream()?;
    let reducers = [reducer(device, tier)?, reducer(&other, tier)?];
    let expected = bits(&reducers[0], &tensor)?;
    let mut pending = Vec::new();
    for _ in 0..if reduced() { 2 } else { 50 } {
        for reducer in &reducers {
            pending.push(reducer.summary_async(&tensor)?);
        }
    }
    let expected = &expected[..8];
    for (number, pending) in pending.into_iter().enumerate() {
        let got = summary_bits(&pending.read()?);
        require(got == *expected, || format!("summary {number}: the bits differ"))?;
    }
    Ok(())
}

/// A tensor of one stream is written before and after a reducer of another reads it.
fn streams_are_ordered(device: &Device) -> Result<(), Failed> {
    let other = device.on_new_stream()?;
    let reducer = TelemetryReducer::new(&other)?;
    let length = 1 << 22;
    let mut pending = Vec::new();
    for round in 0..20u8 {
        // Its memory goes to the next round's tensor as soon as it is dropped.
        let tensor = Tensor::full(device, [length], f32::from(round))?;
        pending.push(reducer.reduce_async(&tensor, Reduction::Sum)?);
    }
    for (round, pending) in pending.into_iter().enumerate() {
        let expected = Some((round * length) as f64);
        let got = pending.read()?;
        require(got == expected, || format!("round {round}: got {got:?}"))?;
    }
    Ok(())
}

fn workspace(device: &Device) -> Result<(), Failed> {
    let device = device.on_new_stream()?;
    let reducer = TelemetryReducer::new(&device)?;
    require(reducer.workspace_bytes() == 0, || "it has a workspace before any use".to_owned())?;
    let tensor = Tensor::full(&device, [1 << 20], 1.0f32)?;
    reducer.summary(&tensor)?;
    let kept = reducer.workspace_bytes();
    let allocations = device.memory().driver_allocations;
    for round in 0..100 {
        let part = tensor.columns(0..(1 << 20) - round * 1000)?;
        reducer.summary(&part)?;
        reducer.reduce(&part, Reduction::Sum)?;
    }
    require(kept > 0 && reducer.workspace_bytes() == kept, || {
        format!("{kept} bytes at first, then {}", reducer.workspace_bytes())
    })?;
    let more = device.memory().driver_allocations - allocations;
    require(more == 0, || format!("the driver was asked for memory {more} times"))?;

    let in_use = device.memory().in_use;
    reducer.trim();
    require(reducer.workspace_bytes() == 0 && device.memory().in_use < in_use, || {
        "the workspace is kept".to_owned()
    })?;
    let sum = reducer.reduce(&tensor, Reduction::Sum)?;
    require(sum == Some(f64::from(1 << 20)), || format!("{sum:?} after trimming"))
}

fn threads(device: &Device) -> Result<(), Failed> {
    let reducer = TelemetryReducer::new(device)?;
    let outcomes = thread::scope(|scope| {
        let run = |number: usize| {
            let (reducer, device) = (&reducer, device);
            move || {
                for round in 1..=20 {
                    let length = round * 10_000 * (number + 1);
                    let tensor = Tensor::full(device, [length], number as f32)?;
                    let got = reducer.reduce(&tensor, Reduction::Sum)?;
                    let expected = Some((number * length) as f64);
                    require(got == expected, || format!("got {got:?}, expected {expected:?}"))?;
                }
                Ok(())
            }
        };
        let threads: Vec<_> = (0..4).map(|number| scope.spawn(run(number))).collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|_| Err("a thread panicked".into())))
            .collect::<Vec<Result<(), Failed>>>()
    });
    outcomes.into_iter().collect()
}

fn refusals(device: &Device) -> Result<(), Failed> {
    let reducer = TelemetryReducer::new(device)?;
    let matrix = Tensor::full(device, [3, 5], 1.0f32)?;
    let chunks = reducer.segmented(&matrix, Segments::Chunks(6));
    require(matches!(chunks, Err(Error::Chunks { .. })), || format!("chunks: {chunks:?}"))?;
    let elsewhere = reducer.summary(&Tensor::full(&Device::cpu(), [3], 1.0f32)?);
    require(matches!(elsewhere, Err(Error::DeviceMismatch { .. })), || {
        format!("host memory: {elsewhere:?}")
    })?;
    let on_cpu = TelemetryReducer::with_config(device, config(Tier::Cpu)).map(drop);
    require(matches!(on_cpu, Err(Error::Unsupported { .. })), || format!("CPU tier: {on_cpu:?}"))?;
    let sum = reducer.reduce(&matrix, Reduction::Sum)?;
    require(sum == Some(15.0), || format!("{sum:?} after the refusals"))
}

/// Memory that other things on the GPU may take, in bytes.
const RESERVE: u64 = 2 << 30;

/// More elements than so many bits can number.
const fn beyond_bits(bits: u32) -> usize {
    (1 << bits) + 7
}

fn all_counted(device: &Device, bits: u32) -> Result<(), Failed> {
    // Nobody else has use for memory of this size.
    let device = device.on_new_stream()?;
    let len = beyond_bits(bits);
    let tensor = Tensor::full(&device, [len], bf16::ONE)?;
    let first_beyond = 1 << bits;
    for (position, value) in [(0, -3.0), (first_beyond, f32::INFINITY), (len - 1, 0.0)] {
        tensor.columns(position..position + 1)?.copy_from_slice(&[bf16::from_f32(value)])?;
    }
    let reducer = TelemetryReducer::new(&device)?;
    let summary = reducer.summary(&tensor)?;
    let got = (summary.count(), summary.min(), summary.max(), summary.non_finite(), summary.sum());
    let expected = (len as u64, Some(-3.0), Some(f32::INFINITY), 1, f64::INFINITY);
    require(got == expected, || format!("got {got:?}, expected {expected:?}"))?;

    tensor.columns(first_beyond..first_beyond + 1)?.copy_from_slice(&[bf16::ONE])?;
    let summary = reducer.summary(&tensor)?;
    // −3 and 0 instead of two ones.
    let expected = (len as f64 - 5.0, 1);
    let got = (summary.sum(), summary.dead());
    require(got == expected, || format!("got {got:?}, expected {expected:?}"))?;
    let sum = reducer.reduce(&tensor, Reduction::Sum)?;
    require(sum == Some(expected.0), || format!("the sum alone is {sum:?}"))?;
    drop(tensor);
    reducer.trim();
    Ok(device.trim()?)
}

fn require(holds: bool, message: impl FnOnce() -> String) -> Result<(), Failed> {
    if holds { Ok(()) } else { Err(message().into()) }
}
