//! Telemetry fused into the forward pass: against a float64 reference of the output that was
//! stored, and against the reduction of that output.
//!
//! `KASMINA_TEST_SEED` repeats a run, `KASMINA_TEST_REDUCED=1` takes lists short enough for
//! compute-sanitizer.

#[path = "support/gpu.rs"]
mod gpu;
#[path = "support/graph.rs"]
mod graph;
#[path = "support/moments.rs"]
mod moments;
#[path = "support/poison.rs"]
mod poison;
#[path = "support/random.rs"]
mod random;
#[path = "support/reduced.rs"]
mod reduced;

use std::process::ExitCode;

use gpu::Gpu;
use graph::Graph;
use half::{bf16, f16};
use kasmina::{
    Activation, DType, Device, Error, KasminaLayer, KernelConfig, LayerTelemetry, LinearConfig,
    NanPolicy, ReducerConfig, Segments, Summary, TelemetryReducer, Tensor, Tier, WeightLayout,
};
use libtest_mimic::{Arguments, Failed, Trial};
use moments::Reference;
use poison::{Poison, bits};
use random::{Random, seed};
use reduced::shortened;

type Check = fn(&Device) -> Result<(), Failed>;

/// Dead are, of outputs without activation, about one in ten.
const EPSILON: f32 = 0.0625;
/// The tiles that kernels with telemetry have.
const TILES: [[u32; 2]; 2] = [[128, 256], [64, 128]];

fn main() -> ExitCode {
    let gpu = Gpu::find();
    let mut trials = vec![Trial::test("cpu_telemetry_matches_reference", || {
        unfused::<f32>(&Device::cpu(), Tier::Cpu)
    })];
    let found = Device::cuda(0).ok().and_then(|device| device.capability());
    let lacks = |tier: Tier| found.is_some_and(|gpu| !tier.runs_on(gpu.major, gpu.minor));
    if !lacks(Tier::Hopper) {
        for (name, check) in claims::<bf16>().into_iter().chain(claims::<f16>()) {
            trials.push(gpu.trial(name, check));
        }
        trials.extend([
            gpu.trial("chunks_that_are_not_whole_half_tiles_are_reduced_afterwards", ragged_chunks),
            gpu.trial("what_no_fused_kernel_serves_is_reduced_afterwards", not_served),
        ]);
    }
    trials.extend([
        gpu.trial("portable_telemetry_matches_reference", |device| {
            unfused::<f32>(device, Tier::Portable)?;
            unfused::<bf16>(device, Tier::Portable)
        }),
        gpu.trial("what_telemetry_cannot_take_is_refused_before_the_pass", refusals),
    ]);
    let conclusion = libtest_mimic::run(&Arguments::from_args(), trials);
    println!("seed {}", seed());
    conclusion.exit_code()
}

fn claims<T: Poison>() -> Vec<(String, Check)> {
    let claims: [(&str, Check); 8] = [
        ("one_tile_matches_reference", |device| each::<T>(device, small_cases())),
        ("shapes_around_tile_edges_match_reference", |device| each::<T>(device, edge_cases())),
        ("several_tiles_per_block_match_reference", |device| each::<T>(device, large_cases())),
        ("outputs_far_from_zero_keep_their_variance", far_from_zero::<T>),
        ("non_finite_and_extreme_outputs_match_reference", specials::<T>),
        ("the_same_pass_gives_the_same_bits_on_any_stream", same_bits::<T>),
        ("a_replayed_graph_gives_the_same_bits_every_time", replays::<T>),
        ("passes_of_other_shapes_do_not_disturb_each_other", in_turn::<T>),
    ];
    claims.map(|(sentence, check)| (format!("hopper_{}_{sentence}", T::DTYPE), check)).into()
}

/// A pass, and how its output is cut up.
#[derive(Clone, Copy, Debug)]
struct Case {
    /// m, n, k.
    shape: [usize; 3],
    chunks: usize,
    tile: [u32; 2],
    layout: WeightLayout,
    activation: Activation,
}

