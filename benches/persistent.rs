//! Resident sessions beside a launch per batch and beside a CUDA graph, and above the floor that
//! the bus sets.
//!
//! `benches/results/README.md` says how it is measured.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::ensure;
use clap::Parser;
use half::bf16;
use kasmina::{
    Activation, DType, Device, KasminaLayer, LinearConfig, StreamConfig, StreamPath, StreamSession,
    Tensor,
};
use measure::cuda::Clock;
use measure::options::{self, Sampling};
use measure::random::Normals;
use measure::record::{Peer, Provenance, Times, append};
use measure::statistics::Summary;
use serde::Serialize;
use streaming::echo::Echo;
use streaming::latency::{Latency, measure};

#[allow(dead_code, reason = "the other benches need the rest of it")]
mod measure;
mod streaming;

const TIMEOUT: Duration = Duration::from_secs(5);
/// Batches in flight when throughput is measured, batches per sample, and samples.
const DEPTH: usize = 64;
const BATCHES: usize = 20_000;
const THROUGHPUT_SAMPLES: usize = 5;
/// Calls of other work that are timed beside a session.
const CALLS: usize = 50;

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    let Some(device) = options::device() else { return Ok(()) };
    println!("{}, {} tier", device.name(), device.tier());
    println!("\n| case | contender | p50 µs | p99 | p99.9 | mean |\n|---|---|---|---|---|---|");
    let bench = Bench { provenance: Provenance::new(&device), device, options };
    bench.floor()?;
    bench.stack("linear 32x256x256", &[256, 256], 32)?;
    for batch in [1, 8] {
        bench.stack(&format!("mlp 256-256-256-64 batch {batch}"), &[256, 256, 256, 64], batch)?;
    }
    bench.throughput(32)?;
    bench.throughput(1)?;
    bench.beside()?;
    Ok(())
}

/// Resident sessions beside a launch per batch.
#[derive(Parser)]
struct Options {
    /// Blocks of the resident grid; default the session's
    #[arg(long, value_name = "N")]
    blocks: Option<u32>,
    /// Rows of the parts that batches are cut into; default as few as occupy the grid
    #[arg(long, value_name = "N")]
    part_rows: Option<u32>,
    /// Only cases whose name contains this
    #[arg(long, value_name = "NAME")]
    only: Option<String>,
    #[command(flatten)]
    sampling: Sampling,
}

impl Options {
    fn samples(&self) -> usize {
        self.sampling.samples_or(20_000)
    }

    fn config(&self) -> StreamConfig {
        let config = StreamConfig::default().fallback(false);
        let config = self.blocks.map_or(config.clone(), |blocks| config.blocks(blocks));
        self.part_rows.map_or(config.clone(), |rows| config.part_rows(rows))
    }

    fn selects(&self, case: &str) -> bool {
        self.only.as_ref().is_none_or(|only| case.contains(only.as_str()))
    }
}

/// One line of `benches/results`.
#[derive(Serialize)]
struct Record<'a, T> {
    #[serde(flatten)]
    provenance: &'a Provenance,
    case: &'a str,
    contender: &'a str,
    blocks: Option<u32>,
    part_rows: Option<u32>,
    #[serde(flatten)]
    timing: T,
}

/// What many batches in flight take, each.
#[derive(Serialize)]
struct Throughput {
    #[serde(flatten)]
    times: Times,
    /// Rows of batches.
    items_per_s: f64,
}

/// What work takes beside a session.
#[derive(Serialize)]
struct Beside {
    #[serde(flatten)]
    times: Times,
    /// The same work without a session.
    peer: Peer<Times>,
    ratio: f64,
}

struct Bench {
    device: Device,
    provenance: Provenance,
    options: Options,
}

impl Bench {
    fn report(&self, case: &str, contenders: &[&str], latencies: &[Latency]) -> anyhow::Result<()> {
        for (&contender, &latency) in contenders.iter().zip(latencies) {
            let Latency { p50_us, p99_us, p999_us, mean_us, .. } = latency;
            println!(
                "| {case} | {contender} | {p50_us:.2} | {p99_us:.2} | {p999_us:.2} | {mean_us:.2} |"
            );
            self.keep(case, contender, latency)?;
        }
        Ok(())
    }

    /// Appends a line to the file of results, if there is to be one.
    fn keep(&self, case: &str, contender: &str, timing: impl Serialize) -> anyhow::Result<()> {
        let Some(file) = &self.options.sampling.json else { return Ok(()) };
        let Options { blocks, part_rows, .. } = self.options;
        let provenance = &self.provenance;
        append(&Record { provenance, case, contender, blocks, part_rows, timing }, file)
    }

