// SPDX-License-Identifier: GPL-2.0
/*
 * C that Rust cannot call: static inline functions and macros, two loops over struct pages, and a
 * callback. As in the kernel's rust/helpers/, the bindings have them without the prefix. bindgen
 * reads this file, too.
 */
#include <linux/balloon.h>
#include <linux/crash_dump.h>
#include <linux/fs.h>
#include <linux/fs_struct.h>
#include <linux/gfp.h>
#include <linux/memory.h>
#include <linux/mm.h>
#include <linux/pageblock-flags.h>
#include <linux/poison.h>
#include <linux/suspend.h>
#include <linux/swap.h>
#include <linux/virtio_config.h>
#include <linux/vmstat.h>

#ifndef CONFIG_64BIT
#error "The driver divides 64-bit numbers, and keeps lists in pages that are always mapped: it needs CONFIG_64BIT"
#endif

struct page *rust_helper_pfn_to_online_page(unsigned long pfn)
{
	return pfn_to_online_page(pfn);
}

struct page *rust_helper_pfn_to_page(unsigned long pfn)
{
	return pfn_to_page(pfn);
}

unsigned long rust_helper_page_to_pfn(const struct page *page)
{
	return page_to_pfn(page);
}

struct zone *rust_helper_page_zone(const struct page *page)
{
	return page_zone(page);
}

struct folio *rust_helper_page_folio(struct page *page)
{
	return page_folio(page);
}

void *rust_helper_page_address(const struct page *page)
{
	return page_address(page);
}

struct pglist_data *rust_helper_NODE_DATA(int nid)
{
	return NODE_DATA(nid);
}

void *rust_helper_per_cpu_ptr(void __percpu *ptr, int cpu)
{
	return per_cpu_ptr(ptr, cpu);
}

unsigned int rust_helper_pageblock_order(void)
{
	return pageblock_order;
}

struct page *rust_helper_alloc_pages_node(int nid, gfp_t gfp, unsigned int order)
{
	return alloc_pages_node(nid, gfp, order);
}

unsigned long rust_helper_alloc_pages_bulk_node(gfp_t gfp, int nid, unsigned long nr,
					struct page **pages)
{
	return alloc_pages_bulk_node(gfp, nid, nr, pages);
}

void rust_helper_get_page(struct page *page)
{
	get_page(page);
}

void rust_helper_put_page(struct page *page)
{
	put_page(page);
}

void rust_helper_count_vm_events(enum vm_event_item item, long delta)
{
	count_vm_events(item, delta);
}

void rust_helper_mod_node_page_state(struct pglist_data *pgdat, enum node_stat_item item,
					long delta)
{
	mod_node_page_state(pgdat, item, delta);
}

void rust_helper_mm_account_reclaimed_pages(unsigned long pages)
{
	mm_account_reclaimed_pages(pages);
}

bool rust_helper_want_init_on_alloc(gfp_t flags)
{
	return want_init_on_alloc(flags);
}

bool rust_helper_want_init_on_free(void)
{
	return want_init_on_free();
}

bool rust_helper_page_poisoning_enabled_static(void)
{
	return page_poisoning_enabled_static();
}

bool rust_helper_is_kdump_kernel(void)
{
	return is_kdump_kernel();
}

void rust_helper_virtio_device_ready(struct virtio_device *vdev)
{
	virtio_device_ready(vdev);
}

/* Loops in C, since a call for each page would double the cost. */
void rust_helper_set_pages_offline(struct page *page, unsigned int order)
{
	for (struct page *end = page + (1UL << order); page < end; page++)
		__SetPageOffline(page);
}

/*
 * The first page keeps its mark until it is freed, as the pages of the balloon core do. Returns
 * whether one of the pages has a memory error.
 */
bool rust_helper_clear_pages_offline(struct page *page, unsigned int order)
{
	struct page *end = page + (1UL << order);
	bool has_error = PageHWPoison(page);

	while (++page < end) {
		has_error |= PageHWPoison(page);
		__ClearPageOffline(page);
	}
	return has_error;
}

#ifdef CONFIG_SPARSEMEM
bool rust_helper_pfn_in_early_section(unsigned long pfn)
{
	return early_section(__pfn_to_section(pfn));
}
#endif

struct file *rust_helper_filp_open_as_init(const char *path, int flags)
{
	scoped_with_init_fs()
		return filp_open(path, flags, 0);
}

/* A balloon whose pages Rust migrates. */
struct balloon_rs_info {
	struct balloon_dev_info core;
	int (*migrate)(struct balloon_rs_info *info, struct page *new, struct page *old, int mode);
};

/*
 * The balloon core calls this by a pointer, and passes an enum. For kCFI an enum is a type of its
 * own, and in Rust it is an integer. A kernel with kCFI would not call a function in Rust.
 */
int rust_helper_migrate_balloon_page(struct balloon_dev_info *core, struct page *new,
				     struct page *old, enum migrate_mode mode)
{
	struct balloon_rs_info *info = container_of(core, struct balloon_rs_info, core);

	return info->migrate(info, new, old, mode);
}
