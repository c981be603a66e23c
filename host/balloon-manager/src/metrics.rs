// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Metrics in Prometheus' text exposition format.

use std::fmt::Write;

use balloon_policy::{Account, Pages};

use crate::config::PAGE;
use crate::manager::Manager;
use crate::status::{Counts, Status, VmStatus};

fn head(text: &mut String, name: &str, kind: &str, help: &str) {
    let _ = writeln!(text, "# HELP balloon_manager_{name} {help}");
    let _ = writeln!(text, "# TYPE balloon_manager_{name} {kind}");
}

/// A label's value.
fn escaped(name: &str) -> String {
    name.replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n")
}

/// A metric of each VM: its name, its help and its value.
type PerVm = (&'static str, &'static str, fn(&Account) -> Pages);

const PER_VM: [PerVm; 6] = [
    (
        "vm_memory_bytes",
        "Memory of the VM, in the balloon or not.",
        |account| account.memory,
    ),
    (
        "vm_grant_bytes",
        "Memory that the VM may have by its balloon's target.",
        |account| account.grant,
    ),
    (
        "vm_charged_bytes",
        "Memory that the VM can touch.",
        |account| account.charge,
    ),
    (
        "vm_need_bytes",
        "Memory that the guest cannot do without.",
        |account| account.need,
    ),
    (
        "vm_want_bytes",
        "Memory that the guest can use.",
        |account| account.want,
    ),
    (
        "vm_share_bytes",
        "Share of the VM in the pool.",
        |account| account.share,
    ),
];

pub(crate) fn text(manager: &Manager) -> String {
    let status = manager.status();
    let mut text = String::new();
    pool(&mut text, &status);
    vms(&mut text, &status.vms);
    counts(&mut text, manager.counts());
    text
}

fn pool(text: &mut String, status: &Status) {
    for (name, help, pages) in [
        (
            "pool_bytes",
            "Memory that the VMs may have together.",
            status.pool,
        ),
        (
            "reserve_bytes",
            "Part of the pool that stays free.",
            status.reserve,
        ),
        (
            "charged_bytes",
            "Memory that all VMs can touch.",
            status.charged,
        ),
        (
            "reserved_bytes",
            "Memory for VMs that are about to start.",
            status.reserved,
        ),
    ] {
        head(text, name, "gauge", help);
        let bytes = pages.saturating_mul(PAGE);
        let _ = writeln!(text, "balloon_manager_{name} {bytes}");
    }
}

fn vms(text: &mut String, vms: &[VmStatus]) {
    let line = |text: &mut String, name: &str, vm: &VmStatus, value: u64| {
        let vm = escaped(&vm.name);
        let _ = writeln!(text, "balloon_manager_{name}{{vm=\"{vm}\"}} {value}");
    };
    for (name, help, value) in PER_VM {
        head(text, name, "gauge", help);
        for vm in vms {
            if let Some(account) = &vm.account {
                line(text, name, vm, value(account).saturating_mul(PAGE));
            }
        }
    }
    let (name, help) = ("vm_pressed", "Whether the guest shows a sign of pressure.");
    head(text, name, "gauge", help);
    for vm in vms {
        let pressed = vm.account.is_some_and(|account| account.pressed.is_some());
        line(text, name, vm, u64::from(pressed));
    }
}

fn counts(text: &mut String, counts: Counts) {
    let Counts {
        decisions,
        raises,
        cuts,
        refused,
    } = counts;
    for (name, help, count) in [
        ("decisions_total", "Decisions of the policy.", decisions),
        ("raises_total", "Targets that give memory to a VM.", raises),
        ("cuts_total", "Targets that take memory from a VM.", cuts),
        (
            "refused_reservations_total",
            "Reservations without room.",
            refused,
        ),
    ] {
        head(text, name, "counter", help);
        let _ = writeln!(text, "balloon_manager_{name} {count}");
    }
}
