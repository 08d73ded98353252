//! Learns to remove noise from signals: two `KasminaConv1d`s, stochastic gradient descent, forward
//! and backward on the GPU if there is one, else on the CPU.
//!
//! ```text
//! cargo run --release --example convolution
//! ```
//!
//! A signal is the sum of two waves. The layers see it with noise added and are to give it without:
//! the loss is the mean squared difference. Every step has signals of its own, so what the network
//! does to the last ones, which are held out, it has learned of signals, not of these.

use anyhow::{Context, ensure};
use kasmina::conv1d::Gradients;
use kasmina::{Activation, Conv1dConfig, Device, KasminaConv1d, Padding, Tensor};

const BATCH: usize = 16;
const LENGTH: usize = 256;
const CHANNELS: usize = 16;
const TAPS: usize = 9;
const STEPS: usize = 300;
const LEARNING_RATE: f32 = 0.1;
/// What must be left of the noise, as a share of its mean square.
const REQUIRED_SHARE: f64 = 0.25;

fn main() -> anyhow::Result<()> {
    let device = Device::auto()?;
    println!("device  {}: {} tier, {}", device.name(), device.tier(), device.tier_reason());
    let mut network = Network::new(&device)?;
    println!("tier    {} for the hidden layer", network.hidden.tier_for(BATCH, LENGTH)?);
    let mut random = Random(2026);
    for step in 1..=STEPS {
        let loss = network.step(&Signals::new(&mut random))?;
        if step == 1 || step % 50 == 0 {
            println!("step {step:3}  loss {loss:.4}");
        }
    }
    let held_out = Signals::new(&mut random);
    let (before, after) = (held_out.loss(&held_out.noisy), network.loss(&held_out)?);
    println!("held out: mean squared noise {before:.4} before, {after:.4} after");
    ensure!(
        after < REQUIRED_SHARE * before,
        "less than {REQUIRED_SHARE} of the noise must be left; more means wrong gradients"
    );
    Ok(())
}

/// A hidden layer with GELU and an output layer, each position of which sees 17 of the input.
struct Network {
    device: Device,
    hidden: KasminaConv1d,
    output: KasminaConv1d,
}

impl Network {
    fn new(device: &Device) -> anyhow::Result<Self> {
        let hidden = Conv1dConfig::new(1, CHANNELS, TAPS).activation(Activation::Gelu).seed(1);
        let output = Conv1dConfig::new(CHANNELS, 1, TAPS).seed(2);
        Ok(Self {
            device: device.clone(),
            hidden: hidden.padding(Padding::Same).build(device)?,
            output: output.padding(Padding::Same).build(device)?,
        })
    }

    fn tensor(&self, values: &[f32]) -> kasmina::Result<Tensor<f32>> {
        Tensor::from_slice(&self.device, values, [BATCH, 1, LENGTH])
    }

    /// One step down the gradient of a batch; its loss before.
    fn step(&mut self, signals: &Signals) -> anyhow::Result<f64> {
        let x = self.tensor(&signals.noisy)?;
        let h = self.hidden.forward(&x)?;
        let y = self.output.forward(&h)?;
        let values = y.to_vec()?;
        let dy = self.tensor(&signals.loss_gradient(&values))?;

        let of_output = self.output.backward(&h, &y, &dy)?;
        // Nobody needs the gradient of the noisy signals.
        let mut dw = Tensor::zeros(&self.device, [CHANNELS, 1, TAPS])?;
        let mut db = Tensor::zeros(&self.device, [CHANNELS])?;
        let wanted = Gradients { dw: Some(&mut dw), db: Some(&mut db), ..Gradients::default() };
        self.hidden.backward_into(&x, &h, &of_output.dx, wanted)?;

        descend(&mut self.hidden, &dw, &db)?;
        descend(&mut self.output, &of_output.dw, &of_output.db.context("a layer with bias")?)?;
        Ok(signals.loss(&values))
    }

    fn loss(&self, signals: &Signals) -> anyhow::Result<f64> {
        let x = self.tensor(&signals.noisy)?;
        Ok(signals.loss(&self.output.forward(&self.hidden.forward(&x)?)?.to_vec()?))
    }
}

fn descend(layer: &mut KasminaConv1d, dw: &Tensor<f32>, db: &Tensor<f32>) -> anyhow::Result<()> {
    let moved = |values: Vec<f32>, gradient: Vec<f32>| -> Vec<f32> {
        values.iter().zip(gradient).map(|(value, slope)| value - LEARNING_RATE * slope).collect()
    };
    layer.set_weight(&moved(layer.weight()?, dw.to_vec()?))?;
    let bias = layer.bias()?.context("a layer with bias")?;
    layer.set_bias(&moved(bias, db.to_vec()?))?;
    Ok(())
}

/// [`BATCH`] signals of [`LENGTH`] positions, one after the other.
struct Signals {
    clean: Vec<f32>,
    noisy: Vec<f32>,
}

impl Signals {
    fn new(random: &mut Random) -> Self {
        let mut clean = Vec::with_capacity(BATCH * LENGTH);
        for _ in 0..BATCH {
            // Radians from one position to the next, and where the wave begins.
            let waves = [0.04, 0.2].map(|step| (step * (1.0 + random.next()), 6.3 * random.next()));
            clean.extend((0..LENGTH).map(|position| {
                let wave = |(step, start): (f32, f32)| (step * position as f32 + start).sin();
                wave(waves[0]) + 0.5 * wave(waves[1])
            }));
        }
        let noisy = clean.iter().map(|value| value + 2.0 * random.next() - 1.0).collect();
        Self { clean, noisy }
    }

    /// The mean squared difference from the clean signals.
    fn loss(&self, values: &[f32]) -> f64 {
        let squares = values.iter().zip(&self.clean).map(|(y, t)| f64::from(y - t).powi(2));
        squares.sum::<f64>() / values.len() as f64
    }

    fn loss_gradient(&self, values: &[f32]) -> Vec<f32> {
        let scale = 2.0 / values.len() as f32;
        values.iter().zip(&self.clean).map(|(y, t)| scale * (y - t)).collect()
    }
}

/// SplitMix64: small, seeded, and the same numbers everywhere.
struct Random(u64);

impl Random {
    /// A number in [0, 1).
    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 40) as f32 / (1u32 << 24) as f32
    }
}
