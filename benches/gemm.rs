//! The linear layer's forward pass and gradients beside cuBLASLt with the same fused epilogue.
//!
//! `benches/results/README.md` says how it is measured.

use anyhow::{Context, bail};
use clap::{Args, Parser};
use half::{bf16, f16};
use kasmina::{
    Activation, DType, Device, Element, F32Products, KernelConfig, Tensor, Tier, WeightLayout,
    Without,
};
use measure::cuda::Clock;
use measure::options::{self, Sampling, one_of};
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

/// The regimes of calls that are timed singly.
const SINGLY: &[Regime] = &[Regime::Burst, Regime::Steady];
/// The default table: shapes whose calls are long enough to be timed singly, and those for graphs.
const LARGE: [[usize; 3]; 7] = [
    [8192, 8192, 8192],
    [4096, 4096, 4096],
    [16384, 4096, 4096],
    [4096, 14336, 4096],
    [4096, 4096, 14336],
    [4093, 4104, 4096],
    [2048, 2048, 2048],
];
const SMALL: [[usize; 3]; 6] = [
    [1024, 1024, 1024],
    [512, 512, 512],
    [1000, 1000, 1000],
    [128, 4096, 4096],
    [32, 4096, 4096],
    [8192, 1024, 256],
];

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    let Some(device) = options::device() else { return Ok(()) };
    let bench = Bench::new(device, options.peer_tf32)?;
    let mut normals = Normals::new();
    let mut records = Vec::new();
    for case in options.cases() {
        if let Operation::Gradient(operation) = case.operation {
            let problem = case.problem;
            let (bench, settings) = (bench.gradients(), options.settings(&case));
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
    Ok(())
}

/// The linear layer beside cuBLASLt.
#[derive(Parser)]
struct Options {
    /// Shapes to measure instead of the default table, which has large ones in burst and steady and
    /// small ones in graph
    #[arg(long, value_name = "MxNxK", value_delimiter = ',', value_parser = options::extents::<3>)]
    shapes: Vec<[usize; 3]>,
    /// What to compute; dw is dW and db
    #[arg(
        long = "operation",
        value_delimiter = ',',
        default_value = "forward",
        value_parser = one_of(Operation::ALL, Operation::name)
    )]
    operations: Vec<Operation>,
    /// Default bf16 and f16, and of the default table 4096x4096x4096 in f32
    #[arg(long = "dtype", value_delimiter = ',', value_parser = one_of(DType::ALL, DType::name))]
    dtypes: Vec<DType>,
    /// How W lies
    #[arg(
        long = "layout",
        value_delimiter = ',',
        default_values = ["in-out", "out-in"],
        value_parser = one_of(WeightLayout::ALL, options::layout_name)
    )]
    layouts: Vec<WeightLayout>,
    #[arg(long, default_value = "relu", value_parser = one_of(Activation::ALL, Activation::name))]
    activation: Activation,
    /// Forces a tier; default the best
    #[arg(long, value_parser = one_of(Tier::ALL, Tier::name))]
    tier: Option<Tier>,
    #[command(flatten)]
    forced: Forced,
    /// Products that make up one of f32 on hopper
    #[arg(long, default_value = "six", value_parser = one_of(options::PRODUCTS, options::products_name))]
    products: F32Products,
    /// Lets cuBLASLt round f32 to TF32
    #[arg(long)]
    peer_tf32: bool,
    /// Default that of the table; of other shapes graph for calls under 20 us, else burst and steady
    #[arg(long, value_parser = one_of(Regime::ALL, Regime::name))]
    regime: Option<Regime>,
    #[command(flatten)]
    sampling: Sampling,
}

/// What of hopper's kernels is forced.
#[derive(Args)]
struct Forced {
    /// Forces the output tile of hopper
    #[arg(long, value_name = "MxN", value_parser = options::extents::<2>)]
    tile: Option<[usize; 2]>,
    /// Forces how many blocks of hopper share a tile
    #[arg(long, value_name = "N")]
    split_k: Option<u32>,
    /// Forces into how many blocks of hopper W is loaded
    #[arg(long, value_name = "N")]
    multicast: Option<u32>,
    /// Forces whether consumers of hopper have a tile each
    #[arg(long, value_parser = options::yes_or_no())]
    ping_pong: Option<bool>,
    /// Forces whether f32 is split into parts on its way or before
    #[arg(long, value_parser = options::yes_or_no())]
    direct: Option<bool>,
    /// Takes a hopper kernel without that part
    #[arg(long, value_parser = one_of(WITHOUT, without_name))]
    without: Option<Without>,
}

#[derive(Clone, Copy)]
enum Operation {
    Forward,
    Gradient(gradients::Operation),
}

impl Operation {
    const ALL: [Self; 3] = [
        Self::Forward,
        Self::Gradient(gradients::Operation::Input),
        Self::Gradient(gradients::Operation::Weight),
    ];

    const fn name(self) -> &'static str {
        match self {
            Self::Forward => "forward",
            Self::Gradient(gradient) => gradient.name(),
        }
    }
}

