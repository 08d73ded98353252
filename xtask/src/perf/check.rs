//! Compares results with a baseline.
//!
//! What is compared of a case is its ratio to the peer, where both have one, because absolute times
//! drift between machines and the ratio's two sides drift together; otherwise its time. A case is
//! slower if it lost more than its noise bound,
//!
//! ```text
//! FLOOR + SIGMAS · √(Σ eᵢ²),   eᵢ = 1.2533 · (p90 − p10) / 2.5631 / √samples / time
//! ```
//!
//! over the times that enter: ours in both files, and the peer's in both where ratios are compared.
//! For a normal distribution (p90 − p10) / 2.5631 is its standard deviation σ, and 1.2533·σ/√samples
//! the standard error of a median. `FLOOR` stands for what differs between two runs of the same code
//! although each repeats itself well: temperature, memory placement, the peer's choice of algorithm.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

use super::record::{Record, Times, latest};

/// A loss up to this is never reported.
const FLOOR: f64 = 0.02;
const SIGMAS: f64 = 3.0;
/// A time whose quantiles are not told is taken to be this uncertain.
const UNTOLD: f64 = 0.02;

/// How a case compares with its baseline.
#[derive(Clone, Debug, PartialEq)]
pub struct Comparison {
    /// The case, with operation and regime.
    pub case: String,
    /// How many times as slow as the baseline it is.
    pub slowdown: f64,
    /// What of that may be noise: up to `1 + bound` is.
    pub bound: f64,
    /// Our time over that in the baseline.
    pub own: f64,
    /// The peer's time over that in the baseline, where the ratio was compared.
    pub peer: Option<f64>,
}

impl Comparison {
    fn of(now: &Record, baseline: &Record) -> Self {
        let own = now.times.central / baseline.times.central;
        let mut errors = vec![error(&now.times), error(&baseline.times)];
        let mut slowdown = own;
        let mut peer = None;
        if let (Some(now_ratio), Some(old_ratio)) = (now.ratio, baseline.ratio) {
            slowdown = old_ratio / now_ratio;
            if let (Some(now), Some(old)) = (&now.peer, &baseline.peer) {
                errors.extend([error(&now.times), error(&old.times)]);
                peer = Some(now.times.central / old.times.central);
            }
        }
        let noise = errors.iter().map(|error| error * error).sum::<f64>().sqrt();
        let case = title(now);
        Self { case, slowdown, bound: FLOOR + SIGMAS * noise, own, peer }
    }

    /// Whether the case lost more than noise explains.
    #[must_use]
    pub fn is_slower(&self) -> bool {
        self.slowdown > 1.0 + self.bound
    }
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let percent = |factor: f64| (factor - 1.0) * 100.0;
        write!(f, "{}: {:+.1} % ", self.case, percent(self.slowdown))?;
        match self.peer {
            Some(peer) => write!(
                f,
                "against the peer (our time {:+.1} %, the peer's {:+.1} %)",
                percent(self.own),
                percent(peer)
            )?,
            None => write!(f, "in time")?,
        }
        write!(f, ", noise up to {:.1} %", self.bound * 100.0)
    }
}

/// Standard error of a time, relative to it.
fn error(times: &Times) -> f64 {
    times.spread.map_or(UNTOLD, |[p10, p90]| {
        1.2533 * (p90 - p10) / 2.5631 / times.samples.max(1.0).sqrt() / times.central
    })
}

fn title(record: &Record) -> String {
    let words = [Some(record.operation.clone()), Some(record.case())]
        .into_iter()
        .chain([Some(record.regime.clone()), record.contender.clone()])
        .flatten()
        .filter(|word| !word.is_empty());
    words.collect::<Vec<_>>().join(", ")
}

/// What comparing two sets of results gives.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Verdict {
    /// Cases that are in both, each with its comparison.
    pub compared: Vec<Comparison>,
    /// Cases that the baseline lacks.
    pub new: Vec<String>,
    /// Cases of the operations measured that only the baseline has.
    pub gone: Vec<String>,
}

