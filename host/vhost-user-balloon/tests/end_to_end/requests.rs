// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The guest's answers to host requests.

use super::*;

/// A driver that answers requests.
struct Answering {
    vmm: Vmm,
    kick: EventFd,
    call: EventFd,
    sent: u16,
}

impl Answering {
    fn new(mut vmm: Vmm) -> Self {
        vmm.start(0);
        let mut driver = Self {
            vmm,
            kick: EventFd::new(0).unwrap(),
            call: EventFd::new(0).unwrap(),
            sent: 0,
        };
        driver.start(0);
        driver
    }

    fn start(&mut self, base: u16) {
        let Self {
            vmm, kick, call, ..
        } = self;
        start_queue(&mut vmm.front, REQUESTS_NUMBER, base, REQUESTS, kick, call);
    }

    /// Makes the buffer with this number available, of so many bytes and with these flags.
    fn publish(&mut self, number: u16, length: usize, flags: u16) {
        let vmm = &self.vmm;
        let place = REQUESTS + 16 * u64::from(number);
        vmm.store(place, &(BUFFERS + 256 * u64::from(number)).to_le_bytes());
        vmm.store(place + 8, &u32::try_from(length).unwrap().to_le_bytes());
        vmm.store(place + 12, &flags.to_le_bytes());
        let avail = REQUESTS + AVAIL - DESCRIPTORS;
        let slot = avail + 4 + 2 * u64::from(self.sent % 16);
        vmm.store(slot, &number.to_le_bytes());
        self.sent += 1;
        vmm.store(avail + 2, &self.sent.to_le_bytes());
        self.kick.write(1).unwrap();
    }

    /// Makes a buffer available that the device may write a request into.
    fn offer(&mut self, number: u16) {
        const WRITE: u16 = 2;
        self.publish(number, 32, WRITE);
    }

    fn answer(&mut self, number: u16, words: &[u64]) {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        let place = BUFFERS + 256 * u64::from(number);
        self.vmm.store(place, &bytes);
        self.publish(number, bytes.len(), 0);
    }

    /// The number of used buffers.
    fn used(&self) -> u16 {
        let place = REQUESTS + USED - DESCRIPTORS + 2;
        u16::from_le_bytes([self.vmm.byte(place), self.vmm.byte(place + 1)])
    }

    fn wait_used(&self, used: u16) {
        wait_for("a buffer", || self.used() >= used);
        assert_eq!(self.used(), used);
    }

    /// The words of a request.
    fn request(&self, number: u16) -> [u64; 4] {
        let mut bytes = [0; 32];
        let place = BUFFERS + 256 * u64::from(number);
        self.vmm.memory.read_exact_at(&mut bytes, place).unwrap();
        let word = |at| u64::from_le_bytes(*bytes[at..].first_chunk().unwrap());
        [0, 8, 16, 24].map(word)
    }
}

fn ask(directory: &Path, request: &Request) -> u64 {
    let mut client = Client::connect(&directory.join("control")).unwrap();
    let begun: Begun = client.call(request).unwrap().parse().unwrap();
    begun.id
}

fn progress(directory: &Path, id: u64) -> Result<Progress, ClientError> {
    let mut client = Client::connect(&directory.join("control"))?;
    client.call(&Request::Progress { id })?.parse()
}

const UNUSED: Request = Request::Unused {
    block: 4096,
    start: 0,
    end: 1 << 32,
};
pub(super) const RECLAIM: Request = Request::Reclaim {
    block: 8192,
    start: 1 << 20,
    end: 0,
};

