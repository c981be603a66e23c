// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A system with systemd, in namespaces of its own.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use crate::stopwatch::{PATIENCE, Stopwatch};

/// Enters the cgroup `$1`, and then runs the rest of the line with that as its root.
const ENTER: &str = r#"
    echo $$ >"$1/cgroup.procs"
    shift
    exec "$@"
"#;

/// Boots the system of the directories `$1` up to the target `$3`, with the packages of `$4`. Its changes are in memory,
/// mounted at `$2`.
const BOOT: &str = r#"
    mount -t tmpfs -o mode=755 changes "$2"
    cd "$2"
    mkdir changes work root
    mount -t overlay -o "lowerdir=$1,upperdir=changes,workdir=work" overlay root
    cd root
    mount -t proc proc proc
    mount -t sysfs sysfs sys
    mount -t cgroup2 cgroup2 sys/fs/cgroup
    mount -t tmpfs -o mode=755 dev dev
    for device in null zero full random urandom tty; do
        touch dev/$device
        mount --bind /dev/$device dev/$device
    done
    mkdir dev/pts dev/shm
    mount -t devpts -o newinstance,ptmxmode=0666,mode=620 devpts dev/pts
    ln -s pts/ptmx dev/ptmx
    ln -s /proc/self/fd dev/fd
    mount -t tmpfs -o mode=1777 shm dev/shm
    mount -t tmpfs -o mode=755 run run
    mount -t tmpfs -o mode=1777 tmp tmp
    mkdir -p packages
    mount --bind "$4" packages
    : >etc/machine-id
    exec chroot . env -i container=vm PATH=/usr/sbin:/usr/bin:/sbin:/bin \
        /usr/lib/systemd/systemd --system --unit="$3"
"#;

/// The target that is active when the system has booted.
const TARGET: &str = "multi-user.target";

/// Appends the system of the directories `$1`, mounted at `$2`, to the archive `$3` of the kernel's format. It leaves out
/// the kernel, compilers and documentation.
const APPEND: &str = r#"
    mkdir "$2/system"
    mount -t overlay -o "lowerdir=$1" overlay "$2/system"
    cd "$2"
    find system -xdev \( -path system/boot -o -path system/var/cache -o -path system/var/lib -o -path system/usr/include \
        -o -path system/usr/share -o -path system/usr/src -o -path system/usr/lib/modules -o -path system/usr/lib/gcc \
        -o -path system/usr/libexec/gcc -o -path 'system/usr/lib/llvm-*' -o -path system/usr/lib/rustlib \
        -o -path system/packages \) -prune -o \( ! -type f -o -size -16384k \) -print |
        cpio --quiet --create --format=newc >>"$3"
"#;

/// A system that can be booted.
#[derive(Clone, Debug)]
pub struct System {
    /// The directories that it consists of, the uppermost first.
    pub layers: Vec<PathBuf>,
    /// The directory of the Debian packages that are installed in it.
    pub packages: PathBuf,
}

impl System {
    /// Appends what services need of it to an initramfs, below /system.
    pub(crate) fn append_to(&self, initramfs: &Path) -> Result<()> {
        let mounts = tempfile::tempdir()?;
        let output = Command::new("unshare")
            .args([
                "--mount",
                "--propagation=unchanged",
                "sh",
                "-euc",
                APPEND,
                "sh",
            ])
            .arg(self.layers())
            .arg(mounts.path())
            .arg(initramfs)
            .output()?;
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.success() && errors.is_empty(),
            "the system cannot be put into an initramfs: {errors}"
        );
        Ok(())
    }

    /// The directories, as an option of mount.
    fn layers(&self) -> OsString {
        let layers: Vec<_> = self.layers.iter().map(|layer| layer.as_os_str()).collect();
        layers.join(":".as_ref())
    }
}

/// A running system. It ends with all of its processes when it is dropped.
#[derive(Debug)]
pub struct Container {
    /// The parent of the system's first process.
    child: Child,
    /// The parent of its own cgroups. Dropped when the processes have ended.
    _cgroup: Cgroup,
    /// Where its changes are mounted, in its own namespace.
    _changes: TempDir,
}

