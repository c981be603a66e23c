// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The graph in docs/diagrams/locks.dot has all locks of the driver, and no others.

use std::collections::BTreeSet;
use std::fs;

use anyhow::{Context, Result};

use super::{checkout, find};

/// The lock that only a build with KUnit has.
const KUNIT: &str = "OOM_NOTIFIER";

/// The last parts of a path.
fn end(path: &str, parts: usize) -> String {
    let skipped = path.split("::").count().saturating_sub(parts);
    path.split("::")
        .skip(skipped)
        .collect::<Vec<_>>()
        .join("::")
}

/// The names of the fields and statics of a file that are locks.
fn locks(text: &str) -> Vec<String> {
    let declared = [": Mutex<", ": SpinLock<"].map(|kind| text.match_indices(kind));
    let name = |(place, _): (usize, &str)| text[..place].rsplit(' ').next().map(str::to_owned);
    declared.into_iter().flatten().filter_map(name).collect()
}

/// The names that a file gives to locks, for lockdep.
fn names(text: &str) -> Result<Vec<String>> {
    let made = ["new_mutex!(", "new_spinlock!("].map(|call| text.split(call).skip(1));
    let name = |rest: &str| rest.split('"').nth(1).map(str::to_owned);
    let names = made.into_iter().flatten().map(name);
    names.collect::<Option<_>>().context("a lock has no name")
}

/// The driver's locks in the graph: `TYPE::FIELD`, or the name of a static.
fn labels(graph: &str) -> BTreeSet<String> {
    let nodes = graph
        .lines()
        .filter_map(|line| line.split_once(" [label=\""));
    let labels = nodes.filter_map(|(_, rest)| rest.split('"').next());
    let of_driver = labels.filter(|label| !label.contains("(kernel)"));
    let names = of_driver.filter_map(|label| label.split("\\n").next());
    names.map(str::to_owned).collect()
}

#[test]
fn the_graph_has_each_lock() -> Result<()> {
    let mut files = Vec::new();
    find(&checkout(), &mut files)?;
    let (mut all_locks, mut all_names) = (Vec::new(), Vec::new());
    for path in files {
        let name = path.strip_prefix(checkout())?;
        let others = ["host", "patches", "tests"];
        if others.iter().any(|other| name.starts_with(other)) {
            continue;
        }
        let text = fs::read_to_string(&path)?;
        all_locks.extend(locks(&text));
        all_names.extend(names(&text).with_context(|| name.display().to_string())?);
    }

    // The locks of all devices are statics.
    let (statics, mut fields): (Vec<_>, Vec<_>) = all_locks
        .into_iter()
        .partition(|name| name.chars().all(|c| c.is_uppercase() || c == '_'));
    let mut named: Vec<_> = all_names.iter().map(|name| end(name, 1)).collect();
    fields.sort();
    named.sort();
    assert_eq!(fields, named, "fields, and names of locks");

    let statics = statics.into_iter().filter(|name| name != KUNIT);
    let of_driver: BTreeSet<_> = all_names.iter().map(|name| end(name, 2)).collect();
    let of_driver: BTreeSet<_> = of_driver.into_iter().chain(statics).collect();
    let graph = fs::read_to_string(checkout().join("docs/diagrams/locks.dot"))?;
    assert_eq!(of_driver, labels(&graph), "the driver, and the graph");
    Ok(())
}
