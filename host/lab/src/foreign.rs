// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The programs for guests of another architecture: QEMU, a shell, the agent, and the compiler of some kernels.
//!
//! They are not in the build root, since few developers test another architecture. So the lab unpacks the packages into
//! a directory of the cache on first use. It does not install them: QEMU's libraries are in the build root, and of the
//! other packages it only reads files.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, ensure};
use sha2::{Digest, Sha256};
use vm::Architecture;

use crate::kernel::{lock, package_version};
use crate::places::Places;
use crate::platform::Platform;
use crate::progress::Phase;

/// Unpacks packages into `$1/root`, some of them of the architecture `$2`, and the packages `$3` of the backports with
/// those that they depend on. The package manager's own state does not change: the build root stays without the other
/// architecture, and with its own versions.
const UNPACK: &str = r#"
    cd "$1"
    architecture=$2 newer=$3
    shift 3
    mkdir -p lists/partial cache/archives/partial root
    # Packages of another architecture come from the release itself. Lists of its updates and backports for that
    # architecture are not always on the mirror.
    sed '/-updates\|-backports/ s/^deb /deb [arch=amd64] /' /etc/apt/sources.list >sources.list
    apt() {
        apt-get -o APT::Architectures=amd64,"$architecture" -o APT::Sandbox::User=root \
            -o Dir::Etc::SourceList="$PWD/sources.list" -o Dir::Etc::SourceParts=- \
            -o Dir::State::Lists="$PWD/lists" -o Dir::Cache="$PWD/cache" \
            -o Acquire::https::CaInfo=/run/ca-certificates.crt "$@"
    }
    apt update
    apt download "$@"
    backports=$(. /etc/os-release && echo "$VERSION_CODENAME")-backports
    [ -z "$newer" ] ||
        apt install --download-only --yes --no-install-recommends --target-release "$backports" $newer
    for package in *.deb cache/archives/*.deb; do
        [ -e "$package" ] || continue
        dpkg-deb --extract "$package" root
    done
    rm -r lists cache sources.list *.deb
"#;

/// Prepares the missing parts. The agent is put next to the other `tools`.
pub(crate) fn prepare(
    places: &Places,
    architecture: &Architecture,
    tools: &Path,
) -> Result<Platform> {
    ensure!(
        architecture.has_programs,
        "Debian has no programs for {}: no guest can boot",
        architecture.name
    );
    let root = unpack(places, architecture)?;
    Ok(Platform {
        qemu: root.join("usr/bin").join(architecture.qemu),
        agent: build_agent(places, architecture, &root, tools)?,
        shell: root.join("usr/bin/busybox"),
    })
}

/// Prepares the Rust compiler of the architecture's kernel. Returns its `usr`, unless the kernel is built with the build
/// root's.
pub(crate) fn compiler(places: &Places, architecture: &Architecture) -> Result<Option<PathBuf>> {
    Ok(match architecture.newer_rust {
        true => Some(unpack(places, architecture)?.join("usr")),
        false => None,
    })
}

/// Makes a directory with the packages, unless it exists.
fn unpack(places: &Places, architecture: &Architecture) -> Result<PathBuf> {
    let Architecture {
        name,
        debian,
        newer_rust,
        qemu_package,
        firmware_package,
        ..
    } = architecture;
    let newer = if *newer_rust { "rustc rust-src" } else { "" };
    let mut packages = vec![
        // The libraries in the build root are of this version.
        format!("{qemu_package}={}", package_version("qemu-system-x86")?),
        // The compiler reads only libraries of its own version.
        format!(
            "libstd-rust-dev:{debian}={}",
            package_version("libstd-rust-dev")?
        ),
        format!("libc6-dev-{debian}-cross"),
        format!("libgcc-14-dev-{debian}-cross"),
        format!("busybox-static:{debian}"),
    ];
    packages.extend(firmware_package.map(str::to_owned));
    let hash = Sha256::digest(packages.join(" ") + newer);
    let path = places
        .cache
        .join(format!("{name}-{:.12}", format!("{hash:x}")));
    let _lock = lock(&path)?;
    if !path.exists() {
        let new = path.with_extension("new");
        if new.exists() {
            fs::remove_dir_all(&new)?;
        }
        fs::create_dir(&new)?;
        let phase = Phase::start(&format!("Unpacking packages for {name}"), None);
        phase.follow(
            Command::new("sh")
                .args(["-euc", UNPACK, "sh"])
                .arg(&new)
                .args([debian, newer])
                .args(&packages),
            &places.cache.join(format!("{name}.log")),
        )?;
        fs::rename(new, &path)?;
        phase.finish();
    }
    Ok(path.join("root"))
}

/// Builds the agent with the libraries below `root`, unless it exists.
fn build_agent(
    places: &Places,
    architecture: &Architecture,
    root: &Path,
    tools: &Path,
) -> Result<PathBuf> {
    let Architecture {
        name, rust, clang, ..
    } = architecture;
    let agent = tools.join(format!("agent-{name}"));
    // Cargo puts programs of all checkouts into one directory.
    let _lock = lock(&places.cache.join("tools"))?;
    if agent.exists() {
        return Ok(agent);
    }
    let root = root.display();
    let flags = [
        "-Ctarget-feature=+crt-static".to_owned(),
        format!("-L{root}/usr/lib/rustlib/{rust}/lib"),
        "-Clinker=clang".to_owned(),
        format!("-Clink-arg=--target={clang}"),
        format!("-Clink-arg=--sysroot={root}"),
        "-Clink-arg=-fuse-ld=lld".to_owned(),
    ];
    let target = places.cache.join("target");
    let phase = Phase::start(&format!("Building the agent for {name}"), None);
    phase.follow(
        Command::new("cargo")
            .args(["build", "--release", "--locked", "--package=agent"])
            .args(["--manifest-path=host/Cargo.toml", "--target", rust])
            .env("CARGO_TARGET_DIR", &target)
            .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f")),
        &places.build().join(format!("agent-{name}.log")),
    )?;
    let new = agent.with_extension("new");
    fs::copy(target.join(rust).join("release/agent"), &new)?;
    fs::rename(new, &agent)?;
    phase.finish();
    Ok(agent)
}
