//! Finds and runs ptxas and nvdisasm, which check the PTX. No user of kasmina needs them.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::workspace;

/// Names ptxas itself; nvdisasm is looked for beside it.
pub const OVERRIDE: &str = "KASMINA_PTXAS";

const INSTALL: &str = "ptxas and nvdisasm are not both here. They come with the CUDA toolkit 13, or
  python3 -m pip install --no-deps --target target/nvidia/lib/python3/site-packages \
nvidia-cuda-nvcc==13.0.88 nvidia-cuda-nvdisasm==13.5.37
They are looked for beside KASMINA_PTXAS, or in PATH, CUDA_HOME/bin, CUDA_PATH/bin, VIRTUAL_ENV \
and target/nvidia";

/// The tools, found.
#[derive(Debug)]
pub struct NvidiaTools {
    ptxas: PathBuf,
    nvdisasm: PathBuf,
}

/// What ptxas made of a module.
#[derive(Debug)]
pub struct Assembled {
    /// What `ptxas -v` prints: resources per function, performance warnings.
    pub report: String,
    /// The machine code.
    pub cubin: Vec<u8>,
}

impl NvidiaTools {
    /// The first folder that holds both.
    ///
    /// # Errors
    /// There is none; the message says what to install.
    pub fn find() -> Result<Self> {
        let in_folder = |folder: PathBuf| {
            let tools = Self { ptxas: folder.join("ptxas"), nvdisasm: folder.join("nvdisasm") };
            (tools.ptxas.is_file() && tools.nvdisasm.is_file()).then_some(tools)
        };
        folders().into_iter().find_map(in_folder).context(INSTALL)
    }

    /// Compiles PTX for `target`.
    ///
    /// # Errors
    /// ptxas refuses it; the message is ptxas's.
    pub fn assemble(&self, ptx: &str, target: &str) -> Result<Assembled> {
        let folder = tempfile::tempdir()?;
        let (input, cubin) = (folder.path().join("module.ptx"), folder.path().join("module.cubin"));
        fs::write(&input, ptx)?;
        let output = Command::new(&self.ptxas)
            .args(["--verbose", "--gpu-name", target, "--output-file"])
            .args([&cubin, &input])
            .output()
            .with_context(|| format!("cannot run {}", self.ptxas.display()))?;
        let report = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.success(), "ptxas refuses it:\n{report}");
        Ok(Assembled { report, cubin: fs::read(&cubin)? })
    }

    /// The machine code as text.
    ///
    /// # Errors
    /// nvdisasm refuses it; the message is nvdisasm's.
    pub fn disassemble(&self, cubin: &[u8]) -> Result<String> {
        let folder = tempfile::tempdir()?;
        let input = folder.path().join("module.cubin");
        fs::write(&input, cubin)?;
        let output = Command::new(&self.nvdisasm)
            .arg("--print-code")
            .arg(&input)
            .output()
            .with_context(|| format!("cannot run {}", self.nvdisasm.display()))?;
        ensure!(
            output.status.success(),
            "nvdisasm refuses it:\n{}",
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

fn folders() -> Vec<PathBuf> {
    if let Some(ptxas) = env::var_os(OVERRIDE) {
        return Path::new(&ptxas).parent().map(Path::to_owned).into_iter().collect();
    }
    let mut folders: Vec<PathBuf> = env::var_os("PATH").iter().flat_map(env::split_paths).collect();
    for toolkit in ["CUDA_HOME", "CUDA_PATH"] {
        folders.extend(env::var_os(toolkit).map(|folder| PathBuf::from(folder).join("bin")));
    }
    let environments = env::var_os("VIRTUAL_ENV").map(PathBuf::from).into_iter();
    for environment in environments.chain([workspace().join("target/nvidia")]) {
        folders.extend(wheel_folders(&environment));
    }
    folders
}

/// Where pip puts NVIDIA's tools: `lib/python3.11/site-packages/nvidia/cu13/bin`.
fn wheel_folders(environment: &Path) -> Vec<PathBuf> {
    let subfolders = |folder: PathBuf| -> Vec<PathBuf> {
        fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
    };
    subfolders(environment.join("lib"))
        .into_iter()
        .flat_map(|python| subfolders(python.join("site-packages/nvidia")))
        .map(|package| package.join("bin"))
        .collect()
}
