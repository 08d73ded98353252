//! One-dimensional convolution and its gradients against a float64 reference, on every tier.
//!
//! `KASMINA_TEST_SEED` repeats a run, `KASMINA_TEST_REDUCED=1` takes a list short enough for
//! compute-sanitizer.

#[path = "support/activation.rs"]
mod activation;
#[path = "support/convolution.rs"]
mod convolution;
#[path = "support/convolution_cases.rs"]
mod convolution_cases;
#[path = "support/convolution_faults.rs"]
mod convolution_faults;
#[path = "conv1d/finite_differences.rs"]
mod finite_differences;
#[path = "support/gpu.rs"]
mod gpu;
#[path = "conv1d/parts.rs"]
mod parts;
#[path = "support/poison.rs"]
mod poison;
#[path = "support/random.rs"]
mod random;
#[path = "conv1d/tensor_cores.rs"]
mod tensor_cores;

use std::process::ExitCode;
use std::sync::atomic::{AtomicUsize, Ordering};

use convolution::{
    Convolution, Shape, Sum, canonical, canonical_filter, filter_laid_out, laid_out,
};
use convolution_cases::{
    Case, cases, crossed_cases, depthwise_cases, edge_cases, explicit, reduced, short_cases,
    thinned, view_cases,
};
use convolution_faults::bad_input;
use finite_differences::finite_differences;
use gpu::Gpu;
use half::{bf16, f16};
use kasmina::conv1d::{Backward, Forward, Gradients, Sequences, Window};
use kasmina::{
    Activation, Conv1dConfig, DType, Device, Error, FilterLayout, KernelConfig, Padding,
    SequenceLayout, Tensor, Tier,
};
use libtest_mimic::{Arguments, Failed, Trial};
use poison::{Poison, bits};
use random::seed;

type Check = fn(&Device, Tier) -> Result<(), Failed>;
type HopperCheck = fn(&Device) -> Result<(), Failed>;

/// Passes that were compared in this run.
static COMPARED: AtomicUsize = AtomicUsize::new(0);

fn main() -> ExitCode {
    let gpu = Gpu::find();
    let mut trials =
        vec![Trial::test("case_lists_hold_at_least_400_cases_for_each_tier", enough_cases)];
    for (name, check) in claims(Tier::Cpu) {
        trials.push(Trial::test(name, move || check(&Device::cpu(), Tier::Cpu)));
    }
    for (name, check) in claims(Tier::Portable) {
        trials.push(gpu.trial(name, move |device| check(device, Tier::Portable)));
    }
    if !gpu_lacks(Tier::Hopper) {
        for (dtype, claims) in
            [(DType::F16, hopper_claims::<f16>()), (DType::BF16, hopper_claims::<bf16>())]
        {
            for (sentence, check) in claims {
                trials.push(gpu.trial(format!("hopper_{dtype}_{sentence}"), check));
            }
        }
        for (sentence, check) in parts::claims() {
            trials.push(gpu.trial(format!("hopper_f32_{sentence}"), check));
        }
        let (name, check) = differences(Tier::Hopper);
        trials.push(gpu.trial(name, move |device| check(device, Tier::Hopper)));
    }
    trials.push(Trial::test("bad_input_is_a_typed_error_on_the_cpu", || bad_input(&Device::cpu())));
    trials.push(gpu.trial("bad_input_is_a_typed_error_on_the_gpu", bad_input));
    trials.push(gpu.trial("the_best_tier_of_each_pass_matches_reference", |device| {
        let config = KernelConfig::default();
        for cases in [crossed_cases(), short_cases(), edge_cases(), depthwise_cases()] {
            each_with::<f32>(device, &config, &thinned(cases.clone(), 3))?;
            each_with::<f16>(device, &config, &thinned(cases.clone(), 2))?;
            each_with::<bf16>(device, &config, &cases)?;
        }
        Ok(())
    }));
    trials.push(gpu.trial("without_tiling_the_results_are_the_same", |device| {
        let config = KernelConfig::default().tier(Tier::Portable).enable_tiling(false);
        each_with::<f32>(device, &config, &thinned(crossed_cases(), 9))?;
        each_with::<bf16>(device, &config, &thinned(crossed_cases(), 11))
    }));

    let conclusion = libtest_mimic::run(&Arguments::from_args(), trials);
    println!("{} cases compared, seed {}", COMPARED.load(Ordering::Relaxed), seed());
    conclusion.exit_code()
}

