// SPDX-License-Identifier: GPL-2.0
/*
 * Memory blocks: the pieces of memory that the kernel takes offline and online. Memory that comes
 * online goes to a callback instead of the page allocator, if there is one. So a block that goes
 * offline and online again is memory that the page allocator has not zeroed.
 */
#include "helpers.h"

#include <linux/fs.h>
#include <linux/memory_hotplug.h>
#include <linux/mutex.h>
#include <linux/pageblock-flags.h>
#include <linux/sched/signal.h>
#include <linux/timer.h>
#include <linux/virtio_ids.h>

#ifdef CONFIG_MEMORY_HOTREMOVE
/* Held by the thread that takes a block, of all devices. */
static DEFINE_MUTEX(taking_lock);
static struct task_struct *taking;

/* The pages that do not go to the page allocator when they come online, and those that have come. */
static DEFINE_SPINLOCK(kept_lock);
static unsigned long kept_first, kept_nr;
static LIST_HEAD(kept);

/* Begins to take blocks. Other threads wait until balloon_rs_end_taking(). */
void balloon_rs_begin_taking(void)
{
	mutex_lock(&taking_lock);
	WRITE_ONCE(taking, current);
}

void balloon_rs_end_taking(void)
{
	WRITE_ONCE(taking, NULL);
	mutex_unlock(&taking_lock);
}

/*
 * Begins to isolate page blocks, as taking a block does: if two do that at once, the one that fails
 * ends the isolation of the other. Does not wait: who takes a block may wait for the caller's locks.
 */
bool balloon_rs_try_begin_isolating(void)
{
	return mutex_trylock(&taking_lock);
}

void balloon_rs_end_isolating(void)
{
	mutex_unlock(&taking_lock);
}

/* Whether the caller is called by a thread that takes a block. */
bool balloon_rs_is_taking(void)
{
	return READ_ONCE(taking) == current;
}

/* How many pages a memory block has: none where the kernel takes no memory offline. */
unsigned long balloon_rs_memory_block_pages(void)
{
	return memory_block_size_bytes() >> PAGE_SHIFT;
}

#ifdef CONFIG_KASAN_GENERIC
/* From mm/kasan/kasan.h. 0 says that memory may be accessed. */
void kasan_poison(const void *addr, size_t size, u8 value, bool init);

static void allow_access(struct page *page, unsigned int order)
{
	kasan_poison(page_address(page), PAGE_SIZE << order, 0, false);
}
#else
static void allow_access(struct page *page, unsigned int order)
{
}
#endif

/*
 * Makes a block of the pages, as if it were allocated and balloon_rs_mark_block() had marked it.
 * All pages have a reference, are marked, and are not managed when they come here.
 */
static void keep_page(struct page *page, unsigned int order)
{
	bool is_kept;
	unsigned long i;

	/* A user may bring the block online as movable memory. Pages of the balloon are not movable. */
	scoped_guard(spinlock, &kept_lock)
		is_kept = page_to_pfn(page) - kept_first < kept_nr &&
			  page_zonenum(page) != ZONE_MOVABLE;
	if (!is_kept) {
		generic_online_page(page, order);
		return;
	}
	for (i = 1; i < 1UL << order; i++)
		set_page_count(page + i, 0);
	set_page_private(page, order);
	allow_access(page, order);
	adjust_managed_page_count(page, 1L << order);
	scoped_guard(spinlock, &kept_lock)
		list_add_tail(&page->lru, &kept);
}

/*
 * Keeps the pages that come online from now on, of the @nr from @first on. Fails if another
 * driver keeps pages.
 */
int balloon_rs_keep_online(unsigned long first, unsigned long nr)
{
	scoped_guard(spinlock, &kept_lock) {
		kept_first = first;
		kept_nr = nr;
	}
	return set_online_page_callback(keep_page);
}

/* Takes the last call back. */
void balloon_rs_keep_no_more(void)
{
	restore_online_page_callback(keep_page);
}

/* The first page of the next block that was kept, or NULL. */
struct page *balloon_rs_next_kept(void)
{
	struct page *page;

	guard(spinlock)(&kept_lock);
	page = list_first_entry_or_null(&kept, struct page, lru);
	if (page)
		list_del(&page->lru);
	return page;
}