    fn layers(&self, widths: &[usize]) -> anyhow::Result<Vec<KasminaLayer>> {
        let layers = widths.windows(2).zip(1..).map(|(pair, seed)| {
            let config = LinearConfig::new(pair[0], pair[1]).activation(Activation::Relu);
            config.dtype(DType::BF16).seed(seed).build(&self.device)
        });
        Ok(layers.collect::<Result<_, _>>()?)
    }

    fn session(
        &self,
        layers: &[KasminaLayer],
        config: StreamConfig,
    ) -> anyhow::Result<StreamSession<bf16>> {
        let layers: Vec<&KasminaLayer> = layers.iter().collect();
        let session = StreamSession::of_stack(&layers, config)?;
        ensure!(session.path() == StreamPath::Resident, "no kernel can stay resident");
        Ok(session)
    }

    /// An answer without work, above that of a single thread.
    fn floor(&self) -> anyhow::Result<()> {
        let case = "no-op";
        if !self.options.selects(case) {
            return Ok(());
        }
        let layers = self.layers(&[256, 256])?;
        // Dropped after the session, as unloading waits for every kernel.
        let mut echo = Echo::new()?;
        let session = self.session(&layers, self.options.config())?;
        echo.start()?;
        let latencies = measure(
            self.options.samples(),
            &mut [
                ("ping-pong of one thread", &mut || echo.ping()),
                ("resident", &mut || Ok(session.ping(TIMEOUT).map(drop)?)),
            ],
        )?;
        echo.stop();
        self.report(case, &["ping-pong of one thread", "resident"], &latencies)?;
        println!("\nresident / floor = {:.2}\n", latencies[1].p50_us / latencies[0].p50_us);
        Ok(())
    }

    /// One batch at a time.
    fn stack(&self, case: &str, widths: &[usize], batch: usize) -> anyhow::Result<()> {
        if !self.options.selects(case) {
            return Ok(());
        }
        let layers = self.layers(widths)?;
        let input = Normals::new().take::<bf16>(batch * widths[0], 1.0);
        let x = Tensor::from_slice(&self.device, &input, [batch, widths[0]])?;
        let mut ys = layers
            .iter()
            .map(|layer| Tensor::<bf16>::zeros(&self.device, [batch, layer.out_features()]))
            .collect::<Result<Vec<_>, _>>()?;
        // Whatever first calls set up, before a grid stays.
        forward(&layers, &x, &mut ys)?;
        self.device.synchronize()?;
        let clock = Clock::new(&self.device)?;
        let graph = clock.capture(|| forward(&layers, &x, &mut ys))?;
        clock.launch(&graph)?;
        self.device.synchronize()?;

        let session = self.session(&layers, self.options.config())?;
        let mut output = vec![bf16::ZERO; batch * widths[widths.len() - 1]];
        let mut device_y =
            Tensor::<bf16>::zeros(&self.device, [batch, layers[layers.len() - 1].out_features()])?;
        let names = [
            "resident",
            "resident, tensors",
            "launch + sync",
            "graph + sync",
            "copy in, launch, copy out",
        ];
        let mut second = layers
            .iter()
            .map(|layer| Tensor::<bf16>::zeros(&self.device, [batch, layer.out_features()]))
            .collect::<Result<Vec<_>, _>>()?;
        let latencies = measure(
            self.options.samples(),
            &mut [
                (names[0], &mut || {
                    let mut ticket = session.submit(&input)?;
                    Ok(session.wait_into(&mut ticket, &mut output, TIMEOUT)?)
                }),
                (names[1], &mut || {
                    let mut ticket = session.submit_tensors(&x, &mut device_y)?;
                    Ok(session.wait_tensors(&mut ticket, TIMEOUT)?)
                }),
                (names[2], &mut || {
                    forward(&layers, &x, &mut ys)?;
                    Ok(self.device.synchronize()?)
                }),
                (names[3], &mut || {
                    clock.launch(&graph)?;
                    clock.synchronize()
                }),
                (names[4], &mut || {
                    let x = Tensor::from_slice(&self.device, &input, [batch, widths[0]])?;
                    forward(&layers, &x, &mut second)?;
                    second[second.len() - 1].to_vec()?;
                    Ok(())
                }),
            ],
        )?;
        self.report(case, &names, &latencies)?;
        println!();
        Ok(())
    }

