/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What bindgen reads to make the bindings that the `kernel` crate does not have.
 */
#include <linux/balloon.h>
#include <linux/gfp.h>
#include <linux/memory.h>
#include <linux/mm.h>
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
#include "helpers.h"
