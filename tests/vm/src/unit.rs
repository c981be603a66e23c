// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The device's systemd unit, in a Debian system with its package.

use std::sync::Arc;

use anyhow::{Context, Error, Result, ensure};
use vm::{Container, Daemon, Guest, Kernel, Size};

use crate::scenario::{EXTENDED_DEVICE, PATIENCE, RUST_DRIVER, Scenario, Setup};
use crate::sizes::check_size;
use crate::vhost_user::wait_restarted;

/// The kernel with a system that has systemd and the package's unit.
const DEBIAN_KERNEL: &[Kernel] = &[Kernel::Debian];

pub(crate) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "unit",
        proves: "whatever an operator or apt does to the device's unit, the guest keeps its balloon, and runs without it",
        kernels: DEBIAN_KERNEL,
        drivers: RUST_DRIVER,
        devices: EXTENDED_DEVICE,
        run: unit,
    },
    Scenario {
        name: "unit_shutdown",
        proves: "when the host shuts down, the device's unit is stopped after libvirt's guests and the units of VMs",
        kernels: DEBIAN_KERNEL,
        drivers: RUST_DRIVER,
        devices: EXTENDED_DEVICE,
        run: unit_shutdown,
    },
];

/// The unit of the device, as its package installs it.
const UNIT: &str = "vhost-user-balloon@vm.service";

/// Makes systemd detect within two seconds that the unit hangs.
const SHORT_WATCHDOG: &str = r"
    mkdir -p /run/systemd/system/$unit.d
    printf '[Service]\nWatchdogSec=2\n' >/run/systemd/system/$unit.d/watchdog.conf
    systemctl daemon-reload
";

/// An operation on the unit, after which new processes implement the device.
type NamedChange = (&'static str, &'static str);

/// Operations of operators, updates and crashes.
const CHANGES: &[NamedChange] = &[
    ("the unit is restarted", "systemctl restart $unit"),
    ("the unit is reloaded", "systemctl reload $unit"),
    (
        "the unit is stopped and started",
        "systemctl stop $unit; systemctl start $unit",
    ),
    (
        "all processes are killed",
        "systemctl kill --signal=KILL $unit",
    ),
    (
        "the package is installed again",
        "apt-get install --yes --reinstall /packages/vhost-user-balloon_*.deb",
    ),
    (
        "the supervisor hangs until the watchdog ends it",
        "systemctl kill --signal=STOP --kill-whom=main $unit",
    ),
    (
        "the options are wrong, and right again",
        "options=/etc/vhost-user-balloon/vm.conf
         cp $options /tmp/options
         echo 'OPTIONS=--no-such-option' >$options
         if systemctl restart $unit; then
             echo 'the unit starts with wrong options' >&2
             exit 1
         fi
         sleep 3
         [ $(systemctl is-failed $unit) = failed ]
         [ $(systemctl show --property=NRestarts --value $unit) = 0 ]
         cp /tmp/options $options
         systemctl start $unit",
    ),
    (
        "the sockets get groups",
        r"mkdir -p /run/systemd/system/$unit.d
          printf '[Service]\nSupplementaryGroups=users operator\n' >/run/systemd/system/$unit.d/groups.conf
          systemctl daemon-reload
          options=/etc/vhost-user-balloon/vm.conf
          sed -i 's/^OPTIONS=/&--socket-group users --control-group operator /' $options
          systemctl restart $unit",
    ),
];

/// Replaces the C library by a copy, as its update does. Every process still has the old one.
const UPDATE_LIBRARY: &str = r#"
    library=$(readlink --canonicalize /usr/lib/x86_64-linux-gnu/libc.so.6)
    cp --preserve=all $library $library.new
    mv $library.new $library
"#;

/// Lists the units that use a library that has been replaced.
const LIST_OUTDATED: &str = "needrestart -b -l";

/// Restarts them, as needrestart does after an update of a library.
const RESTART_OUTDATED: &str = "DEBIAN_FRONTEND=noninteractive needrestart -l -r a";

/// Removes what the package tells needrestart about the unit.
const REMOVE_OVERRIDE: &str = "rm /etc/needrestart/conf.d/vhost-user-balloon.conf";

/// Checks that users of each group, and only they, have access to its socket.
const CHECK_GROUPS: &str = r#"
    cd /run/vhost-user-balloon/vm
    as() {
        group=$1
        shift
        setpriv --reuid=daemon --regid=$group --clear-groups "$@"
    }
    vmm() {
        as $1 perl -MIO::Socket::UNIX -e 'IO::Socket::UNIX->new("vmm.sock") or die $!'
    }
    client() {
        as $1 balloonctl --socket control.sock info
    }
    vmm users
    client operator
    for refused in 'vmm operator' 'vmm daemon' 'client users' 'client daemon'; do
        if $refused; then
            echo "$refused has access" >&2
            exit 1
        fi
    done
"#;

