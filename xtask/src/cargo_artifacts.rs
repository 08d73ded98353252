//! Which executables a cargo command built.

use std::env;
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

/// An executable that cargo built.
#[derive(Debug)]
pub struct Executable {
    /// Name of the test, bench or example.
    pub name: String,
    /// What it is: `test`, `bench`, `example`, or `lib` for a library's unit tests.
    pub kind: String,
    /// Where it lies.
    pub path: PathBuf,
}

#[derive(Deserialize)]
struct Message {
    target: Option<Target>,
    executable: Option<PathBuf>,
}

#[derive(Deserialize)]
struct Target {
    name: String,
    kind: Vec<String>,
}

/// The cargo that runs this, or the one in `PATH`.
#[must_use]
pub fn cargo() -> Command {
    Command::new(env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo")))
}

/// Runs a cargo command that builds, with `--message-format`, and returns its executables.
///
/// # Errors
/// The build fails; cargo has printed why.
pub fn build(command: &mut Command) -> Result<Vec<Executable>> {
    let output = command
        .arg("--message-format=json-render-diagnostics")
        .stderr(Stdio::inherit())
        .output()
        .context("cannot run cargo")?;
    ensure!(output.status.success(), "the build fails");
    let mut executables = Vec::new();
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        let message: Message = serde_json::from_str(line).context("cargo prints other JSON")?;
        if let (Some(target), Some(path)) = (message.target, message.executable) {
            let kind = target.kind.into_iter().next().unwrap_or_default();
            executables.push(Executable { name: target.name, kind, path });
        }
    }
    Ok(executables)
}
