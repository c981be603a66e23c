// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The state of the balloon and of the guest, as a table.

use std::collections::BTreeMap;
use std::time::Duration;

use balloon_control::{ByQueue, Counters, Guest, Info};
use comfy_table::presets::{NOTHING, UTF8_FULL_CONDENSED};
use comfy_table::{CellAlignment, ContentArrangement, Table};
use console::Term;
use indicatif::{HumanBytes, HumanCount, HumanDuration};

/// The state of the balloon, and below it the messages of the guest.
pub(crate) fn table(info: &Info) -> String {
    format!("{}\n{}", state(info).trim_fmt(), messages(&info.counters))
}

fn state(info: &Info) -> Table {
    let mut table = Table::new();
    table.load_preset(NOTHING);
    // Lines are not wrapped if the output is not a terminal.
    if let Some((_, columns)) = Term::stdout().size_checked() {
        table.set_content_arrangement(ContentArrangement::Dynamic);
        table.set_width(columns);
    }
    if let Some(vm) = vm(info) {
        table.add_row(["VM", &vm]);
    }
    table.add_row(["Balloon", &balloon(info)]);
    if let Some(lease) = lease(info) {
        table.add_row(["Lease", &lease]);
    }
    table.add_row(["Guest", &guest(info)]);
    table.add_row(["Driver", &driver(&info.guest)]);
    table.add_row([
        "Statistics",
        &match info.stats_interval {
            0 => "off".to_owned(),
            seconds => format!("every {seconds} s"),
        },
    ]);
    let counters = &info.counters;
    table.add_row([
        "Returned",
        &format!(
            "{} in {} discards, {} failed",
            HumanBytes(counters.discarded),
            HumanCount(counters.discards),
            HumanCount(counters.discard_failures)
        ),
    ]);
    if let Some(reasons) = withheld(info) {
        table.add_row([
            "Not returned",
            &format!("{}: {reasons}", HumanBytes(counters.withheld)),
        ]);
    }
    table.add_row([
        "Granule",
        &format!(
            "{}, the smallest piece that is returned",
            HumanBytes(info.granule)
        ),
    ]);
    table.add_row(["Encodings", &by_name(&counters.encodings)]);
    table.add_row(["Requests", &requests(info)]);
    table.add_row(["Refused", &refused(counters)]);
    table.add_row(["Daemon", &daemon(info)]);
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    table
}

/// Which VM it is, if that is known.
fn vm(info: &Info) -> Option<String> {
    let process = info.vmm.map(|pid| format!("process {pid}"));
    let parts: Vec<_> = info.name.clone().into_iter().chain(process).collect();
    (!parts.is_empty()).then(|| parts.join(", "))
}

/// The worker's program and its running time. An older one does not tell its version.
fn daemon(info: &Info) -> String {
    let uptime = format!("up for {}", duration(info.uptime));
    match info.version.as_str() {
        "" => uptime,
        version => format!("version {version}, {uptime}"),
    }
}

/// Why no memory is returned to the host, if so.
pub(crate) fn withheld(info: &Info) -> Option<String> {
    let mut text = info.withheld.join(", ");
    // It is the last reason.
    if let (Some(seconds), true) = (info.inhibited, info.inhibitors.is_empty()) {
        text += &format!(" for {}", duration(seconds));
    }
    for (number, (owner, &seconds)) in info.inhibitors.iter().enumerate() {
        text += match number {
            0 => "",
            _ => ",",
        };
        if !owner.is_empty() {
            text += &format!(" by {owner}");
        }
        text += &format!(" for {}", duration(seconds));
    }
    (!info.withheld.is_empty()).then_some(text)
}

fn balloon(info: &Info) -> String {
    let size = HumanBytes(info.size);
    let mut text = if info.is_reached() {
        format!("{size}, as requested")
    } else {
        format!("{size} of {} requested", HumanBytes(info.asked()))
    };
    if info.asked() < info.target {
        text += &format!(
            "; the target of {} leaves the guest too little",
            HumanBytes(info.target)
        );
    }
    if let Some(seconds) = info.grace {
        text += &format!(
            "; the guest boots, and is left alone for {}",
            duration(seconds)
        );
    }
    if let Some(reason) = info.guest.short_of_target {
        text += &format!("; {reason}");
    }
    text
}

