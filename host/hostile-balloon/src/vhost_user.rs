// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The device behind QEMU's vhost-user front end, which does the rest of virtio.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use anyhow::{Result, anyhow};
use balloon_control::{Access, listen};
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost_user_backend::{VhostUserBackend, VhostUserDaemon, VringMutex, VringState, VringT};
use vhost_user_balloon::queues::virtqueue::MAX_QUEUE_SIZE;
use vhost_user_balloon::virtio::kind::MAX_QUEUES;
use virtio_queue::Queue;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

use crate::device::{Device, Transport};
use crate::relay::{self, Channel};
use crate::ring::RawQueue;

/// The device as the library sees it.
pub(crate) struct VhostUser {
    device: Arc<Device>,
    channel: Channel,
    vrings: OnceLock<Vec<VringMutex>>,
}

impl VhostUser {
    pub(crate) fn new(device: Arc<Device>) -> Self {
        Self {
            device,
            channel: Channel::default(),
            vrings: OnceLock::new(),
        }
    }
}

impl RawQueue for VringState {
    fn queue(&self) -> &Queue {
        self.get_queue()
    }

    fn queue_mut(&mut self) -> &mut Queue {
        self.get_queue_mut()
    }

    fn interrupt(&self) {
        // The front end may be gone, which its socket reports later.
        let _ = self.signal_used_queue();
    }
}

impl Transport for VhostUser {
    fn serve(
        self: Arc<Self>,
        socket: &Path,
        announce: &dyn Fn(),
        begin: Box<dyn FnOnce()>,
    ) -> Result<()> {
        let (outer, outer_file) = listen(socket, Access::default())?;
        let inner_path = socket.with_extension("library");
        let (inner, inner_file) = listen(&inner_path, Access::default())?;
        announce();
        let (front, _) = outer.accept()?;
        let name = "vhost-user".to_owned();
        let mut library = VhostUserDaemon::new(name, Arc::clone(&self), self.device.memory())
            .map_err(|error| anyhow!("{error}"))?;
        let channel = self.channel.clone();
        relay::start(front, UnixStream::connect(&inner_path)?, channel)?;
        library
            .start(&mut inner.into())
            .map_err(|error| anyhow!("{error}"))?;
        outer_file.remove();
        inner_file.remove();
        begin();
        library.wait().map_err(|error| anyhow!("{error}"))
    }

    fn with_queue(&self, number: usize, act: &mut dyn FnMut(&mut dyn RawQueue)) {
        if let Some(vring) = self.vrings.get().and_then(|vrings| vrings.get(number)) {
            act(&mut *vring.get_mut());
        }
    }

    fn config_changed(&self) {
        self.channel.config_changed();
    }

    /// The protocol has no word for it.
    fn need_reset(&self) {}

    fn is_pci(&self) -> bool {
        false
    }
}

impl VhostUserBackend for VhostUser {
    type Bitmap = ();
    type Vring = VringMutex;

    fn num_queues(&self) -> usize {
        MAX_QUEUES
    }

    fn max_queue_size(&self) -> usize {
        MAX_QUEUE_SIZE
    }

    fn features(&self) -> u64 {
        self.device.features()
    }

    fn acked_features(&self, features: u64) {
        self.device.set_acked(features);
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::BACKEND_REQ
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
    }

    /// The seed determines the index at which the driver notifies the device.
    fn set_event_idx(&self, _enabled: bool) {}

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let (start, length) = (usize::try_from(offset), usize::try_from(size));
        self.device
            .read_config(start.unwrap_or(usize::MAX), length.unwrap_or(0))
    }

    /// The device ignores the driver's notifications.
    fn set_config(&self, _offset: u32, _bytes: &[u8]) -> io::Result<()> {
        Ok(())
    }

    fn update_memory(&self, _memory: GuestMemoryAtomic<GuestMemoryMmap>) -> io::Result<()> {
        Ok(())
    }

    fn stop_vring(&self, queue_index: u32) -> io::Result<()> {
        self.device
            .forget(usize::try_from(queue_index).unwrap_or(usize::MAX));
        Ok(())
    }

    /// The device polls the queues. It only needs to know that they exist.
    fn handle_event(
        &self,
        _event: u16,
        _evset: EventSet,
        vrings: &[VringMutex],
        _thread_id: usize,
    ) -> io::Result<()> {
        self.vrings.get_or_init(|| vrings.to_vec());
        Ok(())
    }
}
