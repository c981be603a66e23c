/* SPDX-License-Identifier: GPL-2.0 */
/*
 * C that Rust cannot call: static inline functions and macros, and what is done between two of them
 * for each page or under one lock. Nothing else belongs here.
 */
#ifndef VIRTIO_BALLOON_RS_HELPERS_H
#define VIRTIO_BALLOON_RS_HELPERS_H

#include <linux/balloon.h>
#include <linux/gfp.h>
#include <linux/memory.h>
#include <linux/mm.h>
#include <linux/seq_file.h>
#include <linux/suspend.h>
#include <linux/virtio.h>

/* What balloon_rs_free_order() says of a page that begins no free block. */
#define BALLOON_IN_USE	(-1)
#define BALLOON_NOT_HERE	(-2)

#ifdef __BINDGEN__
#define GFP_TRY (__GFP_NORETRY | __GFP_NOWARN | __GFP_NOMEMALLOC)

/*
 * A block that stays whole cannot be moved: it must not come from CMA or ZONE_MOVABLE. It has at
 * least the size of a page block, which the page allocator hands out without raising a watermark.
 * No large block is worth reclaim.
 */
const gfp_t RUST_CONST_HELPER_GFP_WHOLE_BLOCK = (GFP_HIGHUSER | GFP_TRY) & ~__GFP_RECLAIM;

/* Single balloon pages can be moved, if the kernel is built for it. */
#ifdef CONFIG_BALLOON_MIGRATION
#define GFP_BALLOON (GFP_HIGHUSER_MOVABLE | GFP_TRY)
#else
#define GFP_BALLOON (GFP_HIGHUSER | GFP_TRY)
#endif

/* A block of at least a page block that is split into single pages. */
const gfp_t RUST_CONST_HELPER_GFP_SPLIT_BLOCK = GFP_BALLOON & ~__GFP_RECLAIM;

/*
 * The same for a smaller block. It may come from a page block of another type, for which the page
 * allocator raises a watermark. kswapd lowers it again, and may be woken for that.
 */
const gfp_t RUST_CONST_HELPER_GFP_SPLIT_SMALL_BLOCK = GFP_BALLOON & ~__GFP_DIRECT_RECLAIM;

/* One balloon page, for which some light reclaim is allowed. */
const gfp_t RUST_CONST_HELPER_GFP_BALLOON_PAGE = GFP_BALLOON;

/* A block that is hinted: free memory, and at least a page block. Nothing is reclaimed. */
const gfp_t RUST_CONST_HELPER_GFP_HINT_BLOCK = GFP_TRY;

/* Where these lie in struct page: bindgen's names for the unions around them are not stable. */
const size_t RUST_CONST_HELPER_PAGE_LRU_OFFSET = offsetof(struct page, lru);
const size_t RUST_CONST_HELPER_PAGE_PRIVATE_OFFSET = offsetof(struct page, private);

/* What is said before memory goes offline, and when it has gone or does not go. */
const unsigned long RUST_CONST_HELPER_BALLOON_MEM_GOING_OFFLINE = MEM_GOING_OFFLINE;
const unsigned long RUST_CONST_HELPER_BALLOON_MEM_OFFLINE = MEM_OFFLINE;
const unsigned long RUST_CONST_HELPER_BALLOON_MEM_CANCEL_OFFLINE = MEM_CANCEL_OFFLINE;

/* What a system says before it sleeps, and when it has slept or could not. */
const unsigned long RUST_CONST_HELPER_BALLOON_PM_HIBERNATION_PREPARE = PM_HIBERNATION_PREPARE;
const unsigned long RUST_CONST_HELPER_BALLOON_PM_SUSPEND_PREPARE = PM_SUSPEND_PREPARE;
const unsigned long RUST_CONST_HELPER_BALLOON_PM_RESTORE_PREPARE = PM_RESTORE_PREPARE;

const unsigned int RUST_CONST_HELPER_BALLOON_MAX_PAGE_ORDER = MAX_PAGE_ORDER;

/* How far it is to where memory may begin again after a hole. */
#ifdef CONFIG_SPARSEMEM
const unsigned int RUST_CONST_HELPER_BALLOON_SECTION_ORDER = PFN_SECTION_SHIFT;
#else
const unsigned int RUST_CONST_HELPER_BALLOON_SECTION_ORDER = MAX_PAGE_ORDER;
#endif

/*
 * The order from which on free pages are reported, unless the user says otherwise: 2 MiB, the size
 * of a huge page of most hosts. A page block, the kernel's own choice, is that much, or as much as
 * 512 MiB with pages of 64 KiB.
 */
const unsigned int RUST_CONST_HELPER_BALLOON_REPORTING_ORDER =
	PAGE_SHIFT >= 21 ? 0 : 21 - PAGE_SHIFT;
#endif

/*
 * The guest's memory at some moment. Amounts of memory are in bytes; the rest are counts since it
 * booted.
 */
struct balloon_rs_memory {
	u64 free;
	u64 total;
	u64 available;
	u64 caches;
	u64 swapped_in;
	u64 swapped_out;
	u64 major_faults;
	u64 faults;
	u64 hugetlb_allocations;
	u64 hugetlb_failures;
	u64 oom_kills;
	u64 allocation_stalls;
	u64 async_scanned;
	u64 direct_scanned;
	u64 async_reclaimed;
	u64 direct_reclaimed;
	/* Whether this kernel counts events, and those of huge pages. */
	bool has_events;
	bool has_hugetlb;
};

