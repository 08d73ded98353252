//! The backward pass of the linear layer against a float64 reference, on every tier.
//!
//! `KASMINA_TEST_SEED` repeats a run, `KASMINA_TEST_REDUCED=1` takes a list short enough for
//! compute-sanitizer.

/// What the tests of operations share, as far as it is used here.
mod support {
    pub(crate) mod gpu;
    pub(crate) mod gradient_cases;
    pub(crate) mod gradients;
    pub(crate) mod operand;
    pub(crate) mod poison;
    pub(crate) mod random;
    pub(crate) mod reduced;
}

use std::process::ExitCode;
use std::sync::atomic::{AtomicUsize, Ordering};

use half::{bf16, f16};
use kasmina::gemm::{self, Saved, Tiers};
use kasmina::{
    Activation, DType, Device, Error, KernelConfig, LinearConfig, Tensor, Tier, WeightLayout,
};
use libtest_mimic::{Arguments, Failed, Trial};
use support::gpu::Gpu;
use support::gradient_cases::{Case, activation_cases, cases, edge_cases, long_cases, prime_cases};
use support::gradients::Gradients;
use support::operand::{Placed, Placement, Poison, bits};
use support::random::{Random, seed};
use support::reduced::{reduced, shortened};

type Check = fn(&Device, Tier) -> Result<(), Failed>;

/// Cases that were compared in this run.
static COMPARED: AtomicUsize = AtomicUsize::new(0);

fn main() -> ExitCode {
    let gpu = Gpu::find();
    let mut trials = Vec::new();
    for (name, check) in claims(Tier::Cpu) {
        trials.push(Trial::test(name, move || check(&Device::cpu(), Tier::Cpu)));
    }
    for tier in [Tier::Portable, Tier::Hopper] {
        for (name, check) in claims(tier).into_iter().filter(|_| !gpu_lacks(tier)) {
            trials.push(gpu.trial(name, move |device| check(device, tier)));
        }
    }
    trials.extend([
        Trial::test("cpu_wrong_arguments_are_refused", || refusals(&Device::cpu())),
        gpu.trial("gpu_wrong_arguments_are_refused", refusals),
        gpu.trial("streams_are_ordered_around_the_tensors_they_share", streams_are_ordered),
    ]);
    let conclusion = libtest_mimic::run(&Arguments::from_args(), trials);
    println!("{} cases compared, seed {}", COMPARED.load(Ordering::Relaxed), seed());
    conclusion.exit_code()
}

/// Whether there is a GPU that lacks what `tier` needs, which no requirement can change.
fn gpu_lacks(tier: Tier) -> bool {
    let capability = Device::cuda(0).ok().and_then(|device| device.capability());
    capability.is_some_and(|gpu| !tier.runs_on(gpu.major, gpu.minor))
}

/// What is claimed of a tier, for each of its element types.
fn claims(tier: Tier) -> Vec<(String, Check)> {
    fn of<T: Poison>(tier: Tier) -> Vec<(&'static str, Check)> {
        let mut claims: Vec<(&str, Check)> = vec![
            ("backward_at_tile_edges_matches_reference", |d, t| each::<T>(d, t, edge_cases())),
            ("backward_with_prime_extents_matches_reference", |d, t| {
                each::<T>(d, t, prime_cases())
            }),
            ("backward_of_every_activation_matches_reference", |d, t| {
                each::<T>(d, t, activation_cases())
            }),
            ("backward_of_long_batches_matches_reference", |d, t| each::<T>(d, t, long_cases(t))),
            ("backward_of_any_selection_gives_the_bits_of_all", selections::<T>),
            ("backward_of_no_rows_gives_zeros_or_what_was_there", no_rows::<T>),
            ("backward_propagates_nan_to_what_depends_on_it", nan::<T>),
            ("backward_gives_the_same_bits_twice", repeats::<T>),
            ("layer_backward_matches_reference_from_output_and_pre_activation", layer::<T>),
        ];
        if tier == Tier::Hopper {
            claims.push(("backward_with_every_tile_matches_reference", every_tile::<T>));
            claims.push((
                "backward_of_unaligned_rows_with_every_tile_matches_reference",
                every_tile_unaligned::<T>,
            ));
        }
        if tier != Tier::Cpu {
            claims.push(("backward_of_misaligned_views_matches_reference", misaligned::<T>));
        }
        if T::DTYPE == DType::F32 {
            claims.push(("backward_is_what_central_differences_give", differences));
        }
        claims
    }
    let mut claims = Vec::new();
    for dtype in DType::ALL {
        let of_dtype = match dtype {
            DType::F32 => of::<f32>(tier),
            DType::F16 => of::<f16>(tier),
            _ => of::<bf16>(tier),
        };
        let name = |sentence| format!("{tier}_{dtype}_{sentence}");
        claims.extend(of_dtype.into_iter().map(|(sentence, check)| (name(sentence), check)));
    }
    claims
}