impl Verdict {
    /// Compares results of one GPU model. What other implementations took is left out: their
    /// getting slower is no regression of ours.
    #[must_use]
    pub fn of(now: &[Record], baseline: &[Record]) -> Self {
        let ours = |records: &[Record]| -> BTreeMap<BTreeMap<String, String>, Record> {
            let ours = records.iter().filter(|record| !record.foreign);
            ours.map(|record| (record.identity.clone(), record.clone())).collect()
        };
        let (now, baseline) = (ours(now), ours(baseline));
        let mut verdict = Self::default();
        for (identity, record) in &now {
            match baseline.get(identity) {
                Some(old) => verdict.compared.push(Comparison::of(record, old)),
                None => verdict.new.push(title(record)),
            }
        }
        for (identity, old) in &baseline {
            let measured = now.values().any(|record| record.operation == old.operation);
            if measured && !now.contains_key(identity) {
                verdict.gone.push(title(old));
            }
        }
        verdict
    }
}

/// Compares the results in `file` with `baseline`, or with the file of their GPU model in
/// `baselines`, and prints how.
///
/// # Errors
/// Files that cannot be read, results of several GPU models or of none that has a baseline, no case
/// in common, and any case that is slower beyond noise.
pub fn run(file: &Path, baseline: Option<&Path>, baselines: &Path) -> Result<()> {
    let now = latest(Record::read(file)?);
    let gpu = &now.first().with_context(|| format!("{} is empty", file.display()))?.gpu;
    ensure!(
        now.iter().all(|record| record.gpu == *gpu),
        "{} has results of several GPU models: check each in a file of its own",
        file.display()
    );
    let path = baseline.map_or_else(|| baseline_path(baselines, gpu), Path::to_path_buf);
    ensure!(
        path.exists(),
        "there is no baseline {}: name another with --baseline, or commit these results there if \
         they are to be the first of a {gpu}",
        path.display()
    );
    let old: Vec<Record> =
        latest(Record::read(&path)?).into_iter().filter(|record| record.gpu == *gpu).collect();
    ensure!(!old.is_empty(), "{} has no results of a {gpu}", path.display());

    let verdict = Verdict::of(&now, &old);
    for case in &verdict.new {
        println!("new: {case}");
    }
    for case in &verdict.gone {
        println!("gone: {case}");
    }
    let slower: Vec<&Comparison> =
        verdict.compared.iter().filter(|comparison| comparison.is_slower()).collect();
    for comparison in &slower {
        println!("slower: {comparison}");
    }
    ensure!(
        !verdict.compared.is_empty(),
        "no case of {} is in {}: nothing was compared",
        file.display(),
        path.display()
    );
    if !slower.is_empty() {
        bail!(
            "{} of {} cases are slower than in {}. Measure again on an idle GPU; if they stay slower, \
             find the change that did it, or, if it is worth its price, commit the new results as \
             the baseline and say why",
            slower.len(),
            verdict.compared.len(),
            path.display()
        );
    }
    println!(
        "{} cases, none slower than in {} beyond noise; {} new, {} gone",
        verdict.compared.len(),
        path.display(),
        verdict.new.len(),
        verdict.gone.len()
    );
    Ok(())
}

