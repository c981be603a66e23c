// SPDX-License-Identifier: GPL-2.0
#include "helpers.h"

#include <linux/crash_dump.h>
#include <linux/debugfs.h>
#include <linux/fs.h>
#include <linux/fs_struct.h>
#include <linux/kthread.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/pageblock-flags.h>
#include <linux/poison.h>
#include <linux/sched/signal.h>
#include <linux/sched/task.h>
#include <linux/scatterlist.h>
#include <linux/seq_file.h>
#include <linux/suspend.h>
#include <linux/swap.h>
#include <linux/virtio_config.h>
#include <linux/vmstat.h>

#ifndef CONFIG_64BIT
#error "The driver divides 64-bit numbers, and keeps lists in pages that are always mapped: it needs CONFIG_64BIT"
#endif

void balloon_rs_devinfo_init(struct balloon_dev_info *info)
{
	balloon_devinfo_init(info);
}

unsigned long balloon_rs_page_to_pfn(struct page *page)
{
	return page_to_pfn(page);
}

void *balloon_rs_page_address(struct page *page)
{
	return page_address(page);
}

void *balloon_rs_phys_to_virt(phys_addr_t address)
{
	return phys_to_virt(address);
}

int balloon_rs_page_to_nid(struct page *page)
{
	return page_to_nid(page);
}

/*
 * The private field of a page that is marked as offline, or 0. Such a page keeps it for as long as
 * its owner holds the owner's lock; for a page of others the value is a guess.
 */
unsigned long balloon_rs_offline_private(unsigned long pfn)
{
	struct page *page = pfn_to_online_page(pfn);

	return page && PageOffline(page) ? data_race(page_private(page)) : 0;
}

/* The number of a node that has memory, or -1. */
int balloon_rs_nth_node(unsigned long n)
{
	int node;

	for_each_node_state(node, N_MEMORY) {
		if (!n--)
			return node;
	}
	return -1;
}

/* All nodes have smaller numbers. */
unsigned int balloon_rs_node_ids(void)
{
	return nr_node_ids;
}

unsigned long balloon_rs_node_start(int node)
{
	return node_start_pfn(node);
}

unsigned long balloon_rs_node_end(int node)
{
	return node_end_pfn(node);
}

unsigned long balloon_rs_node_present(int node)
{
	return node_present_pages(node);
}

static unsigned long node_counter(struct pglist_data *pgdat, enum node_stat_item item)
{
	return max(atomic_long_read(&pgdat->vm_stat[item]), 0L);
}

static unsigned long file_pages(struct pglist_data *pgdat)
{
	return node_counter(pgdat, NR_ACTIVE_FILE) + node_counter(pgdat, NR_INACTIVE_FILE);
}

/*
 * How much of the node's page cache processes have mapped, at least: shared memory, which is no page
 * cache, may be mapped as well.
 */
static unsigned long mapped_file_pages(struct pglist_data *pgdat)
{
	unsigned long mapped = node_counter(pgdat, NR_FILE_MAPPED);

	mapped -= min(mapped, node_counter(pgdat, NR_SHMEM));
	return min(mapped, file_pages(pgdat));
}

/*
 * What MemAvailable would be if there were this node only, without what its zones keep back and
 * what processes have mapped.
 */
unsigned long balloon_rs_node_available(int node)
{
	struct pglist_data *pgdat = NODE_DATA(node);
	unsigned long low = 0, cache;
	long available = -(long)(pgdat->totalreserve_pages + mapped_file_pages(pgdat));
	int i;

	for (i = 0; i < MAX_NR_ZONES; i++) {
		struct zone *zone = &pgdat->node_zones[i];

		low += low_wmark_pages(zone);
		available += zone_page_state(zone, NR_FREE_PAGES);
		available -= READ_ONCE(zone->watermark_boost);
	}
	cache = file_pages(pgdat);
	available += cache - min(cache / 2, low);
	cache = node_counter(pgdat, NR_SLAB_RECLAIMABLE_B) +
		node_counter(pgdat, NR_KERNEL_MISC_RECLAIMABLE);
	available += cache - min(cache / 2, low);
	return max(available, 0L);
}

