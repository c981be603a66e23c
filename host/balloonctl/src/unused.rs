// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The file with the guest's unused pages (docs/unused-pages.md).

use std::fs::{File, Permissions};
use std::io::{self, BufWriter, Seek, SeekFrom, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use balloon_control::{Client, Ranges, Request};
use tempfile::Builder;

use crate::amount::PAGE;
use crate::failure::Failure;

const MAGIC: [u8; 8] = *b"UNUSEDPG";
const VERSION: u32 = 1;
const PAGE_SHIFT: u32 = PAGE.trailing_zeros();

/// The size of the header in bytes.
const HEADER: u64 = 64;

/// The number of pages in a word of the bitmap.
const WORD: u64 = u64::BITS as u64;

/// Reads the unused pages that the guest has listed, and writes them to a file. The file appears only when it
/// is complete. Returns the number of pages.
///
/// # Errors
///
/// The daemon no longer has them, or the file cannot be written.
pub(crate) fn save(client: &mut Client, id: u64, path: &Path) -> Result<u64, Failure> {
    let failed = |error| Failure::File(path.to_owned(), error);
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    // With the permissions of any other output file. It is removed unless it is persisted.
    let part = Builder::new()
        .permissions(Permissions::from_mode(0o666))
        .tempfile_in(directory)
        .map_err(failed)?;
    let count = write(client, id, BufWriter::new(part.as_file()), failed)?;
    part.as_file().sync_all().map_err(failed)?;
    part.persist(path).map_err(|error| failed(error.error))?;
    Ok(count)
}

fn write(
    client: &mut Client,
    id: u64,
    file: BufWriter<&File>,
    failed: impl Fn(io::Error) -> Failure,
) -> Result<u64, Failure> {
    let mut bitmap = Bitmap::new(file);
    let mut from = Some(0);
    let mut end = 0;
    while let Some(start) = from {
        let request = Request::Ranges { id, from: start };
        let answer = client.call(&request).map_err(Failure::of_request)?;
        let ranges: Ranges = answer.parse()?;
        for (address, bytes) in ranges.ranges {
            let first = address / PAGE;
            bitmap
                .add(first, first.saturating_add(bytes / PAGE))
                .map_err(&failed)?;
        }
        // This ends whatever the daemon sends.
        from = ranges.next.filter(|&next| next > start);
        end = ranges.end;
    }
    bitmap.finish(id, end / PAGE).map_err(failed)
}

/// A bitmap that is written in ascending order, with holes in the file for zeroes.
struct Bitmap<'a> {
    file: BufWriter<&'a File>,
    /// The index of the current word, and its content.
    place: u64,
    word: u64,
    /// The number of set bits.
    count: u64,
}

impl<'a> Bitmap<'a> {
    fn new(file: BufWriter<&'a File>) -> Self {
        Self {
            file,
            place: 0,
            word: 0,
            count: 0,
        }
    }

    /// Adds pages after those that were added before.
    fn add(&mut self, first: u64, end: u64) -> io::Result<()> {
        let mut page = first;
        while page < end {
            self.go_to(page / WORD)?;
            let base = page / WORD * WORD;
            let last = end.min(base.saturating_add(WORD));
            let bits = (u64::MAX << (page - base)) & (u64::MAX >> (WORD - (last - base)));
            self.count += u64::from((bits & !self.word).count_ones());
            self.word |= bits;
            page = last;
        }
        Ok(())
    }

    /// Makes the word at `place` the current one.
    fn go_to(&mut self, place: u64) -> io::Result<()> {
        if place == self.place {
            return Ok(());
        }
        if self.word != 0 {
            let at = HEADER.saturating_add(self.place.saturating_mul(8));
            if self.file.stream_position()? != at {
                self.file.seek(SeekFrom::Start(at))?;
            }
            self.file.write_all(&self.word.to_le_bytes())?;
        }
        (self.place, self.word) = (place, 0);
        Ok(())
    }

    /// Writes the remaining bits, and the header. Returns how many pages are in the bitmap.
    fn finish(mut self, id: u64, pages: u64) -> io::Result<u64> {
        self.go_to(u64::MAX)?;
        let length = pages.div_ceil(WORD).saturating_mul(8);
        self.file.seek(SeekFrom::Start(0))?;
        self.file.write_all(&MAGIC)?;
        self.file.write_all(&VERSION.to_le_bytes())?;
        self.file.write_all(&PAGE_SHIFT.to_le_bytes())?;
        for field in [pages, id, self.count] {
            self.file.write_all(&field.to_le_bytes())?;
        }
        let file = self.file.into_inner()?;
        file.set_len(HEADER.saturating_add(length))?;
        Ok(self.count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    use proptest::prelude::{prop, prop_assert_eq, proptest};

    /// The content of a file: the fields of the header, and the pages.
    fn read(bytes: &[u8]) -> ([u64; 3], Vec<u64>) {
        let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        assert_eq!(bytes[..8], *b"UNUSEDPG");
        assert_eq!(word(8), 1 | (12 << 32));
        assert_eq!(bytes[40..64], [0; 24]);
        let pages = bytes[64..].iter().enumerate().flat_map(|(place, byte)| {
            (0..8)
                .filter(move |bit| byte & (1 << bit) != 0)
                .map(move |bit| place as u64 * 8 + bit)
        });
        ([word(16), word(24), word(32)], pages.collect())
    }

    proptest! {
        #[test]
        fn a_file_has_the_pages(gaps in prop::collection::vec((0_u64..300, 1_u64..300), 0..20)) {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("pages");
            let file = File::create(&path).unwrap();
            let mut bitmap = Bitmap::new(BufWriter::new(&file));
            let mut expected = Vec::new();
            let mut end = 0;
            for (gap, length) in gaps {
                let first = end + gap;
                end = first + length;
                bitmap.add(first, end).unwrap();
                expected.extend(first..end);
            }
            let pages = end + 70;
            let count = bitmap.finish(9, pages).unwrap();
            prop_assert_eq!(count, expected.len() as u64);
            let bytes = fs::read(&path).unwrap();
            prop_assert_eq!(bytes.len() as u64, 64 + pages.div_ceil(64) * 8);
            prop_assert_eq!(read(&bytes), ([pages, 9, count], expected));
        }
    }
}