/// Compares cases, which are sorted by shape, as TMA can address them on the tier that has it.
fn each<T: Poison>(device: &Device, tier: Tier, mut cases: Vec<Case>) -> Result<(), Failed> {
    if tier == Tier::Hopper {
        cases.iter_mut().for_each(align);
    }
    each_with::<T>(device, tier, &KernelConfig::default(), &cases)
}

/// Makes rows of all matrices whole pieces of 16 bytes.
fn align(case: &mut Case) {
    let [m, n, k] = case.shape;
    case.shape = [m, n.next_multiple_of(8), k.next_multiple_of(8)];
}

/// As [`each`], with more asked of the kernels than a tier.
fn each_with<T: Poison>(
    device: &Device,
    tier: Tier,
    config: &KernelConfig,
    cases: &[Case],
) -> Result<(), Failed> {
    for cases in cases.chunk_by(|a, b| a.shape == b.shape) {
        let operands = Gradients::<T>::random(cases[0].shape);
        for case in cases {
            let told = |error: String| format!("{case:?}: {error}");
            let result = run(device, tier, config, &operands, case, [true; 3]).map_err(told)?;
            result.compare(&operands, case, tier).map_err(told)?;
            COMPARED.fetch_add(1, Ordering::Relaxed);
        }
    }
    Ok(())
}

/// What a pass wrote, and what was there before.
struct Written<T: Poison> {
    /// dX, dW and db, as far as they were wanted.
    gradients: [Option<Vec<T>>; 3],
    before: [Vec<T>; 2],
    /// Held, so that the next pass writes elsewhere.
    _tensors: [Placed<T>; 3],
}

impl<T: Poison> Written<T> {
    fn compare(&self, operands: &Gradients<T>, case: &Case, tier: Tier) -> Result<(), String> {
        let references = operands.references(case.layout, case.activation, tier);
        let [dw, db] = [0, 1].map(|i| case.accumulate.then_some(&self.before[i][..]));
        for (i, before) in [None, dw, db].into_iter().enumerate() {
            if let Some(got) = &self.gradients[i] {
                let name = ["dx", "dw", "db"][i];
                references[i].compare(got, before).map_err(|error| format!("{name}: {error}"))?;
            }
        }
        Ok(())
    }

    fn bits(&self) -> Vec<u32> {
        self.gradients.iter().flatten().flat_map(|gradient| bits(gradient)).collect()
    }
}

