/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Tracepoints of the balloon and of host requests.
 */
#undef TRACE_SYSTEM
#define TRACE_SYSTEM virtio_balloon_rs

#if !defined(VIRTIO_BALLOON_RS_TRACE_H) || defined(TRACE_HEADER_MULTI_READ)
#define VIRTIO_BALLOON_RS_TRACE_H

#include <linux/tracepoint.h>

#include "../uapi/linux/virtio_balloon_ext.h"

/* The reason of a deflate. */
#define BALLOON_RS_TARGET		0
#define BALLOON_RS_OUT_OF_MEMORY	1
#define BALLOON_RS_ISOLATED		2

/* Pages were sent to the device, which has not used the message yet. */
TRACE_EVENT(virtio_balloon_rs_inflate,
	TP_PROTO(unsigned int device, unsigned long pages),
	TP_ARGS(device, pages),
	TP_STRUCT__entry(
		__field(unsigned int, device)
		__field(unsigned long, pages)
	),
	TP_fast_assign(
		__entry->device = device;
		__entry->pages = pages;
	),
	TP_printk("virtio%u: pages=%lu", __entry->device, __entry->pages)
);

/* Pages left the balloon. */
TRACE_EVENT(virtio_balloon_rs_deflate,
	TP_PROTO(unsigned int device, unsigned long pages, unsigned int reason),
	TP_ARGS(device, pages, reason),
	TP_STRUCT__entry(
		__field(unsigned int, device)
		__field(unsigned long, pages)
		__field(unsigned int, reason)
	),
	TP_fast_assign(
		__entry->device = device;
		__entry->pages = pages;
		__entry->reason = reason;
	),
	TP_printk("virtio%u: pages=%lu reason=%s", __entry->device, __entry->pages,
		  __print_symbolic(__entry->reason,
				   { BALLOON_RS_TARGET, "target" },
				   { BALLOON_RS_OUT_OF_MEMORY, "out-of-memory" },
				   { BALLOON_RS_ISOLATED, "isolated" }))
);

/* The host has made a request. */
TRACE_EVENT(virtio_balloon_rs_request,
	TP_PROTO(unsigned int device, u64 id, u16 command),
	TP_ARGS(device, id, command),
	TP_STRUCT__entry(
		__field(unsigned int, device)
		__field(u64, id)
		__field(u16, command)
	),
	TP_fast_assign(
		__entry->device = device;
		__entry->id = id;
		__entry->command = command;
	),
	TP_printk("virtio%u: id=%llu command=%s", __entry->device, __entry->id,
		  __print_symbolic(__entry->command,
				   { VIRTIO_BALLOON_PAGE_SET_UNUSED_SKIP, "unused-skip" },
				   { VIRTIO_BALLOON_PAGE_SET_UNUSED_DISCARD, "unused-discard" },
				   { VIRTIO_BALLOON_REQUEST_DROP_CACHES, "drop-caches" },
				   { VIRTIO_BALLOON_REQUEST_CANCEL, "cancel" }))
);

/* A message of an answer: with so many pages, or the last one with a status. */
TRACE_EVENT(virtio_balloon_rs_answer,
	TP_PROTO(unsigned int device, u64 id, unsigned long pages, u8 status),
	TP_ARGS(device, id, pages, status),
	TP_STRUCT__entry(
		__field(unsigned int, device)
		__field(u64, id)
		__field(unsigned long, pages)
		__field(u8, status)
	),
	TP_fast_assign(
		__entry->device = device;
		__entry->id = id;
		__entry->pages = pages;
		__entry->status = status;
	),
	TP_printk("virtio%u: id=%llu pages=%lu status=%s", __entry->device, __entry->id,
		  __entry->pages,
		  __print_symbolic(__entry->status,
				   { 0, "more-follows" },
				   { VIRTIO_BALLOON_COMPLETION_COMPLETE, "complete" },
				   { VIRTIO_BALLOON_COMPLETION_ABORTED, "aborted" },
				   { VIRTIO_BALLOON_COMPLETION_CANCELLED, "cancelled" },
				   { VIRTIO_BALLOON_COMPLETION_UNSUPPORTED, "unsupported" },
				   { VIRTIO_BALLOON_COMPLETION_MALFORMED, "malformed" },
				   { VIRTIO_BALLOON_COMPLETION_UNKNOWN_ID, "unknown-id" }))
);

#endif

#undef TRACE_INCLUDE_PATH
#define TRACE_INCLUDE_PATH .
#undef TRACE_INCLUDE_FILE
#define TRACE_INCLUDE_FILE trace
#include <trace/define_trace.h>