/* Whether an allocation that the page allocator insists on may have failed in the zone. */
static bool zone_is_short(struct zone *zone)
{
	unsigned long kept = 2 * high_wmark_pages(zone) + zone->lowmem_reserve[MAX_NR_ZONES - 1] +
			     data_race(zone->nr_free_highatomic) +
			     zone_page_state(zone, NR_FREE_CMA_PAGES);
	int order;

	/* The limit is the high watermark. Some memory may have become free since. */
	if (zone_page_state(zone, NR_FREE_PAGES) <= kept)
		return true;

	for (order = PAGE_ALLOC_COSTLY_ORDER; order < NR_PAGE_ORDERS; order++) {
		if (data_race(zone->free_area[order].nr_free))
			return false;
	}
	return true;
}

/*
 * Whether the kernel may have run out of memory for lack of it on this node: if it has nothing in
 * any of the node's zones. Not every allocation may take from ZONE_MOVABLE.
 */
bool balloon_rs_node_is_short(int node)
{
	int i;

	for (i = 0; i < MAX_NR_ZONES; i++) {
		struct zone *zone = &NODE_DATA(node)->node_zones[i];

		if (populated_zone(zone) && i != ZONE_MOVABLE && !zone_is_short(zone))
			return false;
	}
	return true;
}

/* From this node and no other one, unless it is NUMA_NO_NODE. */
static gfp_t gfp_of(int node, gfp_t gfp)
{
	return node == NUMA_NO_NODE ? gfp : gfp | __GFP_THISNODE;
}

struct page *balloon_rs_alloc_block(int node, gfp_t gfp, unsigned int order)
{
	return alloc_pages_node(node, gfp_of(node, gfp), order);
}

unsigned long balloon_rs_alloc_pages_bulk(int node, gfp_t gfp, int nr, struct page **pages)
{
	return alloc_pages_bulk_node(gfp_of(node, gfp), node, nr, pages);
}

bool balloon_rs_same_zone(struct page *a, struct page *b)
{
	return page_zone(a) == page_zone(b);
}

/* Whether the @nr pages from @pfn on are memory that is online, all in one zone. For tests. */
bool balloon_rs_is_in_one_zone(unsigned long pfn, unsigned long nr)
{
	struct page *first = pfn_to_online_page(pfn);
	unsigned long i;

	for (i = 0; i < nr; i++) {
		struct page *page = pfn_to_online_page(pfn + i);

		if (!page || page_zone(page) != page_zone(first))
			return false;
	}
	return nr;
}

void balloon_rs_get_page(struct page *page)
{
	get_page(page);
}

void balloon_rs_put_page(struct page *page)
{
	put_page(page);
}

/* For a block whose order balloon_rs_take_order() returns. */
void balloon_rs_set_order(struct page *page, unsigned int order)
{
	set_page_private(page, order);
}

/* Takes the note of a block's order back. */
unsigned int balloon_rs_take_order(struct page *page)
{
	unsigned int order = page_private(page);

	set_page_private(page, 0);
	return order;
}

/* Marks the block for everybody who looks at pages, and notes its order. */
void balloon_rs_mark_block(struct page *page, unsigned int order)
{
	unsigned long i;

	set_page_private(page, order);
	for (i = 0; i < 1UL << order; i++)
		__SetPageOffline(page + i);
}

/* Takes the marks off, as the page allocator wants it, and returns the order. */
unsigned int balloon_rs_unmark_block(struct page *page)
{
	unsigned int order = page_private(page);
	unsigned long i;

	set_page_private(page, 0);
	for (i = 0; i < 1UL << order; i++)
		__ClearPageOffline(page + i);
	return order;
}

/*
 * Makes pages of order 0 of a block that is not marked. What was in their private fields is the
 * past's.
 */
void balloon_rs_split_block(struct page *page, unsigned int order)
{
	unsigned long i;

	split_page(page, order);
	for (i = 0; i < 1UL << order; i++)
		set_page_private(page + i, 0);
}

/* What mm/balloon.c does for single pages. */
void balloon_rs_account_block(struct page *page, bool inflated, bool adjust_managed)
{
	long pages = 1L << page_private(page);

	count_vm_events(inflated ? BALLOON_INFLATE : BALLOON_DEFLATE, pages);
	if (!inflated)
		pages = -pages;
	if (adjust_managed)
		adjust_managed_page_count(page, -pages);
	mod_node_page_state(page_pgdat(page), NR_BALLOON_PAGES, pages);
}

