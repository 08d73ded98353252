//! Classifies handwritten digits: a `KasminaLayer` makes 4,096 random ReLU features of each image,
//! and a ridge regression, solved in closed form, reads the digit from them.
//!
//! ```text
//! cargo run --release --example quickstart
//! ```
//!
//! With more features than samples the regression is cheapest in its dual form. With the features
//! `F` (one row per image) and `G = F·Fᵀ`, it solves `(G + λI)·A = T` over the training images and
//! scores an image by `f·Fᵀ·A`. `G` is a forward pass too: inputs `F`, weights `F`, no activation.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use kasmina::{
    Activation, DType, Device, KasminaLayer, KernelConfig, LinearConfig, Tensor, WeightLayout, f16,
    gemm,
};

const PIXELS: usize = 64;
const CLASSES: usize = 10;
const FEATURES: usize = 4096;
/// Images to learn from; the rest of the 1,797 are held out.
const TRAINING: usize = 1347;
/// λ, relative to the mean of G's diagonal.
const RIDGE: f64 = 1e-3;
const REQUIRED_ACCURACY: f64 = 0.97;
/// How long the timed forward passes run together.
const TIMED: Duration = Duration::from_millis(300);

fn main() -> anyhow::Result<()> {
    let device = Device::auto()?;
    let digits = Digits::parse(include_str!("data/optdigits.txt"))?;
    let samples = digits.labels.len();
    println!("device    {}", device.name());
    println!("tier      {}: {}", device.tier(), device.tier_reason());
    println!("data      {TRAINING} digits to learn from, {} held out", samples - TRAINING);

    let layer = random_features(&device)?;
    let x = Tensor::from_slice(&device, &digits.pixels, [samples, PIXELS])?;
    let features = layer.forward(&x)?;
    let gram = gram_matrix(&device, &features)?;
    let readout = ridge_readout(&gram, &digits.labels)?;
    let correct = (TRAINING..samples)
        .filter(|&i| classify(&gram[i * samples..], &readout) == digits.labels[i])
        .count();
    let accuracy = correct as f64 / (samples - TRAINING) as f64;
    println!("accuracy  {:.2} % of the held-out digits", accuracy * 100.0);

    report_speed(&layer, &x)?;
    report_difference_from_cpu(&digits, &features)?;

    ensure!(
        accuracy > REQUIRED_ACCURACY,
        "the accuracy must exceed {} %; a lower one means wrong features",
        REQUIRED_ACCURACY * 100.0
    );
    Ok(())
}

/// The data set, shuffled.
struct Digits {
    /// One row of [`PIXELS`] values from −1 to 1 per image.
    pixels: Vec<f16>,
    labels: Vec<usize>,
}

impl Digits {
    fn parse(text: &str) -> anyhow::Result<Self> {
        let mut lines: Vec<&str> = text.lines().collect();
        let mut random = Random(1998);
        for last in (1..lines.len()).rev() {
            lines.swap(last, random.below(last + 1));
        }
        let mut digits = Self { pixels: Vec::new(), labels: Vec::new() };
        for line in lines {
            let (image, label) = line.split_once(' ').context("a line is an image and a label")?;
            ensure!(image.len() == PIXELS, "an image has {PIXELS} pixels, not {}", image.len());
            for pixel in image.chars() {
                let value = pixel.to_digit(17).context("a pixel is a base-17 digit")?;
                digits.pixels.push(f16::from_f32(value as f32 / 8.0 - 1.0));
            }
            digits.labels.push(label.parse()?);
        }
        Ok(digits)
    }
}

/// A layer of random weights and biases, the same on every device.
fn random_features(device: &Device) -> anyhow::Result<KasminaLayer> {
    let mut random = Random(2026);
    let weight_scale = 1.0 / (PIXELS as f32).sqrt();
    let weight: Vec<f32> = (0..PIXELS * FEATURES).map(|_| random.normal() * weight_scale).collect();
    let bias: Vec<f32> = (0..FEATURES).map(|_| random.normal() * 0.5).collect();
    let mut layer = LinearConfig::new(PIXELS, FEATURES)
        .activation(Activation::Relu)
        .dtype(DType::F16)
        .build(device)?;
    layer.set_weight(&weight)?;
    layer.set_bias(&bias)?;
    Ok(layer)
}

/// `F·Fᵀ` in f32: entry `(i, j)` is the product of the features of images `i` and `j`.
fn gram_matrix(device: &Device, features: &Tensor<f16>) -> anyhow::Result<Vec<f32>> {
    let samples = features.shape().rows();
    let values: Vec<f32> = features.to_vec()?.into_iter().map(f16::to_f32).collect();
    let f = Tensor::from_slice(device, &values, [samples, FEATURES])?;
    let mut gram = Tensor::zeros(device, [samples, samples])?;
    let product = gemm::Forward {
        x: &f,
        w: &f,
        bias: None,
        layout: WeightLayout::OutIn,
        activation: Activation::None,
    };
    product.run(&mut gram, &KernelConfig::default())?;
    Ok(gram.to_vec()?)
}

