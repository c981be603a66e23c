// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The balloon's state in a file, for the next worker.
//!
//! The file is in memory. The supervisor holds it and passes it to each worker. Without it a worker would not know
//! the pages in the balloon: it would not prefault them, and would refuse the guest's messages about them. A worker
//! writes the changes of a batch after it has discarded or allocated the memory, and before it uses the guest's
//! buffers. A worker that is killed in between leaves the old bits, and the next one repeats the batch.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use balloon_wire::status::Status;
use log::{error, warn};
use serde::{Deserialize, Serialize};

use super::bitmap::index;
use super::hazard::Identity;

/// The offset of the bitmaps. The table of regions is in front of them, with its length before it.
const BITMAPS: u64 = 64 << 10;

/// The offset of the driver's last status: its size and its stop reason, after the table.
const STATUS: u64 = BITMAPS - 8;

/// How many unchanged words are written to avoid another write.
const GAP: u64 = 512;

/// A region of the guest's memory, as the file describes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Region {
    /// Its balloon pages.
    pub pages: Range<u64>,
    /// The identity of its memory file.
    pub identity: Identity,
    /// Its offset in that file, in bytes.
    pub offset: u64,
    /// The offset of its bitmap in this file, in bytes.
    bitmap: u64,
    /// How many words the bitmap has.
    words: u64,
}

/// The file.
#[derive(Debug)]
pub struct Kept {
    file: File,
    regions: Vec<Region>,
    status: Status,
}

impl Kept {
    /// Reads the state from a file.
    pub fn new(file: File) -> Self {
        // An invalid one was not finished, or is empty.
        let regions = read_regions(&file).unwrap_or_default();
        let status = read_status(&file).unwrap_or_default();
        Self {
            file,
            regions,
            status,
        }
    }

    /// The driver's last status.
    pub fn status(&self) -> Status {
        self.status
    }

    /// Writes the driver's status to the file.
    pub fn set_status(&mut self, status: Status) -> io::Result<()> {
        self.status = status;
        // A file without a table is empty, and stays so until there is one.
        if self.regions.is_empty() {
            return Ok(());
        }
        let fields = [status.actual, status.stop_reason].map(u32::to_ne_bytes);
        self.file.write_all_at(fields.as_flattened(), STATUS)
    }

    /// The regions in the file, and the bitmap of each.
    pub fn load(&self) -> io::Result<Vec<(Region, Vec<u64>)>> {
        let load = |region: &Region| {
            let mut bytes = vec![0; index(region.words.saturating_mul(8))];
            self.file.read_exact_at(&mut bytes, region.bitmap)?;
            let words = bytes.chunks_exact(8).filter_map(<[u8]>::first_chunk);
            let words = words.map(|word| u64::from_ne_bytes(*word)).collect();
            Ok((region.clone(), words))
        };
        self.regions.iter().map(load).collect()
    }

    /// Stops using the file after an error.
    pub fn give_up(self, error: &io::Error) {
        give_up(&self.file, error);
    }

    /// Writes these regions to the file, with an empty balloon.
    pub fn reset(
        &mut self,
        regions: impl Iterator<Item = (Range<u64>, Identity, u64, usize)>,
    ) -> io::Result<()> {
        // Meanwhile the file is empty, and has no regions.
        self.file.set_len(0)?;
        self.regions.clear();
        let mut end = BITMAPS;
        for (pages, identity, offset, words) in regions {
            let words = words as u64;
            self.regions.push(Region {
                pages,
                identity,
                offset,
                bitmap: end,
                words,
            });
            end = end.saturating_add(words.saturating_mul(8));
        }
        let table = serde_json::to_vec(&self.regions)?;
        let length = table.len() as u64;
        if length > STATUS - 8 {
            return Err(io::Error::other("there are too many regions of memory"));
        }
        self.file.set_len(end)?;
        self.file.write_all_at(&table, 8)?;
        // The file already has zeroes.
        if self.status != Status::default() {
            self.set_status(self.status)?;
        }
        self.file.write_all_at(&length.to_ne_bytes(), 0)
    }

    /// Writes words of the bitmap of the region with this number.
    fn write(&self, number: usize, words: Range<u64>, bitmap: &[u64]) -> io::Result<()> {
        let Some(region) = self.regions.get(number) else {
            return Ok(());
        };
        let place = index(words.start)..index(words.end);
        let changed = bitmap.get(place).unwrap_or_default();
        let bytes: Vec<u8> = changed.iter().flat_map(|word| word.to_ne_bytes()).collect();
        self.file
            .write_all_at(&bytes, region.bitmap + words.start * 8)
    }

