//! `kasmina-kernels/ptx/manifest.json`: what the committed PTX is and what it was built from.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::source_digest::MANIFEST;

/// The manifest's content.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// What built it.
    pub compiler: Compiler,
    /// The flags it was built with.
    pub flags: Vec<String>,
    /// What it was built from; see [`device_sources`](crate::source_digest::device_sources).
    pub sources: BTreeMap<String, String>,
    /// One row per module, in the order of `kasmina_kernels::abi::MODULES`.
    pub modules: Vec<ModuleRow>,
}

/// The compiler, as far as it decides what is emitted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Compiler {
    /// First line of `rustc -vV`.
    pub rustc: String,
    /// Version of the LLVM it uses.
    pub llvm: String,
}

/// A committed module.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModuleRow {
    /// Its path under `kasmina-kernels/ptx/`.
    pub file: String,
    /// SHA-256 of the file.
    pub sha256: String,
    /// The PTX ISA version it is written in.
    pub ptx_version: String,
    /// The architecture it is for.
    pub target: String,
    /// Its entries.
    pub entries: Vec<String>,
}

impl Compiler {
    /// Reads the output of `rustc -vV`.
    ///
    /// # Errors
    /// It lacks the version of rustc or of LLVM.
    pub fn from_verbose_version(text: &str) -> Result<Self> {
        let rustc = text.lines().find(|line| line.starts_with("rustc "));
        let llvm = text.lines().find_map(|line| line.strip_prefix("LLVM version: "));
        let (rustc, llvm) = rustc.zip(llvm).with_context(|| format!("not a version: {text}"))?;
        Ok(Self { rustc: rustc.to_owned(), llvm: llvm.to_owned() })
    }
}

impl fmt::Display for Compiler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} with LLVM {}", self.rustc, self.llvm)
    }
}

impl Manifest {
    /// The committed manifest; `None` before there is one.
    ///
    /// # Errors
    /// It is not one that this xtask wrote.
    pub fn read(workspace: &Path) -> Result<Option<Self>> {
        let Ok(text) = fs::read_to_string(workspace.join(MANIFEST)) else {
            return Ok(None);
        };
        let manifest = serde_json::from_str(&text)
            .with_context(|| format!("{MANIFEST} is damaged: run `cargo xtask ptx`"))?;
        Ok(Some(manifest))
    }

    /// The manifest as the file holds it.
    ///
    /// # Errors
    /// None in practice.
    pub fn to_json(&self) -> Result<String> {
        Ok(serde_json::to_string_pretty(self)? + "\n")
    }
}
