// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The CPU time of threads.

use std::fs;
use std::time::Duration;

use anyhow::Result;

/// The CPU time of a process's threads for whose names `is_counted` returns true.
pub(crate) fn of_threads(pid: i32, is_counted: impl Fn(&str) -> bool) -> Result<Duration> {
    let mut total = 0;
    for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
        let thread = thread?;
        // It may end meanwhile.
        let read = |file| fs::read_to_string(thread.path().join(file)).unwrap_or_default();
        if is_counted(&read("comm")) {
            total += nanoseconds(&read("schedstat"));
        }
    }
    Ok(Duration::from_nanos(total))
}

/// The first number of a schedstat file.
fn nanoseconds(times: &str) -> u64 {
    let first = times.split_whitespace().next();
    first.and_then(|time| time.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_on_a_processor_comes_first() {
        assert_eq!(nanoseconds("877068 86288 2\n"), 877_068);
        assert_eq!(nanoseconds(""), 0);
    }
}
