// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The results of tests in the kernel: KTAP, which KUnit prints among the other lines of the log.

use std::sync::LazyLock;

use regex::Regex;

/// The result of a test case.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It passed.
    Passed,
    /// It failed. The reason is the log since the previous result.
    Failed(String),
    /// It was skipped, for this reason.
    Skipped(String),
}

/// A test case without subtests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Case {
    /// The suites that it is in and its own name, with dots between them.
    pub name: String,
    /// What it came to.
    pub outcome: Outcome,
}

static LINE: LazyLock<Regex> = LazyLock::new(|| {
    Regex::new(
        r"(?x) ^ (?P<indent>(?:\ {4})*) (?:
            (?P<version>KTAP\ version\ [0-9]+)
            | \#\ Subtest:\ (?P<subtest>.*?)
            | 1\.\.(?P<plan>[0-9]+)
            | (?P<result>(?:not\ )?ok)\ [0-9]+\ (?:-\ )?(?P<name>[^\#]*?)
              (?:\ +\#\ (?P<skip>SKIP)?(?P<reason>.*?))?
        ) \s* $",
    )
    .expect("the pattern is valid")
});

/// A suite, or a case with parameters, whose own result has not been printed yet.
#[derive(Default)]
struct Suite {
    name: String,
    plan: Option<usize>,
    results: usize,
    failures: usize,
}

#[derive(Default)]
struct Parser {
    cases: Vec<Case>,
    /// The suites around the current line, one for each level of indentation. The first stands
    /// for the log and has no result.
    open: Vec<Suite>,
    notes: Vec<String>,
}

/// Reads all results in `log`. A suite without an end, or with fewer results than it planned, is a
/// failed case. So is a log without any results.
pub fn parse(log: &str) -> Vec<Case> {
    let mut parser = Parser {
        open: vec![Suite::default()],
        ..Parser::default()
    };
    for line in log.lines() {
        parser.line(line);
    }
    parser.break_off(1);
    if parser.cases.is_empty() {
        parser.add(
            "results",
            Outcome::Failed("the guest printed none".to_owned()),
        );
    }
    parser.cases
}

impl Parser {
    fn line(&mut self, line: &str) {
        let Some(found) = LINE.captures(line) else {
            self.notes.push(line.trim().to_owned());
            return;
        };
        let depth = found["indent"].len() / 4;
        let text = |name| found.name(name).map_or("", |text| text.as_str().trim());
        if found.name("version").is_some() {
            self.break_off(depth.max(1));
            self.open.resize_with(depth + 1, Suite::default);
            self.notes.clear();
        } else if depth >= self.open.len() {
            // It looks like KTAP, but is outside of a suite.
        } else if found.name("result").is_some() {
            self.break_off(depth + 2);
            let failed = text("result") == "not ok";
            if self.open.len() == depth + 2 {
                self.end_suite(text("name"), failed);
            } else {
                let outcome = match (found.name("skip"), failed) {
                    (Some(_), _) => Outcome::Skipped(text("reason").to_owned()),
                    (None, true) => Outcome::Failed(self.notes.join("\n")),
                    (None, false) => Outcome::Passed,
                };
                self.add(text("name"), outcome);
            }
            self.notes.clear();
        } else if let Some(name) = found.name("subtest") {
            self.open[depth].name = name.as_str().to_owned();
        } else if let Ok(plan) = text("plan").parse() {
            self.open[depth].plan = Some(plan);
        }
    }

    /// Adds a case of the innermost suite.
    fn add(&mut self, name: &str, outcome: Outcome) {
        let suite = self.open.last_mut().expect("the log itself is always open");
        suite.results += 1;
        suite.failures += usize::from(matches!(outcome, Outcome::Failed(_)));
        let names = self
            .open
            .iter()
            .map(|suite| suite.name.as_str())
            .chain([name]);
        let names: Vec<_> = names.filter(|name| !name.is_empty()).collect();
        self.cases.push(Case {
            name: names.join("."),
            outcome,
        });
    }

    /// Adds the result of the innermost suite. A suite is no case, but it must not hide a missing
    /// case.
    fn end_suite(&mut self, name: &str, failed: bool) {
        let suite = self.open.pop().expect("its depth was looked at");
        let planned = suite.plan.unwrap_or(suite.results);
        if planned != suite.results {
            let reason = format!("{} of {planned} cases have a result", suite.results);
            self.add(name, Outcome::Failed(reason));
        } else if failed && suite.failures == 0 {
            self.add(name, Outcome::Failed(self.notes.join("\n")));
        } else {
            let parent = self.open.last_mut().expect("the log itself is always open");
            parent.results += 1;
            parent.failures += usize::from(failed);
        }
    }

    /// Ends the suites from `depth` on, which have no result.
    fn break_off(&mut self, depth: usize) {
        while self.open.len() > depth {
            let suite = self.open.pop().expect("its length was looked at");
            self.add(&suite.name, Outcome::Failed("it breaks off".to_owned()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "\
virtio_balloon_rs: loading out-of-tree module taints kernel.
    KTAP version 1
    # Subtest: pages
    # module: virtio_balloon_rs
    1..3
    ok 1 split
    ok 2 join # SKIP no huge pages
        KTAP version 1
        # Subtest: orders
        1..2
        ok 1 order 0
a line of another part of the kernel
        ok 2 order 9
    # orders: pass:2 fail:0 skip:0 total:2
    ok 3 orders
# pages: pass:2 fail:0 skip:1 total:3
# Totals: pass:3 fail:0 skip:1 total:4
ok 1 pages
    KTAP version 1
    # Subtest: target
    1..1
    ok 1 edges
ok 2 target
";

    fn failures(log: &str) -> Vec<(String, String)> {
        parse(log)
            .into_iter()
            .filter_map(|case| match case.outcome {
                Outcome::Failed(reason) => Some((case.name, reason)),
                _ => None,
            })
            .collect()
    }

    #[test]
    fn every_case_counts_and_suites_do_not() {
        let names: Vec<_> = parse(GOOD).into_iter().map(|case| case.name).collect();
        assert_eq!(
            names,
            [
                "pages.split",
                "pages.join",
                "pages.orders.order 0",
                "pages.orders.order 9",
                "target.edges"
            ]
        );
        assert_eq!(failures(GOOD), []);
    }

    #[test]
    fn a_skipped_case_says_why() {
        assert_eq!(
            parse(GOOD)[1].outcome,
            Outcome::Skipped("no huge pages".to_owned())
        );
    }

    #[test]
    fn a_failed_case_comes_with_its_lines() {
        let log = "    KTAP version 1\n    # Subtest: s\n    1..2\n    ok 1 a\n    \
                   # b: ASSERTION FAILED at x.rs:1\n    not ok 2 b\nnot ok 1 s\n";
        let reason = "# b: ASSERTION FAILED at x.rs:1".to_owned();
        assert_eq!(failures(log), [("s.b".to_owned(), reason)]);
    }

    #[test]
    fn no_results_are_a_failure() {
        assert_eq!(failures("booted\n").len(), 1);
        assert_eq!(failures("").len(), 1);
    }

    #[test]
    fn a_suite_that_breaks_off_is_a_failure() {
        let cut = &GOOD[..GOOD.find("        ok 2 order 9").unwrap()];
        let names: Vec<_> = failures(cut).into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["pages.orders", "pages"]);
    }

    #[test]
    fn a_missing_case_is_a_failure() {
        let log = GOOD.replace("    ok 1 split\n", "");
        assert_eq!(
            failures(&log),
            [("pages".to_owned(), "2 of 3 cases have a result".to_owned())]
        );
    }

    #[test]
    fn a_suite_may_fail_by_itself() {
        let log = GOOD.replace("\nok 2 target", "\nnot ok 2 target");
        assert_eq!(failures(&log), [("target".to_owned(), String::new())]);
    }

    #[test]
    fn an_empty_suite_fails_only_when_it_says_so() {
        let log = "    KTAP version 1\n    # Subtest: s\n    1..0\nok 1 s # SKIP\n";
        assert_eq!(
            failures(log),
            [("results".to_owned(), "the guest printed none".to_owned())]
        );
    }
}
