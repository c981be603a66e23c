// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Builds of this repository's module.

use std::path::{Path, PathBuf};
use std::{fs, process};

use anyhow::{Context, Result, ensure};
use sha2::{Digest, Sha256};
use vm::{Driver, Kernel};

use crate::kernel::Tree;
use crate::places::Places;
use crate::progress::Phase;

/// Includes the KUnit suites, which run when the module is loaded.
pub(crate) const WITH_KUNIT: &str = "CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST=y";

/// What a lying driver does in another way.
struct Lie {
    file: &'static str,
    truth: &'static str,
    lie: &'static str,
}

/// It lists some pages in use as unused, and hints the memory at half the address of what it holds.
const LIES: [Lie; 2] = [
    Lie {
        file: "rust/mm/zone.rs",
        truth: "zone.free_order(*next as usize)",
        lie: "match zone.free_order(*next as usize) {
            Ok(None) if *next % 64 == 0 => Ok(Some(0)),
            order => order,
        }",
    },
    Lie {
        file: "rust/mm/pages/block_range.rs",
        truth: "Page::from_pfn(self.0.first() as usize)",
        lie: "Page::from_pfn(self.0.first() as usize / 2)",
    },
];

/// The kernel's build applies KCSAN to C only. The same pass can instrument Rust functions with an attribute, which the
/// compiler sets on no function for this target.
const SANITIZE_THREADS: &str = "KRUSTFLAGS=-Cpasses=forceattrs -Cllvm-args=-force-attribute=sanitize_thread \
     '-Cpasses=function(tsan)' -Cllvm-args=-tsan-distinguish-volatile=1 \
     -Cllvm-args=-tsan-instrument-func-entry-exit=0 -Cllvm-args=-tsan-compound-read-before-write=1";

/// Counts how often each region of the module is executed. Each function has its counters in a section of its own, and
/// the linker merges sections of the same name.
const COUNT: [&str; 2] = [
    "KRUSTFLAGS=-Cinstrument-coverage -Zno-profiler-runtime",
    "LDFLAGS_MODULE=--force-group-allocation",
];

/// Builds the module with its KUnit suites for a kernel, unless a checkout has already built the same sources for it.
/// Returns the module's file.
pub(crate) fn build(places: &Places, tree: &Tree) -> Result<PathBuf> {
    let directory = places.build_for(tree.kernel);
    keep(places, tree, Driver::Rust, || {
        make(
            &places.checkout,
            tree,
            &directory,
            "Building the module",
            &[WITH_KUNIT],
        )?;
        Ok(directory.join(Driver::Rust.file()))
    })
}

/// The same for a module that lists memory in use as unused and hints it, without suites.
pub(crate) fn build_lying(places: &Places, tree: &Tree) -> Result<PathBuf> {
    let directory = places.build_for(tree.kernel).join("lying");
    keep(places, tree, Driver::Lying, || {
        // Not in the build directory, since kbuild has a link to the source there.
        let copy = directory.with_file_name("lying-source");
        copy_lying(places, &copy)?;
        make(&copy, tree, &directory, "Building a lying module", &[])?;
        let module = directory.join(Driver::Rust.file());
        ensure!(
            !has_suites(&module)?,
            "Kbuild has built KUnit suites into a module that should have none"
        );
        Ok(module)
    })
}

/// Whether a module has KUnit suites.
fn has_suites(module: &Path) -> Result<bool> {
    const SECTION: &[u8] = b".kunit_test_suites";
    let content = fs::read(module)?;
    Ok(content.windows(SECTION.len()).any(|part| part == SECTION))
}

/// The same for a module with coverage counters.
pub(crate) fn build_counting(places: &Places, tree: &Tree) -> Result<PathBuf> {
    let directory = places.build_for(tree.kernel).join("counting");
    make(
        &places.checkout,
        tree,
        &directory,
        "Building a module with coverage counters",
        &[&[WITH_KUNIT], &COUNT[..]].concat(),
    )?;
    Ok(directory.join(Driver::Rust.file()))
}

/// The module that was built for a kernel from these sources. If there is none, `build` builds it.
fn keep(
    places: &Places,
    tree: &Tree,
    driver: Driver,
    build: impl FnOnce() -> Result<PathBuf>,
) -> Result<PathBuf> {
    let kept = tree.path.join("modules").join(key(places)?);
    let module = kept.join(driver.file());
    if !module.exists() {
        let built = build()?;
        fs::create_dir_all(&kept)?;
        // Other processes see a complete module or none.
        let new = kept.join(format!("{}.new", process::id()));
        fs::copy(built, &new)?;
        fs::rename(new, &module)?;
    }
    Ok(module)
}

/// The folders with the module's sources. Others are at the root.
const FOLDERS: [&str; 8] = [
    "balloon",
    "device",
    "features",
    "messages",
    "rust",
    "sources",
    "tests/kunit",
    "uapi",
];

/// Copies the module's sources, and puts the lies into them.
fn copy_lying(places: &Places, copy: &Path) -> Result<()> {
    // Otherwise files that have moved since the last copy would exist twice.
    if copy.exists() {
        fs::remove_dir_all(copy)?;
    }
    for path in all_sources(places)? {
        let mut text = fs::read_to_string(places.checkout.join(&path))?;
        for Lie { file, truth, lie } in LIES.iter().filter(|lie| path == Path::new(lie.file)) {
            ensure!(
                text.matches(truth).count() == 1,
                "{file} differs from what host/lab/src/module.rs expects: correct LIES there"
            );
            text = text.replace(truth, lie);
        }
        let path = copy.join(path);
        fs::create_dir_all(path.with_file_name(""))?;
        fs::write(path, text)?;
    }
    Ok(())
}