/// `NVIDIA H200` has its baseline in `nvidia-h200.jsonl`.
fn baseline_path(baselines: &Path, gpu: &str) -> PathBuf {
    let name = gpu.to_lowercase().replace(|c: char| !c.is_ascii_alphanumeric(), "-");
    baselines.join(format!("{name}.jsonl"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::perf::record::tests::product_line;

    fn record(line: &str) -> Record {
        Record::parse(line).unwrap()
    }

    fn compare(now: &str, baseline: &str) -> Comparison {
        let verdict = Verdict::of(&[record(now)], &[record(baseline)]);
        assert_eq!((verdict.compared.len(), verdict.new.len(), verdict.gone.len()), (1, 0, 0));
        verdict.compared[0].clone()
    }

    /// A sum without a peer.
    fn sum_line(median: f64, p10: f64, p90: f64) -> String {
        format!(
            r#"{{"gpu":"NVIDIA H200","operation":"sum","len":4096,"dtype":"f32","regime":"graph",
            "samples":60,"median_us":{median},"p10_us":{p10},"p90_us":{p90}}}"#
        )
    }

    #[test]
    fn a_case_that_lost_against_its_peer_is_found() {
        let baseline = product_line("burst", 180.0, 200.0);
        let slower = compare(&product_line("burst", 190.0, 200.0), &baseline);
        assert!(slower.is_slower(), "{slower}");
        assert!((slower.slowdown - 190.0 / 180.0).abs() < 1e-9);
        // On a slower machine too, where the peer lost less.
        assert!(compare(&product_line("burst", 209.0, 220.0), &baseline).is_slower());
        // And on a faster one, where our time is as before.
        assert!(compare(&product_line("burst", 180.0, 190.0), &baseline).is_slower());
    }

    #[test]
    fn a_machine_that_slows_both_sides_is_no_regression() {
        let baseline = product_line("steady", 180.0, 200.0);
        let drifted = compare(&product_line("steady", 216.0, 240.0), &baseline);
        assert!(!drifted.is_slower(), "{drifted}");
        assert!((drifted.own - 1.2).abs() < 1e-9);
    }

    #[test]
    fn a_loss_within_noise_is_no_regression_and_the_same_loss_beyond_it_is() {
        assert!(
            !compare(&product_line("burst", 183.0, 200.0), &product_line("burst", 180.0, 200.0))
                .is_slower()
        );
        let (steady, noisy) = (sum_line(10.0, 9.9, 10.1), sum_line(10.0, 8.0, 12.0));
        assert!(compare(&sum_line(10.5, 10.4, 10.6), &steady).is_slower());
        assert!(!compare(&sum_line(10.5, 8.4, 12.6), &noisy).is_slower());
        assert!(compare(&sum_line(14.0, 11.0, 17.0), &noisy).is_slower());
    }

    #[test]
    fn without_a_peer_on_both_sides_times_are_compared() {
        let baseline = product_line("burst", 180.0, 200.0);
        let alone =
            baseline.replace("\"peer\":{", "\"details\":{").replace("\"ratio\"", "\"x_us\"");
        assert!(record(&alone).ratio.is_none());
        assert!(!compare(&alone, &baseline).is_slower());
        let slower = alone.replace("180", "200");
        let comparison = compare(&slower, &baseline);
        assert!(comparison.is_slower() && comparison.peer.is_none(), "{comparison}");
    }

    #[test]
    fn cases_that_are_new_or_gone_are_named() {
        let burst = record(&product_line("burst", 180.0, 200.0));
        let steady = record(&product_line("steady", 180.0, 200.0));
        let sum = record(&sum_line(10.0, 9.9, 10.1));
        let verdict = Verdict::of(std::slice::from_ref(&burst), &[steady.clone(), sum]);
        assert_eq!((verdict.new, verdict.gone), (vec![title(&burst)], vec![title(&steady)]));
        assert!(verdict.compared.is_empty());
    }

    #[test]
    fn a_slower_peer_is_no_regression_of_ours() {
        let line = |time| {
            product_line("burst", time, 200.0)
                .replace("{\"commit\"", "{\"foreign\":true,\"commit\"")
        };
        let verdict = Verdict::of(&[record(&line(300.0))], &[record(&line(180.0))]);
        assert_eq!(verdict, Verdict::default());
    }

    #[test]
    fn files_are_checked_against_the_baseline_of_their_gpu() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = folder.path().join(name);
            std::fs::write(&path, text).unwrap();
            path
        };
        let check = |file: &Path| run(file, None, folder.path());
        let now = write("now.jsonl", &product_line("burst", 180.0, 200.0));
        let missing = format!("{:#}", check(&now).unwrap_err());
        assert!(
            missing.contains("nvidia-h200.jsonl") && missing.contains("--baseline"),
            "{missing}"
        );

        write("nvidia-h200.jsonl", &product_line("burst", 180.0, 200.0));
        check(&now).unwrap();
        let slow = write("slow.jsonl", &product_line("burst", 240.0, 200.0));
        let message = format!("{:#}", check(&slow).unwrap_err());
        assert!(message.contains("1 of 1 cases") && message.contains("Measure again"), "{message}");
        run(&slow, Some(&slow), folder.path()).unwrap();
        let other = write("other.jsonl", &product_line("steady", 180.0, 200.0));
        assert!(format!("{:#}", check(&other).unwrap_err()).contains("nothing was compared"));
    }
}