/// Every shape with every tile that serves it; layout and activation go round.
fn cases(shapes: impl IntoIterator<Item = ([usize; 3], usize)>) -> Vec<Case> {
    let mut cases = Vec::new();
    for (shape, chunks) in shapes {
        for tile in TILES {
            // Whole halves of tiles.
            if chunks > 1 && !(shape[1] / chunks).is_multiple_of(tile[1] as usize / 2) {
                continue;
            }
            let number = cases.len();
            let layout = WeightLayout::ALL[number % 2];
            let activation = Activation::ALL[number % Activation::ALL.len()];
            cases.push(Case { shape, chunks, tile, layout, activation });
        }
    }
    cases
}

fn small_cases() -> Vec<Case> {
    cases(shortened(vec![([64, 128, 64], 1), ([64, 128, 64], 2), ([128, 256, 72], 4)], 2))
}

fn edge_cases() -> Vec<Case> {
    let mut shapes = Vec::new();
    for m in [1, 63, 65, 128, 129, 191, 257] {
        for (n, chunks) in
            [(8, 1), (64, 1), (72, 1), (128, 2), (200, 1), (264, 1), (576, 3), (768, 4), (1016, 1)]
        {
            let k = [8, 64, 72, 136, 520][shapes.len() % 5];
            shapes.push(([m, n, k], chunks));
        }
    }
    cases(shortened(shapes, 3))
}

/// More tiles than an H200 has multiprocessors, of every kind.
fn large_cases() -> Vec<Case> {
    cases(shortened(
        vec![
            ([2180, 4096, 72], 8),
            ([2180, 4096, 1032], 1),
            ([1993, 4096, 64], 64),
            ([4096, 2880, 8], 15),
            ([5003, 2312, 200], 1),
        ],
        0,
    ))
}

impl Case {
    fn layer(&self, device: &Device, dtype: DType) -> Result<KasminaLayer, Failed> {
        let [_, n, k] = self.shape;
        let kernels = KernelConfig::default().hopper_tile(self.tile).hopper_split_k(1);
        let config = LinearConfig::new(k, n).dtype(dtype).weight_layout(self.layout);
        let config = config.activation(self.activation).kernel_config(kernels);
        Ok(config.seed(seed()).build(device)?)
    }

    fn x<T: Poison>(&self, device: &Device) -> Result<Tensor<T>, Failed> {
        let [m, _, k] = self.shape;
        Ok(Tensor::from_slice(device, &normal::<T>("x", m * k), [m, k])?)
    }
}

fn normal<T: Poison>(purpose: &str, count: usize) -> Vec<T> {
    let mut random = Random::of(&format!("{purpose} {count} {}", T::DTYPE));
    random.normal(count).into_iter().map(T::from_f32).collect()
}

fn reducer(device: &Device, nan: NanPolicy) -> Result<TelemetryReducer, Failed> {
    let config = ReducerConfig::default().epsilon(EPSILON).nan(nan);
    Ok(TelemetryReducer::with_config(device, config)?)
}

fn poisoned<T: Poison>(device: &Device, shape: [usize; 2]) -> Result<Tensor<T>, Failed> {
    Ok(Tensor::from_slice(device, &vec![T::POISON; shape[0] * shape[1]], shape)?)
}

fn require(holds: bool, message: impl FnOnce() -> String) -> Result<(), Failed> {
    if holds { Ok(()) } else { Err(message().into()) }
}

/// The elements of each chunk of columns, the first chunks one wider where it does not divide.
fn elements<T: Copy>(values: &[T], columns: usize, chunks: usize) -> Vec<Vec<T>> {
    let (width, wider) = (columns / chunks, columns % chunks);
    let of_chunk = |chunk: usize| {
        let first = chunk * width + chunk.min(wider);
        let width = width + usize::from(chunk < wider);
        values.chunks(columns).flat_map(|row| row[first..first + width].to_vec()).collect()
    };
    (0..chunks).map(of_chunk).collect()
}

