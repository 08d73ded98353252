//! Trains a small network on handwritten digits: two `KasminaLayer`s, stochastic gradient descent
//! with momentum, forward and backward on the GPU if there is one, else on the CPU.
//!
//! ```text
//! cargo run --release --example train
//! ```
//!
//! The layers compute, and the parameters' gradients come from them. The loss, which is softmax
//! with cross-entropy over ten scores an image, and the update of the parameters are plain Rust on
//! the host.

use std::time::Instant;

use anyhow::{Context, ensure};
use kasmina::gemm::Gradients;
use kasmina::{Activation, Device, Element, KasminaLayer, LinearConfig, Tensor};

const PIXELS: usize = 64;
const HIDDEN: usize = 256;
const CLASSES: usize = 10;
/// Images to learn from; the rest of the 1,797 are held out.
const TRAINING: usize = 1347;
const BATCH: usize = 64;
const EPOCHS: usize = 20;
const LEARNING_RATE: f32 = 0.05;
const MOMENTUM: f32 = 0.9;
const REQUIRED_ACCURACY: f64 = 0.95;

fn main() -> anyhow::Result<()> {
    let device = Device::auto()?;
    println!("device  {}: {} tier, {}", device.name(), device.tier(), device.tier_reason());
    let mut random = Random(2026);
    let digits = Digits::parse(include_str!("data/optdigits.txt"), &mut random)?;
    let mut network = Network::new(&device)?;
    let start = Instant::now();
    let mut order: Vec<usize> = (0..TRAINING).collect();
    for epoch in 1..=EPOCHS {
        random.shuffle(&mut order);
        let mut loss = 0.0;
        for batch in order.chunks(BATCH) {
            loss += network.step(&digits, batch)? * batch.len() as f64;
        }
        if epoch == 1 || epoch % 5 == 0 {
            let accuracy = network.accuracy(&digits)?;
            let loss = loss / TRAINING as f64;
            println!("epoch {epoch:2}  loss {loss:.4}  held out {:.2} %", accuracy * 100.0);
        }
    }
    println!("{:.1} s for {EPOCHS} epochs", start.elapsed().as_secs_f64());
    let accuracy = network.accuracy(&digits)?;
    ensure!(
        accuracy > REQUIRED_ACCURACY,
        "the accuracy must exceed {} %; a lower one means wrong gradients",
        REQUIRED_ACCURACY * 100.0
    );
    Ok(())
}

/// A hidden layer with ReLU and an output layer with a score for each digit.
struct Network {
    device: Device,
    hidden: Trained,
    output: Trained,
}

/// A layer with its parameters and their momentum on the host.
struct Trained {
    layer: KasminaLayer,
    weight: Parameters,
    bias: Parameters,
}

struct Parameters {
    values: Vec<f32>,
    velocity: Vec<f32>,
}

impl Parameters {
    fn new(values: Vec<f32>) -> Self {
        let velocity = vec![0.0; values.len()];
        Self { values, velocity }
    }

    fn descend(&mut self, gradient: &[f32]) {
        for ((value, velocity), gradient) in
            self.values.iter_mut().zip(&mut self.velocity).zip(gradient)
        {
            *velocity = MOMENTUM * *velocity - LEARNING_RATE * gradient;
            *value += *velocity;
        }
    }
}

impl Trained {
    fn new(config: LinearConfig, device: &Device) -> anyhow::Result<Self> {
        let layer = config.build(device)?;
        let weight = Parameters::new(layer.weight()?);
        let bias = Parameters::new(layer.bias()?.context("a layer with bias")?);
        Ok(Self { layer, weight, bias })
    }

    fn descend(&mut self, dw: &Tensor<f32>, db: &Tensor<f32>) -> anyhow::Result<()> {
        self.weight.descend(&dw.to_vec()?);
        self.bias.descend(&db.to_vec()?);
        self.layer.set_weight(&self.weight.values)?;
        self.layer.set_bias(&self.bias.values)?;
        Ok(())
    }
}

impl Network {
    fn new(device: &Device) -> anyhow::Result<Self> {
        let hidden = LinearConfig::new(PIXELS, HIDDEN).activation(Activation::Relu).seed(1);
        let output = LinearConfig::new(HIDDEN, CLASSES).seed(2);
        Ok(Self {
            device: device.clone(),
            hidden: Trained::new(hidden, device)?,
            output: Trained::new(output, device)?,
        })
    }

