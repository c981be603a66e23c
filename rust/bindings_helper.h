/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What bindgen reads to make the bindings that the `kernel` crate does not have.
 */
#include <linux/oom.h>
#include <linux/page_reporting.h>
#include <linux/shrinker.h>
#include <linux/virtio.h>
#include <linux/virtio_balloon.h>
#include <linux/virtio_config.h>
#include <linux/virtio_ids.h>
#include <linux/virtio_pci.h>
#include <linux/virtio_ring.h>

#include "../uapi/linux/virtio_balloon_ext.h"
#include "helpers.c"
#include "trace.h"

/* What Batch::alloc() allocates for the balloon. */
#define GFP_BALLOON (__GFP_NORETRY | __GFP_NOWARN | __GFP_NOMEMALLOC)

/* Order-0 pages of the balloon can be moved, if the kernel is built for it. */
#ifdef CONFIG_BALLOON_MIGRATION
#define GFP_BALLOON_SINGLES (GFP_HIGHUSER_MOVABLE | GFP_BALLOON)
#else
#define GFP_BALLOON_SINGLES (GFP_HIGHUSER | GFP_BALLOON)
#endif

const gfp_t RUST_CONST_HELPER_GFP_WHOLE_BLOCK = (GFP_HIGHUSER | GFP_BALLOON) & ~__GFP_RECLAIM;
const gfp_t RUST_CONST_HELPER_GFP_SPLIT_BLOCK = GFP_BALLOON_SINGLES & ~__GFP_RECLAIM;
const gfp_t RUST_CONST_HELPER_GFP_SPLIT_SMALL_BLOCK = GFP_BALLOON_SINGLES & ~__GFP_DIRECT_RECLAIM;
const gfp_t RUST_CONST_HELPER_GFP_BALLOON_PAGE = GFP_BALLOON_SINGLES;

/* What PageRun::alloc() allocates for hints: no reclaim, since OOM notifiers wait for it. */
const gfp_t RUST_CONST_HELPER_GFP_HINT_BLOCK = __GFP_NORETRY | __GFP_NOWARN | __GFP_NOMEMALLOC;

/* What drain_free_lists() allocates, and frees at once. */
const gfp_t RUST_CONST_HELPER_GFP_DRAIN =
	__GFP_NORETRY | __GFP_NOWARN | __GFP_NOMEMALLOC | __GFP_THISNODE;

/* Where these lie in struct page: bindgen's names for the unions around them are not stable. */
const size_t RUST_CONST_HELPER_PAGE_LRU_OFFSET = offsetof(struct page, lru);
const size_t RUST_CONST_HELPER_PAGE_MAPPING_OFFSET = offsetof(struct page, mapping);
const size_t RUST_CONST_HELPER_PAGE_PRIVATE_OFFSET = offsetof(struct page, private);
const size_t RUST_CONST_HELPER_PAGE_TYPE_OFFSET = offsetof(struct page, page_type);
const size_t RUST_CONST_HELPER_PAGE_REFCOUNT_OFFSET = offsetof(struct page, _refcount);
const size_t RUST_CONST_HELPER_BALLOON_MAPPING_ANON = FOLIO_MAPPING_ANON;
const u8 RUST_CONST_HELPER_BALLOON_PAGE_POISON = PAGE_POISON;
const unsigned int RUST_CONST_HELPER_BALLOON_MAX_PAGE_ORDER = MAX_PAGE_ORDER;

const unsigned long RUST_CONST_HELPER_BALLOON_MEM_GOING_OFFLINE = MEM_GOING_OFFLINE;
const unsigned long RUST_CONST_HELPER_BALLOON_MEM_OFFLINE = MEM_OFFLINE;
const unsigned long RUST_CONST_HELPER_BALLOON_MEM_CANCEL_OFFLINE = MEM_CANCEL_OFFLINE;
const unsigned long RUST_CONST_HELPER_BALLOON_PM_HIBERNATION_PREPARE = PM_HIBERNATION_PREPARE;
const unsigned long RUST_CONST_HELPER_BALLOON_PM_SUSPEND_PREPARE = PM_SUSPEND_PREPARE;
const unsigned long RUST_CONST_HELPER_BALLOON_PM_RESTORE_PREPARE = PM_RESTORE_PREPARE;

/* How far it is to where memory may begin again after a hole. */
#ifdef CONFIG_SPARSEMEM
const unsigned int RUST_CONST_HELPER_BALLOON_SECTION_ORDER = PFN_SECTION_SHIFT;
#else
const unsigned int RUST_CONST_HELPER_BALLOON_SECTION_ORDER = MAX_PAGE_ORDER;
#endif
