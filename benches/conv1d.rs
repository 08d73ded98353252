//! One-dimensional convolution and its gradients beside cuDNN.
//!
//! `benches/results/README.md` says how it is measured.

use std::cell::RefCell;

use anyhow::{Context, bail};
use clap::Parser;
use convolutions::operands::{Convolution, Operands, Pass, Results, SHAPES};
use convolutions::record::{self, Case, Record, Timing};
use half::{bf16, f16};
use kasmina::{DType, Device, Element, FilterLayout, KernelConfig, SequenceLayout, Tier};
use measure::cuda::Clock;
use measure::options::{self, Sampling, one_of};
use measure::random::Normals;
use measure::record::{Peer, Provenance, append};
use measure::regime::{self, Contender, Regime};
use peer::cudnn::{Cudnn, Prepared};

mod convolutions;
mod measure;
/// Libraries to measure against, loaded at run time.
mod peer {
    pub(crate) mod cudnn;
    pub(crate) mod library;
}

fn main() -> anyhow::Result<()> {
    let options = &Options::parse();
    let Some(device) = options::device() else { return Ok(()) };
    let bench = Bench::new(device)?;
    let mut normals = Normals::new();
    let mut records = Vec::new();
    let cases = options.dtypes.iter().flat_map(|&dtype| {
        let of_shape =
            move |shape| options.layouts.iter().map(move |&layout| (dtype, shape, layout));
        options.shapes().into_iter().flat_map(of_shape)
    });
    for (dtype, shape, layout) in cases {
        let some = match dtype {
            DType::F32 => bench.run::<f32>(shape, layout, options, &mut normals),
            DType::F16 => bench.run::<f16>(shape, layout, options, &mut normals),
            DType::BF16 => bench.run::<bf16>(shape, layout, options, &mut normals),
            other => bail!("no Rust type for {other}"),
        };
        records.extend(some.with_context(|| format!("{dtype} {shape:?} {}", layout.name()))?);
    }
    println!("\n{}", record::table(&records));
    Ok(())
}

/// One-dimensional convolution beside cuDNN.
#[derive(Parser)]
struct Options {
    /// Batch, input and output channels, length, taps, groups; default seven layers of 32 to 1024
    /// channels and three depthwise ones
    #[arg(
        long,
        value_name = "BxIxOxLxK[xG]",
        value_delimiter = ',',
        value_parser = Convolution::parse
    )]
    shapes: Vec<Convolution>,
    #[arg(
        long = "dtype",
        value_delimiter = ',',
        default_value = "bf16",
        value_parser = one_of(DType::ALL, DType::name)
    )]
    dtypes: Vec<DType>,
    #[arg(
        long = "layout",
        value_delimiter = ',',
        default_values = ["ncl", "nlc"],
        value_parser = one_of(SequenceLayout::ALL, SequenceLayout::name)
    )]
    layouts: Vec<SequenceLayout>,
    /// Layout of the filter
    #[arg(
        long = "filter",
        default_value = "oik",
        value_parser = one_of(FilterLayout::ALL, FilterLayout::name)
    )]
    filter_layout: FilterLayout,
    #[arg(
        long = "pass",
        value_delimiter = ',',
        default_values = ["forward", "dgrad", "wgrad"],
        value_parser = one_of(Pass::ALL, Pass::name)
    )]
    passes: Vec<Pass>,
    /// Forces a tier; default the best
    #[arg(long, value_parser = one_of(Tier::ALL, Tier::name))]
    tier: Option<Tier>,
    /// Takes the kernel without any reuse
    #[arg(long)]
    untiled: bool,
    #[arg(long, default_value = "burst", value_parser = one_of(Regime::ALL, Regime::name))]
    regime: Regime,
    #[command(flatten)]
    sampling: Sampling,
}

impl Options {
    fn shapes(&self) -> Vec<Convolution> {
        if self.shapes.is_empty() {
            SHAPES.map(Convolution::of).to_vec()
        } else {
            self.shapes.clone()
        }
    }

    fn config(&self) -> KernelConfig {
        let config = KernelConfig::default().enable_tiling(!self.untiled);
        match self.tier {
            Some(tier) => config.tier(tier),
            None => config,
        }
    }
}

struct Bench {
    device: Device,
    clock: Clock,
    provenance: Provenance,
    cudnn: Option<Cudnn>,
}

