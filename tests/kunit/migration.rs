// SPDX-License-Identifier: GPL-2.0

//! Which pages of the balloon may be migrated. The suite of the whole driver tests the reports to
//! the device.

use crate::{
    balloon::{
        migration::PendingMigrations,
        state::Balloon, //
    },
    bitmap::{
        Encoding,
        Encodings, //
    },
    messages::{
        message::MIGRATIONS_PER_MESSAGE,
        negotiated::Negotiated,
        page_sets,
        ranges::Sorted, //
    },
    rust::{
        mm::{
            balloon::replace::{
                MigratePage,
                OldPage, //
            },
            pages::page_list::PageList,
            pfn_range::PfnRange, //
        },
        virtio_balloon::page_set,
        work::task::{
            new_slot,
            Slot,
            TaskQueue, //
        }, //
    }, //
};

use kernel::{
    page::PAGE_SHIFT,
    prelude::*,
    str::CString,
    sync::atomic::{
        Atomic,
        Relaxed, //
    }, //
};

/// Those of the base protocol.
const TERMS: Negotiated = Negotiated {
    must_tell_host: false,
    page_sets: false,
};

/// Page frame numbers that are not used in these tests: from 8 TiB on.
const ELSEWHERE: u64 = 1 << (43 - PAGE_SHIFT);

/// Migrations without a device.
fn migrations() -> Result<Pin<KBox<PendingMigrations>>> {
    static QUEUES: Atomic<u32> = Atomic::new(0);
    let number = QUEUES.fetch_add(1, Relaxed);
    let name = CString::try_from_fmt(fmt!("virtio_balloon_rs_kunit-{number}"))?;
    let tasks = TaskQueue::new(&name)?;
    let slot: Slot<Balloon> = new_slot!(c"virtio_balloon_rs_kunit", tasks)?;
    let migrations = KBox::pin_init(PendingMigrations::new(slot.waker(), TERMS)?, GFP_KERNEL)?;

    migrations.allow(true);
    Ok(migrations)
}

fn page() -> Result<PageList> {
    super::pages::block(0)
}

/// Migrates the page on `old` to `new`.
fn replace(migrations: &PendingMigrations, old: &PageList, new: u64) -> Result {
    migrations.replace(&OldPage::first_of(old).ok_or(EINVAL)?, new, true)
}

fn pfn(page: &PageList) -> u64 {
    page.pfns().next().unwrap_or(0)
}

#[kunit_tests(virtio_balloon_rs_migration)]
mod tests {
    use super::*;

    #[test]
    fn no_page_is_migrated_unless_that_is_allowed() {
        let (migrations, page) = (migrations(), page());
        assert!(migrations.is_ok() && page.is_ok());
        let (Ok(migrations), Ok(page)) = (migrations, page) else {
            return;
        };

        migrations.allow(false);
        assert_eq!(replace(&migrations, &page, ELSEWHERE), Err(EAGAIN));

        migrations.allow(true);
        let guard = migrations.block();
        assert_eq!(replace(&migrations, &page, ELSEWHERE), Err(EAGAIN));
        assert!(migrations.is_settled());

        drop(guard);
        assert_eq!(replace(&migrations, &page, ELSEWHERE), Ok(()));
        assert!(!migrations.is_settled());
    }

    #[test]
    fn a_balloon_that_has_ended_keeps_no_workqueue() -> Result {
        let name = c"virtio_balloon_rs_kunit-end";
        let tasks = TaskQueue::new(name)?;
        let slot: Slot<Balloon> = new_slot!(c"virtio_balloon_rs_kunit", tasks)?;
        let migrations = KBox::pin_init(PendingMigrations::new(slot.waker(), TERMS)?, GFP_KERNEL)?;
        drop((tasks, slot));

        migrations.end();
        // Page migration may still hold pages when the driver is bound to the device again.
        assert!(TaskQueue::new(name).is_ok());
        Ok(())
    }

