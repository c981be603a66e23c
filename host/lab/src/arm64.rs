// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The programs for guests of another architecture: QEMU, a shell, and the agent.
//!
//! They are not in the build root, since few developers test another architecture. So the lab unpacks the packages into
//! a directory of the cache on first use. It does not install them: QEMU's libraries are in the build root, and of the
//! other packages it only reads files.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;
use sha2::{Digest, Sha256};

use crate::kernel::{lock, package_version};
use crate::places::Places;
use crate::platform::Platform;
use crate::progress::Phase;

const TARGET: &str = "aarch64-unknown-linux-gnu";

/// Unpacks packages into `$1/root`. The package manager's own state does not change: the build root stays
/// without the other architecture.
const UNPACK: &str = r#"
    cd "$1"
    shift
    mkdir -p lists/partial cache/archives/partial root
    apt() {
        apt-get -o APT::Architectures=amd64,arm64 -o APT::Sandbox::User=root \
            -o Dir::State::Lists="$PWD/lists" -o Dir::Cache="$PWD/cache" \
            -o Acquire::https::CaInfo=/run/ca-certificates.crt "$@"
    }
    apt update
    apt download "$@"
    for package in *.deb; do
        dpkg-deb --extract "$package" root
    done
    rm -r lists cache *.deb
"#;

/// Prepares the missing parts. The agent is put next to the other `tools`.
pub(crate) fn prepare(places: &Places, tools: &Path) -> Result<Platform> {
    let root = unpack(places)?;
    Ok(Platform {
        qemu: root.join("usr/bin/qemu-system-aarch64"),
        agent: build_agent(places, &root, tools)?,
        shell: root.join("usr/bin/busybox"),
    })
}

/// Makes a directory with the packages, unless it exists.
fn unpack(places: &Places) -> Result<PathBuf> {
    let packages = [
        // The libraries are of this version.
        format!("qemu-system-arm={}", package_version("qemu-system-x86")?),
        // The compiler reads only libraries of its own version.
        format!(
            "libstd-rust-dev:arm64={}",
            package_version("libstd-rust-dev")?
        ),
        "libc6-dev:arm64".to_owned(),
        "libgcc-14-dev:arm64".to_owned(),
        "busybox-static:arm64".to_owned(),
    ];
    let hash = Sha256::digest(packages.join(" "));
    let path = places
        .cache
        .join(format!("arm64-{:.12}", format!("{hash:x}")));
    let _lock = lock(&path)?;
    if !path.exists() {
        let new = path.with_extension("new");
        if new.exists() {
            fs::remove_dir_all(&new)?;
        }
        fs::create_dir(&new)?;
        let phase = Phase::start("Unpacking packages for arm64", None);
        phase.follow(
            Command::new("sh")
                .args(["-euc", UNPACK, "sh"])
                .arg(&new)
                .args(&packages),
            &places.cache.join("arm64.log"),
        )?;
        fs::rename(new, &path)?;
        phase.finish();
    }
    Ok(path.join("root"))
}

/// Builds the agent with the libraries below `root`, unless it exists.
fn build_agent(places: &Places, root: &Path, tools: &Path) -> Result<PathBuf> {
    let agent = tools.join("agent-arm64");
    // Cargo puts programs of all checkouts into one directory.
    let _lock = lock(&places.cache.join("tools"))?;
    if agent.exists() {
        return Ok(agent);
    }
    let root = root.display();
    let flags = [
        "-Ctarget-feature=+crt-static".to_owned(),
        format!("-L{root}/usr/lib/rustlib/{TARGET}/lib"),
        "-Clinker=clang".to_owned(),
        "-Clink-arg=--target=aarch64-linux-gnu".to_owned(),
        format!("-Clink-arg=--sysroot={root}"),
        "-Clink-arg=-fuse-ld=lld".to_owned(),
    ];
    let target = places.cache.join("target");
    let phase = Phase::start("Building the agent for arm64", None);
    phase.follow(
        Command::new("cargo")
            .args(["build", "--release", "--locked", "--package=agent"])
            .args(["--manifest-path=host/Cargo.toml", "--target", TARGET])
            .env("CARGO_TARGET_DIR", &target)
            .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f")),
        &places.build().join("agent-arm64.log"),
    )?;
    let new = agent.with_extension("new");
    fs::copy(target.join(TARGET).join("release/agent"), &new)?;
    fs::rename(new, &agent)?;
    phase.finish();
    Ok(agent)
}
