// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A queue of tests, several of which run at once.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::Duration;

use procfs::{Current, Meminfo};
use vm::Size;

/// How much memory a guest and its host programs may use.
const MEMORY_PER_TEST: Size = Size::gib(9);

/// How long a test waits for memory before it looks again.
const POLL_INTERVAL: Duration = Duration::from_millis(500);

/// A test, or several that run together.
type Job<'a> = Box<dyn FnOnce() + Send + 'a>;

#[derive(Default)]
struct State<'a> {
    jobs: VecDeque<Job<'a>>,
    running: usize,
    is_building: bool,
    is_closed: bool,
}

/// Tests that have not begun.
pub(crate) struct Queue<'a> {
    state: Mutex<State<'a>>,
    changed: Condvar,
    /// How many tests may run next to a build.
    next_to_build: usize,
    /// The memory that a test could use now.
    available: fn() -> Size,
}

impl<'a> Queue<'a> {
    /// A queue that runs at most `next_to_build` tests at once, at least one, while a build runs.
    pub(crate) fn new(next_to_build: usize) -> Self {
        Self::with_memory(next_to_build, available)
    }

    fn with_memory(next_to_build: usize, available: fn() -> Size) -> Self {
        Self {
            state: Mutex::default(),
            changed: Condvar::new(),
            next_to_build: next_to_build.max(1),
            available,
        }
    }

    /// Returns the only way to add tests. Dropping it closes the queue.
    pub(crate) fn feed(&self) -> Feed<'_, 'a> {
        Feed(self)
    }

    /// Runs one test after the other until the queue is closed and empty. A test begins while others run only if
    /// there is memory for one more guest.
    pub(crate) fn work(&self) {
        while let Some(job) = self.next() {
            let running = Running(self);
            job();
            drop(running);
        }
    }

    fn next(&self) -> Option<Job<'a>> {
        let mut state = self.state();
        loop {
            if state.jobs.is_empty() {
                if state.is_closed {
                    return None;
                }
                state = self.changed.wait(state).expect("a lock");
            } else if state.is_building && state.running >= self.next_to_build {
                state = self.changed.wait(state).expect("a lock");
            } else if state.running == 0 || (self.available)() >= MEMORY_PER_TEST {
                state.running += 1;
                return state.jobs.pop_front();
            } else {
                (state, _) = self
                    .changed
                    .wait_timeout(state, POLL_INTERVAL)
                    .expect("a lock");
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State<'a>> {
        self.state.lock().expect("a lock")
    }
}

/// Adds tests to a queue.
pub(crate) struct Feed<'queue, 'a>(&'queue Queue<'a>);

impl<'a> Feed<'_, 'a> {
    /// Adds a test at the end.
    pub(crate) fn push(&self, job: impl FnOnce() + Send + 'a) {
        self.0.state().jobs.push_back(Box::new(job));
        self.0.changed.notify_one();
    }

    /// Adds a test that is the next one to begin.
    pub(crate) fn push_first(&self, job: impl FnOnce() + Send + 'a) {
        self.0.state().jobs.push_front(Box::new(job));
        self.0.changed.notify_one();
    }

    /// Runs a build, and fewer tests than otherwise in the meantime. A build that shares the processors with all tests
    /// ends last, and its own tests would then run alone.
    pub(crate) fn build<T>(&self, build: impl FnOnce() -> T) -> T {
        self.0.state().is_building = true;
        let result = build();
        self.0.state().is_building = false;
        self.0.changed.notify_all();
        result
    }
}

impl Drop for Feed<'_, '_> {
    fn drop(&mut self) {
        self.0.state().is_closed = true;
        self.0.changed.notify_all();
    }
}

/// A test that runs. Dropping it notes the end, also if the test panics.
struct Running<'a, 'b>(&'a Queue<'b>);

impl Drop for Running<'_, '_> {
    fn drop(&mut self) {
        self.0.state().running -= 1;
        self.0.changed.notify_one();
    }
}

/// The machine's available memory; none if it cannot be read.
fn available() -> Size {
    let bytes = Meminfo::current().map_or(0, |now| now.mem_available.unwrap_or(now.mem_free));
    Size::bytes(bytes)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::thread;

    use super::*;

    #[test]
    fn all_tests_run_the_first_ones_first() {
        let order = Mutex::new(Vec::new());
        let queue = Queue::new(1);
        let note = |n| {
            let order = &order;
            move || order.lock().unwrap().push(n)
        };
        let feed = queue.feed();
        feed.push(note(2));
        feed.push(note(3));
        feed.push_first(note(1));
        drop(feed);
        queue.work();
        assert_eq!(*order.lock().unwrap(), [1, 2, 3]);
    }

    #[test]
    fn a_test_that_panics_does_not_count_as_running() {
        let queue = Queue::new(1);
        queue.feed().push(|| panic!("expected by this test"));
        thread::scope(|scope| scope.spawn(|| queue.work()).join().unwrap_err());
        assert_eq!(queue.state().running, 0);
    }

    #[test]
    fn one_test_runs_next_to_a_build_and_the_others_after_it() {
        #[derive(Default)]
        struct Tests {
            begun: usize,
            may_end: bool,
        }
        let (tests, changed) = (Mutex::<Tests>::default(), Condvar::new());
        let wait_while = |is: fn(&mut Tests) -> bool| {
            let guard = tests.lock().unwrap();
            changed.wait_while(guard, is).unwrap()
        };
        let next_to_build = AtomicUsize::new(0);
        let queue = Queue::with_memory(1, || MEMORY_PER_TEST);
        thread::scope(|scope| {
            scope.spawn(|| queue.work());
            scope.spawn(|| queue.work());
            let feed = queue.feed();
            feed.build(|| {
                for _ in 0..2 {
                    feed.push(|| {
                        tests.lock().unwrap().begun += 1;
                        changed.notify_all();
                        drop(wait_while(|tests| !tests.may_end));
                    });
                }
                drop(wait_while(|tests| tests.begun == 0));
                thread::sleep(Duration::from_millis(50));
                next_to_build.store(tests.lock().unwrap().begun, Ordering::Relaxed);
            });
            wait_while(|tests| tests.begun < 2).may_end = true;
            changed.notify_all();
        });
        assert_eq!(next_to_build.into_inner(), 1);
    }

    #[test]
    fn threads_end_when_the_queue_is_closed() {
        let count = AtomicUsize::new(0);
        let queue = Queue::new(1);
        thread::scope(|scope| {
            scope.spawn(|| queue.work());
            scope.spawn(|| queue.work());
            let feed = queue.feed();
            for _ in 0..100 {
                feed.push(|| {
                    count.fetch_add(1, Ordering::Relaxed);
                });
            }
        });
        assert_eq!(count.load(Ordering::Relaxed), 100);
    }
}
