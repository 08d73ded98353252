//! Digests of everything that is compiled into the committed PTX, and their comparison with
//! `kasmina-kernels/ptx/manifest.json`. Compiled into `build.rs` and into `xtask`.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;

use sha2::{Digest, Sha256};

/// The manifest, from the workspace root.
pub const MANIFEST: &str = "kasmina-kernels/ptx/manifest.json";

/// Where the device sources lie, from the workspace root: a folder of `.rs` files, and a file.
pub const SOURCE_FOLDER: &str = "kasmina-kernels/src";
/// The manifest of the kernel crate, from the workspace root.
pub const CRATE_MANIFEST: &str = "kasmina-kernels/Cargo.toml";

/// The one dependency of the device code.
const DEVICE_DEPENDENCY: &str = "libm";

/// Lower-case hexadecimal SHA-256.
#[must_use]
pub fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What the device code is compiled from: each source file, by its path from the workspace root,
/// with its SHA-256, and the locked version and checksum of its dependency.
///
/// # Errors
/// A source file or `Cargo.lock` that cannot be read.
pub fn device_sources(workspace: &Path) -> io::Result<BTreeMap<String, String>> {
    let mut digests = BTreeMap::new();
    add_folder(workspace, SOURCE_FOLDER, &mut digests)?;
    let crate_manifest = fs::read(workspace.join(CRATE_MANIFEST))?;
    digests.insert(CRATE_MANIFEST.to_owned(), sha256(&crate_manifest));
    let lock = fs::read_to_string(workspace.join("Cargo.lock"))?;
    if let Some(locked) = locked_package(&lock, DEVICE_DEPENDENCY) {
        digests.insert(format!("Cargo.lock: {DEVICE_DEPENDENCY}"), locked);
    }
    Ok(digests)
}

fn add_folder(
    workspace: &Path,
    folder: &str,
    digests: &mut BTreeMap<String, String>,
) -> io::Result<()> {
    for entry in fs::read_dir(workspace.join(folder))? {
        let entry = entry?;
        let path = format!("{folder}/{}", entry.file_name().to_string_lossy());
        if entry.file_type()?.is_dir() {
            add_folder(workspace, &path, digests)?;
        } else if path.ends_with(".rs") {
            digests.insert(path, sha256(&fs::read(entry.path())?));
        }
    }
    Ok(())
}

/// `version checksum` of a package in a `Cargo.lock`.
fn locked_package(lock: &str, name: &str) -> Option<String> {
    let field = |package: &str, key: &str| {
        let prefix = format!("{key} = \"");
        package
            .lines()
            .find_map(|line| Some(line.strip_prefix(&prefix)?.trim_end_matches('"').to_owned()))
    };
    let package = lock
        .split("[[package]]")
        .find(|package| field(package, "name").as_deref() == Some(name))?;
    Some(format!("{} {}", field(package, "version")?, field(package, "checksum")?))
}

/// The `sources` object of a manifest as `cargo xtask ptx` writes it: one `"path": "digest"` a
/// line. Read without a JSON parser because `build.rs` has none.
fn recorded_sources(manifest: &str) -> BTreeMap<String, String> {
    let unquote = |text: &str| text.trim().trim_matches('"').to_owned();
    manifest
        .lines()
        .skip_while(|line| !line.trim_start().starts_with("\"sources\""))
        .skip(1)
        .take_while(|line| !line.trim_start().starts_with('}'))
        .filter_map(|line| line.trim_end().trim_end_matches(',').rsplit_once(": "))
        .map(|(path, digest)| (unquote(path), unquote(digest)))
        .collect()
}

/// The sources that differ between two sets of digests: changed, added or removed.
#[must_use]
pub fn differing(
    recorded: &BTreeMap<String, String>,
    current: &BTreeMap<String, String>,
) -> Vec<String> {
    let changed = current.iter().filter(|(path, digest)| recorded.get(*path) != Some(*digest));
    let removed = recorded.iter().filter(|(path, _)| !current.contains_key(*path));
    changed.chain(removed).map(|(path, _)| path.clone()).collect()
}

/// The sources that differ from what the committed PTX was built from.
///
/// # Errors
/// A source file, `Cargo.lock` or the manifest that cannot be read.
pub fn stale_sources(workspace: &Path) -> io::Result<Vec<String>> {
    let recorded = recorded_sources(&fs::read_to_string(workspace.join(MANIFEST))?);
    Ok(differing(&recorded, &device_sources(workspace)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_are_read_without_the_rest_of_the_manifest() {
        let manifest = "{\n  \"flags\": [\n    \"-O\"\n  ],\n  \"sources\": {\n    \
                        \"Cargo.lock: libm\": \"0.2.16 b6\",\n    \"src/a.rs\": \"a1\"\n  },\n  \
                        \"modules\": [\n    {\n      \"file\": \"a.ptx\"\n    }\n  ]\n}\n";
        let recorded = recorded_sources(manifest);
        let expected = [("Cargo.lock: libm", "0.2.16 b6"), ("src/a.rs", "a1")];
        assert!(recorded.iter().map(|(path, digest)| (&**path, &**digest)).eq(expected));
    }

    #[test]
    fn changed_added_and_removed_sources_differ() {
        let digests = |pairs: &[(&str, &str)]| -> BTreeMap<String, String> {
            pairs.iter().map(|&(path, digest)| (path.to_owned(), digest.to_owned())).collect()
        };
        let recorded = digests(&[("a", "1"), ("b", "1"), ("c", "1")]);
        let current = digests(&[("a", "1"), ("b", "2"), ("d", "1")]);
        assert_eq!(differing(&recorded, &current), ["b", "d", "c"]);
    }

    #[test]
    fn locked_version_and_checksum_are_those_of_the_package() {
        let lock = "version = 4\n\n[[package]]\nname = \"libc\"\nversion = \"1.0\"\n\
                    checksum = \"aa\"\n\n[[package]]\nname = \"libm\"\nversion = \"0.2.16\"\n\
                    source = \"registry\"\nchecksum = \"b6\"\n";
        assert_eq!(locked_package(lock, "libm").as_deref(), Some("0.2.16 b6"));
        assert_eq!(locked_package(lock, "syn"), None);
    }
}
