// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Metrics in Prometheus' text exposition format.

use balloon_control::Exposition;
use balloon_policy::{Account, Pages};

use crate::config::PAGE;
use crate::manager::Manager;
use crate::status::{Counts, Status, VmStatus};

/// Memory of each VM: the metric's name, its help and its value.
type Memory = (&'static str, &'static str, fn(&Account) -> Pages);

const MEMORY: [Memory; 6] = [
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
    manager.waits().show(&mut metrics);
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
        (
            "observed_savings_bytes",
            "Memory that the host would not give to VMs if the manager did not only observe.",
            status.saved,
        ),
    ] {
        metrics.one("gauge", name, help, pages.saturating_mul(PAGE));
    }
}

fn vms(metrics: &mut Exposition, vms: &[VmStatus]) {
    let mut each = |kind, name, help, value: &dyn Fn(&VmStatus) -> Option<u64>| {
        metrics.head(kind, name, help);
        for vm in vms {
            if let Some(value) = value(vm) {
                metrics.sample(name, Some(("vm", &vm.name)), value);
            }
        }
    };
    let bytes = |pages: Pages| pages.saturating_mul(PAGE);
    for (name, help, value) in MEMORY {
        each("gauge", name, help, &|vm| {
            Some(bytes(value(vm.account.as_ref()?)))
        });
    }
    each(
        "gauge",
        "vm_resident_bytes",
        "Memory that the host has given to the VM.",
        &|vm| vm.resident.map(bytes),
    );
    each(
        "gauge",
        "vm_pressed",
        "Whether the guest shows a sign of pressure.",
        &|vm| {
            Some(
                vm.account
                    .is_some_and(|account| account.pressed.is_some())
                    .into(),
            )
        },
    );
    each(
        "counter",
        "vm_raises_total",
        "Targets that give memory to the VM.",
        &|vm| Some(vm.raises),
    );
    each(
        "counter",
        "vm_cuts_total",
        "Targets that take memory from the VM.",
        &|vm| Some(vm.cuts),
    );
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
