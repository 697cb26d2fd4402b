/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The reader's side of a BPF ring buffer (Documentation/bpf/ringbuf.rst)
 *
 * libbpf's own ring_buffer__consume() gives every record back to the kernel
 * as soon as its callback returns. Events are written to a file first, many
 * at once, and given back then: a reader that is killed in between loses none.
 */
#ifndef _VNET_RING_H
#define _VNET_RING_H

#include <linux/bpf.h>
#include <stdint.h>
#include <string.h>

#include "vnet_bpf.h"

/*
 * Copy out what is whole from position *at on, and move *at behind it.
 *
 * producer: the pages that the kernel maps at offset "page": its position,
 * then the data, mapped twice in a row so that no record wraps. size: of the
 * data, a power of 2. unknown: records that are no struct vnet_event.
 */
static inline int vnet_ring_read(const uint8_t *producer, size_t page,
				 size_t size, unsigned long *at,
				 struct vnet_event *out, int room,
				 unsigned long *unknown)
{
	unsigned long end = __atomic_load_n((const unsigned long *)producer,
					    __ATOMIC_ACQUIRE);
	int count = 0;

	while (*at < end && count < room) {
		const uint8_t *record = producer + page + (*at & (size - 1));
		uint32_t head = __atomic_load_n((const uint32_t *)record,
						__ATOMIC_ACQUIRE);
		uint32_t length = head & ~(BPF_RINGBUF_BUSY_BIT |
					   BPF_RINGBUF_DISCARD_BIT);

		if (head & BPF_RINGBUF_BUSY_BIT)
			break;	/* its program is still at it */
		*at += (length + BPF_RINGBUF_HDR_SZ + 7) & ~7ul;
		if (head & BPF_RINGBUF_DISCARD_BIT)
			continue;
		if (length == sizeof(*out))
			memcpy(&out[count++], record + BPF_RINGBUF_HDR_SZ,
			       sizeof(*out));
		else
			++*unknown;
	}
	return count;
}

/* The reader's position; the page that the kernel maps at offset 0. */
static inline unsigned long vnet_ring_position(const void *consumer)
{
	return __atomic_load_n((const unsigned long *)consumer,
			       __ATOMIC_RELAXED);
}

/* Give everything before position "at" back to the kernel. */
static inline void vnet_ring_release(void *consumer, unsigned long at)
{
	__atomic_store_n((unsigned long *)consumer, at, __ATOMIC_RELEASE);
}

#endif /* _VNET_RING_H */
