// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Metrics in Prometheus' text exposition format.

use balloon_control::Exposition;
use balloon_policy::{Account, Pages};

use crate::config::PAGE;
use crate::manager::Manager;
use crate::status::{Counts, Status, VmStatus};

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
    let mut metrics = Exposition::new("balloon_manager");
    pool(&mut metrics, &status);
    vms(&mut metrics, &status.vms);
    counts(&mut metrics, manager.counts());
    metrics.into_text()
}

fn pool(metrics: &mut Exposition, status: &Status) {
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
        metrics.one("gauge", name, help, pages.saturating_mul(PAGE));
    }
}

fn vms(metrics: &mut Exposition, vms: &[VmStatus]) {
    for (name, help, value) in PER_VM {
        metrics.head("gauge", name, help);
        for vm in vms {
            if let Some(account) = &vm.account {
                let bytes = value(account).saturating_mul(PAGE);
                metrics.sample(name, Some(("vm", &vm.name)), bytes);
            }
        }
    }
    let (name, help) = ("vm_pressed", "Whether the guest shows a sign of pressure.");
    metrics.head("gauge", name, help);
    for vm in vms {
        let pressed = vm.account.is_some_and(|account| account.pressed.is_some());
        metrics.sample(name, Some(("vm", &vm.name)), pressed.into());
    }
}

fn counts(metrics: &mut Exposition, counts: Counts) {
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
        metrics.one("counter", name, help, count);
    }
}
