/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * attr.h - netlink's attributes, read out of bytes that are not trusted.
 *
 * Everything on the wire is checked against the end of what encloses it before
 * it is read; multi-byte values are copied out, since a 64-bit value is only
 * 4-byte aligned there.
 */
#ifndef NETFLOW_ATTR_H
#define NETFLOW_ATTR_H

#include <endian.h>
#include <linux/netlink.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

struct span {
	const uint8_t *at, *end;
};

struct attr {
	unsigned int type;
	struct span data;
};

/* NLA_ALIGN and NLMSG_ALIGN (both to 4) without their signed arithmetic. */
static inline size_t align4(size_t n)
{
	return (n + 3) & ~(size_t)3;
}

static inline size_t left(const struct span *s)
{
	return (size_t)(s->end - s->at);
}

/* 1: *a is the next attribute; 0: no more; -1: the lengths do not add up. */
static inline int next_attr(struct span *s, struct attr *a)
{
	struct nlattr nla;
	size_t step;

	if (s->at == s->end)
		return 0;
	if (left(s) < sizeof(nla))
		return -1;
	memcpy(&nla, s->at, sizeof(nla));
	if (nla.nla_len < sizeof(nla) || nla.nla_len > left(s))
		return -1;
	a->type = nla.nla_type & (unsigned int)NLA_TYPE_MASK;
	a->data.at = s->at + sizeof(nla);
	a->data.end = s->at + nla.nla_len;
	/* the last attribute of a message need not be padded */
	step = align4(nla.nla_len);
	s->at = step < left(s) ? s->at + step : s->end;
	return 1;
}

static inline int get_u8(const struct span *s, uint8_t *v)
{
	if (left(s) < sizeof(*v))
		return -1;
	*v = *s->at;
	return 0;
}

static inline int get_be16(const struct span *s, uint16_t *v)
{
	if (left(s) < sizeof(*v))
		return -1;
	memcpy(v, s->at, sizeof(*v));
	*v = be16toh(*v);
	return 0;
}

static inline int get_be32(const struct span *s, uint32_t *v)
{
	if (left(s) < sizeof(*v))
		return -1;
	memcpy(v, s->at, sizeof(*v));
	*v = be32toh(*v);
	return 0;
}

static inline int get_be64(const struct span *s, uint64_t *v)
{
	if (left(s) < sizeof(*v))
		return -1;
	memcpy(v, s->at, sizeof(*v));
	*v = be64toh(*v);
	return 0;
}

#endif /* NETFLOW_ATTR_H */
