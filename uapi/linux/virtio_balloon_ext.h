/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * Extension of the virtio memory balloon.
 *
 * The feature bits are from the range for device types that the specification has not given out (2.2,
 * "Feature Bits": 50 to 127). All fields are little-endian and naturally aligned.
 */
#ifndef _LINUX_VIRTIO_BALLOON_EXT_H
#define _LINUX_VIRTIO_BALLOON_EXT_H

#include <linux/virtio_balloon.h>

/* The device tells its granule, the driver why it stops short of the target */
#define VIRTIO_BALLOON_F_STOP_REASON	58

/* Values of stop_reason */
#define VIRTIO_BALLOON_STOP_REASON_NONE		0 /* It does not stop short */
#define VIRTIO_BALLOON_STOP_REASON_FLOOR	1 /* The guest would have too little left */
#define VIRTIO_BALLOON_STOP_REASON_NO_MEMORY	2 /* No memory could be allocated */
#define VIRTIO_BALLOON_STOP_REASON_AFTER_OOM	3 /* Backing off after running out of memory */
#define VIRTIO_BALLOON_STOP_REASON_EXCLUDED	4 /* The guest's administrator keeps it out */

/* The configuration space with VIRTIO_BALLOON_F_STOP_REASON */
struct virtio_balloon_ext_config {
	struct virtio_balloon_config base;
	/*
	 * Size in bytes of the smallest naturally aligned piece of memory that
	 * the device can give back, readonly by guest.
	 */
	__le32 discard_granule;
	/* One of VIRTIO_BALLOON_STOP_REASON_*, written by guest. */
	__le32 stop_reason;
};

#endif /* _LINUX_VIRTIO_BALLOON_EXT_H */
