// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guests that use their memory.

use std::ops::Range;

use agent::{Command, Load, PageFlag, Reply};
use anyhow::{Context, Result, bail, ensure};

use crate::config::Config;
use crate::guest::Guest;
use crate::guest::load::RunningLoad;
use crate::size::Size;
use crate::stopwatch::PATIENCE;

impl Config {
    /// A guest that uses its memory. An emulated x86 processor with string instructions clears memory byte by byte,
    /// which takes much longer than the measured operation.
    pub fn using_memory(self) -> Self {
        match self.artifacts.kernel.foreign() {
            None => self.argument("-cpu", "max,-erms,-fsrm,-fzrm"),
            Some(_) => self,
        }
    }
}

impl Guest {
    /// Makes the guest use `size` of its memory and free it again.
    pub fn touch(&self, size: Size) -> Result<()> {
        let load = self.load(Load::Touch {
            mib: size.as_mib().try_into()?,
        })?;
        load.wait()?;
        Ok(())
    }

    /// Fragments the guest's free memory into isolated pages, while the load runs.
    pub fn fragment(&self) -> Result<RunningLoad<'_>> {
        // Otherwise the kernel would start compaction.
        self.write_file("/proc/sys/vm/compaction_proactiveness", "0")?;
        let taken = self.free()?.saturating_sub(Size::mib(256));
        self.load(Load::Fragment {
            mib: taken.as_mib().try_into()?,
        })
    }

    /// How many pages are marked as logically offline, as a balloon's pages are: of all pages, or
    /// of those in a range.
    pub fn offline_pages(&self, range: Option<Range<u64>>) -> Result<u64> {
        self.count_pages(range.unwrap_or(0..u64::MAX), &[PageFlag::Offline])
    }

    /// How many pages of a range have all of some flags.
    pub fn count_pages(&self, range: Range<u64>, flags: &[PageFlag]) -> Result<u64> {
        let command = Command::CountPages {
            start: range.start,
            end: range.end,
            flags: flags.to_vec(),
        };
        match self.call(command, PATIENCE)? {
            Reply::Pages(pages) => Ok(pages),
            reply => bail!("the agent answers {reply:?} to a question about pages"),
        }
    }

    /// The number of pages between the lowest and the highest page of the balloon.
    pub fn balloon_stretch(&self) -> Result<u64> {
        let memory = memory_map(&self.read_file("/proc/iomem")?);
        let end = memory.last().context("the guest has no memory")?.end;
        let first = nearest(end, |pages| Ok(self.offline_pages(Some(pages))? > 0))?;
        let last = nearest(end, |pages| {
            let pages = end - pages.end..end - pages.start;
            Ok(self.offline_pages(Some(pages))? > 0)
        })?;
        let pages = first..end - last;
        Ok(memory
            .iter()
            .map(|part| {
                let (start, end) = (part.start.max(pages.start), part.end.min(pages.end));
                end.saturating_sub(start)
            })
            .sum())
    }
}

/// The memory in /proc/iomem, in pages.
fn memory_map(iomem: &str) -> Vec<Range<u64>> {
    let address = |text| u64::from_str_radix(text, 16).ok();
    iomem
        .lines()
        .filter_map(|line| {
            let (start, end) = line.strip_suffix(" : System RAM")?.split_once('-')?;
            Some(Size::bytes(address(start)?).as_pages()..Size::bytes(address(end)? + 1).as_pages())
        })
        .collect()
}

/// The lowest number below `end` that is in a range for which `is_in` holds.
fn nearest(end: u64, mut is_in: impl FnMut(Range<u64>) -> Result<bool>) -> Result<u64> {
    let mut range = 0..1;
    while !is_in(range.clone())? {
        ensure!(range.end < end, "no range has such a number");
        range = range.end..(range.end * 2).min(end);
    }
    while range.end - range.start > 1 {
        let middle = range.start.midpoint(range.end);
        range = match is_in(range.start..middle)? {
            true => range.start..middle,
            false => middle..range.end,
        };
    }
    Ok(range.start)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_told_from_the_rest() {
        let text = "00001000-0009fbff : System RAM\n\
                    000a0000-000bffff : PCI Bus 0000:00\n\
                    00100000-7ffdffff : System RAM\n  01000000-015362d7 : Kernel code\n";
        assert_eq!(memory_map(text), [1..0x9f, 0x100..0x7ffe0]);
    }

    #[test]
    fn the_nearest_is_found() {
        for number in [0, 1, 2, 5, 99] {
            let found = nearest(100, |range| Ok(range.contains(&number)));
            assert_eq!(found.unwrap(), number);
        }
        assert!(nearest(100, |_| Ok(false)).is_err());
    }
}
