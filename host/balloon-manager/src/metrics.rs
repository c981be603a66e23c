// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Metrics in Prometheus' text exposition format.

use std::fmt::Write;

use balloon_policy::{Account, Pages};

use crate::config::PAGE;
use crate::manager::Manager;

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
        head(&mut text, name, "gauge", help);
        let _ = writeln!(
            text,
            "balloon_manager_{name} {}",
            pages.saturating_mul(PAGE)
        );
    }
    for (name, help, value) in PER_VM {
        head(&mut text, name, "gauge", help);
        for vm in &status.vms {
            if let Some(account) = &vm.account {
                let bytes = value(account).saturating_mul(PAGE);
                let _ = writeln!(
                    text,
                    "balloon_manager_{name}{{vm=\"{}\"}} {bytes}",
                    escaped(&vm.name)
                );
            }
        }
    }
    head(
        &mut text,
        "vm_pressed",
        "gauge",
        "Whether the guest shows a sign of pressure.",
    );
    for vm in &status.vms {
        let pressed = vm.account.is_some_and(|account| account.pressed.is_some());
        let _ = writeln!(
            text,
            "balloon_manager_vm_pressed{{vm=\"{}\"}} {}",
            escaped(&vm.name),
            u8::from(pressed)
        );
    }
    let counts = manager.counts();
    for (name, help, count) in [
        (
            "decisions_total",
            "Decisions of the policy.",
            counts.decisions,
        ),
        (
            "raises_total",
            "Targets that give memory to a VM.",
            counts.raises,
        ),
        (
            "cuts_total",
            "Targets that take memory from a VM.",
            counts.cuts,
        ),
        (
            "refused_reservations_total",
            "Reservations without room.",
            counts.refused,
        ),
    ] {
        head(&mut text, name, "counter", help);
        let _ = writeln!(text, "balloon_manager_{name} {count}");
    }
    text
}
