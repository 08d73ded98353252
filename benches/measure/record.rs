//! What a measurement leaves behind: a JSON line and a row of a table.

use std::fmt::Write as _;
use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::path::Path;
use std::process::Command;

use anyhow::Context;
use kasmina::{Device, Tier, WeightLayout};
use kasmina_kernels::abi::MODULES;
use serde::Serialize;
use sha2::{Digest, Sha256};

use super::operands::Problem;
use super::regime::Regime;
use super::statistics::Summary;

/// What was measured, and on what.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Provenance {
    commit: String,
    ptx_digest: String,
    gpu: String,
    driver: Option<String>,
    cuda: String,
}

impl Provenance {
    /// That of this build on `device`, a GPU.
    pub(crate) fn new(device: &Device) -> Self {
        let cuda = device.capability().map_or((0, 0), |capability| capability.driver);
        Self {
            commit: commit(),
            ptx_digest: ptx_digest(),
            gpu: device.name().to_owned(),
            driver: driver_version(),
            cuda: format!("{}.{}", cuda.0, cuda.1),
        }
    }
}

fn commit() -> String {
    if let Ok(commit) = std::env::var("KASMINA_COMMIT") {
        return commit;
    }
    let described = Command::new("git")
        .args(["describe", "--always", "--dirty", "--abbrev=12"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output();
    match described {
        Ok(output) if output.status.success() => {
            String::from_utf8_lossy(&output.stdout).trim().to_owned()
        }
        _ => "unknown".to_owned(),
    }
}

fn ptx_digest() -> String {
    let mut sha = Sha256::new();
    for module in MODULES {
        sha.update(module.ptx);
    }
    sha.finalize().iter().take(8).fold(String::new(), |mut digest, byte| {
        // Writing to a string cannot fail.
        let _ = write!(digest, "{byte:02x}");
        digest
    })
}

/// The driver's version as its kernel module tells it: the first word like 580.159.03.
fn driver_version() -> Option<String> {
    let text = fs::read_to_string("/proc/driver/nvidia/version").ok()?;
    let is_version =
        |word: &&str| word.contains('.') && word.split('.').all(|part| part.parse::<u32>().is_ok());
    text.split_whitespace().find(is_version).map(str::to_owned)
}

/// One side of a comparison.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Timing {
    samples: usize,
    median_us: f64,
    p10_us: f64,
    p90_us: f64,
    mean_us: f64,
    tflops: f64,
    max_error: f64,
}

impl Timing {
    pub(crate) fn new(
        problem: &Problem,
        regime: Regime,
        summary: &Summary,
        max_error: f64,
    ) -> Self {
        Self {
            samples: summary.samples,
            median_us: summary.median,
            p10_us: summary.p10,
            p90_us: summary.p90,
            mean_us: summary.mean,
            tflops: problem.operations() / regime.representative(summary) * 1e-6,
            max_error,
        }
    }
}

/// The other side: its name, and what it took.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Peer {
    pub(crate) name: String,
    #[serde(flatten)]
    pub(crate) timing: Timing,
}

/// One line of `benches/results`.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Record {
    #[serde(flatten)]
    provenance: Provenance,
    m: usize,
    n: usize,
    k: usize,
    dtype: &'static str,
    layout: &'static str,
    activation: String,
    tier: &'static str,
    regime: &'static str,
    #[serde(flatten)]
    timing: Timing,
    peer: Option<Peer>,
    ratio: Option<f64>,
}

impl Record {
    pub(crate) fn new(
        provenance: &Provenance,
        problem: &Problem,
        tier: Tier,
        regime: Regime,
        timing: Timing,
        peer: Option<Peer>,
    ) -> Self {
        Self {
            provenance: provenance.clone(),
            m: problem.m,
            n: problem.n,
            k: problem.k,
            dtype: problem.dtype.name(),
            layout: layout_name(problem.layout),
            activation: format!("{:?}", problem.activation).to_lowercase(),
            tier: tier.name(),
            regime: regime.name(),
            ratio: peer.as_ref().map(|peer| timing.tflops / peer.timing.tflops),
            timing,
            peer,
        }
    }

    /// Appends the record to `file`.
    pub(crate) fn append(&self, file: &Path) -> anyhow::Result<()> {
        let mut file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(file)
            .with_context(|| format!("cannot append to {}", file.display()))?;
        writeln!(file, "{}", serde_json::to_string(self)?)?;
        Ok(())
    }
}

/// The name of a layout on the command line and in the results.
pub(crate) const fn layout_name(layout: WeightLayout) -> &'static str {
    match layout {
        WeightLayout::InOut => "in-out",
        WeightLayout::OutIn => "out-in",
    }
}

/// The records as a Markdown table.
pub(crate) fn table(records: &[Record]) -> String {
    let mut table = String::from(
        "| m × n × k | dtype | W | act | tier | regime | µs (p10–p90) | TFLOP/s | peer µs | \
         peer TFLOP/s | ratio | max error (peer) |\n|---|---|---|---|---|---|---|---|---|---|---|---|\n",
    );
    for record in records {
        let Timing { median_us, p10_us, p90_us, tflops, max_error, .. } = record.timing;
        let [peer_us, peer_tflops, ratio, peer_error] = match (&record.peer, record.ratio) {
            (Some(Peer { timing, .. }), Some(ratio)) => [
                format!("{:.2}", timing.median_us),
                format!("{:.1}", timing.tflops),
                format!("{ratio:.3}"),
                format!("{:.1e}", timing.max_error),
            ],
            _ => ["–"; 4].map(str::to_owned),
        };
        // Writing to a string cannot fail.
        let _ = writeln!(
            table,
            "| {} × {} × {} | {} | {} | {} | {} | {} | {median_us:.2} ({p10_us:.2}–{p90_us:.2}) | \
             {tflops:.1} | {peer_us} | {peer_tflops} | {ratio} | {max_error:.1e} ({peer_error}) |",
            record.m,
            record.n,
            record.k,
            record.dtype,
            record.layout,
            record.activation,
            record.tier,
            record.regime,
        );
    }
    table
}
