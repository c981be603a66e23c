// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Coverage of the driver. A driver with coverage counters has them in its own memory, and QEMU
//! reads this memory.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::qmp::Qmp;

/// The driver's sections: the descriptions of functions, the counters, and the functions' names.
pub(crate) const SECTIONS: [&str; 3] = ["__llvm_prf_data", "__llvm_prf_cnts", "__llvm_prf_names"];

/// The length of the description of a function.
const DESCRIPTION: u64 = 64;

/// The magic number of a file of raw counters, and the version of LLVM 19's format.
const MAGIC: u64 = u64::from_be_bytes(*b"\xfflprofr\x81");
const VERSION: u64 = 10;

/// The highest number of a kind of values. The file has no values.
const LAST_KIND: u64 = 2;

/// The destination of a driver's counters.
#[derive(Clone, Debug)]
pub struct Coverage {
    directory: PathBuf,
    /// The lengths of the sections, in bytes.
    lengths: [u64; 3],
}

impl Coverage {
    /// Writes the counters of `module` to `directory`: a file for each time that it was loaded.
    ///
    /// # Errors
    ///
    /// The module has no counters.
    pub fn new(module: &Path, directory: &Path) -> Result<Self> {
        fs::create_dir_all(directory)?;
        let output = Command::new("llvm-size").arg("-A").arg(module).output()?;
        let text = String::from_utf8(output.stdout)?;
        let length = |section: &str| -> Result<u64> {
            let mut lines = text.lines().map(|line| line.split_whitespace());
            let length = lines
                .find_map(|mut words| (words.next() == Some(section)).then(|| words.next())?)
                .with_context(|| format!("{} has no {section}", module.display()))?;
            Ok(length.parse()?)
        };
        Ok(Self {
            directory: directory.to_owned(),
            lengths: [
                length(SECTIONS[0])?,
                length(SECTIONS[1])?,
                length(SECTIONS[2])?,
            ],
        })
    }

    /// Writes the driver's counters to a file. Reads them through QMP from its sections at these `addresses`.
    pub(crate) fn save(&self, qmp: &Qmp, addresses: [u64; 3]) -> Result<()> {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let name = format!(
            "{}-{}",
            std::process::id(),
            NUMBER.fetch_add(1, Ordering::Relaxed)
        );
        let part = self.directory.join(format!("{name}.part"));
        let [descriptions, counters, names] = self.lengths;
        let header = [
            MAGIC,
            VERSION,
            // There are no ids, nor bitmaps, nor tables of functions, and nothing is padded.
            0,
            descriptions / DESCRIPTION,
            0,
            counters / size_of::<u64>() as u64,
            0,
            0,
            0,
            names,
            // Descriptions have the distance to their counters.
            addresses[1].wrapping_sub(addresses[0]),
            0,
            addresses[2],
            0,
            0,
            LAST_KIND,
        ];
        let mut raw: Vec<u8> = header.iter().flat_map(|word| word.to_le_bytes()).collect();
        for (address, length) in addresses.iter().zip(self.lengths) {
            // Addresses have a sign for QEMU.
            let address = i64::from_ne_bytes(address.to_ne_bytes());
            qmp.execute::<Value>(
                "memsave",
                &json!({ "val": address, "size": length, "filename": part }),
            )?;
            raw.extend(fs::read(&part)?);
        }
        raw.resize(raw.len().next_multiple_of(size_of::<u64>()), 0);
        fs::remove_file(part)?;
        fs::write(self.directory.join(format!("{name}.profraw")), raw)?;
        Ok(())
    }
}
