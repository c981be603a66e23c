// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The guests' kernels: built once for each version, configuration and toolchain, in the cache.

use std::collections::BTreeMap;
use std::env;
use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::available_parallelism;

use anyhow::{Context, Error, Result, ensure};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use sha2::{Digest, Sha256};
use vm::Kernel;

use crate::places::Places;
use crate::progress::Phase;
use crate::toolchain::Toolchain;

/// The file that marks a complete tree.
const COMPLETE: &str = ".complete";

/// A kernel that has been built.
pub(crate) struct Tree {
    /// The kind of kernel.
    pub(crate) kernel: Kernel,
    /// The directory that it was built in.
    pub(crate) path: PathBuf,
    toolchain: Toolchain,
}

impl Tree {
    /// The image that a guest boots.
    pub(crate) fn image(&self) -> PathBuf {
        let foreign = self.kernel.foreign();
        self.path
            .join(foreign.map_or("arch/x86/boot/bzImage", |architecture| architecture.image))
    }

    /// A make in this tree, with the kernel's compiler.
    pub(crate) fn make(&self) -> Result<Command> {
        let mut make = self.toolchain.make();
        make.arg("-C")
            .arg(&self.path)
            .arg(format!("-j{}", available_parallelism()?));
        Ok(make)
    }
}

/// How many lines make prints for a whole build, for the progress bar.
fn build_lines(kernel: Kernel) -> u64 {
    match kernel.foreign() {
        Some(_) => 1590,
        None if kernel == Kernel::Debug => 1720,
        None => 1700,
    }
}

/// The directory of the kernel's source, extracted on first use.
pub(crate) fn source(places: &Places) -> Result<PathBuf> {
    if let Some(own) = env::var_os("KSRC") {
        return Ok(PathBuf::from(own));
    }
    let (archive, version) = packaged_source()?;
    let source = places.cache.join(format!("linux-{version}"));
    let _lock = lock(&source)?;
    if !source.exists() {
        let new = places.cache.join("linux.new");
        if new.exists() {
            fs::remove_dir_all(&new)?;
        }
        fs::create_dir_all(&new)?;
        let phase = Phase::start("Extracting the kernel", Some(checkpoints(&archive)?));
        phase.follow(
            Command::new("tar")
                .arg(format!("--checkpoint={RECORDS}"))
                .args(["--checkpoint-action=echo=.", "--strip-components=1", "-xf"])
                .arg(&archive)
                .arg("-C")
                .arg(&new),
            &places.cache.join("extract.log"),
        )?;
        fs::rename(&new, &source)?;
        phase.finish();
    }
    Ok(source)
}

/// How many records of an archive tar extracts before it prints a line.
const RECORDS: u64 = 1000;

/// The length of a record, in bytes.
const RECORD: u64 = 10240;

/// How many lines tar prints for an archive, for the progress bar.
fn checkpoints(archive: &Path) -> Result<u64> {
    let list = output(Command::new("xz").args(["--robot", "--list"]).arg(archive))?;
    let totals = list.lines().find(|line| line.starts_with("totals"));
    let length = totals.and_then(|totals| totals.split_whitespace().nth(4));
    let length: u64 = length.context("xz does not say the length")?.parse()?;
    Ok(length / RECORD / RECORDS)
}

/// The build root's archive of the kernel's source, and its version.
fn packaged_source() -> Result<(PathBuf, String)> {
    let archive = fs::read_dir("/usr/src")?
        .filter_map(Result::ok)
        .map(|entry| entry.path())
        .find(|path| path.to_string_lossy().ends_with(".tar.xz"))
        .context("the build root has no kernel source; remove it from the cache and try again")?;
    let package = archive
        .file_name()
        .context("the archive has a name")?
        .to_string_lossy();
    let package = package.trim_end_matches(".tar.xz");
    let version = package_version(package)?;
    Ok((
        archive,
        version.replace(|c: char| !c.is_ascii_alphanumeric() && c != '.', "-"),
    ))
}

/// The version of a package of the build root.
pub(crate) fn package_version(package: &str) -> Result<String> {
    output(Command::new("dpkg-query").args(["-W", "-f", "${Version}", package]))
}

