//! `cargo xtask ptx`: builds the committed PTX, or checks it.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::thread;

use anyhow::{Context, Result, bail, ensure};
use kasmina_kernels::abi::{MODULES, Module, Tier};

use crate::device_toolchain::{DeviceToolchain, build_flags};
use crate::manifest::{Manifest, ModuleRow};
use crate::nvidia_tools::NvidiaTools;
use crate::ptx_text::Ptx;
use crate::source_digest::{MANIFEST, device_sources, differing, sha256};

/// Where the modules are committed, from the workspace root.
pub const FOLDER: &str = "kasmina-kernels/ptx";

const REMEDY: &str = "run `cargo xtask ptx` and commit kasmina-kernels/ptx";

/// A fresh build: the manifest and, row by row, the modules' texts.
struct Build {
    manifest: Manifest,
    texts: Vec<String>,
}

/// Path of a module under `kasmina-kernels/ptx/`.
#[must_use]
pub fn file(module: &Module) -> String {
    format!("{}/{}.ptx", module.tier, module.name)
}

/// Builds every module and writes it with the manifest.
///
/// # Errors
/// No toolchain, a failing build, or kernels that do not match `kasmina_kernels::abi::MODULES`.
pub fn write(workspace: &Path) -> Result<()> {
    let committed = Manifest::read(workspace).unwrap_or_default();
    let toolchain = DeviceToolchain::find(committed.as_ref().map(|manifest| &manifest.compiler))?;
    let build = build(workspace, &toolchain)?;
    let folder = workspace.join(FOLDER);
    for (row, text) in build.manifest.modules.iter().zip(&build.texts) {
        let path = folder.join(&row.file);
        fs::create_dir_all(path.parent().context("a module lies in its tier's folder")?)?;
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        println!("{FOLDER}/{} {} bytes", row.file, text.len());
    }
    for file in surplus_files(&folder, &build.manifest)? {
        fs::remove_file(folder.join(&file))?;
        println!("{FOLDER}/{file} removed");
    }
    fs::write(workspace.join(MANIFEST), build.manifest.to_json()?)?;
    println!("built by {}", build.manifest.compiler);
    Ok(())
}

/// Builds every module and compares it with what is committed.
///
/// The compiler that built the committed PTX must give the same bytes. Another one must give the
/// same entries, in PTX that ptxas accepts.
///
/// # Errors
/// As [`write()`], and any difference.
pub fn check(workspace: &Path) -> Result<()> {
    let committed =
        Manifest::read(workspace)?.with_context(|| format!("{MANIFEST} is missing: {REMEDY}"))?;
    let toolchain = DeviceToolchain::find(Some(&committed.compiler))?;
    let build = build(workspace, &toolchain)?;
    let fresh = &build.manifest;
    let stale = differing(&committed.sources, &fresh.sources);
    ensure!(stale.is_empty(), "the committed PTX predates {}: {REMEDY}", stale.join(", "));
    ensure!(committed.flags == fresh.flags, "the committed PTX has other build flags: {REMEDY}");
    let folder = workspace.join(FOLDER);
    let surplus = surplus_files(&folder, fresh)?;
    ensure!(surplus.is_empty(), "no `Module` lists {}: {REMEDY}", surplus.join(", "));
    if committed.compiler == fresh.compiler {
        for (row, text) in fresh.modules.iter().zip(&build.texts) {
            let same = fs::read_to_string(folder.join(&row.file)).is_ok_and(|ptx| ptx == *text);
            ensure!(same, "{FOLDER}/{} is not what its sources give: {REMEDY}", row.file);
        }
        ensure!(committed == *fresh, "{MANIFEST} does not describe the modules: {REMEDY}");
        println!("{} modules are what their sources give, byte for byte", fresh.modules.len());
        return Ok(());
    }
    println!("built by {}, committed from {}", fresh.compiler, committed.compiler);
    let tools = NvidiaTools::find()?;
    for (index, (row, text)) in fresh.modules.iter().zip(&build.texts).enumerate() {
        let entries = committed.modules.get(index).map(|module| (&module.file, &module.entries));
        ensure!(
            entries == Some((&row.file, &row.entries)),
            "{}: other entries: {REMEDY}",
            row.file
        );
        tools.assemble(text, &row.target).with_context(|| row.file.clone())?;
    }
    println!("{} modules have the committed entries and ptxas accepts them", fresh.modules.len());
    Ok(())
}

fn build(workspace: &Path, toolchain: &DeviceToolchain) -> Result<Build> {
    let tiers: Vec<Tier> =
        Tier::ALL.into_iter().filter(|tier| tier.target_cpu().is_some()).collect();
    let sources = device_sources(workspace).context("cannot read the device sources")?;
    // Most of a build is one LTO step on one thread, so the tiers are built side by side.
    let built: Vec<Result<Ptx>> = thread::scope(|scope| {
        let threads: Vec<_> = tiers
            .iter()
            .map(|&tier| scope.spawn(move || Ptx::parse(&toolchain.build(workspace, tier)?)))
            .collect();
        threads.into_iter().map(|thread| thread.join().expect("a build does not panic")).collect()
    });
    let mut ptx_of = Vec::new();
    for (&tier, ptx) in tiers.iter().zip(built) {
        let ptx = ptx.with_context(|| format!("the {tier} tier"))?;
        every_entry_has_a_module(tier, &ptx)?;
        ptx_of.push((tier, ptx));
    }
    let mut modules = Vec::new();
    let mut texts = Vec::new();
    for module in MODULES {
        let Some((_, ptx)) = ptx_of.iter().find(|(tier, _)| *tier == module.tier) else {
            bail!("the module {} is of the tier {}, which has no PTX", module.name, module.tier);
        };
        let text = ptx.module(module.entries).with_context(|| file(module))?;
        modules.push(ModuleRow {
            file: file(module),
            sha256: sha256(text.as_bytes()),
            // Instructions of its own may need a later one than the tier's.
            ptx_version: Ptx::parse(&text).with_context(|| file(module))?.version,
            target: ptx.target.clone(),
            entries: module.entries.iter().map(|&entry| entry.to_owned()).collect(),
        });
        texts.push(text);
    }
    let compiler = toolchain.compiler.clone();
    let manifest = Manifest { compiler, flags: build_flags(&tiers)?, sources, modules };
    Ok(Build { manifest, texts })
}

fn every_entry_has_a_module(tier: Tier, ptx: &Ptx) -> Result<()> {
    let listed: BTreeSet<&str> = MODULES
        .iter()
        .filter(|module| module.tier == tier)
        .flat_map(|module| module.entries)
        .copied()
        .collect();
    for entry in ptx.entries() {
        ensure!(
            listed.contains(entry),
            "the {tier} kernel {entry} is in no `Module`: add it to one, and the `Module` to \
             kasmina_kernels::abi::MODULES"
        );
    }
    Ok(())
}

/// Committed `.ptx` files that no module of `manifest` names.
fn surplus_files(folder: &Path, manifest: &Manifest) -> Result<Vec<String>> {
    let mut surplus = Vec::new();
    for tier in Tier::ALL {
        // A tier without a folder has no surplus.
        let Ok(files) = fs::read_dir(folder.join(tier.name())) else { continue };
        for entry in files {
            let file = format!("{tier}/{}", entry?.file_name().to_string_lossy());
            if !manifest.modules.iter().any(|module| module.file == file) {
                surplus.push(file);
            }
        }
    }
    Ok(surplus)
}
