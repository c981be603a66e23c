// SPDX-License-Identifier: GPL-2.0

//! The encoder of page sets in the kernel: checks that it is the code that `host/wire` tests
//! against a decoder.

use crate::{
    bitmap::{
        Encoder,
        Encoding,
        Encodings,
        Subject, //
    },
    rust::{
        mm::pfn_range::PfnRange,
        virtio_balloon::{
            page_set::{
                BITMAP,
                INFLATE,
                MORE,
                RANGES, //
            },
            PageSet, //
        }, //
    }, //
};

use kernel::{
    page::PAGE_SHIFT,
    prelude::*, //
};

/// Writes `ranges` (first page frame number, length) to a message. Returns its header and the
/// length of its payload in words.
///
/// # Errors
///
/// `EINVAL` if there is no such range, or none at all, `ENOSPC` if one does not fit.
fn encode(
    payload: &mut [u64],
    allowed: Encodings,
    ranges: &[(u64, u64)],
) -> Result<(PageSet, usize)> {
    let mut encoder = Encoder::new(payload, allowed).ok_or(ENOSPC)?;

    for &(first, len) in ranges {
        let range = PfnRange::new(first, len).ok_or(EINVAL)?;

        if encoder.push(range).is_some() {
            return Err(ENOSPC);
        }
    }

    encoder
        .finish(Subject {
            command: INFLATE,
            page_shift: PAGE_SHIFT as u8,
            request_id: 7,
            more: true,
        })
        .ok_or(EINVAL)
}

/// Like [`encode`]. Returns the encoding, the page of bit 0, and the numbers of pages and words.
fn outline(
    payload: &mut [u64],
    allowed: Encodings,
    ranges: &[(u64, u64)],
) -> Result<(u8, u64, u64, usize)> {
    let (header, words) = encode(payload, allowed, ranges)?;

    Ok((
        header.encoding,
        u64::from_le(header.first_pfn),
        u64::from_le(header.count),
        words,
    ))
}

#[kunit_tests(virtio_balloon_rs_bitmap)]
mod tests {
    use super::*;

    #[test]
    fn the_header_says_what_the_message_is_about() {
        let header = encode(&mut [0; 2], Encodings::ALL, &[(1, 1)]).map(|(header, _)| header);

        assert!(header.is_ok_and(|header| {
            u16::from_le(header.command) == INFLATE
                && usize::from(header.page_shift) == PAGE_SHIFT
                && u32::from_le(header.flags) == MORE
                && u64::from_le(header.request_id) == 7
        }));
    }

    #[test]
    fn long_ranges_have_two_words() {
        let mut payload = [u64::MAX; 4];
        let ranges = [(1, 4095), (8192, 4096)];

        assert_eq!(
            outline(&mut payload, Encodings::ALL, &ranges),
            Ok((RANGES, 0, 8191, 3))
        );
        assert_eq!(
            payload.map(u64::from_le),
            [1 << 12 | 4095, 8192 << 12, 4096, u64::MAX]
        );
    }

    #[test]
    fn isolated_pages_are_a_bitmap() {
        let mut payload = [u64::MAX; 4];
        let ranges = [(1000, 1), (1002, 1), (1063, 2), (1127, 1)];

        assert_eq!(
            outline(&mut payload, Encodings::ALL, &ranges),
            Ok((BITMAP, 1000, 5, 2))
        );
        assert_eq!(
            payload.map(u64::from_le),
            [1 | 1 << 2 | 1 << 63, 1 | 1 << 63, 0, 0]
        );
    }

    #[test]
    fn neighbours_become_one_range() {
        let mut payload = [0; 2];

        assert_eq!(
            outline(
                &mut payload,
                Encodings::ALL,
                &[(512, 512), (1024, 512), (1536, 1)]
            ),
            Ok((RANGES, 0, 1025, 1))
        );
        assert_eq!(u64::from_le(payload[0]), 512 << 12 | 1025);
    }

    #[test]
    fn a_message_has_an_allowed_encoding() {
        let lone = [(0, 1), (2, 1), (4, 1)];

        for encoding in Encoding::ALL {
            assert!(
                outline(&mut [u64::MAX; 4], Encodings::only(encoding), &lone).is_ok_and(
                    |(number, _, count, _)| {
                        Encoding::from_number(number) == Some(encoding) && count == 3
                    }
                )
            );
        }
        assert_eq!(
            outline(&mut [0; 4], Encodings::only(Encoding::Ranges), &lone),
            Ok((RANGES, 0, 3, 3))
        );
        assert_eq!(
            outline(&mut [0; 4], Encodings::only(Encoding::Bitmap), &[(9, 250)]),
            Ok((BITMAP, 9, 250, 4))
        );
    }

    #[test]
    fn pages_that_do_not_fit_are_left() {
        let far = [(0, 1), (1 << 20, 1), (1 << 30, 1)];

        assert_eq!(outline(&mut [0; 2], Encodings::ALL, &far), Err(ENOSPC));
        assert_eq!(
            outline(&mut [0; 3], Encodings::ALL, &far),
            Ok((RANGES, 0, 3, 3))
        );
        assert_eq!(outline(&mut [0; 1], Encodings::ALL, &far), Err(ENOSPC));
        // The part before the rest does, too.
        assert_eq!(
            outline(&mut [0; 9], Encodings::ALL, &[(8, 1), (7, 1)]),
            Err(ENOSPC)
        );
    }

    #[test]
    fn every_page_has_a_number() {
        const END: u64 = 1 << 52;
        let mut payload = [0; 2];

        assert_eq!(
            outline(&mut payload, Encodings::ALL, &[(END - 1, 1)]),
            Ok((RANGES, 0, 1, 1))
        );
        assert_eq!(u64::from_le(payload[0]), (END - 1) << 12 | 1);
        assert_eq!(
            outline(&mut payload, Encodings::ALL, &[(0, END)]),
            Ok((RANGES, 0, END, 2))
        );
        assert_eq!(PfnRange::new(END - 1, 2), None);
    }
}