/// Whether the first GPU is one that the tier does not run on.
fn gpu_lacks(tier: Tier) -> bool {
    let capability = Device::cuda(0).ok().and_then(|device| device.capability());
    capability.is_some_and(|gpu| !tier.runs_on(gpu.major, gpu.minor))
}

/// What is claimed of the Hopper tier for an element type, besides what is claimed of every tier.
fn hopper_claims<T: Poison>() -> [(&'static str, HopperCheck); 3] {
    [
        (
            "conv1d_matches_reference_and_gives_the_same_bits_twice",
            tensor_cores::on_tensor_cores::<T>,
        ),
        (
            "conv1d_of_single_channels_at_the_edges_of_warps_matches_reference",
            tensor_cores::rows_of_single_channels::<T>,
        ),
        (
            "filter_gradients_of_dilated_taps_match_reference",
            tensor_cores::filter_gradients_of_dilated_taps::<T>,
        ),
    ]
}

/// What is claimed of a tier, for each of its element types.
fn claims(tier: Tier) -> Vec<(String, Check)> {
    fn of<T: Poison>() -> [(&'static str, Check); 9] {
        [
            ("conv1d_crossing_stride_padding_dilation_and_groups_matches_reference", |d, t| {
                each::<T>(d, t, &crossed_cases())
            }),
            ("conv1d_of_short_sequences_matches_reference", |d, t| each::<T>(d, t, &short_cases())),
            ("conv1d_at_tile_edges_matches_reference", |d, t| each::<T>(d, t, &edge_cases())),
            ("conv1d_of_single_channels_matches_reference", |d, t| {
                each::<T>(d, t, &depthwise_cases())
            }),
            ("conv1d_of_views_matches_reference_and_leaves_gaps_alone", |d, t| {
                each::<T>(d, t, &view_cases())
            }),
            ("conv1d_of_no_sequences_is_empty", no_sequences::<T>),
            ("conv1d_propagates_nan_and_infinities", non_finite::<T>),
            ("conv1d_gives_the_same_bits_twice", repeats::<T>),
            ("conv1d_layer_matches_reference", layer::<T>),
        ]
    }
    let mut claims = Vec::new();
    for dtype in DType::ALL {
        let of_dtype = match dtype {
            DType::F32 => of::<f32>(),
            DType::F16 => of::<f16>(),
            _ => of::<bf16>(),
        };
        let name = |sentence| format!("{tier}_{dtype}_{sentence}");
        claims.extend(of_dtype.into_iter().map(|(sentence, check)| (name(sentence), check)));
    }
    claims.push(differences(tier));
    claims
}

fn differences(tier: Tier) -> (String, Check) {
    (format!("{tier}_f32_layer_gradients_match_finite_differences"), finite_differences)
}

fn enough_cases() -> Result<(), Failed> {
    let lists = [crossed_cases(), short_cases(), edge_cases(), depthwise_cases(), view_cases()];
    let cases: usize = lists.iter().map(Vec::len).sum();
    require(cases >= 400 || reduced(), || format!("there are only {cases}"))
}

/// A tensor of three axes, with gaps between its rows if asked for.
struct Placed<T: kasmina::Element> {
    whole: Tensor<T>,
    view: Tensor<T>,
}

/// Elements before and after a row where there are gaps: no multiple of 16 bytes.
const GAP: usize = 3;

impl<T: Poison> Placed<T> {
    fn poisoned(device: &Device, extents: [usize; 3], gaps: bool) -> Result<Self, Error> {
        let [a, b, columns] = extents;
        let gap = if gaps { GAP } else { 0 };
        let whole = Tensor::full(device, [a, b, columns + 2 * gap], T::POISON)?;
        let view = whole.columns(gap..gap + columns)?;
        Ok(Self { whole, view })
    }

    fn new(device: &Device, values: &[T], extents: [usize; 3], gaps: bool) -> Result<Self, Error> {
        let mut placed = Self::poisoned(device, extents, gaps)?;
        placed.view.copy_from_slice(values)?;
        Ok(placed)
    }

    /// The values, if what lies between the rows is still poison.
    fn read(&self) -> Result<Vec<T>, String> {
        let told = |error: Error| error.to_string();
        let columns = self.view.shape().columns();
        let stride = self.whole.shape().columns();
        let gap = (stride - columns) / 2;
        let whole = self.whole.to_vec().map_err(told)?;
        for (index, value) in whole.iter().enumerate() {
            let at = index % stride;
            if (at < gap || at >= gap + columns) && value.bits() != T::POISON.bits() {
                return Err(format!("a gap was written: element {index} is {value:?}"));
            }
        }
        self.view.to_vec().map_err(told)
    }
}

/// What a case gives, in canonical order.
struct Results<T> {
    y: Vec<T>,
    dx: Vec<T>,
    dw: Vec<T>,
    db: Vec<T>,
    /// What ran forward, dgrad and wgrad.
    tiers: [Option<Tier>; 3],
}

impl<T: Poison> Results<T> {
    fn bits(&self) -> Vec<u32> {
        let all = [&self.y, &self.dx, &self.dw, &self.db];
        all.into_iter().flat_map(|values| bits(values)).collect()
    }
}

/// What is in the parameters' gradients before; it takes part if they accumulate.
const BEFORE: f32 = 2.5;

/// Runs every pass of a case into poisoned memory.
fn run<T: Poison>(
    device: &Device,
    config: &KernelConfig,
    convolution: &Convolution<T>,
    case: &Case,
) -> Result<Results<T>, String> {
    let told = |error: Error| error.to_string();
    let Shape { batch, channels: [input, out], length, taps, window } = case.shape;
    let (in_extents, out_extents) = ([batch, input, length], [batch, out, convolution.out_length]);
    let filter_extents = [out, case.shape.group_in(), taps];
    let [x_layout, y_layout, dz_layout, dx_layout] = case.layouts;
    let in_memory = |[batch, channels, length]: [usize; 3], layout: SequenceLayout| {
        layout.extents(batch, channels, length)
    };
    let place = |values: &[T], extents: [usize; 3], layout| {
        let values = laid_out(values, extents, layout);
        Placed::new(device, &values, in_memory(extents, layout), case.gaps)
    };
    let x = place(&convolution.x, in_extents, x_layout).map_err(told)?;
    let dz = place(&convolution.dz, out_extents, dz_layout).map_err(told)?;
    let [a, b, c] = filter_extents;
    let memory_filter = match case.filter_layout {
        FilterLayout::OutInTap => [a, b, c],
        FilterLayout::TapOutIn => [c, a, b],
    };
    let w = filter_laid_out(&convolution.w, filter_extents, case.filter_layout);
    let w = Placed::new(device, &w, memory_filter, case.gaps).map_err(told)?;
    let bias = Tensor::from_slice(device, &convolution.bias, [out]).map_err(told)?;

    let mut y =
        Placed::poisoned(device, in_memory(out_extents, y_layout), case.gaps).map_err(told)?;
    let forward = Forward {
        x: Sequences::new(&x.view, x_layout),
        w: &w.view,
        filter_layout: case.filter_layout,
        bias: case.bias.then_some(&bias),
        window,
        activation: case.activation,
    };
    let tier = forward.run(&mut y.view, y_layout, config).map_err(told)?;

    let mut dx =
        Placed::poisoned(device, in_memory(in_extents, dx_layout), case.gaps).map_err(told)?;
    let mut dw = Placed::poisoned(device, memory_filter, case.gaps).map_err(told)?;
    let mut db = Tensor::full(device, [out], T::POISON).map_err(told)?;
    if case.accumulate {
        let before = vec![T::from_f32(BEFORE); out * case.shape.group_in() * taps];
        dw.view.copy_from_slice(&before).map_err(told)?;
        db.copy_from_slice(&before[..1].repeat(out)).map_err(told)?;
    }
    let backward = Backward {
        x: Sequences::new(&x.view, x_layout),
        w: &w.view,
        filter_layout: case.filter_layout,
        dz: Sequences::new(&dz.view, dz_layout),
        window,
    };
    let gradients = Gradients {
        dx: Some((&mut dx.view, dx_layout)),
        dw: Some(&mut dw.view),
        db: Some(&mut db),
        accumulate: case.accumulate,
    };
    let tiers = backward.run(gradients, config).map_err(told)?;
    let forced = config.forced_tier();
    let tiers = [Some(tier), tiers.dx, tiers.dw];
    for tier in tiers {
        if forced.is_some() && tier != forced {
            return Err(format!("served by {tier:?} where {forced:?} was forced"));
        }
    }
    Ok(Results {
        y: canonical(&y.read()?, out_extents, y_layout),
        dx: canonical(&dx.read()?, in_extents, dx_layout),
        dw: canonical_filter(&dw.read()?, filter_extents, case.filter_layout),
        db: db.to_vec().map_err(told)?,
        tiers,
    })
}

/// Compares results with the reference.
fn compare<T: Poison>(
    convolution: &Convolution<T>,
    case: &Case,
    tier: Tier,
    got: &Results<T>,
) -> Result<(), String> {
    let per_channel = convolution.out_length;
    let out = case.shape.channels[1];
    let with_bias: Vec<Sum> = convolution
        .z
        .iter()
        .enumerate()
        .map(|(index, sum)| {
            let channel = index / per_channel % out;
            let bias = if case.bias { convolution.bias[channel].to_f32() } else { 0.0 };
            sum.plus(f64::from(bias))
        })
        .collect();
    let before = if case.accumulate { f64::from(BEFORE) } else { 0.0 };
    let plus_before =
        |sums: &[Sum]| -> Vec<Sum> { sums.iter().map(|sum| sum.plus(before)).collect() };
    let none = Activation::None;
    for (name, expected, got, activation) in [
        ("y", with_bias, &got.y, case.activation),
        ("dx", convolution.dx.clone(), &got.dx, none),
        ("dw", plus_before(&convolution.dw), &got.dw, none),
        ("db", plus_before(&convolution.db), &got.db, none),
    ] {
        if expected.len() != got.len() {
            return Err(format!("{name} has {} elements, not {}", got.len(), expected.len()));
        }
        for (index, (expected, got)) in expected.iter().zip(got).enumerate() {
            let error = expected.error(*got, activation, tier);
            if error > 1.0 {
                return Err(format!(
                    "{name}[{index}]: got {got:?}, expected a sum of {:e}; the error is {error:e} \
                     times its tolerance",
                    expected.value
                ));
            }
        }
        COMPARED.fetch_add(1, Ordering::Relaxed);
    }
    Ok(())
}

fn each<T: Poison>(device: &Device, tier: Tier, cases: &[Case]) -> Result<(), Failed> {
    each_with::<T>(device, &KernelConfig::default().tier(tier), cases)
}

fn each_with<T: Poison>(
    device: &Device,
    config: &KernelConfig,
    cases: &[Case],
) -> Result<(), Failed> {
    let tier = config.forced_tier().unwrap_or(device.tier());
    let mut faults = Vec::new();
    for case in cases {
        let Some(convolution) = Convolution::<T>::random(case.shape) else { continue };
        let outcome = run(device, config, &convolution, case)
            .and_then(|got| compare(&convolution, case, tier, &got));
        faults.extend(outcome.err().map(|fault| format!("{case:?}: {fault}")));
    }
    let shown = faults.iter().take(3).cloned().collect::<Vec<_>>().join("\n");
    require(faults.is_empty(), || format!("{} of {}:\n{shown}", faults.len(), cases.len()))
}

fn no_sequences<T: Poison>(device: &Device, tier: Tier) -> Result<(), Failed> {
    let window = Window { padding: Padding::Same, ..Window::default() };
    let shapes =
        [[4, 6], [1, 1]].map(|channels| Shape { batch: 0, channels, length: 10, taps: 3, window });
    let mut cases = cases(shapes);
    for case in &mut cases {
        case.accumulate = false;
    }
    each::<T>(device, tier, &cases)?;
    for case in &mut cases {
        case.accumulate = true;
    }
    each::<T>(device, tier, &cases)
}

/// NaN and infinities reach what they belong to and nothing else: no neighbour is multiplied with
/// a padded zero.
fn non_finite<T: Poison>(device: &Device, tier: Tier) -> Result<(), Failed> {
    let window = Window { padding: explicit(1, 2), ..Window::default() };
    let shapes = [
        Shape { batch: 2, channels: [5, 9], length: 300, taps: 4, window },
        Shape {
            batch: 2,
            channels: [6, 6],
            length: 296,
            taps: 3,
            window: Window { groups: 6, ..window },
        },
    ];
    for shape in shapes {
        let Convolution { mut x, w, bias, mut dz, .. } =
            Convolution::<T>::random(shape).ok_or("the filter fits")?;
        for (number, special) in
            [f32::NAN, f32::INFINITY, f32::NEG_INFINITY].into_iter().enumerate()
        {
            // In the middle, where no padding is near: padding counts as a zero.
            let (at, of_dz) = (number * 350 + 150, number * 400 + 151);
            x[at % 296] = T::from_f32(special);
            dz[of_dz % 280] = T::from_f32(special);
        }
        let convolution = Convolution::of(shape, [x, w, bias, dz]);
        for layout in SequenceLayout::ALL {
            let mut case = cases([shape])[0];
            case.layouts = [layout; 4];
            case.activation = Activation::None;
            let got = run(device, &KernelConfig::default().tier(tier), &convolution, &case)?;
            let finite = |values: &[T]| values.iter().filter(|v| v.to_f32().is_finite()).count();
            let expected = |sums: &[Sum]| sums.iter().filter(|sum| sum.value.is_finite()).count();
            require(finite(&got.y) == expected(&convolution.z), || {
                format!("{} of y are finite, not {}", finite(&got.y), expected(&convolution.z))
            })?;
            require(finite(&got.dx) == expected(&convolution.dx), || {
                format!("{} of dx are finite, not {}", finite(&got.dx), expected(&convolution.dx))
            })?;
            COMPARED.fetch_add(2, Ordering::Relaxed);
        }
    }
    Ok(())
}

fn repeats<T: Poison>(device: &Device, tier: Tier) -> Result<(), Failed> {
    let plain = Window { padding: Padding::Same, ..Window::default() };
    let shapes = [
        Shape { batch: 4, channels: [40, 72], length: 700, taps: 3, window: plain },
        Shape {
            batch: 3,
            channels: [30, 20],
            length: 201,
            taps: 5,
            window: Window { stride: 2, ..plain },
        },
        Shape {
            batch: 4,
            channels: [64, 64],
            length: 2000,
            taps: 7,
            window: Window { groups: 64, ..plain },
        },
    ];
    let config = KernelConfig::default().tier(tier);
    for case in cases(shapes) {
        let convolution = Convolution::<T>::random(case.shape).ok_or("the filter fits")?;
        let first = run(device, &config, &convolution, &case)?;
        for _ in 0..3 {
            let again = run(device, &config, &convolution, &case)?;
            require(first.bits() == again.bits(), || format!("{case:?}: the bits differ"))?;
        }
    }
    Ok(())
}

/// The layer, with every activation: forward against the reference, backward against that of the
/// gradient before the activation, which the reference makes of the layer's own output.
fn layer<T: Poison>(device: &Device, tier: Tier) -> Result<(), Failed> {
    let window = Window { stride: 2, padding: Padding::Same, ..Window::default() };
    let shape = Shape { batch: 2, channels: [12, 10], length: 77, taps: 5, window };
    let convolution = Convolution::<T>::random(shape).ok_or("the filter fits")?;
    let out_extents = [2, 10, convolution.out_length];
    let wide = |values: &[T]| -> Vec<f32> { values.iter().map(|value| value.to_f32()).collect() };
    for (number, activation) in Activation::ALL.into_iter().enumerate() {
        let layout = SequenceLayout::ALL[number % 2];
        let filter_layout = FilterLayout::ALL[number / 2 % 2];
        let mut layer = Conv1dConfig::new(12, 10, 5)
            .stride(2)
            .padding(Padding::Same)
            .layout(layout)
            .grad_input_layout(SequenceLayout::Ncl)
            .filter_layout(filter_layout)
            .activation(activation)
            .dtype(T::DTYPE)
            .kernel_config(KernelConfig::default().tier(tier))
            .build(device)?;
        layer.set_weight(&wide(&filter_laid_out(&convolution.w, [10, 12, 5], filter_layout)))?;
        layer.set_bias(&wide(&convolution.bias))?;
        let tensor = |values: &[T], extents: [usize; 3]| {
            let [batch, channels, length] = extents;
            let shape = layout.extents(batch, channels, length);
            Tensor::from_slice(device, &laid_out(values, extents, layout), shape)
        };
        let x = tensor(&convolution.x, [2, 12, 77])?;
        let y = layer.forward(&x)?;
        let y_values = canonical(&y.to_vec()?, out_extents, layout);
        for (index, (sum, got)) in convolution.z.iter().zip(&y_values).enumerate() {
            let bias = convolution.bias[index / convolution.out_length % 10].to_f32();
            let error = sum.plus(f64::from(bias)).error(*got, activation, tier);
            require(error <= 1.0, || format!("{activation:?} y[{index}]: {error} tolerances"))?;
        }
        let dy = tensor(&convolution.dz, out_extents)?;
        let gradients = layer.backward(&x, &y, &dy)?;
        // dz as the layer makes it: by what the activation's gradient is in f32, rounded.
        let pre = Conv1dConfig::new(12, 10, 5)
            .stride(2)
            .padding(Padding::Same)
            .layout(layout)
            .filter_layout(filter_layout)
            .dtype(T::DTYPE)
            .kernel_config(KernelConfig::default().tier(tier));
        let mut pre = pre.build(device)?;
        pre.set_weight(&layer.weight()?)?;
        pre.set_bias(&wide(&convolution.bias))?;
        let z = canonical(&pre.forward(&x)?.to_vec()?, out_extents, layout);
        let dz: Vec<T> = z
            .iter()
            .zip(&convolution.dz)
            .map(|(z, dy)| T::from_f32(derivative(activation, z.to_f32()) * dy.to_f32()))
            .collect();
        let expected = Convolution::of(
            shape,
            [convolution.x.clone(), convolution.w.clone(), convolution.bias.clone(), dz],
        );
        // dz may differ in its last bit from the layer's: v of each product at most.
        let v = T::DTYPE.unit_roundoff();
        let got_dw = canonical_filter(&gradients.dw.to_vec()?, [10, 12, 5], filter_layout);
        let db = gradients.db.as_ref().ok_or("a bias gradient")?.to_vec()?;
        for (name, sums, got) in [
            ("dx", &expected.dx, gradients.dx.to_vec()?),
            ("dw", &expected.dw, got_dw),
            ("db", &expected.db, db),
        ] {
            for (index, (sum, got)) in sums.iter().zip(&got).enumerate() {
                let close = sum.within(*got, 2.0 * v);
                require(close, || {
                    format!("{activation:?} {name}[{index}]: {got:?}, expected {:e}", sum.value)
                })?;
            }
        }
        COMPARED.fetch_add(4, Ordering::Relaxed);
    }
    Ok(())
}

/// The derivative in f64, by a central difference of the definition.
fn derivative(activation: Activation, z: f32) -> f32 {
    if activation == Activation::Relu {
        return if z > 0.0 { 1.0 } else { 0.0 };
    }
    let (z, h) = (f64::from(z), 1e-5);
    let of = |z| activation::apply(activation, z);
    ((of(z + h) - of(z - h)) / (2.0 * h)) as f32
}

fn require(holds: bool, message: impl FnOnce() -> String) -> Result<(), Failed> {
    if holds { Ok(()) } else { Err(message().into()) }
}
