//! A layer's forward pass with telemetry of its output, beside the same pass without, and beside
//! the pass followed by a reduction of its output.
//!
//! `benches/results/README.md` says how it is measured.

mod measure;

use std::time::Instant;

use anyhow::ensure;
use clap::Parser;
use half::bf16;
use kasmina::{
    Activation, DType, Device, KasminaLayer, LinearConfig, Segments, Summary, TelemetryReducer,
    Tensor, Tier, WeightLayout,
};
use measure::cuda::Clock;
use measure::options::{self, Sampling, layout_name, one_of};
use measure::random::Normals;
use measure::record::{Peer, Provenance, Times, append};
use measure::regime::{self, Contender, Regime};
use serde::Serialize;

const DTYPE: DType = DType::BF16;
const ACTIVATION: Activation = Activation::Relu;
/// Inputs that are used in turn.
const INPUTS: usize = 2;
/// How often summaries are read for the time that takes.
const READS: usize = 21;

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    let Some(device) = options::device() else { return Ok(()) };
    let (clock, provenance) = (Clock::new(&device)?, Provenance::new(&device));
    let mut normals = Normals::new();
    println!("bf16, bias and ReLU, {} chunks; medians in us", options.chunks);
    println!("shape | layout | regime | forward | fused | + % | then reduced | + % | read | read");
    for &shape in &options.shapes {
        for layout in WeightLayout::ALL {
            let pass = Pass::new(&device, shape, layout, options.chunks, &mut normals)?;
            let record = pass.measure(&clock, &provenance, &options)?;
            println!("{}", record.row());
            if let Some(file) = &options.sampling.json {
                append(&record, file)?;
            }
        }
    }
    Ok(())
}

/// A forward pass with telemetry of its output.
#[derive(Parser)]
struct Options {
    #[arg(
        long,
        value_name = "MxNxK",
        value_delimiter = ',',
        default_values = [
            "1024x1024x1024",
            "2048x2048x2048",
            "4096x4096x4096",
            "8192x8192x8192",
            "4096x14336x4096",
            "16384x4096x4096",
        ],
        value_parser = options::extents::<3>
    )]
    shapes: Vec<[usize; 3]>,
    /// Chunks of the output features
    #[arg(long, value_name = "N", default_value_t = 8)]
    chunks: usize,
    /// Default burst, and graph for passes under 20 us
    #[arg(long, value_parser = one_of(Regime::ALL, Regime::name))]
    regime: Option<Regime>,
    #[command(flatten)]
    sampling: Sampling,
}

/// A layer with its operands.
struct Pass {
    shape: [usize; 3],
    layout: WeightLayout,
    chunks: usize,
    layer: KasminaLayer,
    reducer: TelemetryReducer,
    inputs: Vec<Tensor<bf16>>,
}

impl Pass {
    fn new(
        device: &Device,
        shape: [usize; 3],
        layout: WeightLayout,
        chunks: usize,
        normals: &mut Normals,
    ) -> anyhow::Result<Self> {
        let [m, n, k] = shape;
        let config = LinearConfig::new(k, n).activation(ACTIVATION).dtype(DTYPE);
        let mut layer = config.weight_layout(layout).build(device)?;
        let weights: Vec<f32> = normals.take(n * k, 1.0 / (k as f32).sqrt());
        layer.set_weight(&weights)?;
        let mut inputs = Vec::new();
        for _ in 0..INPUTS {
            inputs.push(Tensor::from_slice(device, &normals.take::<bf16>(m * k, 1.0), [m, k])?);
        }
        let reducer = TelemetryReducer::new(device)?;
        let pass = Self { shape, layout, chunks, layer, reducer, inputs };
        pass.check()?;
        Ok(pass)
    }

    /// Whether what is to be measured is right: both ways tell the same of the same output.
    fn check(&self) -> anyhow::Result<()> {
        let (y, telemetry) =
            self.layer.forward_with_telemetry(&self.inputs[0], &self.reducer, self.chunks)?;
        ensure!(telemetry.is_fused(), "{:?} is not fused", self.shape);
        let reduced = self.reducer.segmented(&y, Segments::Chunks(self.chunks))?;
        for (fused, reduced) in telemetry.read()?.iter().zip(&reduced) {
            let close = |a: Option<f64>, b: Option<f64>| {
                let (a, b) = (a.unwrap_or(f64::NAN), b.unwrap_or(f64::NAN));
                (a - b).abs() <= 1e-5 * b.abs()
            };
            let same = fused.count() == reduced.count()
                && (fused.min(), fused.max()) == (reduced.min(), reduced.max())
                && close(fused.mean(), reduced.mean())
                && close(fused.variance(), reduced.variance());
            ensure!(same, "{:?}: {fused:?} fused, {reduced:?} reduced", self.shape);
        }
        Ok(())
    }