struct page *balloon_rs_pfn_to_page(unsigned long pfn)
{
	return pfn_to_page(pfn);
}

/*
 * Frees @nr pages of order 0, from @pfn on. free_contig_range() is not there in every
 * configuration, and its pages have to be of one zone.
 */
void balloon_rs_free_range(unsigned long pfn, unsigned long nr)
{
	if (!nr)
		return;

#ifdef CONFIG_CONTIG_ALLOC
	if (page_zone(pfn_to_page(pfn)) == page_zone(pfn_to_page(pfn + nr - 1))) {
		free_contig_range(pfn, nr);
		return;
	}
#endif
	for (; nr; pfn++, nr--)
		__free_page(pfn_to_page(pfn));
}

/*
 * Frees a block that is not marked. The page allocator keeps a page with a memory error to itself only
 * if the page is freed alone.
 */
void balloon_rs_free_block(struct page *page, unsigned int order)
{
	unsigned long i;

	for (i = 0; i < 1UL << order; i++) {
		if (PageHWPoison(page + i)) {
			balloon_rs_split_block(page, order);
			balloon_rs_free_range(page_to_pfn(page), 1UL << order);
			return;
		}
	}
	__free_pages(page, order);
}

#ifdef CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST
/* Marks the page as one with a memory error. Returns whether it is one. */
bool balloon_rs_set_error(unsigned long pfn)
{
	SetPageHWPoison(pfn_to_page(pfn));
	return PageHWPoison(pfn_to_page(pfn));
}

/* Mends a page with a memory error. Returns whether the kernel kept it aside when it was freed. */
bool balloon_rs_mend(unsigned long pfn)
{
	struct page *page = pfn_to_page(pfn);
	bool is_aside = !page_count(page) && !is_free_buddy_page(page);

	ClearPageHWPoison(page);
	if (is_aside) {
		init_page_count(page);
		__free_page(page);
	}
	return is_aside;
}
#endif

/*
 * The order of the block that begins at @pfn and is on one of the zone's free lists. Else
 * BALLOON_IN_USE, or BALLOON_NOT_HERE if the section of memory around it is not the zone's. Under
 * the zone's lock.
 */
int balloon_rs_free_order(struct zone *zone, unsigned long pfn)
{
	struct page *page = pfn_to_online_page(pfn);

	if (!page)
		return BALLOON_NOT_HERE;
	return PageBuddy(page) && page_zone(page) == zone ? (int)page_private(page) : BALLOON_IN_USE;
}

#ifdef CONFIG_CONTIG_ALLOC
/*
 * How many pages from @pfn on, but at most @nr, are in page blocks that are unused just now, and in
 * one zone. Looks once at each page block.
 */
static unsigned long free_at(unsigned long pfn, unsigned long nr)
{
	struct page *page = pfn_to_online_page(pfn);
	unsigned long flags, found = 0;
	struct zone *zone;

	if (!page)
		return 0;
	zone = page_zone(page);
	spin_lock_irqsave(&zone->lock, flags);
	while (found < nr) {
		int order = balloon_rs_free_order(zone, pfn + found);

		if (order < (int)pageblock_order)
			break;
		found += 1UL << order;
	}
	spin_unlock_irqrestore(&zone->lock, flags);
	return min(found, nr);
}
#endif

#ifdef CONFIG_CONTIG_ALLOC
/*
 * Allocates the pages from @pfn on, which are moved elsewhere if they are in use. One at a time: of
 * two callers in the same page block the one that fails ends the isolation of the other, too, which
 * is a BUG() with CONFIG_DEBUG_VM and a failure without. The other one may also be somebody who
 * takes memory offline: free pages that are isolated for that look like others, and whoever waits
 * for them to be would wait without end.
 */
static int alloc_range(unsigned long pfn, unsigned long nr)
{
	static DEFINE_MUTEX(lock);
	int ret;

	guard(mutex)(&lock);
	/* Without the zone's lock: what it would say may be over just as soon. */
	if (data_race(page_zone(pfn_to_page(pfn))->nr_isolate_pageblock))
		return -EBUSY;
	if (!balloon_rs_try_begin_isolating())
		return -EBUSY;
	ret = alloc_contig_range(pfn, pfn + nr, ACR_FLAGS_NONE, __GFP_NOWARN);
	balloon_rs_end_isolating();
	return ret;
}
#endif

