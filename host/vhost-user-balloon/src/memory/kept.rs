// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The balloon's state in a file, for the next worker.
//!
//! The file is in memory. The supervisor holds it and passes it to each worker. Without it a worker would not know
//! the pages in the balloon: it would not prefault them, and would refuse the guest's messages about them. A worker
//! writes the changes of a batch after it has discarded or allocated the memory, and before it uses the guest's
//! buffers. A worker that is killed in between leaves the old bits, and the next one repeats the batch.
//!
//! A bitmap for each region of memory is followed by the table of regions, and the first word of the file is the place
//! of the table. When the regions change, a worker writes both again in free space, and that word last. So one that is
//! killed meanwhile leaves the old ones.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use balloon_wire::status::Status;
use log::{error, warn};
use rustix::fs::{FallocateFlags, fallocate};
use serde::{Deserialize, Serialize};

use super::bitmap::index;
use super::hazard::Identity;

/// The offset of the first bitmap, and the least one of the table. Earlier programs have the table in front of it, with
/// its length as the first word of the file.
const BITMAPS: u64 = 64 << 10;

/// The offset of the driver's last status: its size and its stop reason.
const STATUS: u64 = BITMAPS - 8;

/// Bitmaps begin at a page.
const PAGE: u64 = 4096;

/// How many unchanged words are written to avoid another write.
const GAP: u64 = 512;

/// Memory of the guest, and its part of the balloon.
#[derive(Clone, Copy, Debug)]
pub struct Memory<'a> {
    /// Its balloon pages.
    pub pages: &'a Range<u64>,
    /// The identity of its file.
    pub identity: Identity,
    /// Its offset in that file, in bytes.
    pub offset: u64,
    /// A bit for each page.
    pub held: &'a [u64],
}

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
    /// The offsets of the bitmaps and the table in the file.
    place: Range<u64>,
    status: Status,
}

impl Kept {
    /// Reads the state from a file.
    pub fn new(file: File) -> Self {
        // An invalid one is empty.
        let (regions, place) = read_table(&file).unwrap_or((Vec::new(), BITMAPS..BITMAPS));
        let status = read_status(&file).unwrap_or_default();
        Self {
            file,
            regions,
            place,
            status,
        }
    }

    /// Whether one of these files holds memory whose state is stored.
    pub fn has_any(&self, files: &BTreeSet<Identity>) -> bool {
        let mut regions = self.regions.iter();
        regions.any(|region| files.contains(&region.identity))
    }

    /// The driver's last status.
    pub fn status(&self) -> Status {
        self.status
    }

    /// Writes the driver's status to the file.
    pub fn set_status(&mut self, status: Status) -> io::Result<()> {
        if status == self.status {
            return Ok(());
        }
        self.status = status;
        let fields = [status.actual, status.stop_reason].map(u32::to_ne_bytes);
        self.write(fields.as_flattened(), STATUS)
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

    /// Replaces the memory in the file.
    pub fn replace<'a>(
        &mut self,
        memory: impl Iterator<Item = Memory<'a>> + Clone,
    ) -> io::Result<()> {
        // A process that was killed may have left a part of another one.
        self.clear_rest()?;
        let (mut regions, mut table) = lay_out(memory.clone(), BITMAPS);
        let mut content = serde_json::to_vec(&regions)?;
        if table + 8 + content.len() as u64 > self.place.start {
            let after = self.place.end.next_multiple_of(PAGE);
            (regions, table) = lay_out(memory.clone(), after);
            content = serde_json::to_vec(&regions)?;
        }
        // There are zeroes already.
        for (region, memory) in regions.iter().zip(memory) {
            let words = (0..).zip(memory.held).filter(|(_, word)| **word != 0);
            let words = words.map(|(place, _)| place..place + 1);
            self.write_words(region, words, memory.held)?;
        }
        let length = content.len() as u64;
        content.splice(..0, length.to_ne_bytes());
        self.write(&content, table)?;
        self.write(&table.to_ne_bytes(), 0)?;
        let start = regions.first().map_or(table, |region| region.bitmap);
        self.place = start..table + content.len() as u64;
        self.regions = regions;
        self.clear_rest()
    }

    /// Clears the space for other regions.
    fn clear_rest(&self) -> io::Result<()> {
        #[cfg(test)]
        crate::testing::before_step(&self.file);
        self.file.set_len(self.place.end)?;
        let before = self.place.start - BITMAPS;
        if before > 0 {
            #[cfg(test)]
            crate::testing::before_step(&self.file);
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            fallocate(&self.file, flags, BITMAPS, before)?;
        }
        Ok(())
    }

    fn write(&self, bytes: &[u8], place: u64) -> io::Result<()> {
        #[cfg(test)]
        crate::testing::before_step(&self.file);
        self.file.write_all_at(bytes, place)
    }

