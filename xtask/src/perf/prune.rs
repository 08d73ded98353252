//! Takes out of a file of results what later lines measured again.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use super::record::read_lines;

/// Rewrites `file` without the lines whose case a later line measures again, and prints how many
/// are left.
///
/// # Errors
/// A file that cannot be read or written, and the number of a line that is no record.
pub fn run(file: &Path) -> Result<()> {
    let name = || file.display().to_string();
    let text = fs::read_to_string(file).with_context(|| format!("cannot read {}", name()))?;
    let kept = pruned(&text).with_context(name)?;
    fs::write(file, &kept).with_context(|| format!("cannot write {}", name()))?;
    println!("{}: kept {} of {} lines", name(), kept.lines().count(), text.lines().count());
    Ok(())
}

/// The last line of each case, where it stands.
fn pruned(text: &str) -> Result<String> {
    let mut cases = BTreeSet::new();
    let mut kept: Vec<&str> = read_lines(text)?
        .into_iter()
        .rev()
        .filter(|(_, record)| cases.insert(record.key()))
        .map(|(line, _)| line)
        .collect();
    kept.reverse();
    Ok(kept.into_iter().flat_map(|line| [line, "\n"]).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::perf::record::tests::product_line;
    use crate::perf::{BASELINES, result_files};

    #[test]
    fn the_last_line_of_each_case_stays_where_it_is() {
        let [first, steady, again, f16] = [
            product_line("burst", 180.0, 200.0),
            product_line("steady", 200.0, 210.0),
            product_line("burst", 179.0, 201.0).replace("abc", "def"),
            product_line("burst", 181.0, 200.0).replace("bf16", "f16"),
        ];
        let text = format!("{first}\n{steady}\n\n{again}\n{f16}\n");
        let expected = format!("{steady}\n{again}\n{f16}\n");
        assert_eq!(pruned(&text).unwrap(), expected);
        assert_eq!(pruned(&expected).unwrap(), expected);
    }

    #[test]
    fn gpus_have_cases_of_their_own() {
        let h200 = product_line("burst", 180.0, 200.0);
        let text = format!("{h200}\n{}\n", h200.replace("H200", "H100"));
        assert_eq!(pruned(&text).unwrap(), text);
    }

    #[test]
    fn a_line_that_is_no_record_leaves_the_file_as_it_is() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let text = format!("{}\n{{}}\n", product_line("burst", 180.0, 200.0));
        fs::write(&file, &text).unwrap();
        assert!(format!("{:#}", run(file.path()).unwrap_err()).contains("line 2"));
        assert_eq!(fs::read_to_string(&file).unwrap(), text);
    }

    #[test]
    fn the_committed_results_hold_each_case_once() {
        for file in result_files(&crate::workspace().join(BASELINES)) {
            let text = fs::read_to_string(&file).unwrap();
            let kept = pruned(&text).unwrap();
            let (lines, cases) = (text.lines().count(), kept.lines().count());
            assert_eq!(lines, cases, "run `cargo xtask perf prune {}`", file.display());
        }
    }
}
