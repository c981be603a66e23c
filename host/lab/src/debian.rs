// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A Debian system: tests of the packages in it, and its own kernel with the packaged module.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use sha2::{Digest, Sha256};
use vm::{Driver, VIRTIO_MEM};

use crate::places::Places;
use crate::progress::Phase;
use crate::{deb, kernel};

/// The system's kernel and libelf-dev, both from the backports: the headers package needs the backported library of
/// libelf-dev.
const KERNEL: &str = "linux-image-cloud-amd64 linux-headers-cloud-amd64 libelf-dev";

/// A tool of hosts that acts on the packages' units.
const HOST_TOOLS: &str = "needrestart";

/// The build root's proxy configuration for its mirror, if it has one.
const PROXY: &str = "/etc/apt/apt.conf.d/99mmdebstrap";

/// The module aliases that udev requests for a balloon device, and for a virtio-mem device.
const BALLOON_ALIAS: &str = "virtio:d00000005v00001AF4";
const VIRTIO_MEM_ALIAS: &str = "virtio:d00000018v00001AF4";

/// Runs a command in a system that keeps its changes apart.
const ENTER: &str = r#"
    layers=$1 changes=$2 packages=$3
    shift 3
    root=$changes/root
    mount -t overlay overlay -o "lowerdir=$layers,upperdir=$changes/upper,workdir=$changes/work" "$root"
    for directory in proc sys dev; do
        mount --rbind "/$directory" "$root/$directory"
    done
    mkdir -p "$root/packages"
    mount --bind "$packages" "$root/packages"
    exec chroot "$root" env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 \
        DEBIAN_FRONTEND=noninteractive "$@"
"#;

/// The files of the host's programs, by program.
const CHECK_PROGRAMS: &str = r#"
    for program in vhost-user-balloon balloonctl balloon-manager; do
        [ "$($program --version)" = "$program $1" ]
    done
    cd /usr/share
    gzip --test man/man8/vhost-user-balloon.8.gz man/man1/balloonctl.1.gz man/man1/balloon-manager.1.gz
    test -s bash-completion/completions/balloonctl
    test -s zsh/vendor-completions/_balloonctl
    test -s fish/vendor_completions.d/balloonctl.fish
    grep '"binary": "/usr/bin/vhost-user-balloon"' qemu/vhost-user/50-vhost-user-balloon.json
    [ "$(vhost-user-balloon --print-capabilities)" = '{"type": "balloon"}' ]
    [ "$(systemctl is-enabled balloon-manager.service)" = disabled ]
    systemd-analyze verify --man=no vhost-user-balloon@vm.service vhost-user-balloon-connection@vm.target \
        balloon-manager.service
"#;

/// What the tests of the packages begin with.
const COMMON: &str = include_str!("debian/common.sh");

/// The tests of the installed packages, in their order.
const PACKAGE_TESTS: [(&str, &str); 6] = [
    (
        "Skipping a kernel, and building for it again",
        include_str!("debian/skipped.sh"),
    ),
    (
        "Skipping a kernel after a failed build",
        include_str!("debian/failed.sh"),
    ),
    (
        "Comparing configurations",
        include_str!("debian/configuration.sh"),
    ),
    (
        "Skipping a kernel of the next series",
        include_str!("debian/next.sh"),
    ),
    ("Upgrading the packages", include_str!("debian/upgraded.sh")),
    ("Signing the module", include_str!("debian/secure_boot.sh")),
];

/// A system in which the packages are installed.
pub(crate) struct Installed {
    /// Its kernel's image.
    pub(crate) image: PathBuf,
    /// The drivers, as guests load them.
    pub(crate) drivers: Vec<PathBuf>,
    system: System,
}

/// Builds the packages, installs them in a system with Debian's kernel, and checks the result. The drivers are put into
/// `directory`.
///
/// # Errors
///
/// They do not build, or a check fails.
pub(crate) fn install(places: &Places, directory: &Path) -> Result<Installed> {
    let system = System::new(places, deb::build(places)?)?;
    system.check("Listing the files", include_str!("debian/listed.sh"))?;
    system.follow(
        "Installing the packages",
        "apt-get install --yes --no-install-recommends /packages/*.deb",
        &[],
    )?;
    system.keep_tree()?;
    let drivers = system.drivers(BALLOON_ALIAS)?;
    let [ours, theirs] = [Driver::Rust, Driver::C].map(Driver::file);
    let [first, second, ..] = &drivers[..] else {
        bail!("for a balloon device modprobe loads {drivers:?} only");
    };
    ensure!(
        first.contains(ours) && second.contains(theirs),
        "for a balloon device modprobe loads {drivers:?} in this order"
    );
    let virtio_mem = system.drivers(VIRTIO_MEM_ALIAS)?.pop();
    let virtio_mem = virtio_mem.context("modprobe loads nothing for a virtio-mem device")?;
    let modules = [(ours, first), (theirs, second), (VIRTIO_MEM, &virtio_mem)]
        .map(|(file, module)| system.decompress(module, &directory.join(file)));
    system.follow("Checking the programs", CHECK_PROGRAMS, &[deb::VERSION])?;
    let image = format!("boot/vmlinuz-{}", system.release);
    Ok(Installed {
        image: system.path.join(image),
        drivers: modules.into_iter().collect::<Result<_>>()?,
        system,
    })
}

