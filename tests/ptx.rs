//! The committed PTX: current, complete, and accepted by ptxas without the defects that cost
//! speed. No GPU is needed; the tests that need ptxas and nvdisasm are reported as ignored where
//! these are not installed, and fail there under `KASMINA_REQUIRE_PTXAS=1`.

use std::env;
use std::process::ExitCode;
use std::sync::Arc;

use kasmina_kernels::abi::{MODULES, Module, Tier};
use libtest_mimic::{Arguments, Failed, Trial};
use xtask::manifest::Manifest;
use xtask::nvidia_tools::{Assembled, NvidiaTools};
use xtask::ptx::file;
use xtask::ptx_text::Ptx;
use xtask::source_digest::{sha256, stale_sources};
use xtask::workspace;

fn main() -> ExitCode {
    let mut trials = vec![
        Trial::test("committed_ptx_is_built_from_the_sources_beside_it", sources_are_current),
        Trial::test("manifest_describes_every_embedded_module", manifest_is_complete),
    ];
    for &module in MODULES {
        let name = |claim: &str| format!("{}_{}_{claim}", module.tier, module.name);
        trials.push(Trial::test(name("holds_the_entries_the_host_launches"), || {
            entries_agree(module)
        }));
        if module.name.starts_with("persistent_") && module.name != "persistent_echo" {
            trials.push(Trial::test(name("has_each_barrier_once"), || barriers_are_single(module)));
        }
        if module.name.contains("_direct_") {
            trials.push(Trial::test(name("has_each_barrier_once"), || {
                direct_barriers_are_single(module)
            }));
        }
        if module.name.starts_with("reduce") || module.name.ends_with("telemetry") {
            trials.push(Trial::test(name("exchanges_nothing_in_two_copies"), || {
                exchanges_stand_once(module)
            }));
        }
        if module.tier == Tier::Hopper {
            trials.push(Trial::test(name("names_no_local_memory_and_no_panic"), || {
                no_local_memory(module)
            }));
        }
    }
    trials.extend(tool_trials());
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}

/// The tests that need NVIDIA's tools.
fn tool_trials() -> Vec<Trial> {
    let tools = Arc::new(NvidiaTools::find().map_err(|error| format!("{error:#}")));
    let required = env::var_os("KASMINA_REQUIRE_PTXAS").is_some_and(|value| value == "1");
    let ignored = tools.is_err() && !required;
    let mut trials = Vec::new();
    let mut add = |module: &'static Module, claim: &str, check: Check| {
        let tools = Arc::clone(&tools);
        let run = move || check(module, tools.as_ref().as_ref()?);
        let name = format!("{}_{}_{claim}", module.tier, module.name);
        trials.push(Trial::test(name, run).with_ignored_flag(ignored));
    };
    for &module in MODULES {
        add(module, "is_accepted_by_ptxas_without_stack_or_spill", assembles_cleanly);
        let multiplies =
            ["gemm", "wgrad", "conv1d_f32"].iter().any(|prefix| module.name.starts_with(prefix));
        if module.tier == Tier::Hopper && multiplies {
            if module.name.contains("_direct_") {
                add(module, "compiles_to_mma_and_asynchronous_copies", uses_mma);
                continue;
            }
            add(module, "compiles_to_wgmma_and_tma", uses_tensor_cores_and_tma);
            add(module, "main_loop_has_no_memory_barrier", main_loop_is_free_of_barriers);
        }
    }
    trials
}

type Check = fn(&Module, &NvidiaTools) -> Result<(), Failed>;

fn sources_are_current() -> Result<(), Failed> {
    let stale = stale_sources(workspace())?;
    require(stale.is_empty(), || {
        format!("{} changed since: run `cargo xtask ptx`", stale.join(", "))
    })
}

fn manifest_is_complete() -> Result<(), Failed> {
    let manifest = Manifest::read(workspace()).map_err(|error| format!("{error:#}"))?;
    let rows = manifest.ok_or("there is no manifest: run `cargo xtask ptx`")?.modules;
    require(rows.len() == MODULES.len(), || format!("{} rows", rows.len()))?;
    for (row, module) in rows.iter().zip(MODULES) {
        let row_of = || format!("the row of {} does not describe it: {row:?}", file(module));
        require(row.file == file(module) && row.entries == module.entries, row_of)?;
        require(row.sha256 == sha256(module.ptx().as_bytes()), row_of)?;
        require(Some(row.target.as_str()) == module.tier.target_cpu(), row_of)?;
        let ptx = parse(module)?;
        require(row.ptx_version == ptx.version && row.target == ptx.target, row_of)?;
    }
    Ok(())
}

