// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Rules of the driver's sources that its compiler does not check.

use std::collections::BTreeSet;
use std::fs;

use anyhow::{Context, Result};

use super::{checkout, find};

/// The first line of code of a file that cannot have `unsafe` blocks.
const FORBID: &str = "#![forbid(unsafe_code)]";

/// The driver's folder with `unsafe` blocks, and the folders without files of the driver. The suites have one forbid
/// for all, and the macro in the crate's root needs `unsafe` blocks.
const OTHERS: [&str; 5] = ["rust", "tests", "host", "patches", "virtio_balloon_rs.rs"];

#[test]
fn only_one_folder_of_the_driver_has_unsafe_blocks() -> Result<()> {
    let mut files = Vec::new();
    find(&checkout(), &mut files)?;
    let mut checked = 0;
    for path in files {
        let name = path.strip_prefix(checkout())?;
        if OTHERS.iter().any(|other| name.starts_with(other)) {
            continue;
        }
        let text = fs::read_to_string(&path)?;
        assert!(
            text.lines().any(|line| line == FORBID),
            "{} lacks {FORBID}",
            name.display()
        );
        checked += 1;
    }
    assert!(checked > 50, "only {checked} files of the driver");
    Ok(())
}

#[test]
fn the_virtio_layer_is_for_any_driver() -> Result<()> {
    /// The names of the module's configuration options begin like this.
    const OPTION: &str = "VIRTIO_BALLOON_RS";
    let mut files = Vec::new();
    find(&checkout().join("rust/virtio"), &mut files)?;
    for path in &files {
        let text = fs::read_to_string(path)?.replace(OPTION, "");
        let mut lines = text.lines();
        let line = lines.find(|line| line.to_lowercase().contains("balloon"));
        assert_eq!(line, None, "{}", path.display());
    }
    assert!(files.len() > 10, "only {} files", files.len());
    Ok(())
}

/// The names of host requests and of their statuses in the header of the protocol.
fn defined(header: &str) -> impl Iterator<Item = &str> {
    const PREFIXES: [&str; 3] = [
        "VIRTIO_BALLOON_PAGE_SET_UNUSED_",
        "VIRTIO_BALLOON_REQUEST_",
        "VIRTIO_BALLOON_COMPLETION_",
    ];
    let defines = header
        .lines()
        .filter_map(|line| line.strip_prefix("#define ")?.split_whitespace().next());
    defines.filter(|name| PREFIXES.iter().any(|prefix| name.starts_with(prefix)))
}

#[test]
fn traces_name_each_request_and_status() -> Result<()> {
    let read = |path: &str| fs::read_to_string(checkout().join(path)).context(path.to_owned());
    let header = read("uapi/linux/virtio_balloon_ext.h")?;
    let traces = read("rust/trace.h")?;
    let mut checked = 0;
    for name in defined(&header) {
        assert!(
            traces.contains(&format!("{{ {name}, \"")),
            "rust/trace.h has no text for {name}"
        );
        checked += 1;
    }
    assert!(checked > 5, "only {checked} names in the header");
    Ok(())
}

/// The lines of the driver's table of queues.
fn table_of_queues() -> Result<Vec<String>> {
    let queues = fs::read_to_string(checkout().join("device/queues.rs"))?;
    let (_, table) = queues
        .split_once("\nqueues! {")
        .context("no table of queues")?;
    let (table, _) = table.split_once("\n}").context("the table does not end")?;
    let entries = table.lines().filter(|line| line.contains(" = c\""));
    let entries: Vec<_> = entries.map(str::to_owned).collect();
    assert!(entries.len() > 5, "only {} queues", entries.len());
    Ok(entries)
}

#[test]
fn a_feature_takes_each_queue() -> Result<()> {
    let mut files = Vec::new();
    for folder in ["balloon", "features"] {
        find(&checkout().join(folder), &mut files)?;
    }
    let mut features = String::new();
    for path in &files {
        features += &fs::read_to_string(path)?;
    }
    for entry in table_of_queues()? {
        let (queue, _) = entry.split_once(" = ").context("no name")?;
        let take = format!("queues.take(Queue::{})", queue.trim());
        assert!(features.contains(&take), "no feature has {take}");
    }
    Ok(())
}

#[test]
fn driver_and_daemon_have_the_queues_in_one_order() -> Result<()> {
    let daemon = fs::read_to_string(checkout().join("host/vhost-user-balloon/src/virtio/kind.rs"))?;
    let of_daemon = daemon.lines().filter_map(|line| {
        let (_, bit) = line.split_once(" => VIRTIO_BALLOON_")?;
        Some(bit.trim_end_matches(','))
    });
    let table = table_of_queues()?;
    let of_driver = table.iter().filter_map(|entry| {
        let (_, bit) = entry.split_once("virtio_balloon::")?;
        Some(bit.trim_end_matches(");"))
    });
    assert_eq!(of_driver.collect::<Vec<_>>(), of_daemon.collect::<Vec<_>>());
    Ok(())
}

#[test]
fn the_driver_depends_on_64_bits() -> Result<()> {
    let kconfig = fs::read_to_string(checkout().join("Kconfig"))?;
    let depends = kconfig
        .lines()
        .find_map(|line| line.trim_start().strip_prefix("depends on "));
    let mut symbols = depends.context("no dependency")?.split(" && ");
    assert!(symbols.any(|symbol| symbol == "64BIT"));
    Ok(())
}

/// The names of the driver's attributes in sysfs.
fn attributes() -> Result<BTreeSet<String>> {
    let mut names = BTreeSet::new();
    for file in ["device/attributes.rs", "device/announced.rs"] {
        let text = fs::read_to_string(checkout().join(file))?;
        names.extend(text.lines().filter_map(|line| {
            let (what, name) = line.split_once("c\"")?;
            let is_name = what.contains(" NAME: ") || what.trim_start().starts_with("name: ");
            is_name.then(|| name.split('"').next().map(str::to_owned))?
        }));
    }
    Ok(names)
}

#[test]
fn the_abi_file_describes_each_attribute() -> Result<()> {
    let abi = fs::read_to_string(checkout().join("docs/sysfs-bus-virtio-balloon"))?;
    let described: BTreeSet<_> = abi
        .lines()
        .filter_map(|line| line.strip_prefix("What:")?.rsplit('/').next())
        .filter(|name| !name.is_empty())
        .map(str::to_owned)
        .collect();
    assert!(described.len() > 4, "only {described:?}");
    assert_eq!(attributes()?, described);
    Ok(())
}

#[test]
fn lines_fit_into_100_columns() -> Result<()> {
    /// As in the kernel, where checkpatch counts them. Texts for users stay in one piece.
    const COLUMNS: usize = 100;
    let mut files = Vec::new();
    find(&checkout(), &mut files)?;
    let mut checked = 0;
    for path in files {
        let name = path.strip_prefix(checkout())?;
        if ["host", "patches", "tests/vm", "tests/bench"]
            .iter()
            .any(|other| name.starts_with(other))
        {
            continue;
        }
        let text = fs::read_to_string(&path)?;
        let long = text
            .lines()
            .position(|line| line.chars().count() > COLUMNS && !line.contains('"'));
        let number = long.map(|place| place + 1);
        assert_eq!(number, None, "a line of {} is too long", name.display());
        checked += 1;
    }
    assert!(checked > 100, "only {checked} files of the driver");
    Ok(())
}