/// Compares every chunk's summary with the reference of what was stored.
fn compare<T: Poison>(
    y: &[T],
    columns: usize,
    got: &[Summary],
    nan: NanPolicy,
    tier: Tier,
) -> Result<(), String> {
    for (chunk, (values, got)) in elements(y, columns, got.len()).iter().zip(got).enumerate() {
        let reference = if nan == NanPolicy::Skip {
            let kept: Vec<T> =
                values.iter().copied().filter(|value| !value.to_f32().is_nan()).collect();
            let non_finite = values.iter().filter(|value| !value.to_f32().is_finite()).count();
            Reference::of(&kept, EPSILON, tier).with_non_finite(non_finite as u64)
        } else {
            Reference::of(values, EPSILON, tier)
        };
        reference.compare(got).map_err(|error| format!("chunk {chunk}: {error}"))?;
    }
    Ok(())
}

/// What a reduction of the output must tell exactly as the pass does.
fn exact(summary: &Summary) -> [u64; 5] {
    let dead = summary.dead_ratio().unwrap_or(0.0) * summary.count() as f64;
    let bits = |extreme: Option<f32>| u64::from(extreme.map_or(u32::MAX, f32::to_bits));
    let nan = summary.min().is_some_and(f32::is_nan);
    // Which NaN it is does not matter.
    let (min, max) = if nan { (1, 1) } else { (bits(summary.min()), bits(summary.max())) };
    [summary.count(), summary.non_finite(), dead.round() as u64, min, max]
}

fn summary_bits(summary: &Summary) -> Vec<u64> {
    let mut all = exact(summary).to_vec();
    let doubles = [Some(summary.sum()), summary.mean(), summary.variance()];
    all.extend(doubles.map(|double| double.map_or(u64::MAX, f64::to_bits)));
    all
}

fn all_bits(telemetry: &LayerTelemetry) -> Result<Vec<u64>, Failed> {
    Ok(telemetry.read()?.iter().flat_map(summary_bits).collect())
}

/// Runs a pass with telemetry and compares output and summaries.
fn check<T: Poison>(
    device: &Device,
    layer: &KasminaLayer,
    x: &Tensor<T>,
    chunks: usize,
    nan: NanPolicy,
) -> Result<(), Failed> {
    let reducer = reducer(device, nan)?;
    let shape = [x.shape().rows(), layer.out_features()];
    let mut y = poisoned::<T>(device, shape)?;
    let telemetry = layer.forward_into_with_telemetry(x, &mut y, &reducer, chunks)?;
    require(telemetry.is_fused(), || "it is not fused".to_owned())?;
    require(telemetry.tier() == Tier::Hopper, || format!("{} serves", telemetry.tier()))?;
    let (got, values) = (telemetry.read()?, y.to_vec()?);
    let mut plain = poisoned::<T>(device, shape)?;
    layer.forward_into(x, &mut plain)?;
    let same = bits(&plain.to_vec()?) == bits(&values);
    require(same, || "the output is not that of a pass without telemetry".to_owned())?;
    compare(&values, shape[1], &got, nan, Tier::Hopper)?;
    let reduced = reducer.segmented(&y, Segments::Chunks(chunks))?;
    for (chunk, (got, reduced)) in got.iter().zip(&reduced).enumerate() {
        let (got, reduced) = (exact(got), exact(reduced));
        require(got == reduced, || format!("chunk {chunk}: {got:?}, reduced {reduced:?}"))?;
    }
    Ok(())
}

fn each<T: Poison>(device: &Device, cases: Vec<Case>) -> Result<(), Failed> {
    for case in cases {
        let (layer, x) = (case.layer(device, T::DTYPE)?, case.x::<T>(device)?);
        check(device, &layer, &x, case.chunks, NanPolicy::Propagate)
            .map_err(|error| format!("{case:?}: {}", error.message().unwrap_or_default()))?;
    }
    Ok(())
}