fn entries_agree(module: &Module) -> Result<(), Failed> {
    let ptx = parse(module)?;
    let mut found: Vec<&str> = ptx.entries().collect();
    let mut listed = module.entries.to_vec();
    found.sort_unstable();
    listed.sort_unstable();
    require(found == listed, || format!("the PTX has {found:?}, the host launches {listed:?}"))
}

/// The compiler knows nothing of exchanges between threads. Where it makes two copies of one,
/// behind a condition that threads answer differently, they wait for each other for ever.
fn exchanges_stand_once(module: &Module) -> Result<(), Failed> {
    let hopper = module.tier == Tier::Hopper;
    for entry in module.ptx().split("\n.visible .entry ").skip(1) {
        let name = entry.split('(').next().unwrap_or_default();
        let count = |instructions: &[&str]| -> usize {
            instructions.iter().map(|instruction| entry.matches(instruction).count()).sum()
        };
        // As the sources have them. Barriers: none between warps that have segments of their own,
        // one in the single-stage sum, and of the others one for the first drawn chunk, one per
        // chunk, one for the ticket of the block that merges and one where it does. Exchanges: an
        // f64 takes two per step, of which a warp has 5 and the block's warps 3; what a tier adds up
        // in one instruction takes one. A forward pass with telemetry has 11 for what
        // tensor cores have added up, 20 for what is read back, and one more.
        let few = name.contains("_few_");
        let (barriers, exchanges) = match (name.rsplit('_').next(), hopper) {
            // The cluster's warps send what they have to one of them; those of one block alone meet
            // at a barrier.
            (Some("summary"), _) if few => (1, 36),
            (Some("sum"), _) if few => (1, 26),
            (Some("max" | "min"), _) if few => (1, 8),
            // One before the block's slot, and one where the slots are merged.
            (Some("summary"), _) if name.contains("_rows_") => (2, 68),
            (Some("sum"), _) if name.contains("_rows_") => (2, 48),
            (Some("segments"), true) => (0, 54),
            (Some("segments"), false) => (0, 86),
            // One between the block's warps.
            (Some("bands"), true) => (1, 80),
            (Some("bands"), false) => (1, 142),
            // One per four columns of a lane and between these, and two for the counter.
            (Some("columns"), _) if name.contains("_f32_") => (3, 0),
            (Some("columns"), _) => (5, 0),
            (Some("naive"), _) => (1, 8),
            // One at the start, one of each consumer before it reads back, and of each slab two,
            // for each of which both consumers' stand there.
            (Some("telemetry"), _) if name.contains("x256x") => (19, 32),
            (Some("telemetry"), _) => (11, 32),
            (Some("summary"), true) => (4, 88),
            (Some("summary"), false) => (4, 166),
            (Some("sum"), true) => (4, 48),
            (Some("sum"), false) => (4, 84),
            (_, true) => (4, 20),
            (_, false) => (4, 68),
        };
        let found = (count(&["bar.sync"]), count(&["shfl.sync.", "redux.sync.", "vote.sync."]));
        require(found == (barriers, exchanges), || {
            format!("{name} has {} barriers and {} exchanges", found.0, found.1)
        })?;
    }
    Ok(())
}

fn no_local_memory(module: &Module) -> Result<(), Failed> {
    let ptx = module.ptx();
    for forbidden in [".local", "__local_depot", "panic"] {
        let line = ptx.lines().find(|line| line.contains(forbidden));
        require(line.is_none(), || format!("`{forbidden}` in: {}", line.unwrap_or_default()))?;
    }
    Ok(())
}

/// The compiler does not know barriers: where a branch on the thread comes before and after one, it
/// may give both sides a barrier of their own, at which a warp's threads do not meet.
fn barriers_are_single(module: &Module) -> Result<(), Failed> {
    // Those of the source, inlined: one in `load_plans` and in each of two calls of `load_weights`,
    // three in `resident` and on Hopper a fourth, for waits that begin again, and those of
    // `compute`, which Hopper has for three sizes of batches.
    let expected = match module.tier {
        Tier::Hopper => 3 + 4 + 3 * 2,
        _ => 3 + 3 + 3,
    };
    let found = module.ptx().matches("bar.sync").count();
    require(found == expected, || format!("{found} barriers instead of {expected}"))
}

/// As [`barriers_are_single`], of the kernels that split f32 on its way.
fn direct_barriers_are_single(module: &Module) -> Result<(), Failed> {
    let ptx = module.ptx();
    // Two of the block; two of each slice, of warps or of lanes; two of the cluster, if there is one.
    let of_warps = module.name.contains("_64x64");
    let clusters = module.name.contains("64_k");
    for (barrier, expected) in [
        ("bar.sync", if of_warps { 4 } else { 2 }),
        ("bar.warp.sync", if of_warps { 0 } else { 2 }),
        ("barrier.cluster.arrive", if clusters { 2 } else { 0 }),
        ("redux.sync", 1),
    ] {
        let found = ptx.matches(barrier).count();
        require(found == expected, || format!("{found} {barrier} instead of {expected}"))?;
    }
    Ok(())
}

