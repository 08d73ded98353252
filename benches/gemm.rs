//! The linear layer's forward pass and gradients beside cuBLASLt with the same fused epilogue.
//!
//! `benches/results/README.md` says how it is measured.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, bail};
use half::{bf16, f16};
use kasmina::{
    Activation, DType, Device, Element, F32Products, KernelConfig, Tensor, Tier, WeightLayout,
    Without,
};
use measure::cuda::Clock;
use measure::random::Normals;
use measure::record::{Peer, Provenance, append};
use measure::regime::{self, Contender, Regime};
use peer::cublaslt::{self, CublasLt, Product};
use products::gradients;
use products::operands::{Operands, Problem};
use products::record::{self, Record, Timing};

mod measure;
/// Libraries to measure against, loaded at run time.
mod peer {
    pub(crate) mod cublaslt;
    pub(crate) mod library;
}
mod products;

const USAGE: &str = "usage: gemm [option VALUE]...

  --shapes MxNxK,...     shapes to measure instead of the default table
  --operation forward|dx|dw
                         default forward; dw is dW and db
  --dtype bf16|f16|f32   element type; default bf16
  --layout in-out|out-in how W lies; default both
  --activation none|relu|gelu|gelutanh|silu
                         default relu
  --tier hopper|portable forces a tier; default the best
  --tile MxN             forces the output tile of hopper
  --split-k N            forces how many blocks of hopper share a tile
  --multicast N          forces into how many blocks of hopper W is loaded
  --ping-pong yes|no     forces whether consumers of hopper have a tile each
  --direct yes|no        forces whether f32 is split into parts on its way or before
  --without tma|specialisation|persistence
                         takes a hopper kernel without that part
  --products six|three|tf32
                         products that make up those of f32 on hopper; default six
  --peer-tf32 yes|no     lets cuBLASLt round f32 to TF32; default no
  --regime burst|steady|graph|all
                         all, the default, is graph for calls under 20 us, else burst and steady
  --samples N            samples in burst and graph; default 60
  --json FILE            appends the results as JSON lines";

/// Calls shorter than this, in microseconds, are timed in a graph.
const GRAPH_BELOW: f64 = 20.0;

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
    let bench = Bench::new(device, options.peer_tf32)?;
    let mut normals = Normals::new();
    let mut records = Vec::new();
    for case in options.cases() {
        if let Some(operation) = options.gradient {
            let problem = case.problem;
            let (bench, settings) = (bench.gradients(), options.settings(case.tier));
            match problem.dtype {
                DType::F32 => bench.run::<f32>(operation, problem, &settings, &mut normals)?,
                DType::F16 => bench.run::<f16>(operation, problem, &settings, &mut normals)?,
                DType::BF16 => bench.run::<bf16>(operation, problem, &settings, &mut normals)?,
                other => bail!("no Rust type for {other}"),
            }
            continue;
        }
        records.extend(match case.problem.dtype {
            DType::F32 => bench.run::<f32>(&case, &options, &mut normals)?,
            DType::F16 => bench.run::<f16>(&case, &options, &mut normals)?,
            DType::BF16 => bench.run::<bf16>(&case, &options, &mut normals)?,
            other => bail!("no Rust type for {other}"),
        });
    }
    if !records.is_empty() {
        println!("\n{}", record::table(&records));
    }
    Ok(ExitCode::SUCCESS)
}

struct Options {
    /// `None` is the forward pass.
    gradient: Option<gradients::Operation>,
    shapes: Vec<[usize; 3]>,
    dtype: DType,
    layouts: Vec<WeightLayout>,
    activation: Activation,
    tier: Option<Tier>,
    /// What of the kernel is forced.
    kernel: KernelConfig,
    /// The options that force it, for the records.
    variant: Vec<String>,
    products: F32Products,
    peer_tf32: bool,
    /// `None` is all that suit the problem.
    regime: Option<Regime>,
    samples: usize,
    json: Option<PathBuf>,
}

/// A problem and the tier forced on it.
struct Case {
    problem: Problem,
    tier: Option<Tier>,
}

