// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The actions of a hostile device, and their frequency in each mood.

use fastrand::Rng;

/// A mood selects the actions of the device for a while.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mood {
    /// It answers.
    WellBehaved,
    /// Legal actions that a driver must handle.
    Careless,
    /// Illegal actions. Some of them break a queue.
    Cruel,
}

/// An action of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Act {
    /// Uses all buffers of a queue, in order and with the right lengths.
    Use,
    /// Uses one buffer out of order.
    UseAny,
    /// Uses some with impossible lengths.
    UseWithAnyLength,
    /// Uses a buffer that it does not have.
    UseStranger,
    /// Uses a buffer once more.
    UseTwice,
    /// Moves the used ring's index.
    MoveIndex,
    /// Sends a spurious interrupt.
    Interrupt,
    /// Sends many spurious interrupts and spurious configuration interrupts.
    Storm,
    /// Asks the driver for no notifications, or for all of them.
    Mute,
    /// Writes to the driver's rings.
    Scribble,
    /// Writes to the memory that it was given, before it uses the buffers.
    Overwrite,
    /// Sets another target.
    Target,
    /// Changes the command id of free page hinting.
    Hints,
    /// Changes any field, and may announce that.
    Field,
    /// Starts or stops to change all fields with every read.
    Wild,
    /// Makes a valid request.
    Ask,
    /// Makes a request of random bytes.
    AskAnything,
    /// Makes as many requests as there are buffers for.
    AskMuch,
    /// Does nothing.
    Pause,
    /// Resets its side of a queue that the driver continues to use.
    ResetQueue,
    /// Sets `DEVICE_NEEDS_RESET`, and continues.
    NeedReset,
}

/// The frequency of an action in each mood. Actions for whole PCI devices are the last ones, so that seeds of the
/// other devices stay the same.
const ACTS: [(Act, [u32; 3]); 21] = [
    (Act::Use, [40, 20, 10]),
    (Act::UseAny, [0, 20, 10]),
    (Act::UseWithAnyLength, [0, 10, 10]),
    (Act::UseStranger, [0, 0, 1]),
    (Act::UseTwice, [0, 0, 1]),
    (Act::MoveIndex, [0, 0, 1]),
    (Act::Interrupt, [0, 10, 10]),
    (Act::Storm, [0, 2, 4]),
    (Act::Mute, [0, 0, 2]),
    (Act::Scribble, [0, 0, 1]),
    (Act::Overwrite, [2, 10, 10]),
    (Act::Target, [6, 10, 10]),
    (Act::Hints, [2, 6, 6]),
    (Act::Field, [0, 4, 6]),
    (Act::Wild, [0, 0, 4]),
    (Act::Ask, [4, 10, 6]),
    (Act::AskAnything, [0, 6, 6]),
    (Act::AskMuch, [0, 2, 4]),
    (Act::Pause, [10, 20, 20]),
    (Act::ResetQueue, [0, 0, 1]),
    (Act::NeedReset, [0, 0, 1]),
];

/// How many of them are for every device.
const ACTS_FOR_ALL: usize = 19;

impl Act {
    /// A random action, with its frequency in this mood.
    pub(crate) fn choose(mood: Mood, is_pci: bool, random: &mut Rng) -> Self {
        let acts = if is_pci {
            &ACTS[..]
        } else {
            &ACTS[..ACTS_FOR_ALL]
        };
        let weight = |(_, weights): &(Self, [u32; 3])| weights[mood as usize];
        let mut place = random.u32(..acts.iter().map(weight).sum::<u32>());
        let chosen = acts.iter().find(|act| {
            let found = place < weight(act);
            place = place.saturating_sub(weight(act));
            found
        });
        chosen.map_or(Self::Pause, |&(act, _)| act)
    }
}
