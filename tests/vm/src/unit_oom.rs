// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The device's systemd unit when the kernel is out of memory.

use std::fs;

use anyhow::{Context, Result, ensure};
use tempfile::NamedTempFile;
use vm::{Guest, GuestSystem, Kernel, Size};

use crate::scenario::{EXTENDED_DEVICE, PATIENCE, RUST_DRIVER, Scenario, Setup};

pub(crate) const SCENARIOS: &[Scenario] = &[Scenario {
    name: "unit_oom",
    proves: "the device's unit stays active, and keeps the VMM's connection, when the kernel's OOM killer ends its processes",
    kernels: &[Kernel::Debian],
    drivers: RUST_DRIVER,
    devices: EXTENDED_DEVICE,
    run: unit_oom,
}];

/// The unit of the device, as its package installs it.
const UNIT: &str = "vhost-user-balloon@vm.service";

/// A front end that connects once, asks for the device's features again and again, and ends when there is no answer. Its
/// log has a line for each answer.
const VMM: &str = r#"
    cat >/run/vmm <<'END'
use IO::Socket::UNIX;
my $vmm = IO::Socket::UNIX->new("/run/vhost-user-balloon/vm/vmm.sock") or die $!;
open(my $log, ">", "/run/vmm.log") or die $!;
$log->autoflush;
while (1) {
    my ($get_features, $version, $answer) = (1, 1);
    syswrite $vmm, pack("V3", $get_features, $version, 0) or die $!;
    sysread($vmm, $answer, 20) == 20 or die "no answer";
    print $log "an answer\n";
    select(undef, undef, undef, 0.1);
}
END
    systemctl start $unit
    systemd-run --unit=vmm perl /run/vmm
"#;

/// Makes the kernel's OOM killer choose the process `$process`.
const KILL: &str = r#"
    echo 1000 >/proc/$process/oom_score_adj
    echo f >/proc/sysrq-trigger
"#;

/// The processes of the unit, and how it is.
#[derive(Debug, PartialEq, Eq)]
struct State {
    supervisor: String,
    worker: String,
    restarts: String,
    active: String,
}

/// A unit in a guest's system.
struct Unit<'a> {
    guest: &'a Guest,
    system: GuestSystem<'a>,
}

impl Unit<'_> {
    /// Runs a shell script in the system, with the unit's name in `$unit`.
    fn shell(&self, script: &str) -> Result<String> {
        let script = format!("unit={UNIT}\n{script}");
        self.system.run("sh", &["-euc", &script])
    }

    fn state(&self) -> Result<State> {
        let text = self.shell(
            "systemctl show --property=MainPID,NRestarts,ActiveState $unit
             pid=$(systemctl show --property=MainPID --value $unit)
             echo worker=$(cat /proc/$pid/task/$pid/children)",
        )?;
        let value = |name: &str| {
            let value = text
                .lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
            let value = value.with_context(|| format!("no {name} in {text}"))?;
            anyhow::Ok(value.trim_end().to_owned())
        };
        Ok(State {
            supervisor: value("MainPID")?,
            worker: value("worker")?,
            restarts: value("NRestarts")?,
            active: value("ActiveState")?,
        })
    }

    /// Waits until the unit is active with a worker other than `before`'s.
    fn wait_for_another(&self, before: &State) -> Result<State> {
        let mut now = None;
        self.guest.wait_until("another worker", PATIENCE, || {
            // A process may end meanwhile.
            now = self.state().ok().filter(|now| {
                now.active == "active" && !now.worker.is_empty() && now.worker != before.worker
            });
            Ok(now.is_some())
        })?;
        now.context("the unit has a worker")
    }

    /// Waits until the front end has got another answer on its connection.
    fn check_connection(&self) -> Result<()> {
        let answers = || -> Result<u32> { Ok(self.shell("wc -l </run/vmm.log")?.trim().parse()?) };
        let before = answers()?;
        self.guest.wait_until("another answer", PATIENCE, || {
            self.shell("systemctl is-active vmm")
                .context("the front end has lost its connection")?;
            Ok(answers()? > before + 1)
        })
    }

    /// How many processes of such a name the kernel's OOM killer has killed.
    fn killed(&self, name: &str) -> Result<usize> {
        let log = self.guest.run(&["dmesg"])?;
        Ok(log
            .lines()
            .filter(|line| line.contains("Killed process") && line.contains(name))
            .count())
    }

    fn kill(&self, process: &str) -> Result<()> {
        self.shell(&format!("process={process}\n{KILL}"))?;
        Ok(())
    }
}

fn unit_oom(setup: &Setup) -> Result<()> {
    fs::create_dir_all(setup.logs())?;
    let initramfs = NamedTempFile::new_in(setup.logs())?;
    let config = setup
        .config()
        .memory(Size::gib(2))
        .balloon(None)
        .with_system(initramfs.path())?
        // The console loses lines of so many reports, also their first ones.
        .expect("invoked oom-killer|Out of memory|Memory cgroup out of memory|Call Trace:");
    vm::run(&config, |guest| {
        let system = guest.boot_system()?;
        let unit = Unit { guest, system };
        unit.shell(VMM)?;
        guest.wait_until("a first answer", PATIENCE, || {
            Ok(unit.shell("test -s /run/vmm.log").is_ok())
        })?;
        kill_each(&unit)?;
        exceed_limit(setup, &unit)
    })
}

/// The kernel kills the worker, and then the supervisor.
fn kill_each(unit: &Unit<'_>) -> Result<()> {
    let before = unit.state()?;
    unit.kill(&before.worker)?;
    let after = unit.wait_for_another(&before)?;
    unit.guest.wait_until("systemd's notice", PATIENCE, || {
        let log = unit.shell("journalctl --no-pager --unit $unit")?;
        Ok(log.contains("has been killed by the OOM killer"))
    })?;
    ensure!(
        unit.killed("(balloon-worker)")? == 1,
        "the kernel has killed another process"
    );
    let expected = State {
        worker: after.worker.clone(),
        ..before
    };
    let now = unit.state()?;
    ensure!(
        now == expected,
        "when its worker was killed, the unit went from {expected:?} to {now:?}"
    );
    unit.check_connection()?;

    unit.kill(&now.supervisor)?;
    let after = unit.wait_for_another(&now)?;
    ensure!(
        after.supervisor != now.supervisor && after.restarts == "1",
        "when its supervisor was killed, the unit went from {now:?} to {after:?}"
    );
    unit.check_connection()
}

/// The unit has a limit that is too small, and the kernel kills both of its processes.
fn exceed_limit(setup: &Setup, unit: &Unit<'_>) -> Result<()> {
    const KILLS: usize = 2;
    let before = unit.state()?;
    let killed = unit.killed("")?;
    unit.shell("systemctl set-property --runtime $unit MemoryMax=256K")?;
    // The kernel's log may lose these lines later.
    let mut kills = 0;
    unit.guest.wait_until("more OOM kills", PATIENCE, || {
        kills = unit.killed("")?;
        Ok(kills >= killed + KILLS)
    })?;
    unit.shell("systemctl set-property --runtime $unit MemoryMax=infinity")?;
    let after = unit.wait_for_another(&before)?;
    unit.check_connection()?;
    setup.note(format!(
        "{kills} processes killed, systemd started the unit again {} times, and the VMM has its connection",
        after.restarts
    ));
    Ok(())
}
