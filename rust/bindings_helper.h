/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The headers for bindings that the `kernel` crate lacks.
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

const gfp_t RUST_CONST_HELPER_GFP_HIGHUSER = GFP_HIGHUSER;
const gfp_t RUST_CONST_HELPER_GFP_HIGHUSER_MOVABLE = GFP_HIGHUSER_MOVABLE;

/* Offsets of these in struct page: bindgen's names for its unions are not stable. */
const size_t RUST_CONST_HELPER_PAGE_LRU_OFFSET = offsetof(struct page, lru);
const size_t RUST_CONST_HELPER_PAGE_MAPPING_OFFSET = offsetof(struct page, mapping);
const size_t RUST_CONST_HELPER_PAGE_INDEX_OFFSET = offsetof(struct page, __folio_index);
const size_t RUST_CONST_HELPER_PAGE_PRIVATE_OFFSET = offsetof(struct page, private);
const size_t RUST_CONST_HELPER_PAGE_TYPE_OFFSET = offsetof(struct page, page_type);
const size_t RUST_CONST_HELPER_PAGE_REFCOUNT_OFFSET = offsetof(struct page, _refcount);
const unsigned int RUST_CONST_HELPER_BALLOON_MAX_PAGE_ORDER = MAX_PAGE_ORDER;

const unsigned long RUST_CONST_HELPER_BALLOON_MEM_GOING_OFFLINE = MEM_GOING_OFFLINE;
const unsigned long RUST_CONST_HELPER_BALLOON_MEM_OFFLINE = MEM_OFFLINE;
const unsigned long RUST_CONST_HELPER_BALLOON_MEM_CANCEL_OFFLINE = MEM_CANCEL_OFFLINE;

/* The granularity of holes in the memory map. */
#ifdef CONFIG_SPARSEMEM
const unsigned int RUST_CONST_HELPER_BALLOON_SECTION_ORDER = PFN_SECTION_SHIFT;
#else
const unsigned int RUST_CONST_HELPER_BALLOON_SECTION_ORDER = MAX_PAGE_ORDER;
#endif