/// How long the target stays, if that is limited.
fn lease(info: &Info) -> Option<String> {
    match &info.lease {
        Some(lease) => {
            let of = lease.owner.as_ref().map(|owner| format!("of {owner}; "));
            let mut text = format!(
                "{}ends in {}, and then the target is {}",
                of.unwrap_or_default(),
                duration(lease.remaining / 1000),
                HumanBytes(lease.fallback)
            );
            for (verb, bytes) in [
                ("may lower", info.release.unwrap_or(0)),
                ("has lowered", info.released),
            ] {
                if bytes > 0 {
                    text += &format!("; the daemon {verb} the target by {}", HumanBytes(bytes));
                }
            }
            Some(text)
        }
        None if info.lapsed => Some("has run out: no client has renewed it".to_owned()),
        None => None,
    }
}

fn guest(info: &Info) -> String {
    if !info.guest.connected {
        return "not connected".to_owned();
    }
    let mut memory = match info.memory {
        Some(memory) => format!("has {}", HumanBytes(memory)),
        None => "has an unknown amount of memory".to_owned(),
    };
    if let Some(resident) = info.resident {
        memory += &format!(" ({} allocated)", HumanBytes(resident));
    }
    match info.guest.answered {
        Some(seconds) => format!("{memory}, responded {} ago", duration(seconds)),
        None => format!("{memory}, has not responded yet"),
    }
}

fn driver(guest: &Guest) -> String {
    match (guest.driver, guest.features.as_slice()) {
        (false, _) => "none".to_owned(),
        (true, []) => "ready, without features".to_owned(),
        (true, features) => format!("ready, with {}", features.join(", ")),
    }
}

/// Counts, each with its name.
fn by_name(counts: &BTreeMap<String, u64>) -> String {
    let counts: Vec<_> = counts
        .iter()
        .map(|(name, times)| format!("{} {name}", HumanCount(*times)))
        .collect();
    counts.join(", ")
}

fn requests(info: &Info) -> String {
    let Counters {
        asked, answered, ..
    } = &info.counters;
    let mut text = format!(
        "{} asked, {} open",
        HumanCount(*asked),
        HumanCount(info.guest.open_requests)
    );
    for (status, times) in answered {
        text += &format!(", {} {status}", HumanCount(*times));
    }
    text
}

fn refused(counters: &Counters) -> String {
    if counters.refused.is_empty() {
        return "nothing".to_owned();
    }
    by_name(&counters.refused)
}

/// The kind of messages, their memory, their size, and the queue.
type Row = (&'static str, Option<u64>, Option<u64>, fn(ByQueue) -> u64);

fn messages(counters: &Counters) -> Table {
    let mut table = Table::new();
    table.load_preset(UTF8_FULL_CONDENSED).set_header([
        "From the guest",
        "Memory",
        "Messages",
        "Received",
        "Notified",
    ]);
    let received = counters.received;
    let rows: [Row; 6] = [
        (
            "inflated",
            Some(counters.inflated),
            Some(received.inflate),
            |of| of.inflate,
        ),
        (
            "deflated",
            Some(counters.deflated),
            Some(received.deflate),
            |of| of.deflate,
        ),
        ("reported free", Some(counters.reported), None, |of| {
            of.reports
        }),
        ("hinted free", Some(counters.hinted), None, |of| of.hints),
        ("statistics", None, None, |of| of.stats),
        (
            "listed unused",
            Some(counters.unused),
            Some(received.requests),
            |of| of.requests,
        ),
    ];
    let bytes = |bytes: Option<u64>| bytes.map(|bytes| HumanBytes(bytes).to_string());
    for (what, memory, received, of) in rows {
        table.add_row([
            what.to_owned(),
            bytes(memory).unwrap_or_default(),
            HumanCount(of(counters.messages)).to_string(),
            bytes(received).unwrap_or_default(),
            HumanCount(of(counters.notifications)).to_string(),
        ]);
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

/// A time as text.
pub(crate) fn duration(seconds: u64) -> HumanDuration {
    HumanDuration(Duration::from_secs(seconds))
}
