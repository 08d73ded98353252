//! Deflates the committed PTX for the host build that embeds it: as text it would be most of a
//! program's size.

#[cfg(feature = "ptx")]
fn main() -> std::io::Result<()> {
    use std::path::PathBuf;
    use std::{env, fs};

    let folder = |variable| PathBuf::from(env::var_os(variable).expect("cargo sets it"));
    let (from, to) = (folder("CARGO_MANIFEST_DIR").join("ptx"), folder("OUT_DIR"));
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed={}", from.display());
    for tier in ["hopper", "portable"] {
        fs::create_dir_all(to.join(tier))?;
        for file in fs::read_dir(from.join(tier))? {
            let path = file?.path();
            let Some(name) = path.file_name() else { continue };
            // Levels above save under a tenth more, in three times the time.
            let deflated = miniz_oxide::deflate::compress_to_vec(&fs::read(&path)?, 6);
            fs::write(to.join(tier).join(name), deflated)?;
        }
    }
    Ok(())
}

#[cfg(not(feature = "ptx"))]
fn main() {
    println!("cargo::rerun-if-changed=build.rs");
}
