//! `cargo xtask perf`: runs the benches, makes tables and plots of their results, and compares these
//! with a baseline.
//!
//! Results are JSON Lines, as `benches/results/README.md` describes them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

use crate::cargo_artifacts::{Executable, build, cargo};
use record::Record;

pub mod ceilings;
pub mod check;
pub mod prune;
pub mod record;
pub mod report;
pub mod roofline;

/// Where a run leaves its results, from the workspace root.
const RESULTS: &str = "target/perf/results.jsonl";
/// Where the baselines lie, from the workspace root; one file per GPU model.
const BASELINES: &str = "benches/results";

/// How it is called.
pub const USAGE: &str = "usage: cargo xtask perf [BENCH]...
       cargo xtask perf report FILE... [--svg FILE]
       cargo xtask perf check FILE [--baseline FILE]
       cargo xtask perf prune FILE

  perf          runs these benches, or all, on this machine's GPU, and reports on them
  perf report   prints tables of results and draws them under their roofline, beside the first file
                or to the one named
  perf check    compares results with the committed baseline of the same GPU model; fails where a
                case is slower than there, beyond noise
  perf prune    leaves the last line of each case in a file of results";

/// Runs the subcommand that the arguments name.
///
/// # Errors
/// Arguments that are not understood, a build or bench that fails, results that cannot be read, and
/// from `check` a case that is slower than the baseline.
pub fn run(workspace: &Path, arguments: &[&str]) -> Result<()> {
    match arguments {
        ["report", files @ ..] => {
            let (files, svg) = with_option(files, "--svg")?;
            ensure!(!files.is_empty(), "{USAGE}");
            let svg = svg.unwrap_or_else(|| files[0].with_extension("svg"));
            report_on(&files, &svg)
        }
        ["check", file @ ..] => {
            let (files, baseline) = with_option(file, "--baseline")?;
            let [file] = files.as_slice() else { bail!("{USAGE}") };
            check::run(file, baseline.as_deref(), &workspace.join(BASELINES))
        }
        ["prune", file] if !file.starts_with('-') => prune::run(Path::new(file)),
        benches if benches.iter().all(|bench| !bench.starts_with('-')) => {
            let results = workspace.join(RESULTS);
            measure(workspace, benches, &results)?;
            report_on(std::slice::from_ref(&results), &results.with_extension("svg"))
        }
        _ => bail!("{USAGE}"),
    }
}

/// The paths among the arguments, and the value of `option`.
fn with_option(arguments: &[&str], option: &str) -> Result<(Vec<PathBuf>, Option<PathBuf>)> {
    let (mut paths, mut value) = (Vec::new(), None);
    let mut arguments = arguments.iter();
    while let Some(&argument) = arguments.next() {
        if argument == option {
            let path = arguments.next().with_context(|| format!("{option} needs a file"))?;
            value = Some(PathBuf::from(path));
        } else {
            ensure!(!argument.starts_with('-'), "{argument} is not known\n{USAGE}");
            paths.push(PathBuf::from(argument));
        }
    }
    Ok((paths, value))
}

/// Builds and runs the benches of these names, all if there are none, so that they leave their
/// results in `results`.
fn measure(workspace: &Path, names: &[&str], results: &Path) -> Result<()> {
    let mut cargo = cargo();
    cargo.current_dir(workspace).args(["bench", "--package=kasmina", "--no-run"]);
    if names.is_empty() {
        cargo.arg("--benches");
    }
    cargo.args(names.iter().map(|name| format!("--bench={name}")));
    let benches: Vec<Executable> =
        build(&mut cargo)?.into_iter().filter(|built| built.kind == "bench").collect();

    let folder = results.parent().context("results lie in a folder")?;
    fs::create_dir_all(folder)?;
    if results.exists() {
        fs::remove_file(results)?;
    }
    for bench in &benches {
        let mut command = Command::new(&bench.path);
        command.current_dir(workspace).arg("--bench");
        if writes_json(&bench.path)? {
            command.arg("--json").arg(results);
        } else {
            // What it tells is no case of a table.
            println!("{}: writes no JSON, so only what it prints here remains", bench.name);
        }
        let status = command.status()?;
        ensure!(status.success(), "the bench {} fails", bench.name);
    }
    ensure!(
        results.exists(),
        "no bench measured anything: run this on a machine with a GPU, or take the folder of `cargo \
         xtask gpu-bundle` to one and run `./run perf` there"
    );
    println!("results: {}", results.display());
    Ok(())
}

/// Whether a bench can append JSON lines to a file; its help says so.
fn writes_json(bench: &Path) -> Result<bool> {
    let output = Command::new(bench).arg("--help").stderr(Stdio::null()).output()?;
    Ok(String::from_utf8_lossy(&output.stdout).contains("--json"))
}

fn report_on(files: &[PathBuf], svg: &Path) -> Result<()> {
    let mut records = Vec::new();
    for file in files {
        records.extend(Record::read(file)?);
    }
    // A case that was measured again counts with its last figures.
    let records = record::latest(records);
    print!("{}", report::markdown(&records));
    fs::write(svg, roofline::svg(&records))
        .with_context(|| format!("cannot write {}", svg.display()))?;
    eprintln!("roofline: {}", svg.display());
    Ok(())
}

/// The files of results in a folder.
#[cfg(test)]
fn result_files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap();
    let files: Vec<PathBuf> = entries
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "jsonl"))
        .collect();
    assert!(!files.is_empty(), "there are no results in {}", folder.display());
    files
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_told_from_files() {
        let (files, svg) = with_option(&["a", "--svg", "b.svg", "c"], "--svg").unwrap();
        assert_eq!((files.len(), svg), (2, Some(PathBuf::from("b.svg"))));
        assert!(with_option(&["a", "--svg"], "--svg").is_err());
        assert!(with_option(&["--png", "a"], "--svg").is_err());
    }

    #[test]
    fn the_committed_results_can_be_reported_on() {
        for path in result_files(&crate::workspace().join(BASELINES)) {
            let records = record::latest(Record::read(&path).unwrap());
            let markdown = report::markdown(&records);
            assert!(markdown.contains("## gemm"), "{}", path.display());
        }
    }
}