/// Solves `(G + λI)·A = T` over the training images, where `T` is 1 for the image's digit and −1
/// for the others. The result is `A`, one row of [`CLASSES`] per training image.
fn ridge_readout(gram: &[f32], labels: &[usize]) -> anyhow::Result<Vec<[f64; CLASSES]>> {
    let samples = labels.len();
    let entry = |i: usize, j: usize| f64::from(gram[i * samples + j]);
    let ridge = RIDGE * (0..TRAINING).map(|i| entry(i, i)).sum::<f64>() / TRAINING as f64;

    // Cholesky: G + λI = L·Lᵀ, L lower triangular, row by row.
    let mut l: Vec<Vec<f64>> = Vec::with_capacity(TRAINING);
    for i in 0..TRAINING {
        let mut row: Vec<f64> = Vec::with_capacity(i + 1);
        for (j, above) in l.iter().enumerate() {
            row.push((entry(i, j) - dot(&row, above)) / above[j]);
        }
        let pivot = entry(i, i) + ridge - dot(&row, &row);
        ensure!(pivot > 0.0, "row {i}: the Gram matrix is not positive definite");
        row.push(pivot.sqrt());
        l.push(row);
    }

    let mut a: Vec<[f64; CLASSES]> = labels[..TRAINING]
        .iter()
        .map(|&label| std::array::from_fn(|class| if class == label { 1.0 } else { -1.0 }))
        .collect();
    // L·Z = T from the top, then Lᵀ·A = Z from the bottom, in place.
    for i in 0..TRAINING {
        for j in 0..i {
            a[i] = std::array::from_fn(|class| a[i][class] - l[i][j] * a[j][class]);
        }
        a[i] = a[i].map(|value| value / l[i][i]);
    }
    for i in (0..TRAINING).rev() {
        a[i] = a[i].map(|value| value / l[i][i]);
        for j in 0..i {
            a[j] = std::array::from_fn(|class| a[j][class] - l[i][j] * a[i][class]);
        }
    }
    Ok(a)
}

/// The sum of the products of two rows, as far as the shorter goes.
fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// The digit with the highest score, from an image's row of the Gram matrix.
fn classify(gram_row: &[f32], readout: &[[f64; CLASSES]]) -> usize {
    let mut scores = [0.0; CLASSES];
    for (&similarity, coefficients) in gram_row.iter().zip(readout) {
        for (score, coefficient) in scores.iter_mut().zip(coefficients) {
            *score += f64::from(similarity) * coefficient;
        }
    }
    (0..CLASSES).max_by(|&a, &b| scores[a].total_cmp(&scores[b])).unwrap_or(0)
}

fn report_speed(layer: &KasminaLayer, x: &Tensor<f16>) -> anyhow::Result<()> {
    let samples = x.shape().rows();
    // The forward pass that made the features was the warm-up: the kernel is compiled and loaded.
    let mut y = layer.forward(x)?;
    layer.device().synchronize()?;
    let mut passes = 0;
    let start = Instant::now();
    while start.elapsed() < TIMED {
        for _ in 0..10 {
            layer.forward_into(x, &mut y)?;
        }
        layer.device().synchronize()?;
        passes += 10;
    }
    let seconds = start.elapsed().as_secs_f64() / f64::from(passes);
    let operations = 2 * samples * PIXELS * FEATURES;
    println!(
        "forward   {:.1} µs for {samples} samples on the {} tier: {:.3e} samples/s, {:.3} TFLOP/s",
        seconds * 1e6,
        layer.tier_for(samples)?,
        samples as f64 / seconds,
        operations as f64 / seconds * 1e-12,
    );
    Ok(())
}

fn report_difference_from_cpu(digits: &Digits, features: &Tensor<f16>) -> anyhow::Result<()> {
    let cpu = Device::cpu();
    let x = Tensor::from_slice(&cpu, &digits.pixels, [digits.labels.len(), PIXELS])?;
    let expected = random_features(&cpu)?.forward(&x)?.to_vec()?;
    let mut largest = 0.0_f32;
    let mut difference = 0.0_f32;
    for (got, expected) in features.to_vec()?.into_iter().zip(expected) {
        largest = largest.max(expected.to_f32());
        difference = difference.max((got.to_f32() - expected.to_f32()).abs());
    }
    println!("cpu tier  largest difference {difference:.2e}, among features up to {largest:.2}");
    Ok(())
}

/// SplitMix64: small, seeded, and the same numbers everywhere.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in 0 < u ≤ 1.
    fn uniform(&mut self) -> f32 {
        ((self.next() >> 40) + 1) as f32 / (1 << 24) as f32
    }

    /// Uniform in 0 ≤ i < `bound`; the bias for so small a bound is below 1e-15.
    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    /// Standard normal, by Box and Muller.
    fn normal(&mut self) -> f32 {
        let radius = (-2.0 * self.uniform().ln()).sqrt();
        radius * (std::f32::consts::TAU * self.uniform()).cos()
    }
}
