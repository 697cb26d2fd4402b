/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * columns.h - lay the arrays of a batch out in one block of memory.
 *
 * A batch is one allocation: the struct, then every column, each aligned to a
 * cache line so that numpy and the vector units of a store find them aligned.
 * Each kind of batch names its columns once, in a list macro, and the list is
 * walked twice: first to learn the size, then to hand the places out.
 */
#ifndef NETFLOW_COLUMNS_H
#define NETFLOW_COLUMNS_H

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define COLUMN_ALIGN 64u

static inline size_t column_end(size_t at, uint32_t rows, size_t width)
{
	size_t end = at + (size_t)rows * width;

	return (end + COLUMN_ALIGN - 1) & ~(size_t)(COLUMN_ALIGN - 1);
}

/* Not cleared: pages of rows that are never used are never touched. */
static inline void *column_block(size_t head, size_t size)
{
	void *block = aligned_alloc(COLUMN_ALIGN, size);

	if (block)
		memset(block, 0, head);
	return block;
}

#define COLUMN_SIZE(name) size = column_end(size, capacity, sizeof(*b->name));
#define COLUMN_PLACE(name)						\
	b->name = (void *)((char *)b + at);				\
	at = column_end(at, capacity, sizeof(*b->name));

#define COLUMNS_NEW(type, list)						\
	do {								\
		type *b = NULL;						\
		size_t head = column_end(0, 1, sizeof(*b));		\
		size_t size = head, at = head;				\
									\
		list(COLUMN_SIZE)					\
		b = column_block(head, size);				\
		if (!b)							\
			return NULL;					\
		b->capacity = capacity;					\
		list(COLUMN_PLACE)					\
		return b;						\
	} while (0)

#endif /* NETFLOW_COLUMNS_H */
