// SPDX-License-Identifier: GPL-2.0-only
/*
 * decode.c - conntrack's netlink messages into columns.
 *
 * Which message is what is as ctnetlink_conntrack_event() and the dump of
 * net/netfilter/nf_conntrack_netlink.c write it. The lengths of messages are
 * trusted as little as those of attributes are (attr.h).
 */
#include <linux/netfilter/nfnetlink.h>
#include <linux/netfilter/nfnetlink_conntrack.h>
#include <sys/socket.h>

#include "columns.h"
#include "ct.h"
#include "row.h"

#define CT_COLUMNS(X)							\
	X(msg) X(has) X(family) X(proto) X(tcp_state) X(zone)		\
	X(id) X(mark) X(status)						\
	X(src_hi) X(src_lo) X(dst_hi) X(dst_lo) X(sport) X(dport)	\
	X(rsrc_hi) X(rsrc_lo) X(rdst_hi) X(rdst_lo) X(rsport) X(rdport)	\
	X(opackets) X(obytes) X(rpackets) X(rbytes) X(start) X(stop)

struct ct_batch *ct_batch_new(uint32_t capacity)
{
	COLUMNS_NEW(struct ct_batch, CT_COLUMNS);
}

void ct_batch_free(struct ct_batch *b)
{
	free(b);
}

static void put_row(struct ct_batch *b, uint8_t msg, const struct row *r)
{
	uint32_t i = b->count++;

	b->msg[i] = msg;
	b->has[i] = r->has;
	b->family[i] = r->orig.seen & SEEN_V4 ? AF_INET : AF_INET6;
	b->proto[i] = r->orig.proto;
	b->tcp_state[i] = r->state;
	b->zone[i] = r->zone;
	b->id[i] = r->id;
	b->mark[i] = r->mark;
	b->status[i] = r->status;
	b->src_hi[i] = r->orig.src.hi;
	b->src_lo[i] = r->orig.src.lo;
	b->dst_hi[i] = r->orig.dst.hi;
	b->dst_lo[i] = r->orig.dst.lo;
	b->sport[i] = r->orig.sport;
	b->dport[i] = r->orig.dport;
	b->rsrc_hi[i] = r->reply.src.hi;
	b->rsrc_lo[i] = r->reply.src.lo;
	b->rdst_hi[i] = r->reply.dst.hi;
	b->rdst_lo[i] = r->reply.dst.lo;
	b->rsport[i] = r->reply.sport;
	b->rdport[i] = r->reply.dport;
	b->opackets[i] = r->opackets;
	b->obytes[i] = r->obytes;
	b->rpackets[i] = r->rpackets;
	b->rbytes[i] = r->rbytes;
	b->start[i] = r->start;
	b->stop[i] = r->stop;
}

/*
 * Which kind of message; 0 if it is not conntrack's. A dump row, the answer
 * to a GET and an event about a new or changed connection all have the same
 * type. What tells them apart is the sequence number: an answer carries its
 * request's (ctnetlink_fill_info()), an event always 0
 * (ctnetlink_conntrack_event()). The port id does not: an event caused by
 * somebody's `conntrack -U` or `-D` carries that process's port id.
 */
static uint8_t kind(const struct nlmsghdr *nlh)
{
	unsigned int fresh = NLM_F_CREATE | NLM_F_EXCL;

	if (NFNL_SUBSYS_ID(nlh->nlmsg_type) != NFNL_SUBSYS_CTNETLINK)
		return 0;
	switch (NFNL_MSG_TYPE(nlh->nlmsg_type)) {
	case IPCTNL_MSG_CT_DELETE:
		return CT_DESTROY;
	case IPCTNL_MSG_CT_NEW:
		/* the answer's flags are few: NLM_F_MULTI is 2, CREATE 0x400 */
		if (nlh->nlmsg_seq || nlh->nlmsg_flags & NLM_F_MULTI)
			return CT_DUMP;
		return (nlh->nlmsg_flags & fresh) == fresh ? CT_NEW : CT_UPDATE;
	}
	return 0;
}

/* NLMSG_ERROR and NLMSG_DONE both begin with a negative errno or 0. */
static void note_error(const struct nlmsghdr *nlh, const struct span *body,
		       struct ct_decoded *d)
{
	int32_t code;

	if (left(body) < sizeof(code)) {
		d->malformed++;
		return;
	}
	memcpy(&code, body->at, sizeof(code));
	if (code >= 0)
		return;
	d->error = code == INT32_MIN ? INT32_MAX : -code;
	d->error_seq = nlh->nlmsg_seq;
}

static void decode_message(const struct nlmsghdr *nlh, struct span body,
			   struct ct_batch *out, struct ct_decoded *d)
{
	uint8_t msg = kind(nlh);
	struct row r;

	if (nlh->nlmsg_flags & NLM_F_DUMP_INTR)
		d->interrupted = 1;
	if (nlh->nlmsg_type == NLMSG_DONE)
		d->done = 1;
	if (nlh->nlmsg_type == NLMSG_DONE || nlh->nlmsg_type == NLMSG_ERROR) {
		note_error(nlh, &body, d);
		return;
	}
	if (!msg) {
		d->skipped++;
		return;
	}
	if (left(&body) < sizeof(struct nfgenmsg)) {
		d->malformed++;
		return;
	}
	body.at += sizeof(struct nfgenmsg);
	if (parse_row(body, &r))
		d->malformed++;
	else
		put_row(out, msg, &r);
}

struct ct_decoded ct_decode(const void *buf, size_t len, struct ct_batch *out)
{
	struct span rest = { buf, (const uint8_t *)buf + len };
	struct ct_decoded d = { 0 };
	struct nlmsghdr nlh;
	struct span body;
	size_t step;

	while (rest.at < rest.end && !d.error) {
		if (left(&rest) < sizeof(nlh))
			goto truncated;
		memcpy(&nlh, rest.at, sizeof(nlh));
		if (nlh.nlmsg_len < sizeof(nlh) || nlh.nlmsg_len > left(&rest))
			goto truncated;
		if (out->count == out->capacity && kind(&nlh))
			break;
		body.at = rest.at + sizeof(nlh);
		body.end = rest.at + nlh.nlmsg_len;
		decode_message(&nlh, body, out, &d);
		step = align4(nlh.nlmsg_len);
		rest.at = step < left(&rest) ? rest.at + step : rest.end;
	}
	d.used = (size_t)(rest.at - (const uint8_t *)buf);
	return d;

truncated:
	d.malformed++;
	d.used = len;
	return d;
}
