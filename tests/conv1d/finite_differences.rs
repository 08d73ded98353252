//! Gradients of a layer against differences of a loss.

use std::sync::atomic::Ordering;

use kasmina::{
    Activation, Conv1dConfig, Device, Error, KernelConfig, Padding, SequenceLayout, Tensor, Tier,
};
use libtest_mimic::Failed;

use crate::random::Random;
use crate::{COMPARED, require};

/// `Σ r·y` along single directions of x, w and b, against the gradients that `backward` gives for
/// `dy = r`.
///
/// With `D(h)` the central difference of step h, `(4·D(h/2) − D(h))/3` errs by `h⁴/480` times the
/// fifth derivative of the loss, plus what rounding does. Activations have a fifth derivative
/// below 12, the pre-activation a slope of at most 2 (|x| is held to 2, taps are smaller), and 8·77
/// positions with |r| of 0.8 on average take part at most: for h = 2⁻⁴ that stays below 0.2 if all
/// have one sign, slope and curvature, and they meet a bias with slope 1 at the most, one channel's
/// 77 a tap. So 0.01 is generous for x and w, and still a fifth of the smallest product that could
/// be missing. Rounding errs by a few u of `Σ|r·y|` in each loss.
pub(crate) fn finite_differences(device: &Device, tier: Tier) -> Result<(), Failed> {
    let mut random = Random::of("finite differences");
    let h = 0.0625f32;
    for (number, activation) in
        [Activation::None, Activation::Gelu, Activation::GeluTanh, Activation::Silu]
            .into_iter()
            .enumerate()
    {
        let config = Conv1dConfig::new(6, 8, 5)
            .stride(1 + number % 2)
            .dilation(1 + number / 2)
            .padding(Padding::Same)
            .groups(2)
            .layout(SequenceLayout::ALL[number % 2])
            .activation(activation)
            .seed(7)
            .kernel_config(KernelConfig::default().tier(tier));
        let mut layer = config.build(device)?;
        let extents = SequenceLayout::ALL[number % 2].extents(1, 6, 77);
        let x_values: Vec<f32> =
            random.normal(6 * 77).into_iter().map(|value| value.clamp(-2.0, 2.0)).collect();
        let x = Tensor::from_slice(device, &x_values, extents)?;
        let y = layer.forward(&x)?;
        let r: Vec<f32> = random.normal(y.len());
        let dy = Tensor::from_slice(device, &r, *y.shape())?;
        let gradients = layer.backward(&x, &y, &dy)?;
        let loss = |y: &Tensor<f32>| -> Result<f64, Error> {
            Ok(y.to_vec()?.iter().zip(&r).map(|(y, r)| f64::from(*y) * f64::from(*r)).sum())
        };
        let magnitude: f64 =
            y.to_vec()?.iter().zip(&r).map(|(y, r)| f64::from((y * r).abs())).sum();
        let tolerance = 0.01 + 16.0 * magnitude / f64::from(h) / f64::from(1 << 24);
        // The loss at −h, −h/2, h/2 and h.
        let check = |name: &str, index: usize, got: f32, losses: [f64; 4]| {
            let [a, b, c, d] = losses;
            let slope = (4.0 * (c - b) / f64::from(h) - (d - a) / f64::from(2.0 * h)) / 3.0;
            let error = (slope - f64::from(got)).abs();
            COMPARED.fetch_add(1, Ordering::Relaxed);
            require(error <= tolerance, || {
                format!("{activation:?} {name}[{index}]: {got}, by differences {slope}")
            })
        };
        let (dx, dw) = (gradients.dx.to_vec()?, gradients.dw.to_vec()?);
        for _ in 0..5 {
            let index = random.below(x_values.len());
            let moved = |by: f32| -> Result<f64, Error> {
                let mut values = x_values.clone();
                values[index] += by;
                loss(&layer.forward(&Tensor::from_slice(device, &values, extents)?)?)
            };
            let losses = [moved(-h)?, moved(-h / 2.0)?, moved(h / 2.0)?, moved(h)?];
            check("dx", index, dx[index], losses)?;
        }
        let weight = layer.weight()?;
        for _ in 0..5 {
            let index = random.below(weight.len());
            let mut moved = |by: f32| -> Result<f64, Error> {
                let mut values = weight.clone();
                values[index] += by;
                layer.set_weight(&values)?;
                loss(&layer.forward(&x)?)
            };
            let losses = [moved(-h)?, moved(-h / 2.0)?, moved(h / 2.0)?, moved(h)?];
            check("dw", index, dw[index], losses)?;
        }
        layer.set_weight(&weight)?;
        let bias = layer.bias()?.ok_or("a bias")?;
        let db = gradients.db.as_ref().ok_or("a bias gradient")?.to_vec()?;
        for index in 0..bias.len() {
            let mut moved = |by: f32| -> Result<f64, Error> {
                let mut values = bias.clone();
                values[index] += by;
                layer.set_bias(&values)?;
                loss(&layer.forward(&x)?)
            };
            let losses = [moved(-h)?, moved(-h / 2.0)?, moved(h / 2.0)?, moved(h)?];
            check("db", index, db[index], losses)?;
        }
    }
    Ok(())
}
