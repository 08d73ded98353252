//! What layers offer besides their passes, on the CPU and on a GPU: parameters as tensors, the tier
//! of a call, warming up, and keeping what a backward pass needs.

#[path = "support/gpu.rs"]
mod gpu;

use std::process::ExitCode;

use gpu::Gpu;
use half::{bf16, f16};
use kasmina::conv1d::{Gradients, Saved, Tiers, Window};
use kasmina::{
    Activation, Conv1dConfig, DType, Device, Element, Error, FilterLayout, KasminaConv1d,
    KasminaLayer, KernelConfig, LinearConfig, Padding, SequenceLayout, Tensor, Tier, WeightLayout,
};
use libtest_mimic::{Arguments, Failed, Trial};

type Check = fn(&Device) -> Result<(), Failed>;

const CLAIMS: [(&str, Check); 7] = [
    ("parameters_are_copied_from_tensors", |device| {
        copied::<f32>(device)?;
        copied::<f16>(device)?;
        copied::<bf16>(device)
    }),
    ("clones_of_parameters_share_their_memory", shared),
    ("tensors_that_cannot_be_parameters_are_refused", refused),
    ("layers_say_which_tier_a_pass_will_get", |device| {
        tiers::<f32>(device)?;
        tiers::<f16>(device)?;
        tiers::<bf16>(device)
    }),
    ("convolutions_that_cannot_be_have_no_tier_and_do_not_warm_up", no_tier),
    ("gradients_of_a_convolution_are_the_same_whatever_is_kept", |device| {
        kept::<f32>(device)?;
        kept::<f16>(device)?;
        kept::<bf16>(device)
    }),
    ("a_convolution_computes_the_gradients_that_are_wanted", wanted),
];

fn main() -> ExitCode {
    let gpu = Gpu::find();
    let mut trials = vec![Trial::test("a_convolution_tells_what_it_was_built_as", getters)];
    for (name, check) in CLAIMS {
        trials.push(Trial::test(format!("cpu_{name}"), move || check(&Device::cpu())));
        trials.push(gpu.trial(format!("gpu_{name}"), check));
    }
    trials.push(gpu.trial("a_layer_on_the_gpu_refuses_tensors_on_the_host", elsewhere));
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}

fn linear<T: Element>(device: &Device, seed: u64) -> Result<KasminaLayer, Error> {
    let config = LinearConfig::new(5, 4).weight_layout(WeightLayout::InOut);
    config.dtype(T::DTYPE).seed(seed).build(device)
}

fn conv1d<T: Element>(device: &Device, seed: u64) -> Result<KasminaConv1d, Error> {
    let config = Conv1dConfig::new(6, 4, 3).groups(2).filter_layout(FilterLayout::TapOutIn);
    config.dtype(T::DTYPE).seed(seed).build(device)
}

/// Evaluates a block with each of the two layers, and an input of it.
macro_rules! with_each {
    ($device:expr, $T:ty, |$build:ident, $x:ident| $body:block) => {{
        let ($build, $x) = (linear::<$T>, Tensor::full($device, [3, 5], <$T>::from_f32(0.75))?);
        $body
        let ($build, $x) = (conv1d::<$T>, Tensor::full($device, [2, 6, 7], <$T>::from_f32(0.75))?);
        $body
    }};
}

/// The values of `tensor` in a view with gaps between its rows, on a stream of its own.
fn with_gaps<T: Element>(device: &Device, tensor: &Tensor<T>) -> Result<Tensor<T>, Error> {
    let columns = tensor.shape().columns();
    let wide = Tensor::zeros(&device.on_new_stream()?, tensor.shape().with_columns(columns + 3))?;
    let mut view = wide.columns(1..columns + 1)?;
    view.copy_from_slice(&tensor.to_vec()?)?;
    Ok(view)
}

