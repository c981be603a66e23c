// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The guest's log: all output of its kernel on the serial line, stored in a file, and the kernel's
//! reports of faults in it.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use anyhow::{Context, Result};
use regex::Regex;

/// Lines that begin a report of a fault. Lockdep, KASAN, ODEBUG and the others that are not
/// named print one of them.
static FAULT: LazyLock<Regex> = LazyLock::new(|| {
    Regex::new(
        r"(?x) WARNING: | \bBUG\b | \bOops\b | KASAN | Kernel\ panic | general\ protection\ fault
        | INFO:\ task\ .*\ blocked\ for\ more | soft\ lockup | workqueue\ lockup
        | rcu.*(detected\ stalls|self-detected\ stall|detected\ expedited\ stalls)
        | kmemleak:\ [1-9][0-9]*\ new\ suspected | page\ allocation\ failure
        | invoked\ oom-killer | Out\ of\ memory: | refcount_t: | ODEBUG: | Bad\ page
        | pagealloc:\ (memory\ corruption|single\ bit\ error)",
    )
    .expect("the pattern is valid")
});

/// A fault of Linux 7.3 itself, in a guest whose processors have to wait long for the host. The timer of the
/// scheduler's deadline server accounts the time that has passed (`dl_server_timer`). That may start the same timer
/// again, which is then forwarded although it is queued.
static KNOWN: LazyLock<Regex> =
    LazyLock::new(|| Regex::new(r"WARNING: .* at hrtimer_forward\+").expect("it is valid"));

/// The function of that timer in a call trace. Some compilers make it part of another one, or call it by a jump. A
/// question mark means that the function may have ended before.
static KNOWN_CALLER: LazyLock<Regex> =
    LazyLock::new(|| Regex::new(r"^[^?]*\bdl_(task|server)_timer[.+]").expect("it is valid"));

/// The part that all reports of the kernel have in common.
const CALL_TRACE: &str = "Call Trace:";

/// The last line of a warning.
const END: &str = "---[ end trace";

/// How many lines before its call trace a report may begin: an out-of-memory report's header and
/// registers come first.
const REPORT_LINES: usize = 60;

/// A guest's log.
#[derive(Debug)]
pub struct Console {
    path: PathBuf,
}

/// A place in a log. A search from it ignores earlier lines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mark(usize);

impl Console {
    pub(crate) fn new(path: PathBuf) -> Self {
        Self { path }
    }

    /// The file that has the log.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The whole log, without time stamps.
    pub fn text(&self) -> Result<String> {
        self.text_since(Mark::default())
    }

    /// The log since `mark`, without time stamps.
    pub fn text_since(&self, mark: Mark) -> Result<String> {
        static TIME: LazyLock<Regex> =
            LazyLock::new(|| Regex::new(r"(?m)^\[ *[0-9]+\.[0-9]+\] ").expect("it is valid"));
        let log = self.read()?;
        let text = String::from_utf8_lossy(&log[mark.0..]).replace('\r', "");
        Ok(TIME.replace_all(&text, "").into_owned())
    }

    /// The current end of the log.
    pub fn mark(&self) -> Result<Mark> {
        Ok(Mark(self.read()?.len()))
    }

    /// How often a line since `mark` matches `pattern`.
    pub fn count_since(&self, mark: Mark, pattern: &str) -> Result<usize> {
        let pattern = Regex::new(pattern)?;
        Ok(self
            .text_since(mark)?
            .lines()
            .filter(|line| pattern.is_match(line))
            .count())
    }

    /// The first lines of the kernel's reports of faults that none of the `expected` patterns
    /// matches. A line that the kernel is still printing does not count.
    pub fn faults(&self, expected: &[Regex]) -> Result<Vec<String>> {
        Ok(faults(&self.text()?, expected))
    }

    fn read(&self) -> Result<Vec<u8>> {
        fs::read(&self.path)
            .with_context(|| format!("the guest's log {} cannot be read", self.path.display()))
    }
}

fn faults(log: &str, expected: &[Regex]) -> Vec<String> {
    let mut faults = Vec::new();
    let mut report = None;
    let (whole, _) = log.rsplit_once('\n').unwrap_or_default();
    let lines: Vec<_> = whole.lines().collect();
    for (number, &line) in lines.iter().enumerate() {
        let is_expected = expected.iter().any(|pattern| pattern.is_match(line));
        if is_expected || is_known(&lines[number..]) {
            report = Some(number);
        } else if FAULT.is_match(line)
            || line.contains(CALL_TRACE) && report.is_none_or(|first| number - first > REPORT_LINES)
        {
            report = Some(number);
            faults.push(line.to_owned());
        }
    }
    faults
}