/// Runs a case on the tier, into poisoned memory or, to accumulate, into random numbers.
fn run<T: Poison>(
    device: &Device,
    tier: Tier,
    config: &KernelConfig,
    operands: &Gradients<T>,
    case: &Case,
    wanted: [bool; 3],
) -> Result<Written<T>, String> {
    let told = |error: Error| error.to_string();
    let &Gradients { m, n, k, ref x, ref dy, ref z, .. } = operands;
    let placed = |values: &[T], shape: [usize; 2]| {
        Placed::new(device, values, shape, case.placement).map_err(told)
    };
    let (w, w_shape) = operands.weight(case.layout);
    let (x, w, dy) = (placed(x, [m, k])?, placed(&w, w_shape)?, placed(dy, [m, n])?);
    let needed = case.activation.needs_pre_activation() || case.pre_activation;
    let kept = if needed { z.clone() } else { operands.output(case.activation) };
    let kept = placed(&kept, [m, n])?;
    let saved = if needed { Saved::PreActivation(&kept.view) } else { Saved::Output(&kept.view) };

    let mut random = Random::of("before");
    let mut before = |len: usize| -> Vec<T> {
        if case.accumulate {
            random.normal(len).into_iter().map(T::from_f32).collect()
        } else {
            vec![T::POISON; len]
        }
    };
    let before = [before(k * n), before(n)];
    let mut dx = Placed::poisoned(device, [m, k], case.placement).map_err(told)?;
    let mut dw = placed(&before[0], w_shape)?;
    let mut db = Placed::new(device, &before[1], [1, n], Placement::Contiguous).map_err(told)?;
    let mut db_vector = Tensor::from_slice(device, &before[1], [n]).map_err(told)?;

    let backward = gemm::Backward {
        x: &x.view,
        w: &w.view,
        dy: &dy.view,
        saved,
        layout: case.layout,
        activation: case.activation,
    };
    let gradients = gemm::Gradients {
        dx: wanted[0].then_some(&mut dx.view),
        dw: wanted[1].then_some(&mut dw.view),
        db: wanted[2].then_some(&mut db_vector),
        accumulate: case.accumulate,
    };
    let tiers = backward.run(gradients, &config.clone().tier(tier)).map_err(told)?;
    let expected = Tiers { dx: wanted[0].then_some(tier), dw: wanted[1].then_some(tier) };
    if tiers != expected {
        return Err(format!("served by {tiers:?} where {tier} was forced"));
    }
    let values = db_vector.to_vec().map_err(told)?;
    db.view.copy_from_slice(&values).map_err(told)?;
    let mut gradients = [None, None, None];
    for (i, placed) in [&dx, &dw, &db].into_iter().enumerate() {
        let values = placed.read()?;
        // What is not wanted is not written.
        let untouched = [vec![T::POISON; m * k], before[0].clone(), before[1].clone()];
        if wanted[i] {
            gradients[i] = Some(values);
        } else if bits(&values) != bits(&untouched[i]) {
            return Err(format!("{} was written", ["dx", "dw", "db"][i]));
        }
    }
    Ok(Written { gradients, before, _tensors: [dx, dw, db] })
}

/// Every tile on shapes of which some would not get it by themselves.
fn every_tile<T: Poison>(device: &Device, tier: Tier) -> Result<(), Failed> {
    let shapes = vec![[65, 72, 65], [129, 264, 200], [1, 8, 8], [2500, 328, 264], [70, 1160, 2184]];
    let mut cases = cases(shortened(shapes, 1));
    cases.iter_mut().for_each(align);
    each_tile::<T>(device, tier, &cases)
}

/// Every tile with matrices that TMA cannot address.
fn every_tile_unaligned<T: Poison>(device: &Device, tier: Tier) -> Result<(), Failed> {
    let shapes = vec![[65, 71, 65], [129, 257, 201], [1, 3, 5], [2500, 327, 262], [70, 1159, 2183]];
    let mut cases = cases(shortened(shapes, 1));
    for case in cases.iter_mut().filter(|case| case.placement == Placement::Aligned) {
        case.placement = Placement::Misaligned;
    }
    each_tile::<T>(device, tier, &cases)
}

fn each_tile<T: Poison>(device: &Device, tier: Tier, cases: &[Case]) -> Result<(), Failed> {
    let default = KernelConfig::default();
    let kernels: Vec<KernelConfig> = if T::DTYPE == DType::F32 {
        let before = [[128, 128], [64, 128]].map(|tile| default.clone().hopper_tile(tile));
        let direct = [([64, 64], 1), ([32, 64], 1), ([32, 64], 4)].map(|(tile, blocks)| {
            default.clone().hopper_direct(true).hopper_tile(tile).hopper_split_k(blocks)
        });
        before.into_iter().chain(direct).collect()
    } else {
        let tiles = [[128, 256], [128, 128], [64, 128], [64, 64]];
        tiles.map(|tile| default.clone().hopper_tile(tile)).into()
    };
    for config in kernels {
        // Without an activation the kernel itself sums the columns.
        let mut cases = cases.to_vec();
        for case in cases.iter_mut().step_by(3) {
            case.activation = Activation::None;
        }
        each_with::<T>(device, tier, &config, &cases)
            .map_err(|error| format!("{config:?}: {}", error.message().unwrap_or("no message")))?;
    }
    Ok(())
}

