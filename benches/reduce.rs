//! Reductions of whole tensors beside CUB's sum.
//!
//! `benches/results/README.md` says how it is measured.

use anyhow::{Context, bail};
use clap::Parser;
use half::{bf16, f16};
use kasmina::{
    DType, Device, Element, KernelConfig, ReducerConfig, Reduction, Segments, TelemetryReducer,
    Tensor, Tier,
};
use measure::cuda::Clock;
use measure::options::{self, Sampling, one_of};
use measure::random::Normals;
use measure::record::{Peer, Provenance, append};
use measure::regime::{self, Contender, Regime};
use peer::cub::Cub;
use reductions::operands::{COLUMNS, Operands};
use reductions::record::{self, Case, Operation, Record, Timing};

mod measure;
/// Libraries to measure against, loaded at run time.
mod peer {
    pub(crate) mod cub;
    pub(crate) mod library;
}
mod reductions;

/// From this length on calls are long enough to be timed singly, up to it short enough for a graph.
const BOTH_REGIMES: usize = 1 << 24;
/// How the matrix is cut up where each part has statistics of its own.
const CHUNKS: Segments = Segments::Chunks(16);
/// Smaller elements count as dead, which a few of normal numbers are.
const EPSILON: f32 = 1e-3;

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    let Some(device) = options::device() else { return Ok(()) };
    let bench = Bench::new(device)?;
    let mut normals = Normals::new();
    let mut records = Vec::new();
    for &dtype in &options.dtypes {
        for len in options.lengths() {
            records.extend(match dtype {
                DType::F32 => bench.run::<f32>(len, &options, &mut normals)?,
                DType::F16 => bench.run::<f16>(len, &options, &mut normals)?,
                DType::BF16 => bench.run::<bf16>(len, &options, &mut normals)?,
                other => bail!("no Rust type for {other}"),
            });
        }
    }
    println!("\n{}", record::table(&records));
    Ok(())
}

/// Reductions beside CUB's sum.
#[derive(Parser)]
struct Options {
    /// Numbers of elements, 1000 or 2^20; default 2^10, 2^12, ... 2^30
    #[arg(long, value_name = "N", value_delimiter = ',', value_parser = parse_length)]
    lengths: Vec<usize>,
    #[arg(
        long = "dtype",
        value_delimiter = ',',
        default_values = ["f32", "bf16"],
        value_parser = one_of(DType::ALL, DType::name)
    )]
    dtypes: Vec<DType>,
    /// Default all
    #[arg(long = "operation", value_delimiter = ',', value_parser = one_of(Operation::ALL, Operation::name))]
    operations: Vec<Operation>,
    /// Forces a tier; default the best
    #[arg(long, value_parser = one_of(Tier::ALL, Tier::name))]
    tier: Option<Tier>,
    /// Default graph up to 2^24 elements and burst from there on
    #[arg(long, value_parser = one_of(Regime::ALL, Regime::name))]
    regime: Option<Regime>,
    #[command(flatten)]
    sampling: Sampling,
}

impl Options {
    fn lengths(&self) -> Vec<usize> {
        let default = || (10..=30).step_by(2).map(|log2| 1 << log2).collect();
        if self.lengths.is_empty() { default() } else { self.lengths.clone() }
    }

    fn operations(&self) -> &[Operation] {
        if self.operations.is_empty() { &Operation::ALL } else { &self.operations }
    }

    fn regimes(&self, len: usize) -> Vec<Regime> {
        let suits = |regime: &Regime| match regime {
            Regime::Graph => len <= BOTH_REGIMES,
            Regime::Burst => len >= BOTH_REGIMES,
            Regime::Steady => false,
        };
        self.regime.map_or_else(|| Regime::ALL.into_iter().filter(suits).collect(), |one| vec![one])
    }
}

fn parse_length(text: &str) -> anyhow::Result<usize> {
    let length = match text.strip_prefix("2^") {
        Some(exponent) => exponent.parse().ok().and_then(|exponent| 1usize.checked_shl(exponent)),
        None => text.parse().ok(),
    };
    length.filter(|&length| length > 0).with_context(|| format!("{text} is not a length like 2^20"))
}

struct Bench {
    device: Device,
    clock: Clock,
    provenance: Provenance,
    cub: Option<Cub>,
    /// One element, whose sum takes the place of a right result in memory.
    one: Tensor<f32>,
}

/// An operation of kasmina's on `T`s.
struct Ours<'a, T: Element> {
    operation: Operation,
    reducer: TelemetryReducer,
    operands: &'a Operands<T>,
}

