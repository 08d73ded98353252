//! Values that are made on first use, those of different keys at the same time.
#![forbid(unsafe_code)]

use std::sync::{Arc, Mutex};

use super::context::lock;

/// A value for each key, made once. Threads that want the same one wait for who makes it; no thread
/// waits for a value of another key.
pub(super) struct OnceMap<K, V> {
    /// Locked for the look-up alone. A cell is locked while its value is made.
    cells: Mutex<Vec<(K, Cell<V>)>>,
}

type Cell<V> = Arc<Mutex<Option<V>>>;

impl<K: PartialEq, V: Copy> OnceMap<K, V> {
    pub(super) const fn new() -> Self {
        Self { cells: Mutex::new(Vec::new()) }
    }

    /// The key's value, from `make` if there is none. A failure leaves none.
    pub(super) fn get_or_make<E>(
        &self,
        key: K,
        make: impl FnOnce() -> Result<V, E>,
    ) -> Result<V, E> {
        let cell = self.cell(key);
        let mut value = lock(&cell);
        if let Some(value) = *value {
            return Ok(value);
        }
        make().inspect(|made| *value = Some(*made))
    }

    fn cell(&self, key: K) -> Cell<V> {
        let mut cells = lock(&self.cells);
        if let Some((_, cell)) = cells.iter().find(|(known, _)| *known == key) {
            return Arc::clone(cell);
        }
        let cell = Cell::default();
        cells.push((key, Arc::clone(&cell)));
        cell
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::sync::Barrier;
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::sync::mpsc;
    use std::thread;
    use std::time::Duration;

    use super::*;

    #[test]
    fn values_of_different_keys_are_made_at_the_same_time() {
        let map = OnceMap::new();
        let (here, there) = (mpsc::channel(), mpsc::channel());
        // Each is made only once the other has begun.
        let make = |key: u32, begun: mpsc::Sender<()>, other: mpsc::Receiver<()>| {
            map.get_or_make(key, || {
                let _ = begun.send(());
                other.recv_timeout(Duration::from_secs(20)).map(|()| 10 * key)
            })
        };
        thread::scope(|scope| {
            let first = scope.spawn(|| make(1, here.0, there.1));
            assert_eq!(make(2, there.0, here.1), Ok(20));
            assert_eq!(first.join().unwrap(), Ok(10));
        });
    }

    #[test]
    fn a_value_is_made_once_however_many_threads_want_it() {
        let map = OnceMap::new();
        let (made, start) = (AtomicU32::new(0), Barrier::new(8));
        let make = || {
            // So that the others come while it is being made.
            thread::sleep(Duration::from_millis(20));
            Ok::<_, Infallible>(made.fetch_add(1, Ordering::Relaxed))
        };
        thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    start.wait();
                    assert_eq!(map.get_or_make("key", make), Ok(0));
                });
            }
        });
        assert_eq!(made.into_inner(), 1);
    }

    #[test]
    fn a_failure_is_not_kept() {
        let map = OnceMap::new();
        assert_eq!(map.get_or_make("key", || Err("failed")), Err("failed"));
        assert_eq!(map.get_or_make("key", || Ok::<_, &str>(7)), Ok(7));
        assert_eq!(map.get_or_make("key", || Err("not asked")), Ok(7));
    }

    #[test]
    fn making_a_value_that_panics_leaves_none() {
        let map = OnceMap::new();
        // Without the message of a panic that is wanted.
        let panics = || -> Result<u32, Infallible> { std::panic::resume_unwind(Box::new(())) };
        thread::scope(|scope| {
            let outcome = scope.spawn(|| map.get_or_make("key", panics)).join();
            assert!(outcome.is_err());
        });
        assert_eq!(map.get_or_make("key", || Ok::<_, Infallible>(3)), Ok(3));
    }
}