/// Builds a kernel of the build root's architecture, unless it exists.
pub(crate) fn build(places: &Places, kernel: Kernel) -> Result<Tree> {
    build_with(places, kernel, None)
}

/// Builds a kernel, unless it exists, with the Rust compiler in the directory `rust`, if there is one.
pub(crate) fn build_with(places: &Places, kernel: Kernel, rust: Option<PathBuf>) -> Result<Tree> {
    let toolchain = Toolchain::of(kernel, rust);
    let source = source(places)?;
    let fragments = fragments(places, kernel)?;
    let path = places.cache.join(format!(
        "kernel-{kernel}-{}",
        key(&source, &toolchain, &fragments)?
    ));
    let tree = Tree {
        kernel,
        path,
        toolchain,
    };
    let complete = tree.path.join(COMPLETE);
    let _lock = lock(&tree.path)?;
    // A user's own source may have changed since; make detects that.
    if complete.exists() && env::var_os("KSRC").is_none() {
        return Ok(tree);
    }
    // make prints no line for what an earlier run has built.
    let is_new = !tree.path.exists();
    let build = || {
        configure(&tree, &source, &fragments)?;
        let phase = Phase::start(
            &format!("Building the {kernel} kernel"),
            is_new.then(|| build_lines(kernel)),
        );
        phase.follow(
            tree.make()?.args(tree.image().file_name()).arg("modules"),
            &tree.path.join("build.log"),
        )?;
        phase.finish();
        Ok(())
    };
    // An error in a user's own source is no damage.
    match env::var_os("KSRC") {
        Some(_) => build()?,
        None => resume(&tree.path, build)?,
    }
    File::create(complete)?;
    Ok(tree)
}

/// Builds in `directory`, also after an earlier run that did not end. Such a run may have left files that it had written
/// in part, when the disk was full or the machine lost power, and make takes them for complete. So a build that fails
/// there begins again in an empty directory.
fn resume(directory: &Path, build: impl Fn() -> Result<()>) -> Result<()> {
    let is_resumed = directory.exists();
    match build() {
        Err(error) if is_resumed && !is_disk_full(&error) => {
            let name = directory.display();
            eprintln!(
                "{error:#}\nAn earlier run may have left damaged files: building again in {name}"
            );
            fs::remove_dir_all(directory)?;
            build()
        }
        result => result,
    }
}

fn is_disk_full(error: &Error) -> bool {
    let cause = error.root_cause().downcast_ref::<io::Error>();
    cause.is_some_and(|error| error.kind() == ErrorKind::StorageFull)
}

/// The kernel's configuration. Later lines have the last word.
fn fragments(places: &Places, kernel: Kernel) -> Result<String> {
    let mut names = vec!["common"];
    if let Some(architecture) = kernel.foreign() {
        names.extend(["foreign", architecture.name]);
    }
    if !names.contains(&kernel.name()) {
        names.push(kernel.name());
    }
    let read = |name| {
        let directory = places.checkout.join("guest/kernel");
        let path = directory.join(format!("{name}.config"));
        fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))
    };
    names.into_iter().map(read).collect()
}

/// A key that differs between kernels that are built differently.
fn key(source: &Path, toolchain: &Toolchain, fragments: &str) -> Result<String> {
    let mut hash = Sha256::new();
    hash.update(source.to_string_lossy().as_bytes());
    hash.update(fragments);
    for tool in toolchain.tools() {
        hash.update(output(toolchain.command(tool).arg("--version"))?);
    }
    Ok(format!("{:.12}", format!("{:x}", hash.finalize())))
}

fn configure(tree: &Tree, source: &Path, fragments: &str) -> Result<()> {
    let kernel = tree.kernel;
    fs::create_dir_all(&tree.path)?;
    let fragment = tree.path.join("fragments.config");
    fs::write(&fragment, fragments)?;
    let phase = Phase::start(&format!("Configuring the {kernel} kernel"), None);
    phase.follow(
        tree.toolchain
            .make()
            .arg("-C")
            .arg(source)
            .arg(format!("O={}", tree.path.display()))
            .arg(format!("KCONFIG_ALLCONFIG={}", fragment.display()))
            .arg("allnoconfig"),
        &tree.path.join("configure.log"),
    )?;
    let missing = missing(fragments, &fs::read_to_string(tree.path.join(".config"))?);
    ensure!(
        missing.is_empty(),
        "the {kernel} kernel's configuration lost {}; see what they depend on in {}, and correct guest/kernel",
        missing.join(", "),
        source.display()
    );
    phase.finish();
    Ok(())
}