/// Layers whose bias alone decides where the outputs lie.
fn with_bias<T: Poison>(
    device: &Device,
    case: Case,
    bias: impl Fn(usize) -> f32,
    nan: NanPolicy,
) -> Result<(), Failed> {
    let mut layer = case.layer(device, T::DTYPE)?;
    layer.set_bias(&(0..case.shape[1]).map(bias).collect::<Vec<f32>>())?;
    let x = case.x::<T>(device)?;
    check(device, &layer, &x, case.chunks, nan)
        .map_err(|error| format!("{case:?}, {nan:?}: {}", error.message().unwrap_or_default()))?;
    Ok(())
}

fn plain_cases() -> Vec<Case> {
    let mut cases = cases(shortened(vec![([300, 512, 64], 2), ([130, 264, 72], 1)], 1));
    cases.iter_mut().for_each(|case| case.activation = Activation::None);
    cases
}

fn far_from_zero<T: Poison>(device: &Device) -> Result<(), Failed> {
    for case in plain_cases() {
        for mean in [100.0, -1e4, 6e4] {
            with_bias::<T>(device, case, |_| mean, NanPolicy::Propagate)?;
        }
    }
    Ok(())
}

fn specials<T: Poison>(device: &Device) -> Result<(), Failed> {
    let largest = if T::DTYPE == DType::F16 { 65_000.0 } else { 3e38 };
    let sets: [&[f32]; 6] = [
        &[f32::NAN],
        &[f32::INFINITY],
        &[f32::INFINITY, f32::NEG_INFINITY],
        &[f32::NAN, f32::INFINITY],
        &[largest, -largest],
        &[largest, 1e-30],
    ];
    for case in plain_cases() {
        for set in sets {
            for every in [1, 50, 511] {
                for nan in [NanPolicy::Propagate, NanPolicy::Skip] {
                    let first = Random::of(&format!("{set:?} {every}")).below(every);
                    let bias = |column: usize| {
                        if column % every == first { set[column / every % set.len()] } else { 0.5 }
                    };
                    with_bias::<T>(device, case, bias, nan)?;
                }
            }
        }
        // Dead as a whole.
        let case = Case { activation: Activation::Relu, ..case };
        with_bias::<T>(device, case, |_| -100.0, NanPolicy::Propagate)?;
    }
    Ok(())
}

fn same_bits<T: Poison>(device: &Device) -> Result<(), Failed> {
    let shapes = vec![([130, 512, 64], 2), ([2180, 4096, 136], 8), ([3001, 2056, 72], 1)];
    for case in cases(shortened(shapes, 1)) {
        let (layer, x) = (case.layer(device, T::DTYPE)?, case.x::<T>(device)?);
        let reducer = reducer(device, NanPolicy::Propagate)?;
        let expected = all_bits(&layer.forward_with_telemetry(&x, &reducer, case.chunks)?.1)?;
        for repetition in 0..5 {
            let (_, telemetry) = layer.forward_with_telemetry(&x, &reducer, case.chunks)?;
            let same = all_bits(&telemetry)? == expected;
            require(same, || format!("{case:?}: repetition {repetition} differs"))?;
        }
        // Layers and reducers on streams of their own, at the same time.
        let others = [device.on_new_stream()?, device.on_new_stream()?];
        let mut pending = Vec::new();
        for other in &others {
            let (layer, x) = (case.layer(other, T::DTYPE)?, case.x::<T>(other)?);
            let own = self::reducer(other, NanPolicy::Propagate)?;
            for _ in 0..3 {
                pending.push(layer.forward_with_telemetry(&x, &own, case.chunks)?.1);
                // The workspace of another stream.
                pending.push(layer.forward_with_telemetry(&x, &reducer, case.chunks)?.1);
            }
        }
        for (pass, telemetry) in pending.iter().enumerate() {
            let same = all_bits(telemetry)? == expected;
            require(same, || format!("{case:?}: pass {pass} on other streams differs"))?;
        }
    }
    Ok(())
}