    /// Writes the changed words of a region's bitmap, in order.
    pub fn update(
        &self,
        number: usize,
        changed: impl Iterator<Item = Range<u64>>,
        bitmap: &[u64],
    ) -> io::Result<()> {
        let mut pending: Option<Range<u64>> = None;
        for words in changed {
            match &mut pending {
                Some(last) if words.start <= last.end.saturating_add(GAP) => {
                    last.end = last.end.max(words.end);
                }
                _ => {
                    if let Some(last) = pending.replace(words) {
                        self.write(number, last, bitmap)?;
                    }
                }
            }
        }
        pending.map_or(Ok(()), |last| self.write(number, last, bitmap))
    }
}

/// Empties a file that cannot be updated, so that another worker does not use stale bits. That needs no memory.
pub fn give_up(file: &File, error: &io::Error) {
    warn!("cannot store the balloon's state for a restart of this process: {error}");
    if let Err(error) = file.set_len(0) {
        error!("cannot empty the file with the balloon's state: {error}; restart the VM");
    }
}

fn read_status(file: &File) -> Option<Status> {
    let mut bytes = [0; 8];
    file.read_exact_at(&mut bytes, STATUS).ok()?;
    let number = |at| {
        let field = bytes.get(at..).and_then(<[u8]>::first_chunk);
        field.map(|field| u32::from_ne_bytes(*field))
    };
    Some(Status {
        actual: number(0)?,
        stop_reason: number(4)?,
    })
}

fn read_regions(file: &File) -> Option<Vec<Region>> {
    let mut length = [0; 8];
    file.read_exact_at(&mut length, 0).ok()?;
    let length = u64::from_ne_bytes(length);
    if length > BITMAPS {
        return None;
    }
    let mut table = vec![0; index(length)];
    file.read_exact_at(&mut table, 8).ok()?;
    serde_json::from_slice(&table).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::memory_file;

    #[test]
    fn another_process_finds_what_was_written() {
        let file = memory_file(0);
        let open = || Kept::new(file.try_clone().unwrap());
        assert_eq!(open().load().unwrap(), []);
        let mut kept = open();
        kept.reset(
            [
                (0..64, (1, 2), 0, 1),
                (128..128 + 64 * 1000, (1, 3), 4096, 1000),
            ]
            .into_iter(),
        )
        .unwrap();
        let mut bitmap = vec![0; 1000];
        for place in [0, 1, 600, 999] {
            bitmap[place] = 7;
        }
        kept.update(1, [0..1, 1..2, 600..601, 999..1000].into_iter(), &bitmap)
            .unwrap();
        let found = open().load().unwrap();
        assert_eq!(found.len(), 2);
        assert_eq!(found[0].1, [0]);
        assert_eq!(
            (&found[1].0.pages, found[1].0.offset),
            (&(128..64128), 4096)
        );
        assert_eq!(found[1].1, bitmap);

        kept.reset([(0..64, (1, 2), 0, 1)].into_iter()).unwrap();
        assert_eq!(open().load().unwrap().len(), 1);
    }

    #[test]
    fn another_process_finds_the_status() {
        let file = memory_file(0);
        let open = || Kept::new(file.try_clone().unwrap());
        let status = Status {
            actual: 7,
            stop_reason: 2,
        };
        let mut kept = open();
        kept.set_status(status).unwrap();
        assert_eq!(open().status(), Status::default());
        // Other memory does not change it.
        kept.reset([(0..64, (1, 2), 0, 1)].into_iter()).unwrap();
        assert_eq!(open().status(), status);
        kept.set_status(Status::default()).unwrap();
        assert_eq!(open().status(), Status::default());
    }

    #[test]
    fn a_table_that_is_too_long_leaves_none() {
        let file = memory_file(0);
        let mut kept = Kept::new(file.try_clone().unwrap());
        kept.reset([(0..64, (1, 2), 0, 1)].into_iter()).unwrap();
        let many = (0..2000).map(|number| (number * 64..(number + 1) * 64, (1, 2), 0, 1));
        kept.reset(many).unwrap_err();
        assert_eq!(Kept::new(file.try_clone().unwrap()).load().unwrap(), []);
    }

    #[test]
    fn nonsense_is_no_region() {
        for bytes in [
            &[0xff; 64][..],
            &[8, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3],
            &[0; 9000],
        ] {
            let file = memory_file(0);
            file.write_all_at(bytes, 0).unwrap();
            let kept = Kept::new(file.try_clone().unwrap());
            assert_eq!(kept.load().unwrap(), []);
        }
    }
}