    /// Writes the changed words of the bitmap of the memory with this number, in order.
    pub fn update(
        &self,
        number: usize,
        changed: impl Iterator<Item = Range<u64>>,
        bitmap: &[u64],
    ) -> io::Result<()> {
        let region = self.regions.get(number);
        region.map_or(Ok(()), |region| self.write_words(region, changed, bitmap))
    }

    fn write_words(
        &self,
        region: &Region,
        changed: impl Iterator<Item = Range<u64>>,
        bitmap: &[u64],
    ) -> io::Result<()> {
        let write = |words: Range<u64>| {
            let place = index(words.start)..index(words.end);
            let changed = bitmap.get(place).unwrap_or_default();
            let bytes: Vec<u8> = changed.iter().flat_map(|word| word.to_ne_bytes()).collect();
            self.write(&bytes, region.bitmap + words.start * 8)
        };
        let mut pending: Option<Range<u64>> = None;
        for words in changed {
            match &mut pending {
                Some(last) if words.start <= last.end.saturating_add(GAP) => {
                    last.end = last.end.max(words.end);
                }
                _ => {
                    if let Some(last) = pending.replace(words) {
                        write(last)?;
                    }
                }
            }
        }
        pending.map_or(Ok(()), write)
    }
}

/// The places of the bitmaps of this memory from `start` on, and of the table after them.
fn lay_out<'a>(memory: impl Iterator<Item = Memory<'a>>, start: u64) -> (Vec<Region>, u64) {
    let mut end = start;
    let regions = memory.map(|memory| {
        let (bitmap, words) = (end, memory.held.len() as u64);
        end += words * 8;
        Region {
            pages: memory.pages.clone(),
            identity: memory.identity,
            offset: memory.offset,
            bitmap,
            words,
        }
    });
    (regions.collect(), end)
}

/// Empties a file that cannot be updated, so that another worker does not use stale bits. That needs no memory.
pub fn give_up(file: &File, error: &io::Error) {
    warn!("cannot store the balloon's state for a restart of this process: {error}");
    if let Err(error) = file.set_len(0) {
        error!("cannot empty the file with the balloon's state: {error}; restart the VM");
    }
}

fn read_status(file: &File) -> Option<Status> {
    let number = |place| {
        let mut bytes = [0; 4];
        file.read_exact_at(&mut bytes, place).ok()?;
        Some(u32::from_ne_bytes(bytes))
    };
    Some(Status {
        actual: number(STATUS)?,
        stop_reason: number(STATUS + 4)?,
    })
}