fn misaligned<T: Poison>(device: &Device, tier: Tier) -> Result<(), Failed> {
    let shapes = shortened(vec![[130, 140, 50], [1, 1, 1], [128, 128, 64], [257, 65, 31]], 1);
    let mut cases = cases(shapes.into_iter().flat_map(|shape| [shape; 3]));
    for case in &mut cases {
        case.placement = Placement::Misaligned;
    }
    each_with::<T>(device, tier, &KernelConfig::default(), &cases)
}

fn selections<T: Poison>(device: &Device, tier: Tier) -> Result<(), Failed> {
    let shape = [300, 136, 72];
    let operands = Gradients::<T>::random(shape);
    for case in cases([shape; 5]) {
        let of = |wanted| run(device, tier, &KernelConfig::default(), &operands, &case, wanted);
        let all = of([true; 3])?;
        for selection in 0..7 {
            let wanted = [0, 1, 2].map(|bit| selection >> bit & 1 == 1);
            let some = of(wanted)?;
            some.compare(&operands, &case, tier).map_err(|e| format!("{case:?}: {e}"))?;
            for i in 0..3 {
                // Without dW, another kernel sums the columns, in another order.
                if i == 2 && !wanted[1] {
                    continue;
                }
                if let (Some(got), Some(expected)) = (&some.gradients[i], &all.gradients[i]) {
                    let same = bits(got) == bits(expected);
                    require(same, || format!("{case:?}, {wanted:?}: other bits"))?;
                }
            }
            COMPARED.fetch_add(1, Ordering::Relaxed);
        }
    }
    Ok(())
}

fn no_rows<T: Poison>(device: &Device, tier: Tier) -> Result<(), Failed> {
    let [x, dy] = [[0, 16], [0, 24]].map(|shape| Tensor::<T>::zeros(device, shape));
    let (x, dy, w) = (x?, dy?, Tensor::<T>::zeros(device, [24, 16])?);
    let seven = T::from_f32(7.0);
    for (accumulate, expected) in [(true, seven), (false, T::from_f32(0.0))] {
        let mut dx = Tensor::<T>::zeros(device, [0, 16])?;
        // Columns of a wider matrix, of which the others stay.
        let whole = Tensor::full(device, [24, 32], seven)?;
        let mut dw = whole.columns(8..24)?;
        let mut db = Tensor::full(device, [24], seven)?;
        let backward = gemm::Backward {
            x: &x,
            w: &w,
            dy: &dy,
            saved: Saved::PreActivation(&dy),
            layout: WeightLayout::OutIn,
            activation: Activation::Silu,
        };
        let gradients =
            gemm::Gradients { dx: Some(&mut dx), dw: Some(&mut dw), db: Some(&mut db), accumulate };
        backward.run(gradients, &KernelConfig::default().tier(tier))?;
        let values = [dw.to_vec()?, db.to_vec()?].concat();
        let same = values.iter().all(|value| value.bits() == expected.bits());
        require(same, || format!("accumulate {accumulate}: {values:?}"))?;
        let around = [whole.columns(0..8)?.to_vec()?, whole.columns(24..32)?.to_vec()?].concat();
        let same = around.iter().all(|value| value.bits() == seven.bits());
        require(same, || "columns beside the gradient were written".to_owned())?;
    }
    Ok(())
}

