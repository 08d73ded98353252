//! Reductions of whole tensors beside CUB's sum.
//!
//! `benches/results/README.md` says how it is measured.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, bail};
use half::{bf16, f16};
use kasmina::{
    DType, Device, Element, KernelConfig, ReducerConfig, Reduction, Segments, TelemetryReducer,
    Tensor, Tier,
};
use measure::cuda::Clock;
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

const USAGE: &str = "usage: reduce [option VALUE]...

  --lengths N,...        numbers of elements, 1000 or 2^20; default 2^10, 2^12, ... 2^30
  --dtype bf16|f16|f32   element type; default f32 and bf16
  --operation sum|summary|chunks|columns|naive
                         default all
  --tier hopper|portable forces a tier; default the best
  --regime burst|steady|graph|all
                         all, the default, is graph up to 2^24 elements and burst from there on
  --samples N            samples in burst and graph; default 60
  --json FILE            appends the results as JSON lines";

/// From this length on calls are long enough to be timed singly, up to it short enough for a graph.
const BOTH_REGIMES: usize = 1 << 24;
/// How the matrix is cut up where each part has statistics of its own.
const CHUNKS: Segments = Segments::Chunks(16);
/// Smaller elements count as dead, which a few of normal numbers are.
const EPSILON: f32 = 1e-3;

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
    for &dtype in &options.dtypes {
        for &len in &options.lengths {
            records.extend(match dtype {
                DType::F32 => bench.run::<f32>(len, &options, &mut normals)?,
                DType::F16 => bench.run::<f16>(len, &options, &mut normals)?,
                DType::BF16 => bench.run::<bf16>(len, &options, &mut normals)?,
                other => bail!("no Rust type for {other}"),
            });
        }
    }
    println!("\n{}", record::table(&records));
    Ok(ExitCode::SUCCESS)
}

struct Options {
    lengths: Vec<usize>,
    dtypes: Vec<DType>,
    operations: Vec<Operation>,
    tier: Option<Tier>,
    /// `None` is all that suit the length.
    regime: Option<Regime>,
    samples: usize,
    json: Option<PathBuf>,
}

impl Options {
    /// `None` if help is asked for.
    fn parse(mut arguments: impl Iterator<Item = String>) -> anyhow::Result<Option<Self>> {
        let mut options = Self {
            lengths: (10..=30).step_by(2).map(|log2| 1 << log2).collect(),
            dtypes: vec![DType::F32, DType::BF16],
            operations: Operation::ALL.to_vec(),
            tier: None,
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
                "--lengths" => {
                    options.lengths =
                        value.split(',').map(parse_length).collect::<Result<_, _>>()?;
                }
                "--dtype" => {
                    let named = DType::ALL.into_iter().find(|dtype| dtype.name() == value);
                    options.dtypes = vec![named.with_context(unknown)?];
                }
                "--operation" => {
                    options.operations.retain(|operation| operation.name() == value);
                    options.operations.first().with_context(unknown)?;
                }
                "--tier" => options.tier = Some(Tier::from_name(&value).with_context(unknown)?),
                "--regime" if value == "all" => options.regime = None,
                "--regime" => {
                    let named = Regime::ALL.into_iter().find(|regime| regime.name() == value);
                    options.regime = Some(named.with_context(unknown)?);
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
        let operations = options.operations.iter().filter(|&&operation| {
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
            let summaries = regime::measure(&self.clock, regime, options.samples, &contenders)?;
            for (index, one) in ours.iter().enumerate() {
                let (operation, tier) = (one.operation, one.reducer.tier());
                let case = Case { operation, len, dtype: T::DTYPE, tier, regime };
                let timing = |index: usize| Timing::new(&case, &summaries[index], errors[index]);
                let peer = sum
                    .as_ref()
                    .map(|(name, _)| Peer { name: name.to_string(), timing: timing(ours.len()) });
                let record = Record::new(&self.provenance, &case, timing(index), peer);
                if let Some(file) = &options.json {
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
