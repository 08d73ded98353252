//! One-dimensional convolution and its gradients beside cuDNN.
//!
//! `benches/results/README.md` says how it is measured.

use std::cell::RefCell;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, bail};
use convolutions::operands::{Convolution, Operands, Pass, Results, SHAPES};
use convolutions::record::{self, Case, Record, Timing};
use half::{bf16, f16};
use kasmina::{DType, Device, Element, FilterLayout, KernelConfig, SequenceLayout, Tier};
use measure::cuda::Clock;
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

const USAGE: &str = "usage: conv1d [option VALUE]...

  --shapes BxIxOxLxK[xG],...
                         batch, input and output channels, length, taps, groups; default seven
                         layers of 32 to 1024 channels and three depthwise ones
  --dtype bf16|f16|f32   element type; default bf16
  --layout ncl|nlc       default both
  --filter oik|koi       layout of the filter; default oik
  --pass forward|dgrad|wgrad
                         default all
  --tier hopper|portable forces a tier; default the best
  --tiling on|off        off is the kernel without any reuse; default on
  --regime burst|steady|graph
                         default burst
  --samples N            samples in burst and graph; default 60
  --json FILE            appends the results as JSON lines";

fn main() -> anyhow::Result<ExitCode> {
    let Some(options) = Options::parse(std::env::args().skip(1))? else {
        println!("{USAGE}");
        return Ok(ExitCode::SUCCESS);
    };
    // A stream of its own can be captured into a graph.
    let device = match Device::cuda(0).and_then(|device| device.on_new_stream()) {
        Ok(device) => device,
        Err(error) => {
            println!("nothing to measure: {error}");
            return Ok(ExitCode::SUCCESS);
        }
    };
    let bench = Bench::new(device)?;
    let mut normals = Normals::new();
    let mut records = Vec::new();
    for &shape in &options.shapes {
        for &layout in &options.layouts {
            let some = match options.dtype {
                DType::F32 => bench.run::<f32>(shape, layout, &options, &mut normals),
                DType::F16 => bench.run::<f16>(shape, layout, &options, &mut normals),
                DType::BF16 => bench.run::<bf16>(shape, layout, &options, &mut normals),
                other => bail!("no Rust type for {other}"),
            };
            records.extend(some.with_context(|| format!("{shape:?} {}", layout.name()))?);
        }
    }
    println!("\n{}", record::table(&records));
    Ok(ExitCode::SUCCESS)
}

struct Options {
    shapes: Vec<Convolution>,
    dtype: DType,
    layouts: Vec<SequenceLayout>,
    filter_layout: FilterLayout,
    passes: Vec<Pass>,
    config: KernelConfig,
    regime: Regime,
    samples: usize,
    json: Option<PathBuf>,
}

impl Options {
    /// `None` if help is asked for.
    fn parse(mut arguments: impl Iterator<Item = String>) -> anyhow::Result<Option<Self>> {
        let mut options = Self {
            shapes: SHAPES.map(Convolution::of).to_vec(),
            dtype: DType::BF16,
            layouts: SequenceLayout::ALL.to_vec(),
            filter_layout: FilterLayout::OutInTap,
            passes: Pass::ALL.to_vec(),
            config: KernelConfig::default(),
            regime: Regime::Burst,
            samples: 60,
            json: None,
        };
        while let Some(option) = arguments.next() {
            match option.as_str() {
                "--help" | "-h" => return Ok(None),
                // cargo bench passes it.
                "--bench" => continue,
                _ => {}
            }
            let value = arguments.next().with_context(|| format!("{option} needs a value"))?;
            let unknown = || format!("{option} {value} is not known\n{USAGE}");
            match option.as_str() {
                "--shapes" => {
                    options.shapes =
                        value.split(',').map(Convolution::parse).collect::<Result<_, _>>()?;
                }
                "--dtype" => {
                    let named = DType::ALL.into_iter().find(|dtype| dtype.name() == value);
                    options.dtype = named.with_context(unknown)?;
                }
                "--layout" => {
                    options.layouts.retain(|layout| layout.name() == value);
                    options.layouts.first().with_context(unknown)?;
                }
                "--filter" => {
                    let named = FilterLayout::ALL.into_iter().find(|layout| layout.name() == value);
                    options.filter_layout = named.with_context(unknown)?;
                }
                "--pass" => {
                    options.passes.retain(|pass| pass.name() == value);
                    options.passes.first().with_context(unknown)?;
                }
                "--tier" => {
                    let tier = Tier::from_name(&value).with_context(unknown)?;
                    options.config = options.config.tier(tier);
                }
                "--tiling" => {
                    let enable = match value.as_str() {
                        "on" => true,
                        "off" => false,
                        _ => bail!("{}", unknown()),
                    };
                    options.config = options.config.enable_tiling(enable);
                }
                "--regime" => {
                    let named = Regime::ALL.into_iter().find(|regime| regime.name() == value);
                    options.regime = named.with_context(unknown)?;
                }
                "--samples" => {
                    options.samples =
                        value.parse().ok().filter(|&n| n > 0).with_context(unknown)?;
                }
                "--json" => options.json = Some(value.into()),
                _ => bail!("{}", unknown()),
            }
        }
        Ok(Some(options))
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
        let filter_layout = options.filter_layout;
        let layouts = (layout, filter_layout);
        let operands = Operands::<T>::new(&self.device, convolution, layouts, normals)?;
        let mut records = Vec::new();
        for &pass in &options.passes {
            let mut results = operands.results(&self.device, pass)?;
            let tier = operands.enqueue(pass, &mut results, &options.config)?;
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
            let enqueue_ours = |_: usize| {
                operands.enqueue(pass, &mut results.borrow_mut(), &options.config).map(drop)
            };
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
            let summaries = regime::measure(&self.clock, regime, options.samples, &contenders)?;
            let tiled = options.config.tiling_enabled();
            let dtype = T::DTYPE;
            let case =
                Case { convolution, pass, dtype, layout, filter_layout, tier, tiled, regime };
            let peer = prepared.as_ref().map(|(cudnn, prepared)| Peer {
                name: format!("{}, {}", cudnn.name, prepared.algorithm()),
                timing: Timing::new(&case, &summaries[1]),
            });
            let timing = Timing::new(&case, &summaries[0]);
            let record = Record::new(&self.provenance, &case, timing, peer, difference);
            if let Some(file) = &options.json {
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
