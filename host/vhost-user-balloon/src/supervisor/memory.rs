// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The guest's memory, as the front end's messages describe it.

use std::os::unix::net::UnixStream;

use anyhow::Result;
use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::PeerCredentials;
use procfs::process::{MMPermissions, MemoryMaps, Process};

use crate::vhost_user::message::{Message, request};

/// A region of the guest's memory, in bytes.
pub(super) struct Region {
    pub(super) size: u64,
    /// The front end's own address of it.
    pub(super) address: u64,
    /// Its offset in its file.
    pub(super) offset: u64,
}

/// Whether a message adds memory.
pub(super) fn adds_memory(message: &Message) -> bool {
    matches!(
        message.request(),
        request::ADD_MEM_REG | request::SET_MEM_TABLE
    )
}

/// The regions in a message that adds memory.
pub(super) fn regions(message: &Message) -> impl Iterator<Item = Region> {
    /// The address in the guest, followed by the fields above.
    const REGION: usize = 32;
    // Both kinds of messages have 8 bytes in front of the regions.
    const REGIONS: usize = 8;
    let regions = message.body().get(REGIONS..).unwrap_or_default();
    regions.chunks_exact(REGION).filter_map(|region| {
        Some(Region {
            size: word(region, 8)?,
            address: word(region, 16)?,
            offset: word(region, 24)?,
        })
    })
}

/// Whether some of the memory in a message is private to the front end, which is the peer of this socket.
/// Other processes do not see the guest's writes to such memory.
///
/// # Errors
///
/// The front end's mappings cannot be read: its process belongs to another user, or to another namespace.
pub(super) fn is_private(frontend: &UnixStream, message: &Message) -> Result<bool> {
    let peer = getsockopt(frontend, PeerCredentials)?;
    let maps = Process::new(peer.pid())?.maps()?;
    Ok(regions(message).any(|region| has_private(&maps, region.address)))
}

/// Whether an address is in a private mapping.
fn has_private(maps: &MemoryMaps, address: u64) -> bool {
    maps.iter().any(|map| {
        let (start, end) = map.address;
        (start..end).contains(&address) && map.perms.contains(MMPermissions::PRIVATE)
    })
}

/// The 64 bits at a place in a message.
pub(super) fn word(bytes: &[u8], at: usize) -> Option<u64> {
    let bytes = bytes.get(at..)?.first_chunk()?;
    Some(u64::from_ne_bytes(*bytes))
}

#[cfg(test)]
mod tests {
    use procfs::FromRead;

    use super::*;
    use crate::vhost_user::message::tests::message;

    #[test]
    fn private_memory_is_noticed() {
        let maps = "7f0000000000-7f0000002000 rw-s 00000000 00:01 7 /memfd:memory (deleted)\n\
                    7f0000002000-7f0000003000 rw-p 00000000 00:00 0 \n";
        let maps = MemoryMaps::from_read(maps.as_bytes()).unwrap();
        assert!(!has_private(&maps, 0x7f00_0000_0000));
        assert!(!has_private(&maps, 0x7f00_0000_1fff));
        assert!(has_private(&maps, 0x7f00_0000_2000));
        assert!(!has_private(&maps, 0x7f00_0000_3000));
        // This process is its own peer here.
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let stack = std::ptr::from_ref(&maps).addr() as u64;
        let region = [0, 0, 0x1000, stack, 0].map(u64::to_ne_bytes).concat();
        let message = message(request::ADD_MEM_REG, &region, vec![]);
        assert!(is_private(&ours, &message).unwrap());
    }
}
