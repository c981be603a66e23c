/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * Extension of the virtio memory balloon.
 *
 * The feature bits are from the range for device types that the specification has not given out
 * (2.2, "Feature Bits": 50 to 127). All fields are little-endian and naturally aligned.
 */
#ifndef _LINUX_VIRTIO_BALLOON_EXT_H
#define _LINUX_VIRTIO_BALLOON_EXT_H

#include <linux/virtio_balloon.h>

/* Messages of the inflate and the deflate queue are page sets; the device tells its granule */
#define VIRTIO_BALLOON_F_PAGE_SETS	56
/* The device sends requests on a queue of their own; answers are page sets, too */
#define VIRTIO_BALLOON_F_HOST_REQUESTS	57
/* The device tells its granule, the driver why it stops short of the target */
#define VIRTIO_BALLOON_F_STOP_REASON	58

/* Values of stop_reason */
#define VIRTIO_BALLOON_STOP_REASON_NONE		0 /* It does not stop short */
#define VIRTIO_BALLOON_STOP_REASON_FLOOR	1 /* The guest would have too little left */
#define VIRTIO_BALLOON_STOP_REASON_NO_MEMORY	2 /* No memory could be allocated */
#define VIRTIO_BALLOON_STOP_REASON_AFTER_OOM	3 /* Backing off after running out of memory */
#define VIRTIO_BALLOON_STOP_REASON_EXCLUDED	4 /* The guest's administrator keeps it out */

/* The configuration space with any of the features above */
struct virtio_balloon_ext_config {
	struct virtio_balloon_config base;
	/*
	 * Size in bytes of the smallest naturally aligned piece of memory that
	 * the device can give back, readonly by guest. Valid with
	 * VIRTIO_BALLOON_F_PAGE_SETS and VIRTIO_BALLOON_F_STOP_REASON.
	 */
	__le32 discard_granule;
	/*
	 * One of VIRTIO_BALLOON_STOP_REASON_*, written by guest. Valid with
	 * VIRTIO_BALLOON_F_STOP_REASON.
	 */
	__le32 stop_reason;
};

/* Values of command: what the pages of a page set are named for */
#define VIRTIO_BALLOON_PAGE_SET_INFLATE		1 /* They are in the balloon from now on */
#define VIRTIO_BALLOON_PAGE_SET_DEFLATE		2 /* They leave the balloon */
/*
 * They were unused at some moment after the driver had seen the request, and
 * the guest may be using them by now. The device must not change them; it may
 * leave them out of a copy, if they were not written since it made the request.
 */
#define VIRTIO_BALLOON_PAGE_SET_UNUSED_SKIP	3
/*
 * They are unused, and the driver keeps them so until the device has used the
 * buffer. Until then the device may change them.
 */
#define VIRTIO_BALLOON_PAGE_SET_UNUSED_DISCARD	4

/* Values of encoding */
#define VIRTIO_BALLOON_PAGE_SET_RANGES	1
#define VIRTIO_BALLOON_PAGE_SET_BITMAP	2

/* Bits of flags */
#define VIRTIO_BALLOON_PAGE_SET_MORE	(1U << 0) /* This is not the last message of the set */

/* The length of the longest message in bytes, header included */
#define VIRTIO_BALLOON_PAGE_SET_MAX_BYTES	65536

/* In a range: how many bits the page frame number is shifted by, for the number of pages */
#define VIRTIO_BALLOON_PAGE_SET_COUNT_BITS	12

/*
 * A message that names pages, one or more. The payload follows in the same
 * buffer: words of 64 bits, to the end of the buffer.
 *
 * Ranges: a word has a page frame number in its upper 52 bits and a number of
 * pages in its lower 12. If that is 0, the number is the next word, which is
 * not 0. Ranges ascend and do not overlap.
 *
 * Bitmap: bit n % 64 of word n / 64 stands for the page first_pfn + n.
 */
struct virtio_balloon_page_set {
	/* One of VIRTIO_BALLOON_PAGE_SET_INFLATE ... UNUSED_DISCARD */
	__le16 command;
	/* Binary logarithm of the size in bytes of the pages in this message: 12 to 63 */
	__u8 page_shift;
	/* VIRTIO_BALLOON_PAGE_SET_RANGES or BITMAP */
	__u8 encoding;
	/* VIRTIO_BALLOON_PAGE_SET_MORE or 0; the other bits are reserved */
	__le32 flags;
	/* The id of the request that this is an answer to; 0 if nobody asked */
	__le64 request_id;
	/* Bitmap: the page frame number that bit 0 stands for. Ranges: 0 */
	__le64 first_pfn;
	/* How many pages the message names */
	__le64 count;
};

/*
 * Values of command: requests. Those for pages are VIRTIO_BALLOON_PAGE_SET_UNUSED_SKIP and
 * _DISCARD.
 */
#define VIRTIO_BALLOON_REQUEST_DROP_CACHES	5
/* The request with the id in start is no longer wanted */
#define VIRTIO_BALLOON_REQUEST_CANCEL		6
/* Not a request, but the last message of every answer */
#define VIRTIO_BALLOON_COMPLETION		7

/* Bits of caches */
#define VIRTIO_BALLOON_CACHES_PAGES	(1U << 0) /* The page cache */
#define VIRTIO_BALLOON_CACHES_SLAB	(1U << 1) /* The slab caches of names and inodes */

/*
 * What the device asks for: it fills in a buffer of the driver's for each
 * request. Fields that do not count are 0.
 */
struct virtio_balloon_request {
	/* What is asked for */
	__le16 command;
	/*
	 * Pages: binary logarithm of the size in bytes of the smallest block that is worth an
	 * answer
	 */
	__u8 block_shift;
	__u8 reserved;
	/* DROP_CACHES: which ones, VIRTIO_BALLOON_CACHES_* */
	__le32 caches;
	/* Not 0, and not that of a request that is open */
	__le64 request_id;
	/* Pages: the first address of the memory that is asked for. CANCEL: the id of a request */
	__le64 start;
	/* Pages: the address after the last one, or 0 for the end of all memory */
	__le64 end;
};

/* Values of status */
#define VIRTIO_BALLOON_COMPLETION_COMPLETE	1 /* Done */
/* Not done, or not all of it. What was answered holds. */
#define VIRTIO_BALLOON_COMPLETION_ABORTED	2
#define VIRTIO_BALLOON_COMPLETION_CANCELLED	3 /* The same, because of a CANCEL */
#define VIRTIO_BALLOON_COMPLETION_UNSUPPORTED	4 /* The command is not known */
#define VIRTIO_BALLOON_COMPLETION_MALFORMED	5 /* A field has no legal value */
#define VIRTIO_BALLOON_COMPLETION_UNKNOWN_ID	6 /* CANCEL: no such request is open */

/* The end of an answer. Begins like struct virtio_balloon_page_set. */
struct virtio_balloon_completion {
	/* VIRTIO_BALLOON_COMPLETION */
	__le16 command;
	/* One of VIRTIO_BALLOON_COMPLETION_COMPLETE ... UNKNOWN_ID */
	__u8 status;
	__u8 reserved;
	/* 0 */
	__le32 flags;
	/* The id of the request */
	__le64 request_id;
};

#endif /* _LINUX_VIRTIO_BALLOON_EXT_H */
