//! `cargo xtask no-gpu`: what must hold on a machine without a GPU. The quickstart names no driver
//! library and runs; GPU tests are reported as ignored, and fail where a GPU is required.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use crate::cargo_artifacts::{Executable, build, cargo};

/// Makes a missing GPU a failure of every GPU test.
const REQUIRE_GPU: &str = "KASMINA_REQUIRE_GPU";

/// Checks all of it.
///
/// # Errors
/// The first that does not hold, or a machine that has a GPU.
pub fn check(workspace: &Path) -> Result<()> {
    ensure!(
        !Path::new("/dev/nvidiactl").exists(),
        "this machine has an NVIDIA GPU: run `cargo xtask no-gpu` on one without"
    );
    let facade = |arguments: &[&str]| {
        build(cargo().current_dir(workspace).args(arguments).arg("--package=kasmina"))
    };
    let examples = facade(&["build", "--examples"])?;
    let quickstart = examples
        .iter()
        .find(|example| example.name == "quickstart")
        .context("there is no example quickstart")?;
    names_no_driver_library(&quickstart.path)?;
    let status = Command::new(&quickstart.path).stdout(Stdio::null()).status()?;
    ensure!(status.success(), "the quickstart fails without a GPU");
    println!("quickstart runs and needs no libcuda");

    let mut checked = 0;
    // What the PTX tests ignore is a missing ptxas.
    let tests = facade(&["test", "--tests", "--no-run"])?;
    for test in tests.iter().filter(|built| built.kind == "test" && built.name != "ptx") {
        let Some(gpu_test) = first_ignored(test)? else { continue };
        let status = Command::new(&test.path)
            .args(["--exact", &gpu_test])
            .env(REQUIRE_GPU, "1")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()?;
        ensure!(
            !status.success(),
            "{}: `{gpu_test}` does not fail under {REQUIRE_GPU}=1 without a GPU",
            test.name
        );
        println!("{}: GPU tests are ignored, and fail under {REQUIRE_GPU}=1", test.name);
        checked += 1;
    }
    ensure!(checked > 0, "no test is ignored, so none needs a GPU");
    Ok(())
}

/// The name of a test that a run of this binary reports as ignored.
fn first_ignored(test: &Executable) -> Result<Option<String>> {
    let output = Command::new(&test.path)
        .args(["--list", "--ignored", "--format=terse"])
        .env_remove(REQUIRE_GPU)
        .output()?;
    ensure!(output.status.success(), "{} does not list its tests", test.name);
    let listed = String::from_utf8(output.stdout)?;
    Ok(listed.lines().find_map(|line| line.strip_suffix(": test")).map(str::to_owned))
}

/// Reads the dynamic section.
fn names_no_driver_library(executable: &Path) -> Result<()> {
    let output = Command::new("readelf")
        .args(["--wide", "--dynamic"])
        .arg(executable)
        .output()
        .context("readelf of binutils is needed")?;
    let dynamic = String::from_utf8_lossy(&output.stdout).into_owned();
    let needed = || dynamic.lines().filter(|line| line.contains("(NEEDED)"));
    ensure!(needed().count() > 0, "readelf finds no needed library in {}", executable.display());
    let driver = needed().find(|line| line.contains("libcuda"));
    ensure!(driver.is_none(), "{} needs a driver: {}", executable.display(), driver.unwrap_or(""));
    Ok(())
}
