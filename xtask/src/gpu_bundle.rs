//! `cargo xtask gpu-bundle`: tests, benches, examples and the peers' scripts in one folder, to run on
//! a GPU machine that has no Rust.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::cargo_artifacts::{Executable, build, cargo};

/// The folder, from the workspace root.
const FOLDER: &str = "dist/gpu";

/// Each program has its own copy of the modules. `tar` and `xz --lzma2=dict=128MiB` find that out:
/// packed, the folder has a fourteenth of its size.
const SIZE_LIMIT: u64 = 160 << 20;

/// Tests that read the checkout or run cargo: there is nothing for them on a GPU machine.
const CHECKOUT_TESTS: [&str; 1] = ["ptx"];

/// The script that runs what is in the folder; copied, so that it stays executable.
const RUN: &str = "xtask/src/gpu_bundle/run";

/// What a GPU machine compiles itself to be compared with; the file says how.
const CUB: &str = "benches/peer/cub.cu";

/// The scripts that measure PyTorch and Triton.
const PEERS: &str = "benches/peer";

/// What these read: the committed PTX, and the tiles of the kernel that they launch from it.
const READ_BY_PEERS: [&str; 2] = ["kasmina-kernels/ptx", "kasmina-kernels/src/gemm/hopper.rs"];

const SELECTION: [&str; 3] =
    ["--package=kasmina", "--profile=release", "--target-dir=target/gpu-bundle"];

/// Builds the folder anew.
///
/// # Errors
/// A failing build, or programs of more than 160 MiB.
pub fn write(workspace: &Path) -> Result<()> {
    let folder = workspace.join(FOLDER);
    if folder.exists() {
        fs::remove_dir_all(&folder).with_context(|| format!("cannot remove {FOLDER}"))?;
    }
    let mut size = 0;
    for (kind, arguments) in [
        ("test", ["test", "--tests", "--no-run"].as_slice()),
        ("bench", &["bench", "--benches", "--no-run"]),
        ("example", &["build", "--examples"]),
    ] {
        let kind_folder = folder.join(kind);
        fs::create_dir_all(&kind_folder)?;
        let built = build(stripped_release(workspace).args(arguments).args(SELECTION))?;
        // Not the library's own test binary: it has another kind, and nothing for a GPU.
        for Executable { name, path, .. } in built.into_iter().filter(|built| built.kind == kind) {
            if CHECKOUT_TESTS.contains(&name.as_str()) {
                continue;
            }
            size += fs::copy(&path, kind_folder.join(&name))
                .with_context(|| format!("cannot copy {}", path.display()))?;
            println!("{FOLDER}/{kind}/{name}");
        }
    }
    fs::copy(workspace.join(RUN), folder.join("run"))?;
    fs::copy(workspace.join(CUB), folder.join("cub.cu"))?;
    copy_peers(workspace, &folder)?;
    ensure!(
        size <= SIZE_LIMIT,
        "the programs in {FOLDER} have {} MiB, more than the {} MiB that they may: embed less data in \
         tests and examples",
        size >> 20,
        SIZE_LIMIT >> 20
    );
    println!("{:.1} MiB; on the GPU machine: {FOLDER}/run", size as f64 / f64::from(1 << 20));
    Ok(())
}

/// Copies the peers' scripts and what they read, which lies in the folder as it does here.
fn copy_peers(workspace: &Path, folder: &Path) -> Result<()> {
    for file in files(&workspace.join(PEERS))? {
        if file.extension().is_some_and(|extension| extension == "py") {
            copy_into(workspace, folder, &file)?;
        }
    }
    for path in READ_BY_PEERS {
        for file in files(&workspace.join(path))? {
            copy_into(workspace, folder, &file)?;
        }
    }
    Ok(())
}

/// The file, or all files in the folder and below it.
fn files(path: &Path) -> Result<Vec<PathBuf>> {
    if path.is_file() {
        return Ok(vec![path.to_path_buf()]);
    }
    let mut found = Vec::new();
    for entry in fs::read_dir(path).with_context(|| format!("cannot read {}", path.display()))? {
        found.extend(files(&entry?.path())?);
    }
    Ok(found)
}