    #[test]
    fn a_page_that_the_device_does_not_know_stays() {
        let (migrations, first, second) = (migrations(), page(), page());
        assert!(migrations.is_ok() && first.is_ok() && second.is_ok());
        let (Ok(migrations), Ok(first), Ok(second)) = (migrations, first, second) else {
            return;
        };

        // The second page replaces the first one, and is to leave at once.
        assert_eq!(replace(&migrations, &first, pfn(&second)), Ok(()));
        assert_eq!(replace(&migrations, &second, ELSEWHERE), Err(EAGAIN));
    }

    #[test]
    fn only_what_the_device_knows_leaves_the_balloon() -> Result {
        let (migrations, first, mut second, mut others) =
            (migrations()?, page()?, page()?, page()?);
        let (known, unknown) = (pfn(&others), pfn(&second));

        assert_eq!(replace(&migrations, &first, unknown), Ok(()));
        second.move_base_pages(&mut others, |_| true);
        assert_eq!(others.len(), 2);

        let mut aside = PageList::new();
        migrations
            .block()
            .split_off_unacknowledged(&mut others, &mut aside);
        assert!(others.pfns().eq([known]));
        assert!(aside.pfns().eq([unknown]));
        Ok(())
    }

    #[test]
    fn a_page_does_not_come_back_before_the_device_knows_that_it_has_left() {
        let (migrations, first, second) = (migrations(), page(), page());
        assert!(migrations.is_ok() && first.is_ok() && second.is_ok());
        let (Ok(migrations), Ok(first), Ok(second)) = (migrations, first, second) else {
            return;
        };

        assert_eq!(replace(&migrations, &first, ELSEWHERE), Ok(()));
        assert_eq!(replace(&migrations, &second, pfn(&first)), Err(EAGAIN));
    }

    #[test]
    fn a_page_without_a_number_stays_out() {
        let (migrations, page) = (migrations(), page());
        assert!(migrations.is_ok() && page.is_ok());
        let (Ok(migrations), Ok(page)) = (migrations, page) else {
            return;
        };

        assert_eq!(replace(&migrations, &page, u64::MAX), Err(EOVERFLOW));
        assert!(migrations.is_settled());
    }

    #[test]
    fn no_more_pages_are_migrated_than_fit_into_a_message() {
        let migrations = migrations();
        assert!(migrations.is_ok());
        let Ok(migrations) = migrations else { return };

        for n in 0..MIGRATIONS_PER_MESSAGE as u64 + 1 {
            let page = page();
            assert!(page.is_ok());
            let Ok(page) = page else { return };
            let expected = if n < MIGRATIONS_PER_MESSAGE as u64 {
                Ok(())
            } else {
                Err(EAGAIN)
            };

            assert_eq!(replace(&migrations, &page, ELSEWHERE + n), expected);
        }
    }

    #[test]
    fn one_message_lists_all_migrations_in_each_encoding() -> Result {
        // So far apart that a bitmap has room for two of them.
        const STEP: usize = page_sets::WORDS_PER_MESSAGE * u64::BITS as usize / 2;
        let mut pages = KVec::new();
        for n in 0..MIGRATIONS_PER_MESSAGE {
            pages.push(
                PfnRange::new((n * STEP) as u64, 1).ok_or(EINVAL)?,
                GFP_KERNEL,
            )?;
        }

        let alone = Encoding::ALL.map(Encodings::only);
        for allowed in Iterator::chain([Encodings::ALL].into_iter(), alone) {
            let mut message = KVec::with_capacity(page_sets::WORDS_PER_MESSAGE, GFP_KERNEL)?;
            let mut migrations = Sorted::new(&pages);

            let listed =
                page_sets::write(&mut message, page_set::INFLATE, 0, allowed, &mut migrations);
            assert_eq!(listed, Ok(MIGRATIONS_PER_MESSAGE as u64));
        }
        Ok(())
    }
}
