//! Lists of cases, and their start in a reduced run.

use std::env;

/// Whether `KASMINA_TEST_REDUCED=1` asks for lists short enough for compute-sanitizer.
pub(crate) fn reduced() -> bool {
    env::var_os("KASMINA_TEST_REDUCED").is_some_and(|value| value == "1")
}

/// The list, or its start in a reduced run.
pub(crate) fn shortened<T>(mut list: Vec<T>, reduced_len: usize) -> Vec<T> {
    if reduced() {
        list.truncate(reduced_len);
    }
    list
}