impl<T: Element> Ours<'_, T> {
    /// Enqueues call number `call`. The result's memory is free for the next at once, because
    /// nobody reads it.
    fn enqueue(&self, call: usize) -> anyhow::Result<()> {
        let data = self.operands.data(call);
        match self.operation {
            Operation::Sum | Operation::Naive => {
                drop(self.reducer.reduce_async(data, Reduction::Sum)?);
            }
            Operation::Summary => drop(self.reducer.summary_async(data)?),
            Operation::Chunks => drop(self.reducer.segmented_async(data, CHUNKS)?),
            Operation::Columns => drop(self.reducer.segmented_async(data, Segments::Columns)?),
        }
        Ok(())
    }

    /// The error of a result.
    fn error(&self) -> anyhow::Result<f64> {
        let data = self.operands.data(0);
        match self.operation {
            Operation::Sum | Operation::Naive => {
                let sum = self.reducer.reduce(data, Reduction::Sum)?;
                self.operands.sum_error(sum.unwrap_or(f64::NAN))
            }
            Operation::Summary => self.operands.summary_error(&self.reducer.summary(data)?),
            Operation::Chunks => self.operands.parts_error(&self.reducer.segmented(data, CHUNKS)?),
            Operation::Columns => {
                self.operands.parts_error(&self.reducer.segmented(data, Segments::Columns)?)
            }
        }
    }
}

impl Bench {
    fn new(device: Device) -> anyhow::Result<Self> {
        let clock = Clock::new(&device)?;
        let cub = match Cub::open() {
            Ok(library) => Some(library),
            Err(error) => {
                println!("no peer to measure against: {error:#}");
                None
            }
        };
        let provenance = Provenance::new(&device);
        let one = Tensor::full(&device, [1], 1.0)?;
        Ok(Self { device, clock, provenance, cub, one })
    }

    fn run<T: Element>(
        &self,
        len: usize,
        options: &Options,
        normals: &mut Normals,
    ) -> anyhow::Result<Vec<Record>> {
        let l2_bytes = self.device.capability().map_or(0, |capability| capability.l2_bytes);
        let operands = Operands::<T>::new(&self.device, len, l2_bytes, EPSILON, normals)?;

        let mut ours = Vec::new();
        let mut errors = Vec::new();
        let operations = options.operations().iter().filter(|&&operation| {
            // One row is nothing to cut into columns.
            operation != Operation::Columns || (len > COLUMNS && len.is_multiple_of(COLUMNS))
        });
        for &operation in operations {
            let reducer = self.reducer(operation, options.tier)?;
            // The pool gives the same memory to the next result, which must not find it right.
            reducer.reduce(&self.one, Reduction::Sum)?;
            let one = Ours { operation, reducer, operands: &operands };
            let wrong = || format!("kasmina's {} of {len} {}", operation.name(), T::DTYPE);
            errors.push(one.error().with_context(wrong)?);
            ours.push(one);
        }
        let sum = match &self.cub {
            Some(cub) => cub.sum(&self.device, len, T::DTYPE)?.map(|sum| (&cub.name, sum)),
            None => None,
        };
        if let Some((_, sum)) = &sum {
            sum.enqueue(operands.data(0))?;
            errors.push(operands.sum_error(sum.read()?.into()).context("CUB's sum")?);
        }

        let ours_enqueued: Vec<_> =
            ours.iter().map(|one| move |call: usize| one.enqueue(call)).collect();
        let sum_enqueued = |call: usize| match &sum {
            Some((_, sum)) => sum.enqueue(operands.data(call)),
            None => Ok(()),
        };
        let mut contenders: Vec<Contender<'_>> = Vec::new();
        contenders.extend(ours_enqueued.iter().map(|one| one as Contender<'_>));
        if sum.is_some() {
            contenders.push(&sum_enqueued);
        }

        let mut records = Vec::new();
        for regime in options.regimes(len) {
            let summaries =
                regime::measure(&self.clock, regime, options.sampling.repetitions(), &contenders)?;
            for (index, one) in ours.iter().enumerate() {
                let (operation, tier) = (one.operation, one.reducer.tier());
                let case = Case { operation, len, dtype: T::DTYPE, tier, regime };
                let timing = |index: usize| Timing::new(&case, &summaries[index], errors[index]);
                let peer = sum
                    .as_ref()
                    .map(|(name, _)| Peer { name: name.to_string(), timing: timing(ours.len()) });
                let record = Record::new(&self.provenance, &case, timing(index), peer);
                if let Some(file) = &options.sampling.json {
                    append(&record, file)?;
                }
                println!("{record:?}");
                records.push(record);
            }
        }
        Ok(records)
    }

    /// A reducer whose sum is that of `operation`.
    fn reducer(
        &self,
        operation: Operation,
        tier: Option<Tier>,
    ) -> anyhow::Result<TelemetryReducer> {
        let kernel_config =
            tier.map_or_else(KernelConfig::default, |tier| KernelConfig::default().tier(tier));
        let config = ReducerConfig::default()
            .epsilon(EPSILON)
            .kernel_config(kernel_config)
            .single_stage(operation == Operation::Naive);
        Ok(TelemetryReducer::with_config(&self.device, config)?)
    }
}