/// A layer that was given the parameters of another computes what that one computed, also once
/// that one has others.
fn copied<T: Element + PartialEq>(device: &Device) -> Result<(), Failed> {
    with_each!(device, T, |build, x| {
        let mut teacher = build(device, 1)?;
        let (mut student, mut second) = (build(device, 2)?, build(device, 3)?);
        let expected = (teacher.weight()?, teacher.bias()?, teacher.forward(&x)?.to_vec()?);
        let bias = teacher.bias_tensor::<T>()?.ok_or("a layer with bias")?;
        student.set_weight_tensor(teacher.weight_tensor::<T>()?)?;
        student.set_bias_tensor(bias)?;
        second.set_weight_tensor(&with_gaps(device, teacher.weight_tensor::<T>()?)?)?;
        second.set_bias_tensor(&with_gaps(device, bias)?)?;
        teacher.set_weight(&vec![0.5; expected.0.len()])?;
        teacher.set_bias(&[0.5; 4])?;
        for layer in [student, second] {
            let got = (layer.weight()?, layer.bias()?, layer.forward(&x)?.to_vec()?);
            require(got == expected, || format!("{got:?}, not {expected:?}"))?;
        }
        require(teacher.forward(&x)?.to_vec()? != expected.2, || "nothing changed".to_owned())?;
    });
    Ok(())
}

fn shared(device: &Device) -> Result<(), Failed> {
    with_each!(device, f32, |build, x| {
        let layer = build(device, 1)?;
        let before = layer.forward(&x)?.to_vec()?;
        let mut weight = layer.weight_tensor::<f32>()?.clone();
        let mut bias = layer.bias_tensor::<f32>()?.ok_or("a layer with bias")?.clone();
        require(weight.to_vec()? == layer.weight()?, || "another weight".to_owned())?;
        require(Some(bias.to_vec()?) == layer.bias()?, || "another bias".to_owned())?;
        weight.copy_from_slice(&vec![0.0; weight.len()])?;
        bias.copy_from_slice(&[2.0; 4])?;
        let after = layer.forward(&x)?.to_vec()?;
        require(after == vec![2.0; before.len()], || format!("{after:?}"))?;
    });
    Ok(())
}

/// What a refused call leaves as it was.
fn refused(device: &Device) -> Result<(), Failed> {
    with_each!(device, f32, |build, x| {
        let mut layer = build(device, 1)?;
        let before = (layer.weight()?, layer.bias()?, layer.forward(&x)?.to_vec()?);
        let weight = layer.weight_tensor::<f32>()?.clone();
        let shape = *weight.shape();

        let short = Tensor::<f32>::zeros(device, shape.with_columns(shape.columns() - 1))?;
        let outcomes = [layer.set_weight_tensor(&short), layer.set_bias_tensor(&weight)];
        for outcome in outcomes {
            let typed = matches!(outcome, Err(Error::Shape { operand: "values", .. }));
            require(typed, || format!("{outcome:?}"))?;
        }
        let half = Tensor::<f16>::zeros(device, shape)?;
        let outcomes = [
            layer.set_weight_tensor(&half),
            layer.set_bias_tensor(&half),
            layer.weight_tensor::<f16>().map(drop),
            layer.bias_tensor::<f16>().map(drop),
        ];
        for outcome in outcomes {
            require(matches!(outcome, Err(Error::DType { .. })), || format!("{outcome:?}"))?;
        }
        let outcome = layer.set_weight_tensor(&weight);
        require(matches!(outcome, Err(Error::Overlap { .. })), || format!("{outcome:?}"))?;

        let after = (layer.weight()?, layer.bias()?, layer.forward(&x)?.to_vec()?);
        require(before == after, || format!("{before:?} became {after:?}"))?;
    });

    let mut without = LinearConfig::new(5, 4).bias(false).build(device)?;
    let outcome = without.set_bias_tensor(&Tensor::<f32>::zeros(device, [4])?);
    require(matches!(outcome, Err(Error::Shape { .. })), || format!("{outcome:?}"))?;
    without.set_bias_tensor(&Tensor::<f32>::zeros(device, [0])?)?;
    require(without.bias_tensor::<f32>()?.is_none(), || "a bias where there is none".to_owned())
}

fn elsewhere(device: &Device) -> Result<(), Failed> {
    with_each!(device, f32, |build, x| {
        let mut layer = build(device, 1)?;
        let here = Tensor::<f32>::zeros(&Device::cpu(), *layer.weight_tensor::<f32>()?.shape())?;
        let outcome = layer.set_weight_tensor(&here);
        let typed = matches!(outcome, Err(Error::DeviceMismatch { operand: "values", .. }));
        require(typed, || format!("{outcome:?}"))?;
        layer.forward(&x)?;
    });
    Ok(())
}