impl Options {
    /// `None` if help is asked for.
    fn parse(mut arguments: impl Iterator<Item = String>) -> anyhow::Result<Option<Self>> {
        let mut options = Self {
            gradient: None,
            shapes: Vec::new(),
            dtype: DType::BF16,
            layouts: WeightLayout::ALL.to_vec(),
            activation: Activation::Relu,
            tier: None,
            kernel: KernelConfig::default(),
            variant: Vec::new(),
            products: F32Products::Six,
            peer_tf32: false,
            regime: None,
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
                    options.shapes = value.split(',').map(parse_shape).collect::<Result<_, _>>()?;
                }
                "--operation" if value == "forward" => options.gradient = None,
                "--operation" => {
                    let named = gradients::Operation::ALL
                        .into_iter()
                        .find(|operation| operation.name() == value);
                    options.gradient = Some(named.with_context(unknown)?);
                }
                "--dtype" => {
                    let named = DType::ALL.into_iter().find(|dtype| dtype.name() == value);
                    options.dtype = named.with_context(unknown)?;
                }
                "--layout" => {
                    options.layouts.retain(|&layout| record::layout_name(layout) == value);
                    options.layouts.first().with_context(unknown)?;
                }
                "--activation" => {
                    let named = Activation::ALL
                        .into_iter()
                        .find(|activation| format!("{activation:?}").to_lowercase() == value);
                    options.activation = named.with_context(unknown)?;
                }
                "--tier" => options.tier = Some(Tier::from_name(&value).with_context(unknown)?),
                "--products" => {
                    let named = [F32Products::Six, F32Products::Three, F32Products::Tf32]
                        .into_iter()
                        .find(|&products| products_name(products) == value);
                    options.products = named.with_context(unknown)?;
                }
                "--peer-tf32" => {
                    options.peer_tf32 = yes_or_no(&value).with_context(unknown)?;
                }
                "--regime" if value == "all" => options.regime = None,
                "--regime" => {
                    let named = Regime::ALL.into_iter().find(|regime| regime.name() == value);
                    options.regime = Some(named.with_context(unknown)?);
                }
                "--samples" => {
                    options.samples =
                        value.parse().ok().filter(|&n| n > 0).with_context(unknown)?;
                }
                "--tile" => {
                    let tile = parse_tile(&value).with_context(unknown)?;
                    options.force(&option, &value, |kernel| kernel.hopper_tile(tile));
                }
                "--split-k" => {
                    let blocks = value.parse().with_context(unknown)?;
                    options.force(&option, &value, |kernel| kernel.hopper_split_k(blocks));
                }
                "--multicast" => {
                    let blocks = value.parse().with_context(unknown)?;
                    options.force(&option, &value, |kernel| kernel.hopper_multicast(blocks));
                }
                "--ping-pong" => {
                    let turns = yes_or_no(&value).with_context(unknown)?;
                    options.force(&option, &value, |kernel| kernel.hopper_ping_pong(turns));
                }
                "--direct" => {
                    let direct = yes_or_no(&value).with_context(unknown)?;
                    options.force(&option, &value, |kernel| kernel.hopper_direct(direct));
                }
                "--without" => {
                    let part = match value.as_str() {
                        "tma" => Without::TmaLoads,
                        "specialisation" => Without::WarpSpecialization,
                        "persistence" => Without::PersistentBlocks,
                        _ => bail!("{}", unknown()),
                    };
                    options.force(&option, &value, |kernel| kernel.hopper_without(part));
                }
                "--json" => options.json = Some(value.into()),
                _ => bail!("{}", unknown()),
            }
        }
        Ok(Some(options))
    }

    fn force(
        &mut self,
        option: &str,
        value: &str,
        kernel: impl FnOnce(KernelConfig) -> KernelConfig,
    ) {
        self.kernel = kernel(std::mem::take(&mut self.kernel));
        self.variant.push(format!("{} {value}", option.trim_start_matches('-')));
    }

    fn settings(&self, tier: Option<Tier>) -> gradients::Settings<'_> {
        gradients::Settings {
            tier,
            regime: self.regime,
            samples: self.samples,
            graph_below: GRAPH_BELOW,
            json: self.json.as_deref(),
        }
    }

    /// The shapes asked for, or the default table.
    fn cases(&self) -> Vec<Case> {
        if !self.shapes.is_empty() {
            return self.table(&self.shapes, self.dtype, self.tier);
        }
        let mut cases = self.table(&[[8192; 3], [4096; 3]], DType::BF16, None);
        cases.extend(self.table(&[[4096; 3]], DType::F32, Some(Tier::Portable)));
        cases.extend(self.table(&[[4096; 3]], DType::F32, None));
        cases
    }

    fn table(&self, shapes: &[[usize; 3]], dtype: DType, tier: Option<Tier>) -> Vec<Case> {
        let activation = self.activation;
        let case = |&[m, n, k]: &[usize; 3], &layout: &WeightLayout| Case {
            problem: Problem { m, n, k, dtype, layout, activation },
            tier,
        };
        let layouts = &self.layouts;
        shapes
            .iter()
            .flat_map(|shape| layouts.iter().map(move |layout| case(shape, layout)))
            .collect()
    }
}

const fn products_name(products: F32Products) -> &'static str {
    match products {
        F32Products::Six => "six",
        F32Products::Three => "three",
        F32Products::Tf32 => "tf32",
    }
}

fn yes_or_no(value: &str) -> Option<bool> {
    match value {
        "yes" => Some(true),
        "no" => Some(false),
        _ => None,
    }
}

fn parse_tile(text: &str) -> Option<[u32; 2]> {
    let (rows, columns) = text.split_once('x')?;
    Some([rows.parse().ok()?, columns.parse().ok()?])
}

fn parse_shape(text: &str) -> anyhow::Result<[usize; 3]> {
    let extents: Vec<usize> = text.split('x').filter_map(|extent| extent.parse().ok()).collect();
    match extents[..] {
        [m, n, k] if m > 0 && n > 0 && k > 0 => Ok([m, n, k]),
        _ => bail!("{text} is not a shape like 4096x4096x4096"),
    }
}