/*
 * Takes pages from @pfn on out of the page allocator, each as one of order 0: at most @nr, and not
 * those from the first on that is in use. Returns how many. They are marked: memory does not go
 * offline under them, and nobody looks at what is in them. Being freed takes the marks off.
 */
unsigned long balloon_rs_claim_range(unsigned long pfn, unsigned long nr)
{
#ifdef CONFIG_CONTIG_ALLOC
	unsigned long i;

	/* One block that cannot be had, as those of CMA, spoils all. */
	for (nr = round_down(free_at(pfn, nr), pageblock_nr_pages); nr;
	     nr = round_down(nr / 2, pageblock_nr_pages)) {
		if (!alloc_range(pfn, nr))
			break;
	}
	for (i = 0; i < nr; i++)
		__SetPageOffline(pfn_to_page(pfn + i));
	return nr;
#else
	return 0;
#endif
}

/* Threads of the kernel do not see the files that processes see. */
struct file *balloon_rs_open_as_init(const char *path, int flags)
{
	scoped_with_init_fs()
		return filp_open(path, flags, 0);
}

/* This module may be unloaded as soon as it is put: the rest is the kernel's code. */
static int run_thread(void *data)
{
	struct balloon_rs_thread_start *start = data;

	allow_signal(SIGKILL);
	start->run(start);
	module_put_and_kthread_exit(0);
}

/* Starts a thread that holds a reference to this module. Returns it with a reference, or an error. */
struct task_struct *balloon_rs_start_thread(const char *name,
					    struct balloon_rs_thread_start *start)
{
	struct task_struct *thread;

	if (!try_module_get(THIS_MODULE))
		return ERR_PTR(-ENODEV);
	thread = kthread_create(run_thread, start, "%s", name);
	if (IS_ERR(thread)) {
		module_put(THIS_MODULE);
		return thread;
	}
	get_task_struct(thread);
	wake_up_process(thread);
	return thread;
}

/* How many there are to this module, for tests. */
int balloon_rs_module_references(void)
{
#if defined(MODULE) && defined(CONFIG_MODULE_UNLOAD)
	return module_refcount(THIS_MODULE);
#else
	return 0;
#endif
}

/* The zones that have memory, of all nodes. */
struct zone *balloon_rs_nth_zone(unsigned long n)
{
	int node, i;

	for_each_online_node(node) {
		for (i = 0; i < MAX_NR_ZONES; i++) {
			struct zone *zone = &NODE_DATA(node)->node_zones[i];

			if (populated_zone(zone) && !n--)
				return zone;
		}
	}
	return NULL;
}

unsigned long balloon_rs_lock_zone(struct zone *zone)
{
	unsigned long flags;

	spin_lock_irqsave(&zone->lock, flags);
	return flags;
}

void balloon_rs_unlock_zone(struct zone *zone, unsigned long flags)
{
	spin_unlock_irqrestore(&zone->lock, flags);
}

#ifdef CONFIG_CONTIG_ALLOC
/*
 * Drains the zone that @gfp asks for first, by allocating a free block in it. Returns whether there
 * was one for that.
 */
static bool drain_zone(int node, gfp_t gfp, unsigned int order)
{
	struct zone *zone = &NODE_DATA(node)->node_zones[gfp_zone(gfp)];
	struct page *page = alloc_pages_node(node, gfp, order);
	unsigned long pfn;
	bool is_it;

	if (!page)
		return false;
	pfn = page_to_pfn(page);
	is_it = page_zone(page) == zone || !populated_zone(zone);
	balloon_rs_free_block(page, order);

	/* Whoever was faster has it; it is drained for nevertheless, or only another time. */
	if (!is_it || alloc_range(pfn, 1UL << order))
		return false;
	free_contig_range(pfn, 1UL << order);
	return true;
}
#endif

/*
 * Puts the free pages that the CPUs keep on lists of their own back to where blocks are made of
 * them. The call for it is the page allocator's own. But to allocate a given range is to begin with
 * that, in the range's zone; so a free page block of each zone is such a range: if possible not one
 * for movable pages, as most that were just freed are. Page blocks may be so large that none is
 * free: then it is as much as can be had of one in which the kernel can move what is in use.
 * Without CONFIG_CONTIG_ALLOC the pages stay where they are.
 */
