// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The driver's counters, trace events and log messages.

use anyhow::{Context, Result, ensure};
use vm::{Config, Driver, Guest, Size, Zeroing};

use crate::debugfs::{show, value};
use crate::lifecycle::device;
use crate::overwriting::unused;
use crate::scenario::{
    ALL_DEVICES, BOTH_DRIVERS, BOTH_KERNELS, CALLBACK_KERNELS, EXTENDED_DEVICE, PATIENCE,
    RUST_DRIVER, Scenario, Setup,
};
use crate::unused::ask;

pub(crate) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "observability",
        proves: "counters, trace events and the log agree with the guest's kernel and with the device",
        kernels: CALLBACK_KERNELS,
        drivers: RUST_DRIVER,
        devices: EXTENDED_DEVICE,
        run: observability,
    },
    Scenario {
        name: "attributes",
        proves: "sysfs shows the balloon's state, accepts settings at run time, and notifies of a new stop reason",
        kernels: CALLBACK_KERNELS,
        drivers: RUST_DRIVER,
        devices: ALL_DEVICES,
        run: attributes,
    },
    Scenario {
        name: "kernel_threads",
        proves: "a device has one kernel thread of its own (C driver: none), whose priority can be set",
        kernels: BOTH_KERNELS,
        drivers: BOTH_DRIVERS,
        devices: EXTENDED_DEVICE,
        run: kernel_threads,
    },
];

fn observability(setup: &Setup) -> Result<()> {
    let size = Size::mib(300);
    let config = setup.config().memory(Size::gib(1));
    vm::run(&config, |guest| {
        guest.insmod(setup.driver, &[])?;
        let log = guest.console().text()?;
        ensure!(
            log.contains("features: inflate and deflate, statistics"),
            "the log does not list the features"
        );

        let (_, events) = guest.trace_balloon(|| guest.balloon().settle(size))?;
        let pages = guest.vmstat("nr_balloon_pages")?;
        let inflated = sum(&events, "inflate", "pages")?;
        ensure!(
            inflated == pages,
            "{inflated} of {pages} pages in {events:#?}"
        );

        let balloon = show(guest, "balloon")?;
        for name in ["target", "held"] {
            let value = value(&balloon, name)?;
            ensure!(value == pages, "{name} is {value}, not {pages}");
        }
        let mut held = 0;
        for order in 0..=10 {
            held += value(&balloon, &format!("order_{order}_blocks"))? << order;
        }
        ensure!(held == pages, "{held} pages in {balloon}");
        check_traffic(guest, "inflate")?;

        let (_, events) = guest.trace_balloon(|| guest.balloon().settle(Size::default()))?;
        let deflated = sum(&events, "deflate", "pages")?;
        ensure!(
            deflated == pages,
            "{deflated} of {pages} pages in {events:#?}"
        );
        check_traffic(guest, "deflate")?;

        check_request(guest)?;
        guest.rmmod(setup.driver)
    })
}

/// Checks that trace events and counters contain a host request.
fn check_request(guest: &Guest) -> Result<()> {
    let ((answer, _), events) = guest.trace_balloon(|| ask(guest, &unused(2 << 20)))?;
    let named = Size::pages(sum(&events, "answer", "pages")?);
    ensure!(
        named.as_bytes() == answer.named && answer.named > 0,
        "{named} of {} bytes in {events:#?}",
        answer.named
    );
    let has = |part: &str| events.iter().any(|event| event.contains(part));
    ensure!(
        has("command=unused-skip") && has("status=complete"),
        "no request, or no end of it: {events:#?}"
    );
    for (name, expected) in [
        ("requests_completed", "1"),
        ("requests_open", "0"),
        ("requests_refused", "0"),
    ] {
        let found = show(guest, name)?;
        ensure!(found.trim() == expected, "{name} is {found}");
    }
    Ok(())
}

/// Checks that the module does not load with parameters that have no legal value, and says why.
fn check_refused(setup: &Setup, guest: &Guest) -> Result<()> {
    for (parameter, line) in [
        (
            "encoding=254",
            "encoding=254: give 0, the number of an encoding, or 255",
        ),
        ("floor_mib=-2", "floor_mib=-2: give a number of MiB, or -1"),
    ] {
        let mark = guest.console().mark()?;
        ensure!(
            guest.insmod(setup.driver, &[parameter]).is_err(),
            "the module accepts {parameter}"
        );
        ensure!(
            guest.console().count_since(mark, line)? > 0,
            "'{line}' is not in the guest's log"
        );
    }
    Ok(())
}