/// Copies a file of the workspace to where it lies there, from `folder` on.
fn copy_into(workspace: &Path, folder: &Path, file: &Path) -> Result<()> {
    let target = folder.join(file.strip_prefix(workspace)?);
    fs::create_dir_all(target.parent().context("a file lies in a folder")?)?;
    fs::copy(file, &target).with_context(|| format!("cannot copy {}", file.display()))?;
    Ok(())
}

/// cargo without symbols in what it links. It builds in a target folder of its own, because with
/// other flags it would rebuild every dependency each time.
fn stripped_release(workspace: &Path) -> Command {
    let mut cargo = cargo();
    cargo
        .current_dir(workspace)
        .env("CARGO_PROFILE_RELEASE_STRIP", "symbols")
        .env("CARGO_PROFILE_RELEASE_DEBUG", "false");
    cargo
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::process::Output;

    /// A folder with the script and programs that are shell scripts of these texts.
    fn folder(programs: &[(&str, &str)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        fs::copy(crate::workspace().join(RUN), folder.path().join("run")).unwrap();
        for (name, text) in programs {
            let path = folder.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        }
        folder
    }

    /// The script, with the programs of the folder `bin` before others.
    fn run(folder: &tempfile::TempDir, arguments: &[&str]) -> Command {
        let path = folder.path().join("bin").into_os_string().into_string().unwrap();
        let mut run = Command::new("bash");
        run.arg("run")
            .args(arguments)
            .current_dir(folder.path())
            .env("PATH", path + ":" + &std::env::var("PATH").unwrap())
            // So that no nvcc is looked for.
            .env("KASMINA_CUB", "none");
        run
    }

    /// Whether it succeeds, and what it prints as output and as errors.
    fn outcome(run: &mut Command) -> (bool, String, String) {
        let Output { status, stdout, stderr } = run.output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (status.success(), text(stdout), text(stderr))
    }

    /// Whether `run perf` succeeds, and what it left in its file.
    fn perf(folder: &tempfile::TempDir) -> (bool, String) {
        let (succeeded, ..) = outcome(&mut run(folder, &["perf", "results"]));
        (succeeded, fs::read_to_string(folder.path().join("results")).unwrap_or_default())
    }

    const WRITES: &str = r#"[ "$1" = --help ] && echo "--json FILE" || echo "$0 $2" >> "$3""#;

    #[test]
    fn perf_runs_every_bench_and_collects_what_those_with_json_write() {
        let folder = folder(&[
            ("bench/gemm", WRITES),
            ("bench/launch", r#"[ "$1" = --help ] || [ $# = 1 ]"#),
            ("bench/reduce", WRITES),
        ]);
        let (succeeded, results) = perf(&folder);
        assert!(succeeded);
        let written: Vec<&str> =
            results.lines().filter_map(|line| line.rsplit('/').next()).collect();
        assert_eq!(written, ["gemm --json", "reduce --json"]);
    }

    #[test]
    fn perf_fails_where_a_bench_does_after_the_others_have_run_or_where_none_measures() {
        let (succeeded, results) = perf(&folder(&[("bench/a", "exit 3"), ("bench/b", WRITES)]));
        assert!(!succeeded && results.contains("b --json"), "{results}");
        assert!(!perf(&folder(&[("bench/launch", "true")])).0);
    }

    /// Takes the place of python3: appends the script and what follows `--json FILE` to that file.
    const PYTHON: &str = r#"script=${1##*/} file=$3; shift 3; echo "$script $*" >> "$file""#;

    #[test]
    fn peers_write_where_the_benches_do_and_pytorch_is_set_beside_what_is_there() {
        let folder = folder(&[("bin/python3", PYTHON)]);
        let mut written = String::new();
        for expected in ["torch_layers.py \n", "torch_layers.py --beside results\n"] {
            let (succeeded, ..) = outcome(&mut run(&folder, &["peer", "results"]));
            assert!(succeeded);
            written += &format!("{expected}triton_gemm.py \n");
            let results = fs::read_to_string(folder.path().join("results")).unwrap();
            assert_eq!(results, written);
        }
    }

    #[test]
    fn a_peer_that_fails_is_named_after_the_others_have_run() {
        let folder = folder(&[("bin/python3", "echo $1; case $1 in *torch*) exit 3; esac")]);
        let (succeeded, out, err) = outcome(&mut run(&folder, &["peer"]));
        assert!(!succeeded && out.contains("triton_gemm.py"), "{out}");
        assert!(err.contains("failed: torch_layers\n"), "{err}");
    }

    #[test]
    fn peers_find_in_the_folder_what_they_import_and_read() {
        let folder = tempfile::tempdir().unwrap();
        copy_peers(crate::workspace(), folder.path()).unwrap();
        let text = |path: &str| fs::read_to_string(folder.path().join(path)).unwrap();
        let scripts = ["torch_layers", "triton_gemm", "timing", "triton_kernels"];
        for script in scripts {
            let text = text(&format!("{PEERS}/{script}.py"));
            for module in ["timing", "triton_kernels", "kasmina_kernel"] {
                let imports = text.lines().any(|line| {
                    line == format!("import {module}")
                        || line.starts_with(&format!("from {module} "))
                });
                let file = folder.path().join(PEERS).join(format!("{module}.py"));
                assert!(!imports || file.exists(), "{script} imports {module}");
            }
        }
        let entry = "gemm_bf16_kn_128x256x64";
        assert!(text("kasmina-kernels/ptx/manifest.json").contains(entry));
        assert!(text(&format!("kasmina-kernels/ptx/hopper/{entry}.ptx")).contains(entry));
        assert!(text("kasmina-kernels/src/gemm/hopper.rs").contains(&format!("{entry}:")));
    }

    const PASSES: &str = r#"echo "test result: ok, $*""#;

    #[test]
    fn tests_get_the_arguments_and_one_that_fails_is_named_after_all_have_run() {
        let folder = folder(&[
            ("test/conv1d", "echo wrong; exit 101"),
            ("test/gemm", PASSES),
            ("test/persistent", PASSES),
        ]);
        let (succeeded, out, err) = outcome(&mut run(&folder, &["test", "ragged", "--exact"]));
        assert!(!succeeded);
        for name in ["gemm", "persistent"] {
            assert!(out.contains(&format!("== {name}: test result: ok, ragged --exact")), "{out}");
        }
        assert!(err.contains("wrong\nexit status 101\nfailed: conv1d\n"), "{err}");
    }

    #[test]
    fn tests_that_take_longer_than_their_limit_have_failed() {
        let folder = folder(&[("test/gemm", "sleep 60")]);
        let (succeeded, _, err) = outcome(run(&folder, &["test"]).env("KASMINA_TEST_LIMIT", "0.1"));
        assert!(!succeeded && err.contains("exit status 124"), "{err}");
    }

    #[test]
    fn sanitizers_get_every_test_with_short_lists() {
        let folder = folder(&[
            ("bin/compute-sanitizer", "echo ERROR SUMMARY: $KASMINA_TEST_REDUCED $*"),
            ("test/gemm", "exit 1"),
            ("test/persistent", "exit 1"),
        ]);
        let (succeeded, out, _) = outcome(
            run(&folder, &["sanitize", "racecheck", "prime"])
                .env("KASMINA_SANITIZER_OPTIONS", "--print-limit 40"),
        );
        assert!(succeeded, "{out}");
        for name in ["gemm", "persistent"] {
            let line = out.lines().find(|line| line.starts_with(&format!("== {name}: "))).unwrap();
            assert!(line.contains("1 --tool racecheck"), "{line}");
            assert!(line.contains(" --print-limit 40 "), "{line}");
            assert!(line.ends_with(&format!("/test/{name} prime")), "{line}");
        }
        assert!(!outcome(&mut run(&folder, &["sanitize"])).0);
    }
}