fn assembles_cleanly(module: &Module, tools: &NvidiaTools) -> Result<(), Failed> {
    let report = assemble(module, tools)?.report;
    let frames: Vec<&str> = report.lines().filter(|line| line.contains("stack frame")).collect();
    require(!frames.is_empty(), || format!("ptxas reports no stack frame:\n{report}"))?;
    let clean = "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads";
    require(frames.iter().all(|line| line.trim() == clean), || report.clone())?;
    // C75xx: wgmma serialised, setmaxnreg ignored and their like.
    require(module.tier != Tier::Hopper || !report.contains("(C75"), || report.clone())
}

fn uses_tensor_cores_and_tma(module: &Module, tools: &NvidiaTools) -> Result<(), Failed> {
    for sass in disassemble(module, tools)? {
        // f32 results leave by ordinary stores, so that rows of any length may.
        let stores_by_tma =
            !["gemm_f32", "conv1d_f32"].iter().any(|it| module.name.starts_with(it));
        for wanted in ["HGMMA", "UTMALDG", "UTMASTG"] {
            if wanted == "UTMASTG" && !stores_by_tma {
                continue;
            }
            require(sass.iter().any(|opcode| is(opcode, wanted)), || format!("no {wanted}"))?;
        }
        for forbidden in ["LDL", "STL"] {
            require(!sass.iter().any(|opcode| is(opcode, forbidden)), || format!("a {forbidden}"))?;
        }
    }
    Ok(())
}

fn uses_mma(module: &Module, tools: &NvidiaTools) -> Result<(), Failed> {
    for sass in disassemble(module, tools)? {
        for wanted in ["HMMA", "LDGSTS"] {
            require(sass.iter().any(|opcode| is(opcode, wanted)), || format!("no {wanted}"))?;
        }
        for forbidden in ["LDL", "STL", "MEMBAR"] {
            let found = sass.iter().any(|opcode| is(opcode, forbidden));
            // A cluster's barrier orders memory outside of the block.
            let allowed = forbidden == "MEMBAR" && module.name.contains("64_k");
            require(!found || allowed, || format!("a {forbidden}"))?;
        }
    }
    Ok(())
}

fn main_loop_is_free_of_barriers(module: &Module, tools: &NvidiaTools) -> Result<(), Failed> {
    for sass in disassemble(module, tools)? {
        let first = sass.iter().position(|opcode| is(opcode, "HGMMA")).ok_or("no HGMMA")?;
        let last = sass.iter().rposition(|opcode| is(opcode, "HGMMA")).ok_or("no HGMMA")?;
        for forbidden in ["MEMBAR", "ERRBAR", "CCTL"] {
            let found = sass[first..last].iter().any(|opcode| is(opcode, forbidden));
            require(!found, || format!("a {forbidden} between two HGMMA"))?;
        }
    }
    Ok(())
}

/// Whether `opcode`, `HGMMA.64x256x16.F32.BF16` for instance, is a form of `mnemonic`.
fn is(opcode: &str, mnemonic: &str) -> bool {
    opcode.split('.').next() == Some(mnemonic)
}

fn parse(module: &Module) -> Result<Ptx, Failed> {
    Ok(Ptx::parse(&module.ptx()).map_err(|error| format!("{error:#}"))?)
}

fn assemble(module: &Module, tools: &NvidiaTools) -> Result<Assembled, Failed> {
    let target = module.tier.target_cpu().ok_or("its tier has no PTX")?;
    Ok(tools.assemble(&module.ptx(), target).map_err(|error| format!("{error:#}"))?)
}

/// For each kernel its opcodes in program order.
fn disassemble(module: &Module, tools: &NvidiaTools) -> Result<Vec<Vec<String>>, Failed> {
    let cubin = assemble(module, tools)?.cubin;
    let sass = tools.disassemble(&cubin).map_err(|error| format!("{error:#}"))?;
    // `        /*0040*/               @P0 EXIT ;`
    let opcode = |line: &str| {
        let (_, instruction) = line.trim_start().strip_prefix("/*")?.split_once("*/")?;
        let mut words = instruction.split_whitespace();
        words.find(|word| !word.starts_with('@')).map(str::to_owned)
    };
    let kernels: Vec<Vec<String>> = sass
        .split("\t.section\t.text.")
        .skip(1)
        .map(|kernel| kernel.lines().filter_map(opcode).collect())
        .collect();
    require(kernels.len() == module.entries.len(), || format!("nvdisasm prints:\n{sass}"))?;
    Ok(kernels)
}

fn require(holds: bool, message: impl FnOnce() -> String) -> Result<(), Failed> {
    if holds { Ok(()) } else { Err(message().into()) }
}
