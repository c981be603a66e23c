// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Finds memory of the balloon that the host has allocated again for a reader.
//!
//! When a process reads a hole in shared memory through a mapping, the host allocates a page of zeroes. A dump of a VM
//! reads all of its memory, so afterwards the host has a page for each page of the balloon. The worker replaces such
//! pages by holes, which read the same. A page with other content stays: a driver that writes to a page of its balloon
//! is faulty, but loses no data.

use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use nix::unistd::{Whence, lseek};

use super::bitmap::index;
use super::discard::{Piece, Pieces};

/// The content of a balloon page that was read as a hole. Granules have this size, or a power of
/// two times this size.
const ZEROES: [u8; 4096] = [0; 4096];

/// A search through the balloon.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Sweep {
    /// The balloon page where it continues.
    pub(crate) next: u64,
    /// The discarded memory, in bytes.
    pub(crate) discarded: u64,
}

/// Adds the granules of a piece that have memory, and only zeroes in it, to `found`.
pub(crate) fn find_zeroes(piece: &Piece, found: &mut Pieces) {
    let mut place = piece.range.start;
    while let Some(data) = next_data(piece, place) {
        place = data.end;
        for start in data.step_by(index(piece.granule)) {
            let granule = start..start + piece.granule;
            if is_zero(piece, granule.clone()) {
                found.push(&piece.file, granule, piece.granule);
            }
        }
    }
}

/// The next granules of a piece that have memory. This changes the file's offset, which the front end shares and does
/// not use.
fn next_data(piece: &Piece, from: u64) -> Option<Range<u64>> {
    let seek = |place: u64, whence| {
        // ENXIO: there is no memory up to the end of the file.
        let place = lseek(piece.file.as_fd(), place.try_into().ok()?, whence);
        u64::try_from(place.ok()?).ok()
    };
    let end = piece.range.end;
    let data = seek(from, Whence::SeekData).filter(|&data| data < end)?;
    let hole = seek(data, Whence::SeekHole)?.min(end);
    Some(data / piece.granule * piece.granule..hole.next_multiple_of(piece.granule))
}

/// Whether a granule has only zeroes. The read fails for a page with a memory error.
fn is_zero(piece: &Piece, granule: Range<u64>) -> bool {
    let mut page = ZEROES;
    granule.step_by(ZEROES.len()).all(|place| {
        let read = piece.file.read_exact_at(&mut page, place);
        read.is_ok() && page == ZEROES
    })
}