impl Installed {
    /// The system, for a guest to run in.
    pub(crate) fn system(&self) -> vm::System {
        vm::System {
            layers: self.system.layers_with_changes(),
            packages: self.system.packages.clone(),
        }
    }

    /// Upgrades the packages and the kernel in copies of the system, and removes the packages.
    ///
    /// # Errors
    ///
    /// One of the tests fails.
    pub(crate) fn test_packages(&self, places: &Places) -> Result<()> {
        let copy = |system: &System, name| {
            let mut system = system.clone();
            system.begin_changes(places.build().join(name))?;
            Ok::<_, anyhow::Error>(system)
        };
        let system = copy(&self.system, "debian-upgraded")?;
        for (what, script) in PACKAGE_TESTS {
            system.check(what, script)?;
        }
        let other = copy(&system, "debian-kernels")?;
        other.check("Upgrading the kernel", include_str!("debian/kernel.sh"))?;
        remove(&copy(&system, "debian-removed")?)
    }
}

/// Removes the packages, and purges them: nothing of them stays.
fn remove(system: &System) -> Result<()> {
    system.follow(
        "Removing the packages",
        "apt-get remove --yes virtio-balloon-rs-dkms vhost-user-balloon balloonctl balloon-manager",
        &[],
    )?;
    let drivers = system.drivers(BALLOON_ALIAS)?;
    ensure!(
        drivers.len() == 1 && drivers[0].contains(Driver::C.file()),
        "for a balloon device modprobe loads {drivers:?} when the packages have been removed"
    );
    system.follow(
        "Looking for remaining files",
        "! find /etc /usr /var/cache /var/lib/dkms -name '*balloon[-_]rs*' | grep .",
        &[],
    )?;
    system.check("Purging the packages", include_str!("debian/purged.sh"))
}

/// A Debian system with its kernel and the packages' dependencies, but without the packages.
#[derive(Clone)]
struct System {
    /// The system as it was made, in the cache.
    path: PathBuf,
    /// The cached kernel tree that the module's package makes in it.
    tree: PathBuf,
    /// The directories that it consists of, the uppermost first.
    layers: Vec<PathBuf>,
    /// The directory with the current changes.
    changes: PathBuf,
    /// The packages, which are mounted at /packages.
    packages: PathBuf,
    /// Its kernel's.
    release: String,
}

impl System {
    /// Makes it, unless it exists. There are no changes yet.
    fn new(places: &Places, packages: PathBuf) -> Result<Self> {
        let path = make(places, &packages)?;
        let mut hash = Sha256::new();
        hash.update(path.as_os_str().as_encoded_bytes());
        hash.update(fs::read(places.checkout.join("debian/dkms-build"))?);
        let tree = places.cache.join(format!(
            "debian-tree-{:.12}",
            format!("{:x}", hash.finalize())
        ));
        let release = fs::read_dir(path.join("usr/lib/modules"))?
            .next()
            .context("the Debian system has no kernel")??
            .file_name()
            .to_string_lossy()
            .into_owned();
        let layers = [tree.exists().then(|| tree.clone()), Some(path.clone())];
        let mut system = Self {
            path,
            tree,
            layers: layers.into_iter().flatten().collect(),
            changes: PathBuf::new(),
            packages,
            release,
        };
        system.begin_changes(places.build().join("debian"))?;
        Ok(system)
    }

    /// Keeps the changes so far, and puts the next ones into `directory`.
    fn begin_changes(&mut self, directory: PathBuf) -> Result<()> {
        self.layers = self.layers_with_changes();
        if directory.exists() {
            fs::remove_dir_all(&directory)?;
        }
        for part in ["root", "upper", "work"] {
            fs::create_dir_all(directory.join(part))?;
        }
        self.changes = directory;
        Ok(())
    }

    fn layers_with_changes(&self) -> Vec<PathBuf> {
        let changed = !self.changes.as_os_str().is_empty();
        let changes = changed.then(|| self.changes.join("upper"));
        changes
            .into_iter()
            .chain(self.layers.iter().cloned())
            .collect()
    }

