//! What layers offer besides their passes, on the CPU and on a GPU: parameters as tensors.

#[path = "support/gpu.rs"]
mod gpu;

use std::process::ExitCode;

use gpu::Gpu;
use half::{bf16, f16};
use kasmina::{
    Conv1dConfig, Device, Element, Error, FilterLayout, KasminaConv1d, KasminaLayer, LinearConfig,
    Tensor, WeightLayout,
};
use libtest_mimic::{Arguments, Failed, Trial};

type Check = fn(&Device) -> Result<(), Failed>;

const CLAIMS: [(&str, Check); 3] = [
    ("parameters_are_copied_from_tensors", |device| {
        copied::<f32>(device)?;
        copied::<f16>(device)?;
        copied::<bf16>(device)
    }),
    ("clones_of_parameters_share_their_memory", shared),
    ("tensors_that_cannot_be_parameters_are_refused", refused),
];

fn main() -> ExitCode {
    let gpu = Gpu::find();
    let mut trials = Vec::new();
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

fn require(holds: bool, message: impl FnOnce() -> String) -> Result<(), Failed> {
    if holds { Ok(()) } else { Err(message().into()) }
}