    /// Many batches in flight.
    fn throughput(&self, batch: usize) -> anyhow::Result<()> {
        let case = format!("depth {DEPTH}, linear {batch}x256x256");
        if !self.options.selects(&case) {
            return Ok(());
        }
        let layers = self.layers(&[256, 256])?;
        let session = self.session(&layers, self.options.config().depth(DEPTH))?;
        let input = Normals::new().take::<bf16>(batch * 256, 1.0);
        let mut output = vec![bf16::ZERO; batch * 256];
        let batches = self.options.sampling.scaled(BATCHES);
        let mut samples = Vec::new();
        for _ in 0..THROUGHPUT_SAMPLES {
            let mut tickets = VecDeque::with_capacity(DEPTH);
            let start = Instant::now();
            for _ in 0..batches {
                if tickets.len() == DEPTH
                    && let Some(mut oldest) = tickets.pop_front()
                {
                    session.wait_into(&mut oldest, &mut output, TIMEOUT)?;
                }
                tickets.push_back(session.submit(&input)?);
            }
            for mut ticket in tickets {
                session.wait_into(&mut ticket, &mut output, TIMEOUT)?;
            }
            samples.push(start.elapsed().as_secs_f64() * 1e6 / batches as f64);
        }
        let times = Times::from(&Summary::new(samples));
        let items_per_s = batch as f64 * 1e6 / times.median_us;
        println!(
            "| {case} | one producer, µs per batch | {:.3} | | | {:.3} |",
            times.median_us, times.mean_us
        );
        self.keep(&case, "resident", Throughput { times, items_per_s })?;
        let statistics = session.statistics();
        println!("\n{statistics:?}\n");
        Ok(())
    }

    /// What a session, idle or busy, costs other work, and other work a session.
    fn beside(&self) -> anyhow::Result<()> {
        let case = "forward 4096x4096x4096";
        let session_case = format!("linear 32x256x256 beside {case}");
        if !self.options.selects(case) && !self.options.selects(&session_case) {
            return Ok(());
        }
        let large = LinearConfig::new(4096, 4096).dtype(DType::BF16).build(&self.device)?;
        let x = Tensor::from_slice(
            &self.device,
            &Normals::new().take::<bf16>(4096 * 4096, 1.0),
            [4096, 4096],
        )?;
        let mut y = Tensor::<bf16>::zeros(&self.device, [4096, 4096])?;
        let clock = Clock::new(&self.device)?;
        let mut time = || -> anyhow::Result<Times> {
            let samples = (0..self.options.sampling.scaled(CALLS))
                .map(|_| clock.time(|| Ok(large.forward_into(&x, &mut y).map(drop)?)));
            Ok(Times::from(&Summary::new(samples.collect::<Result<_, _>>()?)))
        };
        let alone = time()?;
        let layers = self.layers(&[256, 256])?;
        let session = self.session(&layers, self.options.config())?;
        let idle = time()?;
        let input = Normals::new().take::<bf16>(32 * 256, 1.0);
        let stop = AtomicBool::new(false);
        let (busy, answers) = std::thread::scope(|scope| {
            let answers = scope.spawn(|| {
                let mut answers = Vec::new();
                while !stop.load(Ordering::Relaxed) {
                    let start = Instant::now();
                    session.submit_and_wait(&input, TIMEOUT)?;
                    answers.push(start.elapsed());
                }
                anyhow::Ok(answers)
            });
            let busy = time();
            stop.store(true, Ordering::Relaxed);
            let answers = answers.join().expect("the producer does not panic");
            anyhow::Ok((busy?, answers?))
        })?;
        ensure!(!answers.is_empty(), "the session did not answer beside the pass");
        self.report(&session_case, &["resident"], &[Latency::of(answers)])?;
        println!("\n{case} alone: {:.1} µs", alone.median_us);
        for (contender, times) in
            [("beside an idle session", idle), ("beside a busy session", busy)]
        {
            let ratio = alone.median_us / times.median_us;
            println!("{contender}: {:.1} µs, {:.2} times as long", times.median_us, 1.0 / ratio);
            let peer = Peer { name: "without a session".to_owned(), timing: alone };
            self.keep(case, contender, Beside { times, peer, ratio })?;
        }
        Ok(())
    }
}

/// One layer after the other, from `x` into `ys`.
fn forward(
    layers: &[KasminaLayer],
    x: &Tensor<bf16>,
    ys: &mut [Tensor<bf16>],
) -> anyhow::Result<()> {
    let mut x = x.clone();
    for (layer, y) in layers.iter().zip(ys) {
        layer.forward_into(&x, y)?;
        x = y.clone();
    }
    Ok(())
}