/* Whether memory may come online in the zone that it is in, which depends on where that lies. */
static bool comes_back(struct zone *zone, unsigned long first, unsigned long nr)
{
	if (zone_idx(zone) == ZONE_MOVABLE)
		return false;
	return zone_idx(zone) == ZONE_NORMAL ||
	       (READ_ONCE(zone->zone_start_pfn) < first && first + nr < zone_end_pfn(zone));
}

/* Whether the kernel can move the page without waiting for a disk or a server. */
static bool can_be_moved(struct page *page)
{
	return PageLRU(page) && !PageLocked(page) && !PageWriteback(page) &&
	       (PageAnon(page) || !PageDirty(page));
}

/*
 * Whether the memory block of @nr pages from @first on can be taken: its pages are of one zone in
 * which they also come online, and free, or such that the kernel can move them. With a memory error
 * it would not come online again. Without a lock: it may be over just as soon, and then the kernel
 * does not take it offline.
 */
bool balloon_rs_can_take_block(unsigned long first, unsigned long nr)
{
	struct page *page = pfn_to_online_page(first);
	unsigned long pfn, end = first + nr;
	struct zone *zone;

	if (!page)
		return false;
	/* That kernel refuses, and logs each attempt. */
	if (IS_ENABLED(CONFIG_ARM64) && early_section(__pfn_to_section(first)))
		return false;
	zone = page_zone(page);
	if (!comes_back(zone, first, nr))
		return false;

	for (pfn = first; pfn < end; pfn++) {
		page = pfn_to_online_page(pfn);
		if (!page || page_zone(page) != zone)
			return false;
		if (PageBuddy(page)) {
			unsigned long order = READ_ONCE(page->private);

			if (order <= MAX_PAGE_ORDER)
				pfn += (1UL << order) - 1;
		} else if (page_has_type(page) || PageReserved(page) || PageHWPoison(page) ||
			   (page_count(page) && !can_be_moved(page))) {
			return false;
		}
	}
	return true;
}

struct deadline {
	struct timer_list timer;
	struct task_struct *task;
};

static void end_patience(struct timer_list *timer)
{
	send_sig(SIGINT, container_of(timer, struct deadline, timer)->task, 1);
}

/*
 * Writes to a file of a memory block. The kernel tries to take it offline until a signal comes,
 * which is after @ms milliseconds. It also makes one pending when others take memory offline or
 * online, and returns -ERESTARTNOINTR then.
 */
ssize_t balloon_rs_write_within(struct file *file, const char *what, size_t len, unsigned int ms)
{
	struct deadline deadline = { .task = current };
	ssize_t ret;

	allow_signal(SIGINT);
	timer_setup_on_stack(&deadline.timer, end_patience, 0);
	mod_timer(&deadline.timer, jiffies + msecs_to_jiffies(ms));
	ret = kernel_write(file, what, len, NULL);
	timer_delete_sync(&deadline.timer);
	timer_destroy_on_stack(&deadline.timer);
	disallow_signal(SIGINT);
	flush_signals(current);
	return ret;
}

static int is_virtio_mem(struct device *dev, void *unused)
{
	return dev_to_virtio(dev)->id.device == VIRTIO_ID_MEM;
}

/* Whether there is a device whose driver keeps the pages that come online. */
bool balloon_rs_has_virtio_mem(struct virtio_device *vdev)
{
	return bus_for_each_dev(vdev->dev.bus, NULL, NULL, is_virtio_mem);
}
#else
void balloon_rs_begin_taking(void)
{
}

void balloon_rs_end_taking(void)
{
}

bool balloon_rs_try_begin_isolating(void)
{
	return true;
}

void balloon_rs_end_isolating(void)
{
}

bool balloon_rs_is_taking(void)
{
	return false;
}

unsigned long balloon_rs_memory_block_pages(void)
{
	return 0;
}

int balloon_rs_keep_online(unsigned long first, unsigned long nr)
{
	return -EOPNOTSUPP;
}

void balloon_rs_keep_no_more(void)
{
}

struct page *balloon_rs_next_kept(void)
{
	return NULL;
}

bool balloon_rs_can_take_block(unsigned long first, unsigned long nr)
{
	return false;
}

ssize_t balloon_rs_write_within(struct file *file, const char *what, size_t len, unsigned int ms)
{
	return -EOPNOTSUPP;
}

bool balloon_rs_has_virtio_mem(struct virtio_device *vdev)
{
	return false;
}
#endif