    /// One step down the gradient of a batch; its mean loss before.
    fn step(&mut self, digits: &Digits, batch: &[usize]) -> anyhow::Result<f64> {
        let pixels: Vec<f32> =
            batch.iter().flat_map(|&i| &digits.pixels[i * PIXELS..][..PIXELS]).copied().collect();
        let x = Tensor::from_slice(&self.device, &pixels, [batch.len(), PIXELS])?;
        let h = self.hidden.layer.forward(&x)?;
        let scores = self.output.layer.forward(&h)?;

        let labels = batch.iter().map(|&i| digits.labels[i]);
        let (loss, d_scores) = cross_entropy(&scores.to_vec()?, labels);
        let d_scores = Tensor::from_slice(&self.device, &d_scores, [batch.len(), CLASSES])?;
        let of_output = self.output.layer.backward(&h, &scores, &d_scores)?;
        // Nobody needs the gradient of the images.
        let mut dw = Tensor::zeros(&self.device, [HIDDEN, PIXELS])?;
        let mut db = Tensor::zeros(&self.device, [HIDDEN])?;
        let wanted = Gradients { dw: Some(&mut dw), db: Some(&mut db), ..Gradients::default() };
        self.hidden.layer.backward_into(&x, &h, &of_output.dx, wanted)?;

        self.hidden.descend(&dw, &db)?;
        self.output.descend(&of_output.dw, &of_output.db.context("a layer with bias")?)?;
        Ok(loss)
    }

    /// How many of the held-out images are recognised.
    fn accuracy(&self, digits: &Digits) -> anyhow::Result<f64> {
        let (pixels, labels) = (&digits.pixels[TRAINING * PIXELS..], &digits.labels[TRAINING..]);
        let x = Tensor::from_slice(&self.device, pixels, [labels.len(), PIXELS])?;
        let scores = self.output.layer.forward(&self.hidden.layer.forward(&x)?)?.to_vec()?;
        let best = |scores: &[f32]| {
            (0..CLASSES).max_by(|&a, &b| scores[a].total_cmp(&scores[b])).unwrap_or(0)
        };
        let correct =
            scores.chunks(CLASSES).zip(labels).filter(|(scores, label)| best(scores) == **label);
        Ok(correct.count() as f64 / labels.len() as f64)
    }
}

/// The mean of `−ln softmax(scores)` at each image's label, and its gradient.
fn cross_entropy<T: Element>(
    scores: &[T],
    labels: impl ExactSizeIterator<Item = usize>,
) -> (f64, Vec<f32>) {
    let images = labels.len() as f32;
    let mut loss = 0.0;
    let mut gradient = Vec::with_capacity(scores.len());
    for (scores, label) in scores.chunks(CLASSES).zip(labels) {
        let scores: Vec<f32> = scores.iter().map(|score| score.to_f32()).collect();
        let largest = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let powers: Vec<f32> = scores.iter().map(|score| (score - largest).exp()).collect();
        let sum: f32 = powers.iter().sum();
        loss += f64::from(sum.ln() + largest - scores[label]);
        gradient.extend(powers.iter().enumerate().map(|(class, power)| {
            let target = if class == label { 1.0 } else { 0.0 };
            (power / sum - target) / images
        }));
    }
    (loss / f64::from(images), gradient)
}

/// The data set, shuffled.
struct Digits {
    /// One row of [`PIXELS`] values from −1 to 1 per image.
    pixels: Vec<f32>,
    labels: Vec<usize>,
}

impl Digits {
    fn parse(text: &str, random: &mut Random) -> anyhow::Result<Self> {
        let mut lines: Vec<&str> = text.lines().collect();
        random.shuffle(&mut lines);
        let mut digits = Self { pixels: Vec::new(), labels: Vec::new() };
        for line in lines {
            let (image, label) = line.split_once(' ').context("a line is an image and a label")?;
            ensure!(image.len() == PIXELS, "an image has {PIXELS} pixels, not {}", image.len());
            for pixel in image.chars() {
                let value = pixel.to_digit(17).context("a pixel is a base-17 digit")?;
                digits.pixels.push(value as f32 / 8.0 - 1.0);
            }
            digits.labels.push(label.parse()?);
        }
        Ok(digits)
    }
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

    /// The bias of the remainder is below 1e-15 for so few items.
    fn shuffle<V>(&mut self, items: &mut [V]) {
        for last in (1..items.len()).rev() {
            items.swap(last, (self.next() % (last as u64 + 1)) as usize);
        }
    }
}