impl Bench {
    fn new(device: Device) -> anyhow::Result<Self> {
        let clock = Clock::new(&device)?;
        let cudnn = match Cudnn::open(&device) {
            Ok(library) => Some(library),
            Err(error) => {
                println!("no peer to measure against: {error:#}");
                None
            }
        };
        let provenance = Provenance::new(&device);
        Ok(Self { device, clock, provenance, cudnn })
    }

    fn run<T: Element>(
        &self,
        convolution: Convolution,
        layout: SequenceLayout,
        options: &Options,
        normals: &mut Normals,
    ) -> anyhow::Result<Vec<Record>> {
        let (filter_layout, config) = (options.filter_layout, options.config());
        let layouts = (layout, filter_layout);
        let operands = Operands::<T>::new(&self.device, convolution, layouts, normals)?;
        let mut records = Vec::new();
        for &pass in &options.passes {
            let mut results = operands.results(&self.device, pass)?;
            let tier = operands.enqueue(pass, &mut results, &config)?;
            let ours = results.sample(pass)?;

            let peer_results = operands.results(&self.device, pass)?;
            let prepared = match &self.cudnn {
                Some(cudnn) => match first_call(cudnn, pass, &operands, &peer_results) {
                    Ok(prepared) => Some((cudnn, prepared)),
                    Err(error) => {
                        println!("no peer for {convolution:?}: {error:#}");
                        None
                    }
                },
                None => None,
            };
            // The peer's filter lies otherwise where channels are last, and it pads an even number of
            // taps otherwise, so the two then compute different convolutions of the same size.
            let comparable = prepared.is_some()
                && layout == SequenceLayout::Ncl
                && filter_layout == FilterLayout::OutInTap
                && convolution.taps % 2 == 1;
            let difference =
                if comparable { Some(distance(&ours, &peer_results.sample(pass)?)) } else { None };

            let results = RefCell::new(results);
            let enqueue_ours =
                |_: usize| operands.enqueue(pass, &mut results.borrow_mut(), &config).map(drop);
            let enqueue_peer = |_: usize| match &prepared {
                Some((_, prepared)) => prepared.enqueue(),
                None => Ok(()),
            };
            let mut contenders: Vec<Contender<'_>> = vec![&enqueue_ours];
            if prepared.is_some() {
                contenders.push(&enqueue_peer);
            }
            // Untimed, so that neither side's first samples hold what a first call sets up.
            contenders.iter().try_for_each(|contender| contender(0))?;
            let regime = options.regime;
            let summaries =
                regime::measure(&self.clock, regime, options.sampling.repetitions(), &contenders)?;
            let tiled = !options.untiled;
            let dtype = T::DTYPE;
            let case =
                Case { convolution, pass, dtype, layout, filter_layout, tier, tiled, regime };
            let peer = prepared.as_ref().map(|(cudnn, prepared)| Peer {
                name: format!("{}, {}", cudnn.name, prepared.algorithm()),
                timing: Timing::new(&case, &summaries[1]),
            });
            let timing = Timing::new(&case, &summaries[0]);
            let record = Record::new(&self.provenance, &case, timing, peer, difference);
            if let Some(file) = &options.sampling.json {
                append(&record, file)?;
            }
            println!("{record:?}");
            records.push(record);
        }
        Ok(records)
    }
}

/// Prepares a pass of cuDNN's and runs it once: it refuses some shapes only then.
fn first_call<'a, T: Element>(
    cudnn: &'a Cudnn,
    pass: Pass,
    operands: &Operands<T>,
    results: &Results<T>,
) -> anyhow::Result<Prepared<'a>> {
    let mut prepared = cudnn.prepare(pass, operands, results)?;
    if prepared.enqueue().is_err() {
        // The less it computes, the harder it is to be faster.
        prepared.drop_bias();
        prepared.enqueue()?;
    }
    Ok(prepared)
}

/// ‖a − b‖ / ‖b‖
fn distance(a: &[f32], b: &[f32]) -> f64 {
    let square = |value: f64| value * value;
    let pairs = || a.iter().zip(b).map(|(a, b)| (f64::from(*a), f64::from(*b)));
    let error: f64 = pairs().map(|(a, b)| square(a - b)).sum();
    (error / pairs().map(|(_, b)| square(b)).sum::<f64>()).sqrt()
}
