// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The compilers of a guest's kernel.

use std::env;
use std::path::PathBuf;
use std::process::Command;

use vm::Kernel;

/// The compilers.
pub(crate) struct Toolchain {
    /// Variables of make.
    variables: Vec<String>,
    /// The `usr` with a Rust compiler outside the build root.
    rust: Option<PathBuf>,
}

impl Toolchain {
    /// The compilers of a kernel, with the Rust compiler in the directory `rust` instead of the build root's, if there is
    /// one. The kernel allows Rust with KASAN for clang only. With clang, KCSAN can instrument Rust in the same way as C.
    /// Only clang has kCFI. And clang also compiles for other architectures.
    pub(crate) fn of(kernel: Kernel, rust: Option<PathBuf>) -> Self {
        let clang = "LLVM=1".to_owned();
        let variables = match (kernel, kernel.foreign()) {
            (_, Some(architecture)) => vec![clang, format!("ARCH={}", architecture.linux)],
            (Kernel::Debug | Kernel::Kcsan | Kernel::Kcfi, None) => vec![clang],
            _ => Vec::new(),
        };
        Self { variables, rust }
    }

    /// The programs on which the kernel depends.
    pub(crate) fn tools(&self) -> [&'static str; 3] {
        let compiler = if self.variables.is_empty() {
            "gcc"
        } else {
            "clang"
        };
        [compiler, "rustc", "bindgen"]
    }

    /// The command of a program.
    pub(crate) fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        if let Some(rust) = &self.rust {
            let path = env::var("PATH").unwrap_or_default();
            command
                .env("PATH", format!("{}/bin:{path}", rust.display()))
                .env("LD_LIBRARY_PATH", rust.join("lib/x86_64-linux-gnu"));
        }
        command
    }

    /// A make with these compilers.
    pub(crate) fn make(&self) -> Command {
        let mut make = self.command("make");
        make.args(&self.variables);
        make
    }
}
