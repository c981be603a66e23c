/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * Extension of the virtio memory balloon.
 *
 * The feature bits are from the unassigned range for device types in the specification (2.2,
 * "Feature Bits": 50 to 127). All fields are little-endian and naturally aligned.
 */
#ifndef _LINUX_VIRTIO_BALLOON_EXT_H
#define _LINUX_VIRTIO_BALLOON_EXT_H

#include <linux/virtio_balloon.h>

/* Messages of the inflate and the deflate queue are page sets; the device has discard_granule */
#define VIRTIO_BALLOON_F_PAGE_SETS	56
/* The device sends requests on a queue of their own; answers are page sets, too */
#define VIRTIO_BALLOON_F_HOST_REQUESTS	57
/* The driver reports why the balloon is below the target; the device has discard_granule */
#define VIRTIO_BALLOON_F_STOP_REASON	58
/* The driver sends statistics unasked when the guest is short of memory */
#define VIRTIO_BALLOON_F_PRESSURE	59
/*
 * The driver reports the balloon's size and the stop reason in messages of the inflate queue, and
 * does not write their fields. Needs VIRTIO_BALLOON_F_PAGE_SETS.
 */
#define VIRTIO_BALLOON_F_STATUS		60

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
	 * Size in bytes of the smallest naturally aligned piece of memory that the device can
	 * return to the host, readonly by guest. Valid with VIRTIO_BALLOON_F_PAGE_SETS and
	 * VIRTIO_BALLOON_F_STOP_REASON.
	 */
	__le32 discard_granule;
	/*
	 * One of VIRTIO_BALLOON_STOP_REASON_*, written by guest. Valid with
	 * VIRTIO_BALLOON_F_STOP_REASON, and without VIRTIO_BALLOON_F_STATUS.
	 */
	__le32 stop_reason;
};

/* Values of command: the purpose of a page set */
#define VIRTIO_BALLOON_PAGE_SET_INFLATE		1 /* They are in the balloon from now on */
#define VIRTIO_BALLOON_PAGE_SET_DEFLATE		2 /* They leave the balloon */
/*
 * They were unused at some moment after the driver had seen the request, and the guest may be using
 * them by now. The device must not change them. It may omit them from a copy, if they were not
 * written since before it made the request.
 */
#define VIRTIO_BALLOON_PAGE_SET_UNUSED_SKIP	3
/*
 * The driver has allocated them until the device has used the buffer. Until then the device may
 * change them.
 */
#define VIRTIO_BALLOON_PAGE_SET_UNUSED_DISCARD	4

/* Values of encoding */
#define VIRTIO_BALLOON_PAGE_SET_RANGES	1
#define VIRTIO_BALLOON_PAGE_SET_BITMAP	2

/* Bits of flags */
#define VIRTIO_BALLOON_PAGE_SET_MORE	(1U << 0) /* This is not the last message of the set */

/* The length of the longest message in bytes, header included */
#define VIRTIO_BALLOON_PAGE_SET_MAX_BYTES	65536

/* In a range: the number of low bits, which hold the number of pages */
#define VIRTIO_BALLOON_PAGE_SET_COUNT_BITS	12

/*
 * A message that lists one or more pages. The payload follows in the same buffer: words of 64 bits,
 * to the end of the buffer.
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
	/* The id of the request that this answers; 0 if it is not an answer */
	__le64 request_id;
	/* Bitmap: the page frame number of bit 0. Ranges: 0 */
	__le64 first_pfn;
	/* The number of pages in the message */
	__le64 count;
};

/*
 * Values of command: requests. Those for pages are VIRTIO_BALLOON_PAGE_SET_UNUSED_SKIP and
 * _DISCARD.
 */
#define VIRTIO_BALLOON_REQUEST_DROP_CACHES	5
/* Cancel the request with the id in start */
#define VIRTIO_BALLOON_REQUEST_CANCEL		6
/* Not a request, but the final message of every answer */
#define VIRTIO_BALLOON_COMPLETION		7

/* Bits of caches */
#define VIRTIO_BALLOON_CACHES_PAGES	(1U << 0) /* The page cache */
#define VIRTIO_BALLOON_CACHES_SLAB	(1U << 1) /* The slab caches of names and inodes */

/*
 * A request: the device writes it into a buffer of the driver. Fields that are not in use are 0.
 */
struct virtio_balloon_request {
	/* The command */
	__le16 command;
	/*
	 * Pages: binary logarithm of the size in bytes of the smallest block to list
	 */
	__u8 block_shift;
	__u8 reserved;
	/* DROP_CACHES: which caches, VIRTIO_BALLOON_CACHES_* */
	__le32 caches;
	/* Not 0, and not the id of an open request */
	__le64 request_id;
	/* Pages: the first address. CANCEL: the id of a request */
	__le64 start;
	/* Pages: the end address, or 0 for the end of memory */
	__le64 end;
};

/* Values of status */
#define VIRTIO_BALLOON_COMPLETION_COMPLETE	1 /* Done */
/* Incomplete. The page sets sent so far are valid. */
#define VIRTIO_BALLOON_COMPLETION_ABORTED	2
#define VIRTIO_BALLOON_COMPLETION_CANCELLED	3 /* The same, because of a CANCEL */
#define VIRTIO_BALLOON_COMPLETION_UNSUPPORTED	4 /* The command is not known */
#define VIRTIO_BALLOON_COMPLETION_MALFORMED	5 /* A field has no legal value */
#define VIRTIO_BALLOON_COMPLETION_UNKNOWN_ID	6 /* CANCEL: no such request is open */

/* A completion. Begins like struct virtio_balloon_page_set. */
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

/* A value of command: the message is a status */
#define VIRTIO_BALLOON_STATUS		8

/* A status. Begins like struct virtio_balloon_page_set. */
struct virtio_balloon_status {
	/* VIRTIO_BALLOON_STATUS */
	__le16 command;
	__le16 reserved;
	/* 0 */
	__le32 flags;
	/* 0 */
	__le64 request_id;
	/* The balloon's size, as in the configuration space */
	__le32 actual;
	/* The stop reason, as in the configuration space; 0 without VIRTIO_BALLOON_F_STOP_REASON */
	__le32 stop_reason;
};

#endif /* _LINUX_VIRTIO_BALLOON_EXT_H */