/// A hash of the module's sources and build options.
pub(crate) fn key(places: &Places) -> Result<String> {
    let mut hash = Sha256::new();
    for path in all_sources(places)? {
        hash.update(path.as_os_str().as_encoded_bytes());
        hash.update(fs::read(places.checkout.join(path))?);
    }
    let lies = LIES.iter().map(|lie| &lie.lie);
    for option in [WITH_KUNIT, SANITIZE_THREADS]
        .iter()
        .chain(&COUNT)
        .chain(lies)
    {
        hash.update(option);
    }
    Ok(format!("{:.12}", format!("{:x}", hash.finalize())))
}

fn all_sources(places: &Places) -> Result<Vec<PathBuf>> {
    let mut sources = sources(places, &["rs", "c", "h"])?;
    sources.push("Kbuild".into());
    Ok(sources)
}

/// The module's sources with this extension, as paths in the checkout.
pub(crate) fn sources(places: &Places, extensions: &[&str]) -> Result<Vec<PathBuf>> {
    let mut sources = Vec::new();
    add_files(places, Path::new(""), extensions, &mut sources)?;
    for folder in FOLDERS {
        add_folder(places, Path::new(folder), extensions, &mut sources)?;
    }
    ensure!(!sources.is_empty(), "there are no sources of the module");
    sources.sort();
    Ok(sources)
}

/// Adds the files of a folder with this extension. Returns its subfolders.
fn add_files(
    places: &Places,
    folder: &Path,
    extensions: &[&str],
    sources: &mut Vec<PathBuf>,
) -> Result<Vec<PathBuf>> {
    let full = places.checkout.join(folder);
    let mut folders = Vec::new();
    for entry in fs::read_dir(&full).with_context(|| format!("reading {}", full.display()))? {
        let entry = entry?;
        let path = folder.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            folders.push(path);
        } else if path
            .extension()
            .is_some_and(|this| extensions.iter().any(|&extension| this == extension))
        {
            sources.push(path);
        }
    }
    Ok(folders)
}

/// The same, with all subfolders.
fn add_folder(
    places: &Places,
    folder: &Path,
    extensions: &[&str],
    sources: &mut Vec<PathBuf>,
) -> Result<()> {
    for inner in add_files(places, folder, extensions, sources)? {
        add_folder(places, &inner, extensions, sources)?;
    }
    Ok(())
}

/// Builds the module from `source` in `directory`, with more variables for make.
pub(crate) fn make(
    source: &Path,
    tree: &Tree,
    directory: &Path,
    what: &str,
    variables: &[&str],
) -> Result<()> {
    fs::create_dir_all(directory)?;
    let phase = Phase::start(&format!("{what} ({})", tree.kernel), None);
    phase.follow(
        tree.make()?
            .arg(format!("M={}", source.display()))
            .arg(format!("MO={}", directory.display()))
            .args((tree.kernel == Kernel::Kcsan).then_some(SANITIZE_THREADS))
            .args(variables)
            .arg("modules"),
        &directory.join("build.log"),
    )?;
    phase.finish();
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::process::Command;
    use std::{env, fs, process};

    /// What `make` says in a kernel's build tree of this release, built by this compiler.
    fn make(release: &str, rustc: &str) -> Result<String, String> {
        let tree = env::temp_dir().join(format!("kdir-{}", process::id()));
        let configuration = format!("CONFIG_RUST=y\nCONFIG_RUSTC_VERSION_TEXT=\"{rustc}\"\n");
        for (file, text) in [
            ("Makefile", "modules:\n\t@echo built\n"),
            ("rust/libkernel.rmeta", ""),
            ("include/config/kernel.release", release),
            ("include/config/auto.conf", &configuration),
        ] {
            let path = tree.join(file);
            fs::create_dir_all(path.with_file_name("")).unwrap();
            fs::write(path, text).unwrap();
        }
        let output = Command::new("make")
            .args(["--silent", "all", &format!("KDIR={}", tree.display())])
            .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("../.."))
            .output()
            .unwrap();
        fs::remove_dir_all(tree).unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        match output.status.success() {
            true => Ok(text(output.stdout)),
            false => Err(text(output.stderr)),
        }
    }

    #[test]
    fn make_refuses_kernels_and_compilers_that_do_not_fit() {
        let version = Command::new("rustc").arg("--version").output().unwrap();
        let version = String::from_utf8(version.stdout).unwrap();
        let rustc = version.trim_end();
        for release in ["7.3.0-rc1", "7.3.4+deb13-amd64", "7.10.1", "8.0.0"] {
            let output = make(release, rustc).unwrap();
            assert!(output.contains("built"), "{release}: {output}");
        }
        let error = make("7.2.9+deb13-amd64", rustc).unwrap_err();
        let expected = "is 7.2.9+deb13-amd64; the module needs 7.3 or newer";
        assert!(error.contains(expected), "{error}");
        let error = make("7.3.4", "rustc 1.2.3 (abc 2026-01-01)").unwrap_err();
        let expected =
            format!("is built with rustc 1.2.3 (abc 2026-01-01), and rustc is {rustc}; set RUSTC=");
        assert!(error.contains(&expected), "{error}");
    }
}