/// The lines of the fragments that the configuration lacks, the last line of each option. Kconfig silently
/// drops an option with unmet dependencies, and tests that rely on it would prove nothing.
fn missing<'a>(fragments: &'a str, config: &str) -> Vec<&'a str> {
    let option = |line: &'a str| line.split_once('=').map(|(option, _)| option);
    let last: BTreeMap<_, _> = fragments
        .lines()
        .filter_map(|line| Some((option(line)?, line)))
        .collect();
    let has = |line: &str| match line.strip_suffix("=n") {
        Some(option) => !config.lines().any(|l| l.starts_with(&format!("{option}="))),
        None => config.lines().any(|l| l == line),
    };
    last.into_values()
        .filter(|line| line.starts_with("CONFIG_") && !has(line))
        .collect()
}

/// Prevents other runs in this checkout from replacing the modules and the logs of this one.
pub(crate) fn lock_checkout(places: &Places) -> Result<Flock<File>> {
    fs::create_dir_all(places.build())?;
    lock(&places.build().join("run"))
}

/// Prevents two runs from making the same directory at once.
pub(crate) fn lock(directory: &Path) -> Result<Flock<File>> {
    let mut path = directory.as_os_str().to_owned();
    path.push(".lock");
    let path = PathBuf::from(path);
    let mut file = Some(File::create(&path)?);
    let mut take = || match Flock::lock(file.take()?, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Some(Ok(lock)),
        Err((back, Errno::EWOULDBLOCK)) => {
            file = Some(back);
            None
        }
        Err((_, error)) => Some(Err(error.into())),
    };
    if let Some(lock) = take() {
        return lock;
    }
    let what = format!(
        "Waiting for another run, which has locked {}",
        path.display()
    );
    let phase = Phase::start(&what, None);
    let lock = phase.wait_for(take)?;
    phase.finish();
    Ok(lock)
}

/// The standard output of a command.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let output = command.stderr(Stdio::inherit()).output()?;
    ensure!(
        output.status.success(),
        "{:?} fails in the build root",
        command.get_program()
    );
    Ok(String::from_utf8(output.stdout)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lost_options_are_named() {
        let fragments = "# comment\nCONFIG_A=y\nCONFIG_B=m\nCONFIG_C=n\nCONFIG_D=n\n";
        let config = "CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_D=y\n";
        assert_eq!(missing(fragments, config), ["CONFIG_B=m", "CONFIG_D=n"]);
    }

    #[test]
    fn a_build_on_damaged_files_begins_again() {
        let directory = std::env::temp_dir().join(format!("resume-{}", std::process::id()));
        let object = directory.join("object");
        let build = |content: &'static str| {
            let object = object.clone();
            move || {
                fs::create_dir_all(object.parent().unwrap())?;
                if !object.exists() {
                    fs::write(&object, content)?;
                }
                ensure!(fs::read_to_string(&object)? == "whole", "not recognized");
                Ok(())
            }
        };
        // A build that fails from the beginning is not repeated.
        resume(&directory, build("half")).unwrap_err();
        assert!(object.exists());
        resume(&directory, build("whole")).unwrap();

        // Neither is one that finds the disk full: the files stay, and the next run continues.
        let full = || Err(io::Error::from(ErrorKind::StorageFull)).context("building");
        resume(&directory, full).unwrap_err();
        assert!(object.exists());
        fs::remove_dir_all(&directory).unwrap();
    }

    #[test]
    fn a_later_fragment_has_the_last_word() {
        let fragments = "CONFIG_A=y\nCONFIG_B=n\nCONFIG_A=n\nCONFIG_B=y\n";
        assert!(missing(fragments, "CONFIG_B=y\n").is_empty());
        assert_eq!(
            missing(fragments, "CONFIG_A=y\n"),
            ["CONFIG_A=n", "CONFIG_B=y"]
        );
    }
}