/// One NaN in dY makes a row of dX, the gradients of one output feature's weights, and its db NaN,
/// unless a closed ReLU stops it.
fn nan<T: Poison>(device: &Device, tier: Tier) -> Result<(), Failed> {
    let [m, n, k] = [70, 72, 40];
    let mut random = Random::of("nan");
    let (row, column) = (random.below(m), random.below(n));
    for (activation, open) in Activation::ALL.into_iter().zip([true, false, true, true, true]) {
        for layout in WeightLayout::ALL {
            let mut operands = Gradients::<T>::random([m, n, k]);
            operands.dy[row * n + column] = T::from_f32(f32::NAN);
            operands.z[row * n + column] = T::from_f32(-0.5);
            let placement = Placement::Contiguous;
            let (shape, pre_activation, accumulate) = ([m, n, k], true, false);
            let case = Case { shape, layout, activation, pre_activation, accumulate, placement };
            let got = run(device, tier, &KernelConfig::default(), &operands, &case, [true; 3])?;
            let depends = |gradient: usize, i: usize| match (gradient, layout) {
                (0, _) => i / k == row,
                (1, WeightLayout::InOut) => i % n == column,
                (1, WeightLayout::OutIn) => i / k == column,
                _ => i == column,
            };
            for (gradient, values) in got.gradients.iter().flatten().enumerate() {
                for (i, value) in values.iter().enumerate() {
                    let expected = open && depends(gradient, i);
                    require(value.to_f32().is_nan() == expected, || {
                        format!("{case:?}: gradient {gradient}, element {i} is {value:?}")
                    })?;
                }
            }
            COMPARED.fetch_add(1, Ordering::Relaxed);
        }
    }
    Ok(())
}

fn repeats<T: Poison>(device: &Device, tier: Tier) -> Result<(), Failed> {
    for shape in [[300, 520, 264], [5000, 72, 136]] {
        let operands = Gradients::<T>::random(shape);
        for case in cases([shape; 3]) {
            let again = || run(device, tier, &KernelConfig::default(), &operands, &case, [true; 3]);
            // While the first output is held, the second lies elsewhere.
            let (first, second) = (again()?, again()?);
            require(first.bits() == second.bits(), || format!("{case:?}: the bits differ"))?;
        }
    }
    Ok(())
}

/// The layer's gradients, from its own pre-activation: kept, or computed anew.
fn layer<T: Poison>(device: &Device, tier: Tier) -> Result<(), Failed> {
    let shape = [66, 144, 80];
    let [m, n, k] = shape;
    let mut operands = Gradients::<T>::random(shape);
    let wide = |values: &[T]| -> Vec<f32> { values.iter().map(|value| value.to_f32()).collect() };
    let x = Tensor::from_slice(device, &operands.x, [2, m / 2, k])?;
    let dy = Tensor::from_slice(device, &operands.dy, [2, m / 2, n])?;
    for (number, activation) in Activation::ALL.into_iter().enumerate() {
        let layout = WeightLayout::ALL[number % 2];
        let mut layer = LinearConfig::new(k, n)
            .activation(activation)
            .dtype(T::DTYPE)
            .weight_layout(layout)
            .kernel_config(KernelConfig::default().tier(tier))
            .build(device)?;
        layer.set_weight(&wide(&operands.weight(layout).0))?;
        let (y, z) = (layer.forward(&x)?, layer.pre_activation(&x)?);
        operands.z = z.to_vec()?;
        let [dx, dw, db] = operands.references(layout, activation, tier);
        let from_output = layer.backward(&x, &y, &dy)?;
        let from_pre_activation = layer.backward(&x, Saved::PreActivation(&z), &dy)?;
        for gradients in [from_output, from_pre_activation] {
            require(gradients.dx.shape() == x.shape(), || "dx has another shape".to_owned())?;
            dx.compare(&gradients.dx.to_vec()?, None)?;
            dw.compare(&gradients.dw.to_vec()?, None)?;
            let of_bias = gradients.db.ok_or("a layer with bias has no gradient of it")?;
            db.compare(&of_bias.to_vec()?, None)?;
            COMPARED.fetch_add(1, Ordering::Relaxed);
        }
    }
    Ok(())
}