    /// A shell that runs `script` in it.
    fn shell(&self, script: &str, arguments: &[&str]) -> Command {
        let layers: Vec<_> = self.layers.iter().map(|layer| layer.as_os_str()).collect();
        let mut command = Command::new("unshare");
        command
            .args([
                "--mount",
                "--propagation=unchanged",
                "sh",
                "-euc",
                ENTER,
                "sh",
            ])
            .arg(layers.join(OsStr::new(":")))
            .args([&self.changes, &self.packages])
            .args(["sh", "-euc", script, "sh"])
            .args(arguments);
        command
    }

    /// Stores the kernel tree that was made.
    fn keep_tree(&self) -> Result<()> {
        let _lock = kernel::lock(&self.tree)?;
        if !self.tree.exists() {
            let new = self.tree.with_extension("new");
            let cache = new.join("var/cache");
            fs::create_dir_all(&cache)?;
            kernel::output(
                Command::new("cp")
                    .args(["--archive", "--target-directory"])
                    .arg(&cache)
                    .arg(self.changes.join("upper/var/cache/virtio-balloon-rs")),
            )?;
            fs::rename(new, &self.tree)?;
        }
        Ok(())
    }

    fn follow(&self, what: &str, script: &str, arguments: &[&str]) -> Result<()> {
        let log = self.changes.join(format!("{what}.log"));
        let phase = Phase::start(what, None);
        phase.follow(&mut self.shell(script, arguments), &log)?;
        phase.finish();
        Ok(())
    }

    /// Runs one of the tests.
    fn check(&self, what: &str, script: &str) -> Result<()> {
        self.follow(what, &format!("{COMMON}{script}"), &[&self.release])
    }

    /// The drivers that it loads for a device with this alias, in this order.
    fn drivers(&self, alias: &str) -> Result<Vec<String>> {
        let modules = kernel::output(&mut self.shell(
            "modprobe --set-version $1 --show-depends $2",
            &[&self.release, alias],
        ))?;
        Ok(modules
            .lines()
            .filter_map(|line| line.strip_prefix("insmod "))
            .map(|path| path.trim_end().to_owned())
            .collect())
    }

    /// Writes a module of it to `file`.
    fn decompress(&self, module: &str, file: &Path) -> Result<PathBuf> {
        let script = r#"case $1 in *.xz) xz --decompress --stdout "$1" ;; *) cat "$1" ;; esac"#;
        let status = self
            .shell(script, &[module])
            .stdout(File::create(file)?)
            .status()?;
        ensure!(status.success(), "{module} cannot be read");
        Ok(file.to_owned())
    }
}

/// Makes a system with the kernel, the packages' dependencies and the tools of hosts, unless it is in the cache. It has
/// few other packages, so that a missing dependency is detected.
fn make(places: &Places, packages: &Path) -> Result<PathBuf> {
    let depends = kernel::output(
        Command::new("sh")
            .args([
                "-euc",
                r#"for package in "$1"/*.deb; do dpkg-deb --field "$package" Depends; done"#,
                "sh",
            ])
            .arg(packages),
    )?;
    let depends = depends.trim_end().replace('\n', ", ");
    let hash = Sha256::digest(format!("{KERNEL}{HOST_TOOLS}{depends}"));
    let path = places
        .cache
        .join(format!("debian-{:.12}", format!("{hash:x}")));
    let _lock = kernel::lock(&path)?;
    if path.exists() {
        return Ok(path);
    }
    let new = path.with_extension("new");
    if new.exists() {
        fs::remove_dir_all(&new)?;
    }
    let in_chroot = |command: &str| {
        format!("--customize-hook=chroot \"$1\" apt-get --yes --no-install-recommends {command}")
    };
    let phase = Phase::start("Making a Debian system", None);
    phase.follow(
        Command::new("mmdebstrap")
            .args([
                "--mode=root",
                "--variant=minbase",
                "--include=ca-certificates",
            ])
            .args(fs::exists(PROXY)?.then(|| format!("--aptopt={PROXY}")))
            .arg(in_chroot(&format!(
                "install --target-release=trixie-backports {KERNEL}"
            )))
            .arg(in_chroot(&format!("satisfy '{depends}'")))
            .arg(in_chroot(&format!("install {HOST_TOOLS}")))
            .arg("trixie")
            .arg(&new)
            .arg("/etc/apt/sources.list"),
        &places.cache.join("debian.log"),
    )?;
    fs::rename(&new, &path)?;
    phase.finish();
    Ok(path)
}
