// SPDX-License-Identifier: GPL-2.0

//! Reporting page migrations to the device: first the new pages, then the old ones.

#![forbid(unsafe_code)]

use crate::{
    balloon::{
        migration::{
            Migration,
            PendingMigrations, //
        },
        queues::{
            deflate::Deflate,
            inflate::Inflate, //
        }, //
    },
    rust::trace::{
        self,
        Reason, //
    }, //
};

use kernel::sync::SpinLock;

/// Sends the next reports, as far as possible now.
pub(in crate::balloon) fn send(
    migrations: &PendingMigrations,
    inflate: &mut Inflate,
    deflate: &SpinLock<Deflate>,
) {
    send_new(migrations, inflate, deflate);
    send_old(migrations, deflate);
}

/// A new page may have been deflated a moment ago, and the device must see that first. Rounds
/// follow one after the other, since a page may be a new one in the first round and an old one in
/// the second. No page is deflated in between, since the lock is held.
fn send_new(migrations: &PendingMigrations, inflate: &mut Inflate, deflate: &SpinLock<Deflate>) {
    let deflate = deflate.lock();
    let can_send = inflate.queue.room() > 0 && !deflate.is_pending();
    let is_sent = can_send
        && migrations.report_new(|waiting| inflate.queue.send_migrations(waiting, |this| this.new));
    drop(deflate);

    if is_sent {
        inflate.queue.notify();
    }
}

fn send_old(migrations: &PendingMigrations, deflate: &SpinLock<Deflate>) {
    let mut deflate = deflate.lock();
    let mut vacated = 0;
    let is_sent = deflate.queue.room() > 0
        && migrations.report_old(|migrations| {
            vacated = migrations.iter().map(Migration::vacated).sum();
            deflate
                .queue
                .send_migrations(migrations, |this| Some(this.old))
        });

    if is_sent {
        deflate.queue.notify();
    }
    if is_sent && vacated > 0 {
        trace::deflate(deflate.queue.device(), vacated, Reason::Isolated);
    }
}