/// The gradients of `L = Σ dY·Y` are what moving each number by ±h moves L by, over 2h: D(h).
///
/// D(h) errs by h²/6 times a third derivative, which `(4·D(h) − D(2h)) / 3` is free of, and f32
/// rounds each Y, of size up to 8, by 16 ulp at most: with h = 2⁻⁶ that is 5e-4 in D(h) for sums of
/// 21 terms, and half of it in D(2h).
fn differences(device: &Device, tier: Tier) -> Result<(), Failed> {
    const H: f32 = 1.0 / 64.0;
    let [m, n, k] = [3, 7, 5];
    let mut random = Random::of("differences");
    let (x, dy) = (random.normal(m * k), random.normal(m * n));
    let dy_tensor = Tensor::from_slice(device, &dy, [m, n])?;
    for activation in [Activation::None, Activation::Gelu, Activation::GeluTanh, Activation::Silu] {
        let mut layer = LinearConfig::new(k, n)
            .activation(activation)
            .kernel_config(KernelConfig::default().tier(tier))
            .build(device)?;
        let parameters = [x.clone(), layer.weight()?, layer.bias()?.ok_or("no bias")?];
        let mut loss = |parameters: &[Vec<f32>; 3]| -> Result<f64, Error> {
            layer.set_weight(&parameters[1])?;
            layer.set_bias(&parameters[2])?;
            let y = layer.forward(&Tensor::from_slice(device, &parameters[0], [m, k])?)?;
            Ok(y.to_vec()?.iter().zip(&dy).map(|(&y, &dy)| f64::from(y) * f64::from(dy)).sum())
        };
        let mut expected: [Vec<f64>; 3] = [const { Vec::new() }; 3];
        for i in 0..3 {
            for j in 0..parameters[i].len() {
                let mut difference = |h: f32| -> Result<f64, Error> {
                    let mut moved = parameters.clone();
                    moved[i][j] = parameters[i][j] + h;
                    let above = loss(&moved)?;
                    moved[i][j] = parameters[i][j] - h;
                    Ok((above - loss(&moved)?) / f64::from(2.0 * h))
                };
                expected[i].push((4.0 * difference(H)? - difference(2.0 * H)?) / 3.0);
            }
        }
        loss(&parameters)?;
        let x = Tensor::from_slice(device, &x, [m, k])?;
        let y = layer.forward(&x)?;
        let got = layer.backward(&x, &y, &dy_tensor)?;
        let got = [got.dx.to_vec()?, got.dw.to_vec()?, got.db.ok_or("no db")?.to_vec()?];
        for (i, (got, expected)) in got.iter().zip(&expected).enumerate() {
            for (j, (&got, &expected)) in got.iter().zip(expected).enumerate() {
                let error = (f64::from(got) - expected).abs();
                require(error <= 2e-3, || {
                    format!("{activation:?}, gradient {i}, {j}: {got}, differences {expected}")
                })?;
            }
        }
        COMPARED.fetch_add(1, Ordering::Relaxed);
    }
    Ok(())
}

/// Fails unless the result is an error that matches.
macro_rules! refused {
    ($result:expr, $pattern:pat $(if $guard:expr)?) => {
        match $result {
            Err($pattern) $(if $guard)? => {}
            other => return Err(format!("{}: {other:?}", stringify!($pattern)).into()),
        }
    };
}

