// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Finding memory of the balloon that the host has allocated again, for a process that has read it.
//!
//! A process that maps a file of shared memory and reads a hole in it has the host allocate a page of zeroes there. A
//! dump of a VM reads all of its memory, so afterwards the host has a page for each page of the balloon. The worker
//! replaces such pages by holes, which read the same. A page with other content stays: a driver that uses a page of
//! its balloon is faulty, but loses nothing.

use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use nix::unistd::{Whence, lseek};

use crate::bitmap::index;
use crate::discard::{Piece, Pieces};

/// What a balloon page holds that was read as a hole. Granules are as large, or a power of two times as large.
const ZEROES: [u8; 4096] = [0; 4096];

/// How far the worker has come with the balloon.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Sweep {
    /// The first balloon page that it has not looked at.
    pub(crate) next: u64,
    /// How much it has given back to the host, in bytes.
    pub(crate) discarded: u64,
}

/// Adds those granules of a piece to `found` that have memory with nothing but zeroes in it.
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

/// The next granules of a piece with memory. The file's offset, which the front end shares, is used for this alone.
fn next_data(piece: &Piece, from: u64) -> Option<Range<u64>> {
    let seek = |place: u64, whence| {
        // An error says that there is nothing more.
        let place = lseek(piece.file.as_fd(), place.try_into().ok()?, whence);
        u64::try_from(place.ok()?).ok()
    };
    let end = piece.range.end;
    let data = seek(from, Whence::SeekData).filter(|&data| data < end)?;
    let hole = seek(data, Whence::SeekHole)?.min(end);
    Some(data / piece.granule * piece.granule..hole.next_multiple_of(piece.granule))
}

/// Whether there is nothing but zeroes in a granule. The host may fail to read a page of it.
fn is_zero(piece: &Piece, granule: Range<u64>) -> bool {
    let mut page = ZEROES;
    granule.step_by(ZEROES.len()).all(|place| {
        let read = piece.file.read_exact_at(&mut page, place);
        read.is_ok() && page == ZEROES
    })
}