    fn measure(
        &self,
        clock: &Clock,
        provenance: &Provenance,
        options: &Options,
    ) -> anyhow::Result<Record> {
        let input = |call: usize| &self.inputs[call % INPUTS];
        let (layer, reducer, chunks) = (&self.layer, &self.reducer, self.chunks);
        let plain = |call| {
            drop(layer.forward(input(call))?);
            Ok(())
        };
        let fused = |call| {
            drop(layer.forward_with_telemetry(input(call), reducer, chunks)?);
            Ok(())
        };
        let reduced = |call| {
            let y = layer.forward(input(call))?;
            drop(reducer.segmented_async(&y, Segments::Chunks(chunks))?);
            Ok(())
        };
        let contenders: [Contender<'_>; 3] = [&plain, &fused, &reduced];
        let regime = match options.regime {
            Some(regime) => regime,
            None => regime::suited(clock, &plain)?[0],
        };
        let summaries =
            regime::measure(clock, regime, options.sampling.repetitions(), &contenders)?;
        let times = |contender: usize| Times::from(&summaries[contender]);
        let peer = |name: &str, contender| Peer { name: name.to_owned(), timing: times(contender) };
        let [m, n, k] = self.shape;
        let time = |contender: usize| regime.representative(&summaries[contender]);
        let fused_read_us = median_of_reads(clock, || {
            let (_, telemetry) = layer.forward_with_telemetry(input(0), reducer, chunks)?;
            Ok(move || telemetry.read())
        })?;
        let reduced_read_us = median_of_reads(clock, || {
            let y = layer.forward(input(0))?;
            let pending = reducer.segmented_async(&y, Segments::Chunks(chunks))?;
            Ok(move || pending.read())
        })?;
        Ok(Record {
            provenance: provenance.clone(),
            operation: "telemetry",
            m,
            n,
            k,
            dtype: DTYPE.name(),
            layout: layout_name(self.layout),
            activation: ACTIVATION.name(),
            // The only one with a fused pass, and `check` has seen that it is one.
            tier: Tier::Hopper.name(),
            chunks,
            regime: regime.name(),
            fused: times(1),
            peer: peer("forward, then reduction", 2),
            ratio: time(2) / time(1),
            details: Details {
                forward: times(0),
                fused_cost: time(1) / time(0) - 1.0,
                reduced_cost: time(2) / time(0) - 1.0,
                fused_read_us,
                reduced_read_us,
            },
        })
    }
}

/// What the host takes to read summaries that are there, in microseconds.
fn median_of_reads<R: FnOnce() -> kasmina::Result<Vec<Summary>>>(
    clock: &Clock,
    enqueue: impl Fn() -> kasmina::Result<R>,
) -> anyhow::Result<f64> {
    let mut times = Vec::with_capacity(READS);
    for _ in 0..READS {
        let read = enqueue()?;
        clock.synchronize()?;
        let begin = Instant::now();
        let summaries = read()?;
        times.push(begin.elapsed().as_secs_f64() * 1e6);
        drop(summaries);
    }
    times.sort_by(f64::total_cmp);
    Ok(times[READS / 2])
}

/// One line of `benches/results`.
#[derive(Serialize)]
struct Record {
    #[serde(flatten)]
    provenance: Provenance,
    operation: &'static str,
    m: usize,
    n: usize,
    k: usize,
    dtype: &'static str,
    layout: &'static str,
    activation: &'static str,
    tier: &'static str,
    chunks: usize,
    regime: &'static str,
    #[serde(flatten)]
    fused: Times,
    peer: Peer<Times>,
    ratio: f64,
    details: Details,
}

/// What else is worth knowing.
#[derive(Serialize)]
struct Details {
    forward: Times,
    /// What telemetry adds, as a part of the pass without.
    fused_cost: f64,
    reduced_cost: f64,
    /// Of the host, once the GPU is done.
    fused_read_us: f64,
    reduced_read_us: f64,
}

impl Record {
    fn row(&self) -> String {
        let Self { m, n, k, layout, regime, fused, peer, details, .. } = self;
        format!(
            "{m}x{n}x{k} | {layout} | {regime} | {:.2} | {:.2} | {:+.2} | {:.2} | {:+.2} | \
             {:.1} | {:.1}",
            details.forward.median_us,
            fused.median_us,
            100.0 * details.fused_cost,
            peer.timing.median_us,
            100.0 * details.reduced_cost,
            details.fused_read_us,
            details.reduced_read_us,
        )
    }
}
