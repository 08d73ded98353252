//! Warns when the committed PTX is older than the kernel sources beside it.

use std::env;
use std::path::PathBuf;

#[path = "build/source_digest.rs"]
#[allow(dead_code, unreachable_pub, reason = "xtask uses the rest of it, as a public module")]
mod source_digest;

use source_digest::{CRATE_MANIFEST, MANIFEST, SOURCE_FOLDER, stale_sources};

fn main() {
    let workspace = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it"));
    println!("cargo::rerun-if-changed=build.rs");
    // The registry's copy of this crate has no kernel sources: there is nothing to compare.
    if !workspace.join(SOURCE_FOLDER).is_dir() {
        return;
    }
    for path in [SOURCE_FOLDER, CRATE_MANIFEST, MANIFEST, "Cargo.lock", "build/source_digest.rs"] {
        println!("cargo::rerun-if-changed={path}");
    }
    match stale_sources(&workspace) {
        Ok(stale) if stale.is_empty() => {}
        Ok(stale) => println!(
            "cargo::warning=the committed PTX does not match its sources ({}): run `cargo xtask ptx`",
            stale.join(", ")
        ),
        Err(error) => println!(
            "cargo::warning=cannot tell whether the committed PTX is current ({error}): \
             run `cargo xtask ptx`"
        ),
    }
}