void balloon_rs_drain_free_lists(void)
{
#ifdef CONFIG_CONTIG_ALLOC
	static const gfp_t zones[] = { 0, __GFP_DMA32 };
	int node, i;

	for_each_online_node(node) {
		for (i = 0; i < ARRAY_SIZE(zones); i++) {
			gfp_t gfp = zones[i] | __GFP_NORETRY | __GFP_NOWARN | __GFP_NOMEMALLOC |
				    __GFP_THISNODE;
			unsigned int order = pageblock_order;

			if (drain_zone(node, gfp, order))
				continue;
			while (!drain_zone(node, gfp | __GFP_MOVABLE, order) && order)
				order--;
		}
	}
#endif
}

/*
 * How many free pages the CPUs keep on lists of their own. The counters are read without their
 * locks: the result is a guess in any case.
 */
unsigned long balloon_rs_listed_pages(void)
{
	unsigned long n, pages = 0;
	struct zone *zone;
	int cpu;

	for (n = 0; (zone = balloon_rs_nth_zone(n)); n++) {
		for_each_online_cpu(cpu)
			pages += data_race(per_cpu_ptr(zone->per_cpu_pageset, cpu)->count);
	}
	return pages;
}

/* Held by who takes what the guest can spare, of all devices. */
static DEFINE_MUTEX(spare_lock);

void balloon_rs_lock_spare(void)
{
	mutex_lock(&spare_lock);
}

void balloon_rs_unlock_spare(void)
{
	mutex_unlock(&spare_lock);
}

int balloon_rs_register_memory_notifier(struct notifier_block *block)
{
	return register_memory_notifier(block);
}

void balloon_rs_unregister_memory_notifier(struct notifier_block *block)
{
	unregister_memory_notifier(block);
}

int balloon_rs_register_pm_notifier(struct notifier_block *block)
{
	return register_pm_notifier(block);
}

void balloon_rs_unregister_pm_notifier(struct notifier_block *block)
{
	unregister_pm_notifier(block);
}

unsigned int balloon_rs_page_block_order(void)
{
	return pageblock_order;
}

void balloon_rs_account_reclaimed(unsigned long pages)
{
	mm_account_reclaimed_pages(pages);
}

static u64 pages_to_bytes(unsigned long pages)
{
	return (u64)pages << PAGE_SHIFT;
}

#ifdef CONFIG_VM_EVENT_COUNTERS
static void events_info(struct balloon_rs_memory *info)
{
	unsigned long events[NR_VM_EVENT_ITEMS];
	int zone;

	all_vm_events(events);

	info->has_events = true;
	info->swapped_in = pages_to_bytes(events[PSWPIN]);
	info->swapped_out = pages_to_bytes(events[PSWPOUT]);
	info->major_faults = events[PGMAJFAULT];
	info->faults = events[PGFAULT];
	info->oom_kills = events[OOM_KILL];

	/* One event for each zone, and the zones depend on the configuration. */
	for (zone = 0; zone < MAX_NR_ZONES; zone++)
		info->allocation_stalls += events[ALLOCSTALL_NORMAL - ZONE_NORMAL + zone];

#ifdef CONFIG_HUGETLB_PAGE
	info->has_hugetlb = true;
	info->hugetlb_allocations = events[HTLB_BUDDY_PGALLOC];
	info->hugetlb_failures = events[HTLB_BUDDY_PGALLOC_FAIL];
#endif
}
#else
static void events_info(struct balloon_rs_memory *info)
{
}
#endif

/* Fills in @info, which has to be zeroes. Which events there are depends on the configuration. */
void balloon_rs_memory_info(struct balloon_rs_memory *info)
{
	struct sysinfo i;

	si_meminfo(&i);
	info->free = pages_to_bytes(i.freeram);
	info->total = pages_to_bytes(i.totalram);
	info->available = pages_to_bytes(si_mem_available());
	info->caches = pages_to_bytes(global_node_page_state(NR_FILE_PAGES));
	info->async_scanned = pages_to_bytes(global_node_page_state(PGSCAN_KSWAPD));
	info->direct_scanned = pages_to_bytes(global_node_page_state(PGSCAN_DIRECT));
	info->async_reclaimed = pages_to_bytes(global_node_page_state(PGSTEAL_KSWAPD));
	info->direct_reclaimed = pages_to_bytes(global_node_page_state(PGSTEAL_DIRECT));
	events_info(info);
}

