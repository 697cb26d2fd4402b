// SPDX-License-Identifier: GPL-2.0-only
/*
 * ct_bench.c - what bench_dump.py needs of the machine's speed: filling a
 * conntrack table, and receiving a dump without looking at it. Built as a
 * shared object and called through ctypes.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <linux/netfilter/nf_conntrack_common.h>
#include <linux/netfilter/nfnetlink.h>
#include <linux/netfilter/nfnetlink_conntrack.h>
#include <linux/netlink.h>
#include <netinet/in.h>
#include <string.h>
#include <sys/socket.h>

struct message {
	char data[65536];
	size_t at;
};

static void *put(struct message *m, const void *data, size_t n)
{
	void *place = m->data + m->at;

	memset(place, 0, NLA_ALIGN(n));
	if (data)
		memcpy(place, data, n);
	m->at += NLA_ALIGN(n);
	return place;
}

static void put_attr(struct message *m, unsigned int type, const void *data, size_t n)
{
	struct nlattr nla = { (uint16_t)(sizeof(nla) + n), (uint16_t)type };

	put(m, &nla, sizeof(nla));
	put(m, data, n);
}

static struct nlattr *nest(struct message *m, unsigned int type)
{
	struct nlattr nla = { 0, (uint16_t)(type | NLA_F_NESTED) };

	return put(m, &nla, sizeof(nla));
}

static void unnest(struct message *m, struct nlattr *nla)
{
	nla->nla_len = (uint16_t)(m->data + m->at - (char *)nla);
}

/* What a busy host has: of four, two are TCP, one is UDP, one TCP over IPv6. */
static const struct kind {
	uint8_t family, proto;
	uint16_t port;
} kinds[] = {
	{ AF_INET, IPPROTO_TCP, 443 }, { AF_INET, IPPROTO_TCP, 22 },
	{ AF_INET, IPPROTO_UDP, 53 }, { AF_INET6, IPPROTO_TCP, 443 },
};

struct end {
	uint32_t host;		/* in 10.0.0.0/8, or at the end of an IPv6 address */
	uint16_t port;
};

static void put_address(struct message *m, const struct kind *k, unsigned int type,
			uint32_t host)
{
	uint32_t v6[4] = { htonl(0x20010db8), 0, 0, htonl(host) };

	host = htonl(0x0a000000 | host);
	if (k->family == AF_INET)
		put_attr(m, type, &host, sizeof(host));
	else	/* CTA_IP_V6_SRC and _DST follow their IPv4 likes by 2 */
		put_attr(m, type + 2, v6, sizeof(v6));
}

static void put_tuple(struct message *m, const struct kind *k, unsigned int type,
		      struct end src, struct end dst)
{
	struct nlattr *tuple = nest(m, type), *inner = nest(m, CTA_TUPLE_IP);
	uint16_t sport = htons(src.port), dport = htons(dst.port);

	put_address(m, k, CTA_IP_V4_SRC, src.host);
	put_address(m, k, CTA_IP_V4_DST, dst.host);
	unnest(m, inner);
	inner = nest(m, CTA_TUPLE_PROTO);
	put_attr(m, CTA_PROTO_NUM, &k->proto, 1);
	put_attr(m, CTA_PROTO_SRC_PORT, &sport, 2);
	put_attr(m, CTA_PROTO_DST_PORT, &dport, 2);
	unnest(m, inner);
	unnest(m, tuple);
}

static void put_state(struct message *m)
{
	struct nlattr *info = nest(m, CTA_PROTOINFO), *tcp = nest(m, CTA_PROTOINFO_TCP);
	uint8_t established = 3;

	put_attr(m, CTA_PROTOINFO_TCP_STATE, &established, 1);
	unnest(m, tcp);
	unnest(m, info);
}

/* Entry n: a host of its own for every 4, an hour to live, owner 0x101. */
static void put_entry(struct message *m, uint32_t n)
{
	const struct kind *k = &kinds[n % 4];
	uint32_t timeout = htonl(3600), mark = htonl(0x101);
	uint32_t status = htonl(IPS_CONFIRMED | IPS_SEEN_REPLY | IPS_ASSURED);
	struct end client = { 0x10000 + n / 4, (uint16_t)(20000 + n % 40000) };
	struct end server = { 1, k->port };
	struct nfgenmsg gen = { k->family, NFNETLINK_V0, 0 };
	size_t from = m->at;
	struct nlmsghdr nlh = {
		.nlmsg_type = NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_NEW,
		.nlmsg_flags = NLM_F_REQUEST | NLM_F_CREATE | NLM_F_EXCL,
	};

	put(m, &nlh, sizeof(nlh));
	put(m, &gen, sizeof(gen));
	put_tuple(m, k, CTA_TUPLE_ORIG, client, server);
	put_tuple(m, k, CTA_TUPLE_REPLY, server, client);
	put_attr(m, CTA_STATUS, &status, 4);
	put_attr(m, CTA_TIMEOUT, &timeout, 4);
	put_attr(m, CTA_MARK, &mark, 4);
	if (k->proto == IPPROTO_TCP)
		put_state(m);
	nlh.nlmsg_len = (uint32_t)(m->at - from);
	memcpy(m->data + from, &nlh, sizeof(nlh));
}

/* Make entries 0..count-1. Returns 0, or the first errno the kernel answered. */
int bench_fill(int fd, uint32_t count)
{
	static struct message m;
	struct nlmsghdr answer[64];
	uint32_t n = 0, i;
	int code;

	while (n < count) {
		m.at = 0;
		for (i = 0; i < 128 && n < count; i++)
			put_entry(&m, n++);
		if (send(fd, m.data, m.at, 0) < 0)
			return errno;
		/* only errors are answered: no NLM_F_ACK */
		if (recv(fd, answer, sizeof(answer), MSG_DONTWAIT) > 0) {
			memcpy(&code, answer + 1, sizeof(code));
			return -code;
		}
	}
	return 0;
}

/*
 * Receive a dump until its end, the way ct_recv_decode() does, and look at no
 * more than the last message's type. Returns datagrams, or -errno.
 */
long bench_receive(int fd, void *buf, size_t len)
{
	struct sockaddr_nl from;
	struct iovec iov = { buf, len };
	struct nlmsghdr *first = buf;
	long datagrams = 0;
	ssize_t n;

	do {
		struct msghdr msg = {
			.msg_name = &from, .msg_namelen = sizeof(from),
			.msg_iov = &iov, .msg_iovlen = 1,
		};

		n = recvmsg(fd, &msg, 0);
		if (n < 0)
			return -errno;
		datagrams++;
		/* NLMSG_DONE may share a datagram: then it is the last 20 bytes */
		if (first->nlmsg_type == NLMSG_DONE)
			break;
		first = (void *)((char *)buf + n - NLMSG_LENGTH(sizeof(int)));
		if (first->nlmsg_type == NLMSG_DONE &&
		    first->nlmsg_len == NLMSG_LENGTH(sizeof(int)))
			break;
		first = buf;
	} while (1);
	return datagrams;
}