fn replays<T: Poison>(device: &Device) -> Result<(), Failed> {
    // Only a stream of its own can be captured.
    let device = device.on_new_stream()?;
    for case in cases(shortened(vec![([300, 512, 64], 2), ([2180, 4096, 72], 8)], 1)) {
        let (layer, x) = (case.layer(&device, T::DTYPE)?, case.x::<T>(&device)?);
        let reducer = reducer(&device, NanPolicy::Propagate)?;
        // Outside the capture, so that modules are loaded and memory is there.
        let [m, n, _] = case.shape;
        let mut y = poisoned::<T>(&device, [m, n])?;
        let mut run = || layer.forward_into_with_telemetry(&x, &mut y, &reducer, case.chunks);
        let before = [run()?, run()?, run()?];
        let expected = all_bits(&before[2])?;
        drop(before);
        let mut pending = Vec::new();
        let graph = Graph::of(&device, || {
            for _ in 0..3 {
                pending.push(run()?);
            }
            Ok(())
        })?;
        for replay in 0..10 {
            graph.launch(&device)?;
            for telemetry in &pending {
                let same = all_bits(telemetry)? == expected;
                require(same, || format!("{case:?}: replay {replay} differs"))?;
            }
        }
    }
    Ok(())
}

fn in_turn<T: Poison>(device: &Device) -> Result<(), Failed> {
    let reducer = reducer(device, NanPolicy::Propagate)?;
    let cases = cases(shortened(
        vec![([130, 512, 64], 2), ([2180, 4096, 72], 8), ([1, 64, 8], 1), ([700, 768, 72], 12)],
        1,
    ));
    let mut pending = Vec::new();
    for round in 0..3 {
        for case in &cases {
            let (layer, x) = (case.layer(device, T::DTYPE)?, case.x::<T>(device)?);
            let (y, telemetry) = layer.forward_with_telemetry(&x, &reducer, case.chunks)?;
            pending.push((round, case, y, telemetry));
        }
    }
    for (round, case, y, telemetry) in pending {
        let got = telemetry.read()?;
        compare(&y.to_vec()?, case.shape[1], &got, NanPolicy::Propagate, Tier::Hopper)
            .map_err(|error| format!("{case:?}, round {round}: {error}"))?;
    }
    Ok(())
}

/// A pass that has to be reduced afterwards.
fn after<T: Poison>(
    device: &Device,
    config: LinearConfig,
    reducer: &TelemetryReducer,
    m: usize,
    chunks: usize,
) -> Result<(), Failed> {
    let layer = config.dtype(T::DTYPE).build(device)?;
    let k = layer.in_features();
    let x = Tensor::from_slice(device, &normal::<T>("x", m * k), [m, k])?;
    let (y, telemetry) = layer.forward_with_telemetry(&x, reducer, chunks)?;
    require(!telemetry.is_fused(), || format!("{chunks} chunks: it is fused"))?;
    let columns = layer.out_features();
    let (y, got) = (y.to_vec()?, telemetry.read()?);
    Ok(compare(&y, columns, &got, NanPolicy::Propagate, reducer.tier())?)
}

fn unfused<T: Poison>(device: &Device, tier: Tier) -> Result<(), Failed> {
    let kernels = KernelConfig::default().tier(tier);
    let config = ReducerConfig::default().epsilon(EPSILON).kernel_config(kernels.clone());
    let reducer = TelemetryReducer::with_config(device, config)?;
    for (m, n, k, chunks) in [(1, 1, 1, 1), (33, 70, 17, 7), (130, 64, 64, 1), (65, 257, 33, 3)] {
        let config = LinearConfig::new(k, n).kernel_config(kernels.clone());
        after::<T>(device, config, &reducer, m, chunks)?;
    }
    Ok(())
}