impl Container {
    /// Boots a system, whose directories stay as they are. It sees the packages in `/packages`.
    ///
    /// # Errors
    ///
    /// The caller has no permission to make namespaces, or systemd does not become ready.
    pub(crate) fn boot(system: &System, log: &Path) -> Result<Self> {
        let changes = tempfile::tempdir()?;
        let cgroup = Cgroup::new()?;
        let log = File::options().create(true).append(true).open(log)?;
        let child = Command::new("sh")
            .args(["-euc", ENTER, "sh"])
            .arg(&cgroup.0)
            .args(["unshare", "--mount", "--propagation=unchanged"])
            .args(["--uts", "--ipc", "--cgroup", "--pid", "--fork"])
            .args(["--kill-child", "sh", "-euc", BOOT, "sh"])
            .arg(system.layers())
            .arg(changes.path())
            .arg(TARGET)
            .arg(&system.packages)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("starting a system")?;
        let container = Self {
            child,
            _cgroup: cgroup,
            _changes: changes,
        };
        container.wait_ready()?;
        Ok(container)
    }

    fn wait_ready(&self) -> Result<()> {
        let stopwatch = Stopwatch::start(self.child.id());
        loop {
            let is_over = stopwatch.has_passed(PATIENCE);
            match self.run("systemctl", &["is-active", "--quiet", TARGET]) {
                Ok(_) => return Ok(()),
                Err(error) if is_over => bail!(
                    "systemd is not ready after {} s ({stopwatch}): {error:#}",
                    PATIENCE.as_secs()
                ),
                Err(_) => thread::sleep(Duration::from_millis(50)),
            }
        }
    }

    /// Runs a program there. Returns its output.
    ///
    /// # Errors
    ///
    /// It fails; the error has its output.
    pub fn run(&self, program: &str, arguments: &[&str]) -> Result<String> {
        let output = Command::new("nsenter")
            .arg(format!("--target={}", self.first_process()?))
            .args([
                "--all",
                "--root",
                "--wd",
                "env",
                "-i",
                "PATH=/usr/sbin:/usr/bin:/sbin:/bin",
            ])
            .arg(program)
            .args(arguments)
            .output()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        ensure!(
            output.status.success(),
            "{program} {}: {}: {text}{}",
            arguments.join(" "),
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(text)
    }

    /// The path of a file of the system for processes outside.
    pub fn path(&self, file: &str) -> Result<PathBuf> {
        Ok(format!("/proc/{}/root{file}", self.first_process()?).into())
    }

    /// The process id outside of process `id` in the system.
    pub(crate) fn outside(&self, id: u32) -> Result<u32> {
        let namespace = |process: &str| fs::read_link(format!("/proc/{process}/ns/pid"));
        let ours = namespace(&self.first_process()?.to_string())?;
        let inner = |process: &str| {
            let status = fs::read_to_string(format!("/proc/{process}/status")).ok()?;
            let ids = status
                .lines()
                .find_map(|line| line.strip_prefix("NSpid:"))?;
            ids.split_whitespace().last()?.parse::<u32>().ok()
        };
        let names =
            fs::read_dir("/proc")?.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        names
            .filter(|name| name.parse::<u32>().is_ok())
            .find(|name| {
                inner(name) == Some(id) && namespace(name).is_ok_and(|other| other == ours)
            })
            .and_then(|name| name.parse().ok())
            .with_context(|| format!("the system has no process {id}"))
    }

    fn first_process(&self) -> Result<Pid> {
        let parent = self.child.id();
        let children = fs::read_to_string(format!("/proc/{parent}/task/{parent}/children"))?;
        let child = children.split_whitespace().next();
        Ok(Pid::from_raw(
            child.context("the system has ended")?.parse()?,
        ))
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        // All processes of the system end with the first one, and its parent ends after them. Each step fails only
        // if the processes have already ended.
        match self.first_process() {
            Ok(first) => drop(kill(first, Signal::SIGKILL)),
            Err(_) => drop(self.child.kill()),
        }
        let _ = self.child.wait();
    }
}

/// A cgroup, which is removed with all in it when it is dropped.
#[derive(Debug)]
struct Cgroup(PathBuf);

impl Cgroup {
    fn new() -> Result<Self> {
        let mounts = fs::read_to_string("/proc/mounts")?;
        let root = mounts.lines().find_map(|line| {
            let mut words = line.split(' ').skip(1);
            let path = words.next()?;
            (words.next()? == "cgroup2").then_some(path)
        });
        let root = root.context("no cgroup2 file system is mounted, which systemd needs")?;
        let path = tempfile::Builder::new()
            .prefix("system-")
            .tempdir_in(root)?
            .keep();
        Ok(Self(path))
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // A cgroup with a process cannot be removed.
        let _ = remove(&self.0);
    }
}

/// Removes the directories of a cgroup, the innermost first. The files in them are the kernel's.
fn remove(path: &Path) -> io::Result<()> {
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove(&entry.path())?;
        }
    }
    fs::remove_dir(path)
}