/// The table, and the offsets of the bitmaps and the table.
fn read_table(file: &File) -> Option<(Vec<Region>, Range<u64>)> {
    let number = |place| {
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, place).ok()?;
        Some(u64::from_ne_bytes(bytes))
    };
    let first = number(0)?;
    let table = if first < BITMAPS { 0 } else { first };
    let length = number(table)?;
    let content = table.checked_add(8)?;
    let end = content.checked_add(length)?;
    if end > file.metadata().ok()?.len() {
        return None;
    }
    let mut bytes = vec![0; index(length)];
    file.read_exact_at(&mut bytes, content).ok()?;
    let regions: Vec<Region> = serde_json::from_slice(&bytes).ok()?;
    let start = regions.first().map_or(table, |region| region.bitmap);
    let bitmaps = regions.last().map_or(0, |region| {
        region.bitmap.saturating_add(region.words.saturating_mul(8))
    });
    Some((regions, start.max(BITMAPS)..end.max(bitmaps).max(BITMAPS)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{left_when_killed, memory_file};
    use std::os::unix::fs::MetadataExt;

    const STATE: Status = Status {
        actual: 7,
        stop_reason: 2,
    };

    fn open(file: &File) -> Kept {
        Kept::new(file.try_clone().unwrap())
    }

    /// Memory at these pages with this bitmap.
    fn memory<'a>(pages: &'a Range<u64>, held: &'a [u64]) -> Memory<'a> {
        Memory {
            pages,
            identity: (1, pages.start),
            offset: 4096,
            held,
        }
    }

    fn replace(kept: &mut Kept, regions: &[(Range<u64>, Vec<u64>)]) {
        let regions = regions.iter();
        kept.replace(regions.map(|(pages, held)| memory(pages, held)))
            .unwrap();
    }

    /// The pages and the bitmaps in a file.
    fn found(file: &File) -> Vec<(Range<u64>, Vec<u64>)> {
        let regions = open(file).load().unwrap().into_iter();
        regions
            .map(|(region, held)| {
                assert_eq!(
                    (region.identity.1, region.offset),
                    (region.pages.start, 4096)
                );
                (region.pages, held)
            })
            .collect()
    }

    #[test]
    fn another_process_finds_what_was_written() {
        let file = memory_file(0);
        assert_eq!(found(&file), []);
        let mut kept = open(&file);
        let mut regions = [(0..64, vec![0]), (128..128 + 64 * 1000, vec![0; 1000])];
        replace(&mut kept, &regions);
        assert_eq!(found(&file), regions);
        let bitmap = &mut regions[1].1;
        for place in [0, 1, 600, 999] {
            bitmap[place] = 7;
        }
        kept.update(1, [0..1, 1..2, 600..601, 999..1000].into_iter(), bitmap)
            .unwrap();
        assert_eq!(found(&file), regions);
    }

    /// However large each is, a process finds the last ones, in a file that does not grow without end.
    #[test]
    fn memory_can_change_any_number_of_times() {
        let file = memory_file(0);
        let mut kept = open(&file);
        for number in 1..100 {
            let words = [3000, 1, 20, 5000, 700][number % 5];
            let regions = (0..=number as u64 % 4).map(|place| {
                let start = place << 20;
                (start..start + words as u64 * 64, vec![number as u64; words])
            });
            let regions: Vec<_> = regions.collect();
            replace(&mut kept, &regions);
            assert_eq!(found(&file), regions);
            if number % 7 == 0 {
                kept = open(&file);
            }
            // Twice the largest state, in whole pages.
            let metadata = file.metadata().unwrap();
            assert!(metadata.len() < BITMAPS + 2 * (4 * 5000 * 8 + 4 * PAGE));
            let words: usize = regions.iter().map(|(_, held)| held.len()).sum();
            let pages = (words as u64 * 8).div_ceil(PAGE) + 3;
            assert!(metadata.blocks() <= pages * 8, "{number}");
        }
    }

    #[test]
    fn another_process_finds_the_status() {
        let file = memory_file(0);
        let mut kept = open(&file);
        kept.set_status(STATE).unwrap();
        // Other memory does not change it.
        replace(&mut kept, &[(0..64, vec![0])]);
        assert_eq!(open(&file).status(), STATE);
        kept.set_status(Status::default()).unwrap();
        assert_eq!(open(&file).status(), Status::default());
    }

    #[test]
    fn any_number_of_regions_is_kept() {
        let file = memory_file(0);
        let regions: Vec<_> = (0..2000)
            .map(|number| (number * 64..(number + 1) * 64, vec![number]))
            .collect();
        replace(&mut open(&file), &regions);
        assert_eq!(found(&file), regions);
    }

    /// The table is at the start, and the bitmaps behind it.
    #[test]
    fn the_file_of_an_earlier_program_is_read() {
        let file = memory_file(BITMAPS + 16);
        let regions = [(64..128, vec![5]), (256..320, vec![6])];
        let table = (0..).zip(&regions).map(|(number, (pages, _))| {
            serde_json::json!({
                "pages": pages, "identity": [1, pages.start], "offset": 4096,
                "bitmap": BITMAPS + number * 8, "words": 1,
            })
        });
        let table = serde_json::to_vec(&table.collect::<Vec<_>>()).unwrap();
        let write = |bytes: &[u8], place| file.write_all_at(bytes, place).unwrap();
        write(&table, 8);
        write(&(table.len() as u64).to_ne_bytes(), 0);
        write([7_u32, 2].map(u32::to_ne_bytes).as_flattened(), STATUS);
        write([5_u64, 6].map(u64::to_ne_bytes).as_flattened(), BITMAPS);

        let mut kept = open(&file);
        assert_eq!((found(&file), kept.status()), (regions.to_vec(), STATE));
        let regions = [(64..128, vec![4]), (512..576, vec![3])];
        for _ in 0..3 {
            replace(&mut kept, &regions);
            assert_eq!(
                (&found(&file)[..], open(&file).status()),
                (&regions[..], STATE)
            );
        }
    }

    #[test]
    fn a_process_that_is_killed_leaves_the_old_or_the_new_state() {
        let states = [
            vec![(0..128, vec![1, 2])],
            vec![(0..64, vec![3]), (128..64 * 1500, vec![4; 1498])],
            vec![(64..128, vec![5])],
            vec![],
            vec![(0..640, vec![6; 10]), (1024..1088, vec![7])],
        ];
        let file = memory_file(0);
        let mut kept = open(&file);
        kept.set_status(STATE).unwrap();
        replace(&mut kept, &states[0]);
        for next in states.windows(2) {
            let left = left_when_killed(|| replace(&mut kept, &next[1]));
            assert!(left.len() >= 4, "{}", left.len());
            for file in left {
                assert!(next.contains(&found(&file)), "{:?}", found(&file));
                assert_eq!(open(&file).status(), STATE);
                // The rest of another state does not disturb the next process.
                for state in &states {
                    replace(&mut open(&file), state);
                    assert_eq!(found(&file), *state);
                }
            }
        }
    }

    #[test]
    fn nonsense_is_no_region() {
        for bytes in [
            &[0xff; 64][..],
            &[8, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3],
            &[0, 0, 1, 0, 0, 0, 0, 0],
            &[0; 9000],
        ] {
            let file = memory_file(0);
            file.write_all_at(bytes, 0).unwrap();
            assert_eq!(found(&file), []);
            replace(&mut open(&file), &[(0..64, vec![1])]);
            assert_eq!(found(&file), [(0..64, vec![1])]);
        }
    }
}