fn refusals(device: &Device) -> Result<(), Failed> {
    let matrix = |shape: [usize; 2]| Tensor::<f32>::full(device, shape, 0.5);
    let layer = LinearConfig::new(24, 40).activation(Activation::Gelu).build(device)?;
    let (x, y, dy, w) = (matrix([5, 24])?, matrix([5, 40])?, matrix([5, 40])?, matrix([40, 24])?);
    let expected = layer.backward(&x, &y, &dy)?.dw.to_vec()?;
    refused!(layer.backward(&x, &y, &matrix([5, 41])?), Error::Shape { operand: "dy", .. });
    refused!(layer.backward(&x, &matrix([4, 40])?, &dy), Error::Shape { operand: "y", .. });
    refused!(layer.backward(&matrix([5, 25])?, &y, &dy), Error::Shape { operand: "x", .. });
    let half = Tensor::<f16>::zeros(device, [5, 24])?;
    let half_y = Tensor::<f16>::zeros(device, [5, 40])?;
    refused!(
        layer.backward(&half, &half_y, &half_y),
        Error::DType { expected: DType::F32, got: DType::F16, .. }
    );

    let backward = |saved, activation| gemm::Backward {
        x: &x,
        w: &w,
        dy: &dy,
        saved,
        layout: WeightLayout::OutIn,
        activation,
    };
    let config = KernelConfig::default();
    for (saved, activation) in [
        (Saved::Nothing, Activation::Relu),
        (Saved::Nothing, Activation::Silu),
        (Saved::Output(&y), Activation::Gelu),
    ] {
        let run = backward(saved, activation).run(gemm::Gradients::default(), &config);
        refused!(run, Error::Saved { activation: named, .. } if named == activation);
    }
    let of = |gradients| backward(Saved::Output(&y), Activation::Relu).run(gradients, &config);
    let mut wrong = matrix([24, 40])?;
    let gradients = gemm::Gradients { dw: Some(&mut wrong), ..gemm::Gradients::default() };
    refused!(of(gradients), Error::Shape { operand: "dw", .. });
    let mut wrong = Tensor::zeros(device, [24])?;
    let gradients = gemm::Gradients { db: Some(&mut wrong), ..gemm::Gradients::default() };
    refused!(of(gradients), Error::Shape { operand: "db", .. });
    let mut alias = x.clone();
    let gradients = gemm::Gradients { dx: Some(&mut alias), ..gemm::Gradients::default() };
    refused!(of(gradients), Error::Overlap { operand: "x", .. });
    let both = matrix([45, 24])?;
    let (mut dx, mut dw) = (both.rows(0..5)?, both.rows(4..44)?);
    let gradients =
        gemm::Gradients { dx: Some(&mut dx), dw: Some(&mut dw), ..gemm::Gradients::default() };
    refused!(of(gradients), Error::Overlap { operand: "dw", .. });
    let empty = Tensor::<f32>::zeros(device, [0, 24])?;
    let run = gemm::Backward { w: &empty, ..backward(Saved::Output(&y), Activation::Relu) }
        .run(gemm::Gradients::default(), &config);
    refused!(run, Error::Shape { operand: "w", .. });
    let forced = KernelConfig::default().tier(Tier::Hopper);
    let mut dw = matrix([40, 24])?;
    let gradients = gemm::Gradients { dw: Some(&mut dw), ..gemm::Gradients::default() };
    let run = backward(Saved::Output(&y), Activation::Relu).run(gradients, &forced);
    refused!(run, Error::Unsupported { tier: Tier::Hopper, .. });
    if !device.is_cuda() {
        // Nor where no product is wanted.
        let mut db = Tensor::zeros(device, [40])?;
        let gradients = gemm::Gradients { db: Some(&mut db), ..gemm::Gradients::default() };
        let run = backward(Saved::Output(&y), Activation::Relu).run(gradients, &forced);
        refused!(run, Error::Unsupported { tier: Tier::Hopper, .. });
    }

    device.synchronize()?;
    let same = layer.backward(&x, &y, &dy)?.dw.to_vec()? == expected;
    require(same, || "the layer computes otherwise afterwards".to_owned())
}

/// Forward and backward on streams of their own, often enough that a missing order would show.
fn streams_are_ordered(device: &Device) -> Result<(), Failed> {
    let features = 256;
    let mut random = Random::of("streams");
    let values: Vec<_> = random.normal(600 * features).into_iter().map(f16::from_f32).collect();
    let layer_on = |device: &Device| {
        let config = LinearConfig::new(features, features).activation(Activation::Silu);
        config.dtype(DType::F16).seed(3).build(device)
    };
    let (first, second) = (layer_on(device)?, layer_on(&device.on_new_stream()?)?);
    let x = Tensor::from_slice(device, &values, [600, features])?;
    let pass = |backward: &kasmina::KasminaLayer| -> Result<Vec<u32>, Error> {
        let y = first.forward(&x)?;
        let gradients = backward.backward(&x, &y, &y)?;
        // Memory of y goes to the next tensor of its stream while the pass may still run.
        drop(y);
        let _next = Tensor::full(device, [600, features], f16::POISON)?;
        Ok([bits(&gradients.dx.to_vec()?), bits(&gradients.dw.to_vec()?)].concat())
    };
    let expected = pass(&first)?;
    for _ in 0..if reduced() { 2 } else { 30 } {
        require(pass(&second)? == expected, || "the streams were not ordered".to_owned())?;
    }
    Ok(())
}

fn require(holds: bool, message: impl FnOnce() -> String) -> Result<(), Failed> {
    if holds { Ok(()) } else { Err(message().into()) }
}