fn tiers<T: Element>(device: &Device) -> Result<(), Failed> {
    for batch in [0, 1, 3, 64] {
        let layer = LinearConfig::new(48, 40).dtype(T::DTYPE).build(device)?;
        layer.warmup(batch)?;
        let x = Tensor::<T>::zeros(device, [batch, 48])?;
        let got = layer.forward_into(&x, &mut Tensor::zeros(device, [batch, 40])?)?;
        require(got == layer.tier_for(batch)?, || format!("linear, {batch}: {got}"))?;

        for [channels, length] in [[8, 64], [5, 33], [1, 1]] {
            for layout in SequenceLayout::ALL {
                let config = Conv1dConfig::new(channels, 16, 3).padding(Padding::Same);
                let layer = config.dtype(T::DTYPE).input_layout(layout).build(device)?;
                layer.warmup(batch, length)?;
                let x = Tensor::<T>::zeros(device, layout.extents(batch, channels, length))?;
                let mut y = Tensor::zeros(device, [batch, 16, length])?;
                let got = layer.forward_into(&x, &mut y)?;
                let expected = layer.tier_for(batch, length)?;
                require(got == expected && device.is_cuda() == (got != Tier::Cpu), || {
                    format!("{layout}, {batch}, {channels}, {length}: {got}, not {expected}")
                })?;
            }
        }
    }
    Ok(())
}

fn no_tier(device: &Device) -> Result<(), Failed> {
    let layer = Conv1dConfig::new(6, 4, 3).build(device)?;
    for (batch, length) in [(1, 2), (usize::MAX, 9), (9, usize::MAX), (1 << 20, 1 << 20)] {
        let outcome = layer.tier_for(batch, length);
        let typed = matches!(outcome, Err(Error::Convolution { .. }));
        require(typed, || format!("{batch}, {length}: {outcome:?}"))?;
    }
    let outcome = layer.warmup(1, 2);
    require(matches!(outcome, Err(Error::Convolution { .. })), || format!("{outcome:?}"))?;

    let elsewhere = if device.is_cuda() { Tier::Cpu } else { Tier::Portable };
    let forced = KernelConfig::default().tier(elsewhere);
    let layer = Conv1dConfig::new(6, 4, 3).kernel_config(forced).build(device)?;
    let outcomes = [layer.tier_for(2, 9).map(drop), layer.warmup(2, 9)];
    for outcome in outcomes {
        require(matches!(outcome, Err(Error::Unsupported { .. })), || format!("{outcome:?}"))?;
    }
    Ok(())
}

fn getters() -> Result<(), Failed> {
    let (padding, device) = (Padding::Explicit { left: 1, right: 4 }, Device::cpu());
    let layer = Conv1dConfig::new(6, 4, 3)
        .stride(5)
        .dilation(7)
        .padding(padding)
        .groups(2)
        .input_layout(SequenceLayout::Nlc)
        .grad_output_layout(SequenceLayout::Nlc)
        .filter_layout(FilterLayout::TapOutIn)
        .activation(Activation::Silu)
        .dtype(DType::F16)
        .build(&device)?;
    let sizes = [layer.in_channels(), layer.out_channels(), layer.kernel_size()];
    require(sizes == [6, 4, 3], || format!("{sizes:?}"))?;
    let window = Window { stride: 5, dilation: 7, padding, groups: 2 };
    require(layer.window() == window, || format!("{:?}", layer.window()))?;
    let layouts = [
        layer.input_layout(),
        layer.output_layout(),
        layer.grad_output_layout(),
        layer.grad_input_layout(),
    ];
    let (ncl, nlc) = (SequenceLayout::Ncl, SequenceLayout::Nlc);
    require(layouts == [nlc, ncl, nlc, ncl], || format!("{layouts:?}"))?;
    let rest = (layer.filter_layout(), layer.activation(), layer.dtype(), layer.device().id());
    let expected = (FilterLayout::TapOutIn, Activation::Silu, DType::F16, device.id());
    require(rest == expected, || format!("{rest:?}"))
}