/*
 * What the zones keep back for a while, beside what they always do, when memory of one kind was
 * taken for another.
 */
unsigned long balloon_rs_boosted_pages(void)
{
	unsigned long n, pages = 0;
	struct zone *zone;

	for (n = 0; (zone = balloon_rs_nth_zone(n)); n++)
		pages += READ_ONCE(zone->watermark_boost);
	return pages;
}

unsigned long balloon_rs_free_pages(void)
{
	return global_zone_page_state(NR_FREE_PAGES);
}

/* What is free, or has files in it, where only pages may be that can be moved: not all files of CMA. */
void balloon_rs_movable_pages(unsigned long *free, unsigned long *caches)
{
	struct zone *zone;
	unsigned long n;

	*free = 0;
	*caches = 0;
	for (n = 0; (zone = balloon_rs_nth_zone(n)); n++) {
		if (zone_idx(zone) != ZONE_MOVABLE) {
			*free += zone_page_state(zone, NR_FREE_CMA_PAGES);
			continue;
		}
		*free += zone_page_state(zone, NR_FREE_PAGES);
		*caches += zone_page_state(zone, NR_ZONE_ACTIVE_FILE) +
			   zone_page_state(zone, NR_ZONE_INACTIVE_FILE);
	}
}

/* How much of the page cache processes have mapped, at least. */
unsigned long balloon_rs_mapped_file_pages(void)
{
	unsigned long pages = 0;
	int node;

	for_each_node_state(node, N_MEMORY)
		pages += mapped_file_pages(NODE_DATA(node));
	return pages;
}

/* The guest's memory, whether or not it is in a balloon. */
unsigned long balloon_rs_present_pages(void)
{
	unsigned long n, pages = 0;
	struct zone *zone;

	for (n = 0; (zone = balloon_rs_nth_zone(n)); n++)
		pages += READ_ONCE(zone->present_pages);
	return pages;
}

unsigned long balloon_rs_total_pages(void)
{
	return totalram_pages();
}

/*
 * The counters of the CPUs are added up, so that tests can rely on the number. Some of them may be
 * negative.
 */
unsigned long balloon_rs_ballooned_pages(void)
{
	long pages = atomic_long_read(&vm_node_stat[NR_BALLOON_PAGES]);
	int node, cpu;

	for_each_online_node(node)
		for_each_online_cpu(cpu)
			pages += per_cpu_ptr(NODE_DATA(node)->per_cpu_nodestats, cpu)
					->vm_node_stat_diff[NR_BALLOON_PAGES];

	return max(pages, 0L);
}

/* Whether this kernel was started to save the memory of one that has panicked. */
bool balloon_rs_is_crash_kernel(void)
{
	return is_kdump_kernel();
}

/* Whether the kernel writes to all memory that it allocates. */
bool balloon_rs_zeroes_on_alloc(void)
{
	return want_init_on_alloc(0);
}

bool balloon_rs_free_page_value(u32 *value)
{
	memset(value, want_init_on_free() ? 0 : PAGE_POISON, sizeof(*value));
	return want_init_on_free() || page_poisoning_enabled_static();
}

bool balloon_rs_sg_is_movable(struct scatterlist *sg)
{
	return is_zone_movable_page(sg_page(sg));
}

void rust_helper_virtio_device_ready(struct virtio_device *vdev)
{
	virtio_device_ready(vdev);
}

struct dentry *balloon_rs_create_dir(const char *name)
{
	return debugfs_create_dir(name, NULL);
}

static int balloon_rs_shown_show(struct seq_file *m, void *unused)
{
	struct balloon_rs_shown *shown = m->private;

	shown->show(m, shown);
	return 0;
}
DEFINE_SHOW_ATTRIBUTE(balloon_rs_shown);

struct dentry *balloon_rs_create_shown(const char *name, struct dentry *dir,
				       struct balloon_rs_shown *shown)
{
	return debugfs_create_file(name, 0400, dir, shown, &balloon_rs_shown_fops);
}

void balloon_rs_remove_shown(struct dentry *dentry)
{
	debugfs_remove(dentry);
}