fn ragged_chunks(device: &Device) -> Result<(), Failed> {
    let reducer = reducer(device, NanPolicy::Propagate)?;
    for (n, chunks) in [(96, 2), (200, 3), (128, 128), (520, 8)] {
        after::<bf16>(device, LinearConfig::new(64, n), &reducer, 130, chunks)?;
        after::<f16>(device, LinearConfig::new(64, n), &reducer, 130, chunks)?;
    }
    Ok(())
}

fn not_served(device: &Device) -> Result<(), Failed> {
    let reducer = reducer(device, NanPolicy::Propagate)?;
    let config = || LinearConfig::new(256, 128);
    after::<f32>(device, config(), &reducer, 64, 2)?;
    for kernels in [
        KernelConfig::default().hopper_tile([64, 64]),
        KernelConfig::default().hopper_tile([128, 128]),
        KernelConfig::default().hopper_split_k(2),
        KernelConfig::default().tier(Tier::Portable),
        KernelConfig::default().enable_tma(false),
    ] {
        after::<bf16>(device, config().kernel_config(kernels), &reducer, 64, 2)?;
    }
    // Rows that TMA cannot store, or not load.
    for (k, n) in [(64, 65), (65, 64), (65, 65)] {
        after::<bf16>(device, LinearConfig::new(k, n), &reducer, 64, 1)?;
    }
    displaced(device, &reducer)?;
    // A reducer of another tier keeps its bits.
    let kernels = KernelConfig::default().tier(Tier::Portable);
    let config_of = ReducerConfig::default().epsilon(EPSILON).kernel_config(kernels);
    let portable = TelemetryReducer::with_config(device, config_of)?;
    after::<bf16>(device, config(), &portable, 64, 2)
}

/// Views that begin where TMA can address them, and where it cannot.
fn displaced(device: &Device, reducer: &TelemetryReducer) -> Result<(), Failed> {
    let layer = LinearConfig::new(64, 128).dtype(DType::BF16).build(device)?;
    let values = normal::<bf16>("displaced", 64 * 72);
    let wide = Tensor::from_slice(device, &values, [64, 72])?;
    let straight = wide.columns(0..64)?;
    let shifted = wide.columns(1..65)?;
    for (x, y_first, fused) in [(&straight, 0, true), (&straight, 1, false), (&shifted, 0, false)] {
        let mut y = poisoned::<bf16>(device, [64, 136])?.columns(y_first..y_first + 128)?;
        let telemetry = layer.forward_into_with_telemetry(x, &mut y, reducer, 2)?;
        require(telemetry.is_fused() == fused, || format!("Y from {y_first}: {telemetry:?}"))?;
        let got = telemetry.read()?;
        compare(&y.to_vec()?, 128, &got, NanPolicy::Propagate, Tier::Hopper)?;
    }
    Ok(())
}

fn refusals(device: &Device) -> Result<(), Failed> {
    let layer = LinearConfig::new(64, 128).dtype(DType::BF16).build(device)?;
    let x = Tensor::from_slice(device, &normal::<bf16>("x", 64 * 64), [64, 64])?;
    let own = reducer(device, NanPolicy::Propagate)?;
    let mut y = poisoned::<bf16>(device, [64, 128])?;
    for chunks in [0, 129] {
        let error = layer.forward_into_with_telemetry(&x, &mut y, &own, chunks);
        require(matches!(error, Err(Error::Chunks { columns: 128, .. })), || {
            format!("{chunks} chunks: {error:?}")
        })?;
    }
    let elsewhere = TelemetryReducer::new(&Device::cpu())?;
    let error = layer.forward_into_with_telemetry(&x, &mut y, &elsewhere, 2);
    require(matches!(error, Err(Error::DeviceMismatch { .. })), || format!("{error:?}"))?;
    let untouched = y.to_vec()?.into_iter().all(|value| value.to_bits() == u16::MAX);
    require(untouched, || "a refused pass has run".to_owned())
}
