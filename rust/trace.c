// SPDX-License-Identifier: GPL-2.0
#include "helpers.h"

#define CREATE_TRACE_POINTS
#include "trace.h"

void balloon_rs_trace_inflate(unsigned int device, unsigned long pages)
{
	trace_virtio_balloon_rs_inflate(device, pages);
}

void balloon_rs_trace_deflate(unsigned int device, unsigned long pages, unsigned int reason)
{
	trace_virtio_balloon_rs_deflate(device, pages, reason);
}

void balloon_rs_trace_request(unsigned int device, u64 id, u16 command)
{
	trace_virtio_balloon_rs_request(device, id, command);
}

void balloon_rs_trace_answer(unsigned int device, u64 id, unsigned long pages, u8 status)
{
	trace_virtio_balloon_rs_answer(device, id, pages, status);
}