fn attributes(setup: &Setup) -> Result<()> {
    let size = Size::mib(100);
    vm::run(&setup.config(), |guest| {
        check_refused(setup, guest)?;
        guest.insmod(setup.driver, &["floor_mib=64"])?;
        let device = device(guest, setup.driver)?;
        let path = |name: &str| format!("/sys/bus/virtio/devices/{device}/balloon/{name}");
        let write = |name: &str, value: &str| guest.write_file(&path(name), value);
        let check = |name: &str, expected: &str| -> Result<()> {
            let found = guest.read_file(&path(name))?;
            ensure!(
                found.trim_end() == expected,
                "{name} is {found}, not {expected}"
            );
            Ok(())
        };
        check("floor_mib", "64")?;
        check("inflate", "1")?;

        guest.balloon().settle(size)?;
        let kib = (size.as_bytes() >> 10).to_string();
        check("target_kib", &kib)?;
        check("actual_kib", &kib)?;
        check("stop_reason", "none")?;

        let reason = guest.watch(&path("stop_reason"), &path("inflate"), "0")?;
        ensure!(
            reason.trim_end() == "excluded",
            "the reason with inflate=0 is {reason}"
        );
        guest.balloon().reach(Size::default())?;
        check("actual_kib", "0")?;
        let reason = guest.watch(&path("stop_reason"), &path("inflate"), "1")?;
        ensure!(
            reason.trim_end() == "none",
            "the reason with inflate=1 is {reason}"
        );
        guest.balloon().reach(size)?;

        // More than the guest's memory.
        write("floor_mib", "1000000")?;
        guest.balloon().request(size + size)?;
        guest.wait_until("a balloon at its floor", PATIENCE, || {
            Ok(guest.read_file(&path("stop_reason"))?.trim_end() == "floor")
        })?;
        ensure!(guest.balloon().size()? == size, "the balloon has inflated");
        write("floor_mib", "64")?;
        guest.balloon().reach(size + size)?;
        check("stop_reason", "none")?;

        check_illegal(write)?;
        check("floor_mib", "64")?;
        guest.rmmod(setup.driver)
    })
}

/// Checks that no file of a setting takes an illegal value, by `write`.
fn check_illegal(write: impl Fn(&str, &str) -> Result<()>) -> Result<()> {
    for (name, value) in [("inflate", "x"), ("floor_mib", "-2"), ("floor_mib", "x")] {
        ensure!(
            write(name, value).is_err(),
            "{name} takes the value '{value}'"
        );
    }
    Ok(())
}

fn kernel_threads(setup: &Setup) -> Result<()> {
    let mut queues = vec!["virtio_balloon_rs", "balloon_rs_requests"];
    threads_with(setup, &setup.config(), &queues)?;
    // There the driver also takes memory blocks.
    let zeroing = setup.config().zeroing(Zeroing::On);
    queues.extend(["balloon_rs_blocks", "balloon_rs_discard"]);
    threads_with(setup, &zeroing, &queues)
}

/// Checks the driver's threads, and sets the priority of its workqueues.
fn threads_with(setup: &Setup, config: &Config, queues: &[&str]) -> Result<()> {
    vm::run(config, |guest| {
        let before = threads(guest)?;
        guest.insmod(setup.driver, &[])?;
        guest.balloon().settle(Size::mib(100))?;
        let new = threads(guest)?.saturating_sub(before);
        match setup.driver {
            Driver::C => ensure!(new == 0, "the C driver has {new} threads"),
            _ => {
                ensure!(new <= 1, "the device has {new} threads");
                let device = device(guest, setup.driver)?;
                for queue in queues {
                    let nice = format!("/sys/devices/virtual/workqueue/{queue}-{device}/nice");
                    guest.write_file(&nice, "5")?;
                    let found = guest.read_file(&nice)?;
                    ensure!(
                        found.trim_end() == "5",
                        "the priority of {queue} is {found}"
                    );
                }
            }
        }
        guest.balloon().settle(Size::default())?;
        guest.rmmod(setup.driver)
    })
}

/// The number of kernel threads, except those that all workqueues share.
fn threads(guest: &Guest) -> Result<usize> {
    let names = guest.sh(
        "for process in /proc/[0-9]*; do [ -e $process/exe ] || cat $process/comm; done 2>/dev/null; true",
    )?;
    let is_shared = |name: &&str| {
        name.strip_prefix("kworker/")
            .is_some_and(|pool| pool.starts_with(|c: char| c == 'u' || c.is_ascii_digit()))
    };
    Ok(names.lines().filter(|name| !is_shared(name)).count())
}

/// The sum of `field` in all `events` called `name`.
fn sum(events: &[String], name: &str, field: &str) -> Result<u64> {
    let mut sum = 0;
    for event in events.iter().filter_map(|event| event.strip_prefix(name)) {
        let mut words = event.split_whitespace();
        let found = words.find_map(|word| word.strip_prefix(field)?.strip_prefix('='));
        sum += found.context("an event lacks a field")?.parse::<u64>()?;
    }
    Ok(sum)
}

/// Checks that the device has received as many messages and bytes on a queue as the driver has
/// sent.
fn check_traffic(guest: &Guest, queue: &str) -> Result<()> {
    let text = show(guest, "queues")?;
    let line = text.lines().find_map(|line| line.strip_prefix(queue));
    let line = line.context("a queue is missing")?;
    let counters = guest.daemon()?.info()?.counters;
    let (messages, bytes) = match queue {
        "inflate" => (counters.messages.inflate, counters.received.inflate),
        _ => (counters.messages.deflate, counters.received.deflate),
    };
    ensure!(
        (value(line, "buffers")?, value(line, "bytes")?) == (messages, bytes),
        "the device has received {messages} messages of {bytes} bytes, and the driver says{line}"
    );
    ensure!(
        value(line, "notifications")? > 0,
        "the driver has not notified the device"
    );
    Ok(())
}
