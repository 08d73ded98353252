//! Finds a Rust toolchain that can build for the device, and runs it.
//!
//! Building `core` for `nvptx64-nvidia-cuda` needs the standard library's sources, and unstable
//! features: a nightly, or a stable compiler under `RUSTC_BOOTSTRAP=1`.

use std::env;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use kasmina_kernels::abi::Tier;

use crate::manifest::Compiler;

/// Names a folder that holds `rustc` and `cargo`, to be used instead of what is found.
pub const OVERRIDE: &str = "KASMINA_DEVICE_TOOLCHAIN";

const TARGET: &str = "nvptx64-nvidia-cuda";

/// The release profile as device code needs it: fat LTO and one codegen unit, so that the emitted
/// assembly is the complete module and nothing remains to be linked.
const PROFILE: [(&str, &str); 6] = [
    ("CARGO_PROFILE_RELEASE_OPT_LEVEL", "3"),
    ("CARGO_PROFILE_RELEASE_LTO", "fat"),
    ("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "1"),
    ("CARGO_PROFILE_RELEASE_PANIC", "abort"),
    ("CARGO_PROFILE_RELEASE_DEBUG", "false"),
    ("CARGO_PROFILE_RELEASE_OVERFLOW_CHECKS", "false"),
];

const CARGO_ARGUMENTS: [&str; 10] = [
    "rustc",
    "--locked",
    "--package=kasmina-kernels",
    "--lib",
    "--release",
    "--no-default-features",
    "--target=nvptx64-nvidia-cuda",
    "--crate-type=cdylib",
    "-Zbuild-std=core",
    "--quiet",
];

const INSTALL: &str = "install one of
  rustup toolchain install nightly --component rust-src
  apt-get install rustc-web cargo-web rust-web-src        (Debian 12 with its security updates)
or name a folder with a rustc and cargo that have rust-src in KASMINA_DEVICE_TOOLCHAIN";

/// A Rust toolchain with the sources of the standard library.
#[derive(Debug)]
pub struct DeviceToolchain {
    /// What it reports about itself.
    pub compiler: Compiler,
    rustc: PathBuf,
    cargo: PathBuf,
    library: PathBuf,
}

impl DeviceToolchain {
    /// The toolchain that built the committed PTX if it is here, else the first that can build it.
    ///
    /// # Errors
    /// None is here; the message says which were looked at and what to install.
    pub fn find(committed: Option<&Compiler>) -> Result<Self> {
        let mut refused = String::new();
        let mut usable = Vec::new();
        for folder in candidates() {
            match Self::at(&folder) {
                Ok(toolchain) => usable.push(toolchain),
                Err(reason) => write!(refused, "\n  {}: {reason:#}", folder.display())?,
            }
        }
        let same = usable.iter().position(|toolchain| Some(&toolchain.compiler) == committed);
        if usable.is_empty() {
            bail!("no toolchain here can build for {TARGET}:{refused}\n{INSTALL}");
        }
        Ok(usable.swap_remove(same.unwrap_or(0)))
    }

    fn at(folder: &Path) -> Result<Self> {
        let (rustc, cargo) = (folder.join("rustc"), folder.join("cargo"));
        ensure!(rustc.is_file() && cargo.is_file(), "it does not hold both rustc and cargo");
        let version = output(clean_command(&rustc).arg("-vV"))?;
        let compiler = Compiler::from_verbose_version(&version)?;
        let sysroot = output(clean_command(&rustc).args(["--print", "sysroot"]))?;
        let library = Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library");
        ensure!(library.join("core").is_dir(), "{} has no rust-src", compiler.rustc);
        Ok(Self { compiler, rustc, cargo, library })
    }

    /// Compiles the kernels of `tier` and returns the PTX that rustc emitted.
    ///
    /// # Errors
    /// The build fails; cargo has printed why.
    pub fn build(&self, workspace: &Path, tier: Tier) -> Result<String> {
        let tier_name = tier.name();
        // A target folder for each tier: in a shared one, `core` would be rebuilt every time.
        let target_dir = target_dir(workspace).join("ptx").join(tier_name);
        let assembly = target_dir.join("kasmina_kernels.ptx");
        let mut rustflags = tier_flags(tier)?;
        // Paths must not differ from one checkout to the next.
        for (from, to) in
            [(workspace, "/kasmina"), (&self.library, "/rust"), (&cargo_home()?, "/cargo")]
        {
            rustflags.push(format!("--remap-path-prefix={}={to}", from.display()));
        }
        let status = clean_command(&self.cargo)
            .current_dir(workspace)
            .args(CARGO_ARGUMENTS)
            .arg("--target-dir")
            .arg(&target_dir)
            .args(["--", "--emit"])
            .arg(format!("asm={}", assembly.display()))
            .env("RUSTC", &self.rustc)
            .env("RUSTC_BOOTSTRAP", "1")
            .env("CARGO_ENCODED_RUSTFLAGS", rustflags.join("\u{1f}"))
            // What is linked is thrown away.
            .env("CARGO_TARGET_NVPTX64_NVIDIA_CUDA_LINKER", "true")
            .envs(PROFILE)
            .status()
            .with_context(|| format!("cannot run {}", self.cargo.display()))?;
        ensure!(
            status.success(),
            "the kernels of the {tier_name} tier do not build for the device"
        );
        fs::read_to_string(&assembly).with_context(|| format!("cannot read {}", assembly.display()))
    }
}

/// The rustc flags that make a build one of `tier`.
fn tier_flags(tier: Tier) -> Result<Vec<String>> {
    let target_cpu = tier.target_cpu().with_context(|| format!("the {tier} tier has no PTX"))?;
    Ok(vec![format!("-Ctarget-cpu={target_cpu}"), format!("--cfg=kasmina_tier=\"{tier}\"")])
}

/// Everything on the command line that decides what is built, for the manifest.
///
/// # Errors
/// A tier without PTX.
pub fn build_flags(tiers: &[Tier]) -> Result<Vec<String>> {
    let mut flags: Vec<String> = CARGO_ARGUMENTS.map(str::to_owned).to_vec();
    flags.extend(PROFILE.map(|(name, value)| format!("{name}={value}")));
    for &tier in tiers {
        flags.push(format!("{tier}: {}", tier_flags(tier)?.join(" ")));
    }
    Ok(flags)
}

/// Folders that may hold a toolchain, the preferred first.
fn candidates() -> Vec<PathBuf> {
    if let Some(folder) = env::var_os(OVERRIDE) {
        return vec![folder.into()];
    }
    let mut folders = vec![PathBuf::from("/usr/bin")];
    let installed = output(clean_command("rustup").args(["toolchain", "list"])).unwrap_or_default();
    for name in installed.lines().filter_map(|line| line.split_whitespace().next()) {
        if !name.starts_with("nightly") {
            continue;
        }
        let mut rustc = clean_command("rustup");
        rustc.args(["run", name, "rustc", "--print", "sysroot"]);
        if let Ok(sysroot) = output(&mut rustc) {
            folders.push(Path::new(sysroot.trim()).join("bin"));
        }
    }
    folders
}

/// A command without what cargo and rustup tell their children about the toolchain and profile
/// that xtask itself is run by.
fn clean_command(program: impl AsRef<std::ffi::OsStr>) -> Command {
    const FOREIGN: [&str; 7] = [
        "CARGO_BUILD_",
        "CARGO_ENCODED_",
        "CARGO_PROFILE_",
        "CARGO_TARGET_",
        "RUSTC",
        "RUSTFLAGS",
        "RUSTUP_TOOLCHAIN",
    ];
    let mut command = Command::new(program);
    for (name, _) in env::vars_os() {
        let name = name.to_string_lossy();
        // cargo puts its own toolchain's libraries in LD_LIBRARY_PATH.
        if name == "LD_LIBRARY_PATH" || FOREIGN.iter().any(|prefix| name.starts_with(prefix)) {
            command.env_remove(&*name);
        }
    }
    command
}

/// What a successful command prints.
fn output(command: &mut Command) -> Result<String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.output().with_context(|| format!("cannot run {program}"))?;
    ensure!(
        output.status.success(),
        "{program} fails: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    String::from_utf8(output.stdout).with_context(|| format!("{program} prints no UTF-8"))
}

fn target_dir(workspace: &Path) -> PathBuf {
    env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| workspace.join("target"), |dir| workspace.join(dir))
}

fn cargo_home() -> Result<PathBuf> {
    let home = || Some(PathBuf::from(env::var_os("HOME")?).join(".cargo"));
    env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(home)
        .context("neither CARGO_HOME nor HOME is set")
}
