//! What a measurement of any kind leaves behind: a JSON line that says on what it was made.

use std::fmt::Write as _;
use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::path::Path;
use std::process::Command;

use anyhow::Context;
use kasmina::Device;
use kasmina_kernels::abi::MODULES;
use serde::Serialize;
use sha2::{Digest, Sha256};

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
        sha.update(module.ptx());
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

/// How long a call takes.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Times {
    pub(crate) samples: usize,
    pub(crate) median_us: f64,
    pub(crate) p10_us: f64,
    pub(crate) p90_us: f64,
    pub(crate) mean_us: f64,
}

impl From<&Summary> for Times {
    fn from(summary: &Summary) -> Self {
        Self {
            samples: summary.samples,
            median_us: summary.median,
            p10_us: summary.p10,
            p90_us: summary.p90,
            mean_us: summary.mean,
        }
    }
}

/// The other side of a comparison: its name, and what it took.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Peer<T> {
    pub(crate) name: String,
    #[serde(flatten)]
    pub(crate) timing: T,
}

/// Appends a record to `file`.
pub(crate) fn append(record: &impl Serialize, file: &Path) -> anyhow::Result<()> {
    let mut file = OpenOptions::new()
        .create(true)
        .append(true)
        .open(file)
        .with_context(|| format!("cannot append to {}", file.display()))?;
    writeln!(file, "{}", serde_json::to_string(record)?)?;
    Ok(())
}
