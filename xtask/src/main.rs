//! `cargo xtask <task>`.

use std::env;
use std::process::ExitCode;

use anyhow::{Result, bail};
use xtask::{gpu_bundle, no_gpu, perf, ptx, workspace};

const USAGE: &str = "usage: cargo xtask <task>

  ptx           build the device code and write kasmina-kernels/ptx/
  ptx --check   build it and compare with what is committed
  gpu-bundle    collect tests, benches and examples in dist/gpu/, to run where no Rust is
  perf          run the benches and report; `perf report`, `check` and `prune` take results
  no-gpu        check what must hold on a machine without a GPU";

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &[&str]) -> Result<()> {
    match arguments {
        ["ptx"] => ptx::write(workspace()),
        ["ptx", "--check"] => ptx::check(workspace()),
        ["gpu-bundle"] => gpu_bundle::write(workspace()),
        ["perf", arguments @ ..] => perf::run(workspace(), arguments),
        ["no-gpu"] => no_gpu::check(workspace()),
        _ => bail!("{USAGE}"),
    }
}