/// Numbers from −2 to 2 that repeat after a prime number of elements.
fn ramp<T: Element>(device: &Device, shape: [usize; 3]) -> Result<Tensor<T>, Error> {
    let number = |index: usize| T::from_f32((index * 29 % 101) as f32 / 25.0 - 2.0);
    let values: Vec<T> = (0..shape.iter().product()).map(number).collect();
    Tensor::from_slice(device, &values, shape)
}

/// The layouts of output and gradient differ; the pre-activation has that of the output.
fn kept<T: Element + PartialEq>(device: &Device) -> Result<(), Failed> {
    let config = Conv1dConfig::new(6, 4, 3).groups(2).stride(2).dtype(T::DTYPE).seed(5);
    let config = config.output_layout(SequenceLayout::Nlc);
    let linear = config.clone().build(device)?;
    let (x, dy) = (ramp::<T>(device, [2, 6, 37])?, ramp::<T>(device, [2, 4, 18])?);
    for activation in Activation::ALL {
        let layer = config.clone().activation(activation).build(device)?;
        let (y, z) = (layer.forward(&x)?, layer.pre_activation(&x)?);
        let same =
            z.shape().extents() == [2, 18, 4] && z.to_vec()? == linear.forward(&x)?.to_vec()?;
        require(same, || format!("{activation}: another pre-activation"))?;
        let expected = layer.backward(&x, &y, &dy)?;
        let expected = [Some(expected.dx), Some(expected.dw), expected.db];
        for saved in [Saved::Output(&y), Saved::PreActivation(&z), Saved::Nothing] {
            let got = layer.backward(&x, saved, &dy)?;
            for (got, expected) in [Some(got.dx), Some(got.dw), got.db].iter().zip(&expected) {
                let values =
                    |tensor: &Option<Tensor<T>>| tensor.as_ref().map(Tensor::to_vec).transpose();
                let same = values(got)? == values(expected)?;
                require(same, || format!("{activation}, {saved:?}: other gradients"))?;
            }
        }
        let outcome = layer.backward(&x, Saved::PreActivation(&dy), &dy);
        let typed = matches!(outcome, Err(Error::Shape { operand: "z", .. }));
        require(typed, || format!("{activation}: {outcome:?}"))?;
    }
    Ok(())
}

fn wanted(device: &Device) -> Result<(), Failed> {
    let layer = Conv1dConfig::new(6, 4, 3).activation(Activation::Gelu).build(device)?;
    let (x, dy) = (ramp::<f32>(device, [2, 6, 20])?, ramp::<f32>(device, [2, 4, 18])?);
    let z = layer.pre_activation(&x)?;
    let full = layer.backward(&x, Saved::PreActivation(&z), &dy)?;

    let mut dx = Tensor::zeros(device, *x.shape())?;
    let only_dx = Gradients { dx: Some((&mut dx, SequenceLayout::Ncl)), ..Gradients::default() };
    let tiers = layer.backward_into(&x, Saved::PreActivation(&z), &dy, only_dx)?;
    require(matches!(tiers, Tiers { dx: Some(_), dw: None }), || format!("{tiers:?}"))?;
    require(dx.to_vec()? == full.dx.to_vec()?, || "another dx".to_owned())?;

    let mut db = Tensor::full(device, [4], 64.0f32)?;
    let added = Gradients { db: Some(&mut db), accumulate: true, ..Gradients::default() };
    let tiers = layer.backward_into(&x, Saved::PreActivation(&z), &dy, added)?;
    require(matches!(tiers, Tiers { dx: None, dw: Some(_) }), || format!("{tiers:?}"))?;
    let sums = full.db.ok_or("a layer with bias")?.to_vec()?;
    for (got, sum) in db.to_vec()?.iter().zip(sums) {
        // 36 additions each, in whatever order, below 128 and so rounded by at most 2⁻¹⁸.
        let close = sum.abs() < 64.0 && (got - 64.0 - sum).abs() <= 72.0 / 262_144.0;
        require(close, || format!("{got} is not 64 + {sum}"))?;
    }
    Ok(())
}

fn require(holds: bool, message: impl FnOnce() -> String) -> Result<(), Failed> {
    if holds { Ok(()) } else { Err(message().into()) }
}