struct Bench {
    device: Device,
    clock: Clock,
    provenance: Provenance,
    cublaslt: Option<CublasLt>,
    workspace: Tensor<f32>,
}

impl Bench {
    fn new(device: Device, peer_tf32: bool) -> anyhow::Result<Self> {
        let clock = Clock::new(&device)?;
        let cublaslt = match CublasLt::open() {
            Ok(library) => Some(if peer_tf32 { library.with_tf32() } else { library }),
            Err(error) => {
                println!("no peer to measure against: {error:#}");
                None
            }
        };
        let workspace = Tensor::zeros(&device, [Product::WORKSPACE_BYTES / size_of::<f32>()])?;
        let provenance = Provenance::new(&device);
        Ok(Self { device, clock, provenance, cublaslt, workspace })
    }

    fn gradients(&self) -> gradients::Bench<'_> {
        gradients::Bench {
            device: &self.device,
            clock: &self.clock,
            provenance: &self.provenance,
            cublaslt: self.cublaslt.as_ref(),
            workspace: &self.workspace,
        }
    }

    fn run<T: Element>(
        &self,
        case: &Case,
        options: &Options,
        normals: &mut Normals,
    ) -> anyhow::Result<Vec<Record>> {
        let problem = &case.problem;
        let config = options.kernel.clone().f32_products(options.products);
        let config = case.tier.map_or_else(|| config.clone(), |tier| config.clone().tier(tier));
        let l2_bytes = self.device.capability().map_or(0, |capability| capability.l2_bytes);
        let operands = Operands::<T>::new(&self.device, *problem, l2_bytes, normals)?;

        operands.poison()?;
        let tier = operands.forward(0, &config)?;
        let error = if options.products == F32Products::Tf32 {
            operands.largest_error()?
        } else {
            operands.max_error().context("kasmina's result is wrong")?
        };
        let ours = |call: usize| operands.forward(call, &config).map(|_| ());

        let product = self.product(problem, &operands)?;
        let theirs = |call: usize| match &product {
            Some((_, product)) => enqueue(product, &operands, call),
            None => Ok(()),
        };
        let mut peer_error = 0.0;
        if product.is_some() {
            operands.poison()?;
            theirs(0)?;
            peer_error = if options.peer_tf32 {
                operands.largest_error()?
            } else {
                operands.max_error().context("cuBLASLt's result is wrong")?
            };
        }

        let mut contenders: Vec<Contender<'_>> = vec![&ours];
        if product.is_some() {
            contenders.push(&theirs);
        }
        let regimes = match options.regime {
            Some(regime) => vec![regime],
            None if regime::estimate(&self.clock, &ours)? < GRAPH_BELOW => {
                vec![Regime::Graph]
            }
            None => vec![Regime::Burst, Regime::Steady],
        };
        let mut records = Vec::new();
        for regime in regimes {
            let summaries = regime::measure(&self.clock, regime, options.samples, &contenders)?;
            let timing = Timing::new(problem, regime, &summaries[0], error);
            let peer = product.as_ref().map(|(name, _)| Peer {
                name: name.clone(),
                timing: Timing::new(problem, regime, &summaries[1], peer_error),
            });
            let mut record = Record::new(&self.provenance, problem, tier, regime, timing, peer);
            if (problem.dtype, tier) == (DType::F32, Tier::Hopper) {
                record.products = Some(products_name(options.products));
            }
            record.variant = (!options.variant.is_empty()).then(|| options.variant.join(", "));
            if let Some(file) = &options.json {
                append(&record, file)?;
            }
            println!("{record:?}");
            records.push(record);
        }
        Ok(records)
    }

    /// cuBLASLt's name and its fastest way to compute `problem`, where it can.
    fn product<T: Element>(
        &self,
        problem: &Problem,
        operands: &Operands<T>,
    ) -> anyhow::Result<Option<(String, Product<'_>)>> {
        let Some(library) = self.cublaslt.as_ref().filter(|_| Product::fuses(problem.activation))
        else {
            return Ok(None);
        };
        let stream = self.device.stream().as_raw();
        // SAFETY: `self` keeps workspace and stream alive, and `operands`, which the caller keeps
        // longer than the result, the bias. Only calls on this one stream use the workspace.
        let mut product = unsafe {
            Product::forward(
                library,
                problem,
                operands.bias_address(),
                self.workspace.as_device_ptr(),
                stream as *mut _,
            )?
        };
        product.tune(|product| {
            regime::estimate(&self.clock, &|call| enqueue(product, operands, call))
        })?;
        Ok(Some((library.name.clone(), product)))
    }
}

/// Enqueues cuBLASLt's call number `call`.
fn enqueue<T: Element>(
    product: &Product<'_>,
    operands: &Operands<T>,
    call: usize,
) -> anyhow::Result<()> {
    let [x, w, y] = operands.addresses(call);
    // SAFETY: the operands have the shapes and the type of the problem that `product` was made
    // for, lie on the device of its stream, and every measurement synchronises that stream before
    // they are dropped.
    unsafe { product.enqueue(cublaslt::Operands { x, w, y }) }
}