/// Whether a log begins with the known fault of Linux. A warning that the kernel is still printing may become it.
fn is_known(log: &[&str]) -> bool {
    let end = log.iter().position(|line| line.contains(END));
    KNOWN.is_match(log[0])
        && end.is_none_or(|end| log[..end].iter().any(|line| KNOWN_CALLER.is_match(line)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quiet_log_has_no_faults() {
        assert!(
            faults(
                "Linux version 7.3.4\nDEBUG_PAGEALLOC enabled\nbooted\n",
                &[]
            )
            .is_empty()
        );
    }

    #[test]
    fn a_report_counts_once() {
        let log = "WARNING: mm/page_alloc.c:1 at f+0x1\nCPU: 0\nCall Trace:\n <TASK>\n";
        assert_eq!(faults(log, &[]), ["WARNING: mm/page_alloc.c:1 at f+0x1"]);
    }

    #[test]
    fn a_call_trace_alone_is_a_fault() {
        assert_eq!(faults("hello\nCall Trace:\n", &[]), ["Call Trace:"]);
    }

    #[test]
    fn a_starved_deadline_server_is_no_fault() {
        const WARNING: &str =
            "WARNING: kernel/time/hrtimer.c:1098 at hrtimer_forward+0x6e/0xa0, CPU#1: rcu_sched/14";
        const TRACE_END: &str = "---[ end trace 0000000000000000 ]---\n";
        let report = |frame: &str| format!("{WARNING}\nCall Trace:\n <IRQ>\n{frame}+0x2ba/0x600\n");
        for frame in [
            " dl_task_timer",
            " dl_server_timer.isra.0",
            "[<ffffffff80043c1e>] dl_task_timer",
        ] {
            let log = report(frame) + TRACE_END;
            assert_eq!(faults(&log, &[]), [""; 0], "{frame}");
            let log = log + "WARNING: mm/page_alloc.c:1 at f+0x1\n";
            assert_eq!(faults(&log, &[]).len(), 1, "{frame}");
        }
        for frame in [
            " sched_cfs_period_timer",
            " ? dl_task_timer",
            " my_dl_task_timer",
        ] {
            let log = report(frame);
            assert_eq!(
                faults(&log, &[]),
                [""; 0],
                "{frame} is not the last one yet"
            );
            // That of another warning does not count.
            let log = log + TRACE_END + &report(" dl_task_timer") + TRACE_END;
            assert_eq!(faults(&log, &[]), [WARNING], "{frame}");
        }
    }

    #[test]
    fn what_is_expected_takes_its_call_trace_with_it() {
        let expected = [Regex::new("invoked oom-killer|Out of memory").unwrap()];
        let log = "hog invoked oom-killer: gfp\nCall Trace:\nOut of memory: Killed process 7\n";
        assert!(faults(log, &expected).is_empty());
        let log = log.to_owned() + &"line\n".repeat(100) + "Call Trace:\n";
        assert_eq!(faults(&log, &expected), ["Call Trace:"]);
    }

    #[test]
    fn a_line_that_is_not_whole_does_not_count() {
        let expected = [Regex::new("WARNING: .* at expected").unwrap()];
        let log = "booted\nWARNING: mm/page_alloc.c:1 at exp";
        assert!(faults(log, &expected).is_empty());
        assert_eq!(faults(&format!("{log}losion\n"), &expected).len(), 1);
    }

    #[test]
    fn each_kind_of_report_is_known() {
        for line in [
            "BUG: KASAN: use-after-free in f",
            "BUG: sleeping function called from invalid context",
            "Oops: general protection fault: 0000 [#1]",
            "WARNING: possible circular locking dependency detected",
            "INFO: task kworker/0:1:10 blocked for more than 10 seconds.",
            "watchdog: BUG: soft lockup - CPU#1 stuck for 22s!",
            "rcu: INFO: rcu_preempt self-detected stall on CPU",
            "kmemleak: 3 new suspected memory leaks (see /sys/kernel/debug/kmemleak)",
            "ODEBUG: free active (active state 0) object",
            "Kernel panic - not syncing: Attempted to kill init!",
            "BUG: Bad page state in process insmod  pfn:12345",
            "pagealloc: memory corruption",
            "pagealloc: single bit error",
        ] {
            assert_eq!(faults(&format!("{line}\n"), &[]).len(), 1, "{line}");
        }
    }
}