void balloon_rs_memory_info(struct balloon_rs_memory *info);
void balloon_rs_devinfo_init(struct balloon_dev_info *info);
unsigned long balloon_rs_page_to_pfn(struct page *page);
void *balloon_rs_page_address(struct page *page);
void *balloon_rs_phys_to_virt(phys_addr_t address);
void balloon_rs_set_order(struct page *page, unsigned int order);
unsigned int balloon_rs_take_order(struct page *page);
void balloon_rs_free_block(struct page *page, unsigned int order);
bool balloon_rs_set_error(unsigned long pfn);
bool balloon_rs_mend(unsigned long pfn);
void balloon_rs_mark_block(struct page *page, unsigned int order);
unsigned int balloon_rs_unmark_block(struct page *page);
void balloon_rs_split_block(struct page *page, unsigned int order);
void balloon_rs_account_block(struct page *page, bool inflated, bool adjust_managed);
struct page *balloon_rs_pfn_to_page(unsigned long pfn);
int balloon_rs_page_to_nid(struct page *page);
unsigned long balloon_rs_offline_private(unsigned long pfn);
int balloon_rs_nth_node(unsigned long n);
unsigned int balloon_rs_node_ids(void);
unsigned long balloon_rs_node_start(int node);
unsigned long balloon_rs_node_end(int node);
unsigned long balloon_rs_node_present(int node);
unsigned long balloon_rs_node_available(int node);
bool balloon_rs_node_is_short(int node);
struct page *balloon_rs_alloc_block(int node, gfp_t gfp, unsigned int order);
unsigned long balloon_rs_alloc_pages_bulk(int node, gfp_t gfp, int nr, struct page **pages);
bool balloon_rs_same_zone(struct page *a, struct page *b);
bool balloon_rs_is_in_one_zone(unsigned long pfn, unsigned long nr);
void balloon_rs_get_page(struct page *page);
void balloon_rs_put_page(struct page *page);
void balloon_rs_free_range(unsigned long pfn, unsigned long nr);
unsigned long balloon_rs_claim_range(unsigned long pfn, unsigned long nr);
struct file *balloon_rs_open_as_init(const char *path, int flags);

/* What a thread does. */
struct balloon_rs_thread_start {
	void (*run)(struct balloon_rs_thread_start *start);
};

struct task_struct *balloon_rs_start_thread(const char *name,
					    struct balloon_rs_thread_start *start);
int balloon_rs_module_references(void);
struct zone *balloon_rs_nth_zone(unsigned long n);
unsigned long balloon_rs_lock_zone(struct zone *zone);
void balloon_rs_unlock_zone(struct zone *zone, unsigned long flags);
int balloon_rs_free_order(struct zone *zone, unsigned long pfn);
void balloon_rs_drain_free_lists(void);
unsigned long balloon_rs_listed_pages(void);
void balloon_rs_lock_spare(void);
void balloon_rs_unlock_spare(void);
int balloon_rs_register_memory_notifier(struct notifier_block *block);
void balloon_rs_unregister_memory_notifier(struct notifier_block *block);
int balloon_rs_register_pm_notifier(struct notifier_block *block);
void balloon_rs_unregister_pm_notifier(struct notifier_block *block);
unsigned int balloon_rs_page_block_order(void);
void balloon_rs_account_reclaimed(unsigned long pages);
unsigned long balloon_rs_boosted_pages(void);
unsigned long balloon_rs_free_pages(void);
void balloon_rs_movable_pages(unsigned long *free, unsigned long *caches);
unsigned long balloon_rs_mapped_file_pages(void);
unsigned long balloon_rs_total_pages(void);
unsigned long balloon_rs_present_pages(void);
unsigned long balloon_rs_ballooned_pages(void);
bool balloon_rs_is_crash_kernel(void);
bool balloon_rs_zeroes_on_alloc(void);
bool balloon_rs_free_page_value(u32 *value);
bool balloon_rs_sg_is_movable(struct scatterlist *sg);
void rust_helper_virtio_device_ready(struct virtio_device *vdev);

/* In memory_blocks.c. */
void balloon_rs_begin_taking(void);
void balloon_rs_end_taking(void);
bool balloon_rs_try_begin_isolating(void);
void balloon_rs_end_isolating(void);
bool balloon_rs_is_taking(void);
unsigned long balloon_rs_memory_block_pages(void);
int balloon_rs_keep_online(unsigned long first, unsigned long nr);
void balloon_rs_keep_no_more(void);
struct page *balloon_rs_next_kept(void);
bool balloon_rs_can_take_block(unsigned long first, unsigned long nr);
ssize_t balloon_rs_write_within(struct file *file, const char *what, size_t len, unsigned int ms);
bool balloon_rs_has_virtio_mem(struct virtio_device *vdev);

/* What a file in debugfs shows. */
struct balloon_rs_shown {
	void (*show)(struct seq_file *m, struct balloon_rs_shown *shown);
};

struct dentry *balloon_rs_create_dir(const char *name);
struct dentry *balloon_rs_create_shown(const char *name, struct dentry *dir,
				       struct balloon_rs_shown *shown);
void balloon_rs_remove_shown(struct dentry *dentry);

/* Why pages leave the balloon. */
enum balloon_rs_reason {
	BALLOON_RS_TARGET,
	BALLOON_RS_OUT_OF_MEMORY,
	BALLOON_RS_GOING_OFFLINE,
};

/* In trace.c. */
void balloon_rs_trace_inflate(unsigned int device, unsigned long pages);
void balloon_rs_trace_deflate(unsigned int device, unsigned long pages, unsigned int reason);
void balloon_rs_trace_request(unsigned int device, u64 id, u16 command);
void balloon_rs_trace_answer(unsigned int device, u64 id, unsigned long pages, u8 status);

#endif