fn unit(setup: &Setup) -> Result<()> {
    const SIZE: Size = Size::mib(300);
    // The system has a PID namespace of its own.
    let config = setup
        .config()
        .daemon_argument("--allow")
        .daemon_argument("unseen");
    let daemon = Arc::new(config.start_daemon_service()?);
    let system = daemon.system().context("there is no system with systemd")?;
    let shell = |script: &str| shell(system, script);
    // The count starts with the first restart.
    shell(SHORT_WATCHDOG)?;
    vm::run(&config.daemon(&daemon), |guest| {
        guest.insmod(setup.driver, &[])?;
        guest.balloon().settle(SIZE)?;
        for (name, change) in CHANGES {
            let before = daemon.processes()?;
            // The balloon has not changed, and follows a new target.
            shell(change)
                .and_then(|_| wait_restarted(guest, before))
                .and_then(|()| check_size(guest, SIZE))
                .and_then(|()| guest.balloon().settle(Size::default()))
                .and_then(|_| guest.balloon().settle(SIZE))
                .with_context(|| format!("when {name}"))?;
        }

        check_needrestart(&daemon, guest, shell)
            .context("when needrestart ran after an update of the C library")?;

        // If the new program does not start, the running one stays.
        let before = daemon.processes()?;
        shell("mv /usr/bin/vhost-user-balloon /tmp; cp /bin/false /usr/bin/vhost-user-balloon")?;
        shell("systemctl reload $unit")?;
        guest.balloon().settle(Size::default())?;
        ensure!(
            daemon.processes()? == before,
            "the running program has ended"
        );
        shell("mv /tmp/vhost-user-balloon /usr/bin")?;

        shell(CHECK_GROUPS)?;

        // The manager detects the balloon.
        shell("systemctl start balloon-manager")?;
        guest.wait_until("the manager sees the guest", PATIENCE, || {
            Ok(shell("balloon-manager top")?.contains("\nvm "))
        })?;
        shell("systemctl stop balloon-manager")?;

        // The guest keeps running when the packages are removed.
        guest.balloon().settle(SIZE)?;
        shell("apt-get remove --yes vhost-user-balloon")?;
        guest.rmmod(setup.driver)
    })
}

/// needrestart must leave the unit to the operator, whose reload takes the new library.
fn check_needrestart(
    daemon: &Daemon,
    guest: &Guest,
    shell: impl Fn(&str) -> Result<String>,
) -> Result<()> {
    let is_outdated = || {
        let units = shell(LIST_OUTDATED)?;
        Ok::<_, Error>(
            units
                .lines()
                .any(|line| line == format!("NEEDRESTART-SVC: {UNIT}")),
        )
    };
    let before = daemon.processes()?;
    shell(UPDATE_LIBRARY)?;
    ensure!(is_outdated()?, "needrestart does not see the unit");
    shell(RESTART_OUTDATED)?;
    ensure!(daemon.processes()? == before, "it restarted the unit");
    shell("systemctl reload $unit")?;
    wait_restarted(guest, before)?;
    ensure!(
        !is_outdated()?,
        "the unit has the old library after a reload"
    );

    // Without the override needrestart restarts the unit.
    let before = daemon.processes()?;
    shell(REMOVE_OVERRIDE)?;
    shell(UPDATE_LIBRARY)?;
    shell(RESTART_OUTDATED)?;
    wait_restarted(guest, before)
}

/// Units that need a daemon until they have stopped: libvirt's, which ends its guests, and that of a VM, as
/// docs/vhost-user-balloon.md has it. Each has a daemon of its own, and writes down whether that answers at the end of its
/// stop. A daemon that is stopped at the same time has ended by then. All daemons wait for libvirt's unit, so the VM's takes
/// longer: its daemon must wait for it, too.
const VM_UNITS: &str = r#"
    vm() {
        cat >/run/systemd/system/$1.service <<END
[Unit]
$3
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=true
ExecStop=sleep $4
ExecStop=sh -c 'balloonctl --vm $2 info >/run/$1.info && echo $1 >>/run/answered'
END
    }
    vm libvirt-guests vm '' 3
    vm another another After=vhost-user-balloon@another.service 6
    systemctl daemon-reload
    systemctl start vhost-user-balloon@another libvirt-guests another
"#;

/// Stops all that a shutdown of the system stops. systemd starts `shutdown.target` only as a dependency.
const SHUTDOWN: &str = r#"
    cat >/run/systemd/system/stop-all.target <<END
[Unit]
DefaultDependencies=no
Requires=shutdown.target
After=shutdown.target
END
    systemctl daemon-reload
    systemctl start --job-mode=replace-irreversibly stop-all.target
    cat /run/answered
"#;

fn unit_shutdown(setup: &Setup) -> Result<()> {
    let daemon = setup.config().start_daemon_service()?;
    let system = daemon.system().context("there is no system with systemd")?;
    let found = shell(system, "systemd-analyze verify --man=no $unit 2>&1")?;
    ensure!(found.is_empty(), "systemd-analyze verify: {found}");
    shell(system, VM_UNITS)?;
    let answered = shell(system, SHUTDOWN)?;
    let mut units: Vec<_> = answered.lines().collect();
    units.sort_unstable();
    ensure!(
        units == ["another", "libvirt-guests"],
        "when they stopped, the daemons answered {units:?} only"
    );
    let state = shell(
        system,
        "systemctl show --property=ActiveState --value $unit",
    )?;
    ensure!(
        state.trim_end() == "inactive",
        "the shutdown leaves the daemon's unit {state}"
    );
    Ok(())
}

/// Runs a shell script in the system, with the unit's name in `$unit`.
fn shell(system: &Container, script: &str) -> Result<String> {
    let script = format!("unit={UNIT}\n{script}");
    system.run("sh", &["-euc", &script])
}