#[test]
fn a_guest_answers_requests() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let daemon = start(directory, &["--extensions"]);
    let vmm = Vmm::connect_with(directory, 1 << VIRTIO_BALLOON_F_HOST_REQUESTS);
    let mut driver = Answering::new(vmm);
    wait_for("the driver", || {
        info(directory).guest.features == ["host-requests"]
    });

    let id = ask(directory, &UNUSED);
    let status = || progress(directory, id).unwrap().status;
    assert_eq!(status(), RequestStatus::Waiting);
    driver.offer(0);
    driver.offer(1);
    driver.wait_used(1);
    assert_eq!(driver.request(0), [3 | (12 << 16), id, 0, 1 << 32]);
    assert_eq!(status(), RequestStatus::Open);
    assert_eq!(info(directory).guest.open_requests, 1);
    // Ranges with the flag for more messages: two pages of 4 KiB from 1 MiB on.
    driver.answer(2, &[0x1_010c_0003, id, 0, 2, 0x10_0002]);
    driver.answer(3, &[0x1_0007, id]);
    driver.wait_used(4);
    let ended = progress(directory, id).unwrap();
    assert_eq!((ended.status, ended.named), (RequestStatus::Complete, 8192));
    let mut client = Client::connect(&directory.join("control")).unwrap();
    let answer = client.call(&Request::Ranges { id, from: 0 }).unwrap();
    let ranges: Ranges = answer.parse().unwrap();
    let expected = Ranges {
        id,
        end: MEMORY,
        ranges: vec![(1 << 20, 8192)],
        next: None,
    };
    assert_eq!(ranges, expected);
    assert_eq!(driver.vmm.byte(1 << 20), 1);

    // The buffer that was used without a request is made available again.
    driver.offer(1);
    let reclaim = ask(directory, &RECLAIM);
    driver.wait_used(5);
    assert_eq!(driver.request(1), [4 | (13 << 16), reclaim, 1 << 20, 0]);
    driver.answer(2, &[0x1_010c_0004, reclaim, 0, 2, 0x10_0002]);
    driver.wait_used(6);
    assert_eq!(
        [0xff, 0x100, 0x101, 0x102].map(|page| driver.vmm.byte(page << 12)),
        [1, 0, 0, 1]
    );
    assert_eq!(progress(directory, reclaim).unwrap().discarded, 8192);

    // Another driver, after a reset.
    driver.vmm.front.get_vring_base(0).unwrap();
    let base = driver.vmm.front.get_vring_base(REQUESTS_NUMBER).unwrap();
    assert_eq!(base, 6);
    let error = progress(directory, reclaim).unwrap_err();
    assert!(matches!(error, ClientError::Refused(error) if error.kind == ErrorKind::NoDriver));
    driver
        .vmm
        .memory
        .write_all_at(&[0; 0x3000], REQUESTS)
        .unwrap();
    driver.vmm.store(AVAIL + 2, &[0, 0]);
    driver.sent = 0;
    driver.vmm.start(0);
    driver.start(0);
    wait_for("the end", || {
        progress(directory, reclaim).is_ok_and(|now| now.status == RequestStatus::Reset)
    });
    let counters = info(directory).counters;
    assert_eq!(counters.asked, 2);
    let answered = [(RequestStatus::Complete, 1), (RequestStatus::Reset, 1)];
    assert_eq!(counters.answered, answered.into());
    assert_eq!(counters.refused.len(), 0);
    daemon.end();
}

#[test]
fn another_process_goes_on_with_requests() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let daemon = start(directory, &["--extensions"]);
    let vmm = Vmm::connect_with(directory, 1 << VIRTIO_BALLOON_F_HOST_REQUESTS);
    let mut driver = Answering::new(vmm);
    wait_for("the driver", || info(directory).guest.driver);
    let before = ask(directory, &RECLAIM);
    for number in 0..3 {
        driver.offer(number);
    }
    driver.wait_used(1);
    driver.answer(3, &[0x1_010c_0004, before, 0, 1, 0x10_0001]);
    driver.wait_used(4);
    driver.offer(1);
    driver.offer(2);

    let pid = Pid::from_raw(daemon.0.id().try_into().unwrap());
    kill(pid, Signal::SIGHUP).unwrap();
    let client = || Client::connect(&directory.join("control"));
    let is_new = |error: &ClientError| match error {
        ClientError::Refused(error) => error.kind == ErrorKind::OutOfRange,
        _ => false,
    };
    wait_for("another process", || {
        client().is_ok() && progress(directory, before).is_err_and(|error| is_new(&error))
    });
    wait_for("the driver", || info(directory).guest.driver);
    let after = ask(directory, &RECLAIM);
    assert!(after > before);
    driver.wait_used(5);
    assert_eq!(driver.request(1)[1], after);
    // Messages for the previous worker have no effect.
    driver.answer(3, &[0x1_010c_0004, before, 0, 1, 0x10_1001]);
    driver.answer(4, &[0x1_010c_0004, after, 0, 1, 0x10_2001]);
    driver.answer(5, &[0x1_0007, after]);
    driver.wait_used(9);
    assert_eq!(
        [0x100, 0x101, 0x102].map(|page| driver.vmm.byte(page << 12)),
        [0, 1, 0]
    );
    let ended = progress(directory, after).unwrap();
    assert_eq!(ended.status, RequestStatus::Complete);
    assert_eq!(info(directory).counters.refused["malformed"], 1);
    daemon.end();
}
