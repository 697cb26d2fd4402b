// SPDX-License-Identifier: GPL-2.0-only
/*
 * recv.c - the loops between a netlink socket and the decoder.
 *
 * They are in C because a dump of 200,000 entries is some 1,300 datagrams of
 * which each is 150 rows or so, and events are one row each.
 */
#define _GNU_SOURCE	/* recvmmsg() */
#include <errno.h>
#include <linux/netlink.h>
#include <string.h>
#include <sys/socket.h>

#include "ct.h"

/* A header, nfgenmsg, two IPv4 addresses in their nests: no row is smaller. */
#define ROW_MIN 44u

static ssize_t receive(int fd, void *buf, size_t len, int flags, int *usable)
{
	struct sockaddr_nl from = { 0 };
	struct iovec iov = { buf, len };
	struct msghdr msg = {
		.msg_name = &from, .msg_namelen = sizeof(from),
		.msg_iov = &iov, .msg_iovlen = 1,
	};
	ssize_t n;

	n = recvmsg(fd, &msg, flags);
	/* only the kernel is port 0 */
	*usable = from.nl_pid == 0;
	return n < 0 ? -errno : n;
}

#define AT_ONCE 64u

static void decode_all(const uint8_t *buf, size_t len, struct ct_batch *out,
		       struct ct_decoded *what)
{
	struct ct_decoded d;

	while (len) {
		d = ct_decode(buf, len, out);
		what->used += d.used;
		what->skipped += d.skipped;
		what->malformed += d.malformed;
		what->done |= d.done;
		what->interrupted |= d.interrupted;
		if (d.error && !what->error) {
			what->error = d.error;
			what->error_seq = d.error_seq;
		}
		if (!d.used)
			return;		/* no room: ROW_MIN does not let it happen */
		buf += d.used;
		len -= d.used;
	}
}

ssize_t ct_recv_decode(int fd, void *buf, size_t len, struct ct_batch *out,
		       struct ct_decoded *what)
{
	ssize_t taken = 0, n;
	int usable;

	memset(what, 0, sizeof(*what));
	while (out->capacity - out->count >= len / ROW_MIN + 1) {
		/* in a dump, each recvmsg() has the kernel prepare the next one */
		n = receive(fd, buf, len, taken ? MSG_DONTWAIT : 0, &usable);
		if (n == -ENOBUFS) {
			what->overrun = 1;	/* told once: must not get lost here */
			continue;
		}
		if (n < 0)
			return taken ? taken : n;
		taken++;
		if (usable)
			decode_all(buf, (size_t)n, out, what);
		if (what->done || what->error)
			break;
	}
	return taken;
}

/* Take what one recvmmsg() has brought; the number of datagrams. */
static int take_many(struct mmsghdr *in, const struct iovec *iov,
		     const struct sockaddr_nl *from, int n, struct ct_batch *out,
		     struct ct_decoded *what)
{
	int i;

	for (i = 0; i < n; i++) {
		if (from[i].nl_pid)
			continue;	/* only the kernel is port 0 */
		if (in[i].msg_hdr.msg_flags & MSG_TRUNC)
			what->malformed++;
		else
			decode_all(iov[i].iov_base, in[i].msg_len, out, what);
	}
	return n;
}

ssize_t ct_recv_events(int fd, void *buf, size_t len, struct ct_batch *out,
		       struct ct_decoded *what)
{
	struct sockaddr_nl from[AT_ONCE];
	struct mmsghdr in[AT_ONCE];
	struct iovec iov[AT_ONCE];
	unsigned int slots = len / CT_EVENT_MAX < AT_ONCE ?
			     (unsigned int)(len / CT_EVENT_MAX) : AT_ONCE;
	size_t rows = slots * (CT_EVENT_MAX / ROW_MIN + 1);
	ssize_t taken = 0;
	unsigned int i;
	int n;

	memset(what, 0, sizeof(*what));
	memset(in, 0, sizeof(in));
	memset(from, 0, sizeof(from));
	for (i = 0; i < slots; i++) {
		iov[i] = (struct iovec){ (char *)buf + i * CT_EVENT_MAX, CT_EVENT_MAX };
		in[i].msg_hdr = (struct msghdr){
			.msg_name = &from[i], .msg_iov = &iov[i], .msg_iovlen = 1,
		};
	}
	while (slots && out->capacity - out->count >= rows) {
		for (i = 0; i < slots; i++)
			in[i].msg_hdr.msg_namelen = sizeof(from[i]);
		n = recvmmsg(fd, in, slots, MSG_DONTWAIT, NULL);
		if (n < 0 && errno == ENOBUFS) {
			what->overrun = 1;	/* told once: must not get lost here */
			continue;
		}
		if (n < 0)
			return taken ? taken : -errno;
		taken += take_many(in, iov, from, n, out, what);
	}
	return taken;
}
