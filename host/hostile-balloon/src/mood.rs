// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a hostile device may do, and how often in which mood.

use fastrand::Rng;

/// How the device feels about its driver for a while.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mood {
    /// It answers.
    WellBehaved,
    /// It does what a driver has to put up with.
    Careless,
    /// It does what no device may do. Some of it ends a queue for good.
    Cruel,
}

/// Something that the device does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Act {
    /// Uses all buffers of a queue, in order and with the right lengths.
    Use,
    /// Uses one of them, which is not the first one to come.
    UseAny,
    /// Uses some with lengths that cannot be.
    UseWithAnyLength,
    /// Uses a buffer that it does not have.
    UseStranger,
    /// Uses a buffer once more.
    UseTwice,
    /// Moves the used ring's index.
    MoveIndex,
    /// Interrupts for nothing.
    Interrupt,
    /// Interrupts for nothing, and says that nothing has changed in the configuration space, many times.
    Storm,
    /// Has the driver notify it of nothing, or of everything.
    Mute,
    /// Writes to rings that are the driver's.
    Scribble,
    /// Writes to the memory that it was given, before it uses the buffers.
    Overwrite,
    /// Wants another balloon.
    Target,
    /// Changes the command id of free page hinting.
    Hints,
    /// Changes any field, and may say so.
    Field,
    /// Changes all fields with every read, or does so no more.
    Wild,
    /// Makes a request that makes sense.
    Ask,
    /// Makes a request of random bytes.
    AskAnything,
    /// Makes as many requests as there are buffers for.
    AskMuch,
    /// Does nothing.
    Pause,
    /// Resets its side of a queue that the driver continues to use.
    ResetQueue,
    /// Says that it needs to be reset, and continues.
    NeedReset,
}

/// How often an act comes in each mood. Those of a whole PCI device alone are the last ones, so that the others' seeds
/// stay what they are.
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
    /// One of the acts, as often as it comes in this mood.
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