/// A problem, and how it is measured.
struct Case {
    operation: Operation,
    problem: Problem,
    /// Forced.
    tier: Option<Tier>,
    /// `None` is all that suit the problem.
    regimes: Option<&'static [Regime]>,
}

impl Forced {
    fn config(&self) -> anyhow::Result<KernelConfig> {
        let mut config = KernelConfig::default();
        if let Some([rows, columns]) = self.tile {
            config = config.hopper_tile([rows.try_into()?, columns.try_into()?]);
        }
        config = force(config, self.split_k, KernelConfig::hopper_split_k);
        config = force(config, self.multicast, KernelConfig::hopper_multicast);
        config = force(config, self.ping_pong, KernelConfig::hopper_ping_pong);
        config = force(config, self.direct, KernelConfig::hopper_direct);
        Ok(force(config, self.without, KernelConfig::hopper_without))
    }

    /// The options that force something, for the records; `None` where none does.
    fn variant(&self) -> Option<String> {
        let yes_or_no = |yes| if yes { "yes" } else { "no" };
        let options = [
            self.tile.map(|[rows, columns]| format!("tile {rows}x{columns}")),
            self.split_k.map(|blocks| format!("split-k {blocks}")),
            self.multicast.map(|blocks| format!("multicast {blocks}")),
            self.ping_pong.map(|turns| format!("ping-pong {}", yes_or_no(turns))),
            self.direct.map(|direct| format!("direct {}", yes_or_no(direct))),
            self.without.map(|part| format!("without {}", without_name(part))),
        ];
        let given: Vec<String> = options.into_iter().flatten().collect();
        (!given.is_empty()).then(|| given.join(", "))
    }
}

fn force<T>(
    config: KernelConfig,
    value: Option<T>,
    setter: impl FnOnce(KernelConfig, T) -> KernelConfig,
) -> KernelConfig {
    match value {
        Some(value) => setter(config, value),
        None => config,
    }
}

impl Options {
    fn settings(&self, case: &Case) -> gradients::Settings<'_> {
        gradients::Settings {
            tier: case.tier,
            regimes: self.regimes(case),
            repetitions: self.sampling.repetitions(),
            json: self.sampling.json.as_deref(),
        }
    }

    fn regimes(&self, case: &Case) -> Option<&[Regime]> {
        self.regime.as_ref().map(std::slice::from_ref).or(case.regimes)
    }

    /// The shapes asked for, or the default table.
    fn cases(&self) -> Vec<Case> {
        let default = [DType::BF16, DType::F16];
        let dtypes = if self.dtypes.is_empty() { &default } else { self.dtypes.as_slice() };
        let all = |shapes: &[[usize; 3]], regimes| {
            let tables = dtypes.iter().map(|&dtype| self.table(shapes, dtype, self.tier, regimes));
            tables.flatten().collect::<Vec<_>>()
        };
        if !self.shapes.is_empty() {
            return all(&self.shapes, None);
        }
        let mut cases = all(&LARGE, Some(SINGLY));
        cases.extend(all(&SMALL, Some(&[Regime::Graph])));
        if self.dtypes.is_empty() {
            let tiers = match self.tier {
                Some(forced) => vec![Some(forced)],
                None => vec![None, Some(Tier::Portable)],
            };
            for tier in tiers {
                cases.extend(self.table(&[[4096; 3]], DType::F32, tier, Some(SINGLY)));
            }
        }
        cases
    }

    fn table(
        &self,
        shapes: &[[usize; 3]],
        dtype: DType,
        tier: Option<Tier>,
        regimes: Option<&'static [Regime]>,
    ) -> Vec<Case> {
        let activation = self.activation;
        let mut cases = Vec::new();
        for &operation in &self.operations {
            for &[m, n, k] in shapes {
                for &layout in &self.layouts {
                    let problem = Problem { m, n, k, dtype, layout, activation };
                    cases.push(Case { operation, problem, tier, regimes });
                }
            }
        }
        cases
    }
}

const WITHOUT: [Without; 3] =
    [Without::TmaLoads, Without::WarpSpecialization, Without::PersistentBlocks];

const fn without_name(part: Without) -> &'static str {
    match part {
        Without::TmaLoads => "tma",
        Without::WarpSpecialization => "specialisation",
        Without::PersistentBlocks => "persistence",
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
        let config = options.forced.config()?.f32_products(options.products);
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
        let regimes = match options.regimes(case) {
            Some(regimes) => regimes,
            None => regime::suited(&self.clock, &ours)?,
        };
        let mut records = Vec::new();
        let repetitions = options.sampling.repetitions();
        for &regime in regimes {
            let summaries = regime::measure(&self.clock, regime, repetitions, &contenders)?;
            let timing = Timing::new(problem, regime, &summaries[0], error);
            let peer = product.as_ref().map(|(name, _)| Peer {
                name: name.clone(),
                timing: Timing::new(problem, regime, &summaries[1], peer_error),
            });
            let mut record = Record::new(&self.provenance, problem, tier, regime, timing, peer);
            record.products = options::products_of(problem.dtype, tier, options.products);
            record.variant = options.forced.variant();
            if let Some(file) = &options.sampling.json {
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
