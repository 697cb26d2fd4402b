/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * owners.h - the two halves of a connection's mark: 0 is nobody.
 */
#ifndef NETFLOW_OWNERS_H
#define NETFLOW_OWNERS_H

#include <stdint.h>

#define HALF 0xffffu

/* Some half has gone from one owner to another. */
static inline int clash(uint32_t was, uint32_t is)
{
	uint32_t diff = was ^ is;

	return ((diff & HALF) && (was & HALF) && (is & HALF)) ||
	       (diff >> 16 && was >> 16 && is >> 16);
}

/* is, and where it names nobody, was. */
static inline uint32_t merge(uint32_t was, uint32_t is)
{
	uint32_t lo = is & HALF ? is & HALF : was & HALF;
	uint32_t hi = is >> 16 ? is >> 16 : was >> 16;

	return hi << 16 | lo;
}

/* The halves (1 low, 2 high) that had an owner and have none. */
static inline unsigned int gone(uint32_t was, uint32_t is)
{
	return ((was & HALF) && !(is & HALF) ? 1u : 0u) |
	       (was >> 16 && !(is >> 16) ? 2u : 0u);
}

/* is without the owners of these halves. */
static inline uint32_t without(uint32_t is, unsigned int halves)
{
	return is & ~((halves & 1 ? HALF : 0u) | (halves & 2 ? HALF << 16 : 0u));
}

#endif /* NETFLOW_OWNERS_H */
