/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * A socket carries its slice's xid from birth to death
 *
 * The low half of sk->sk_mark is the xid of the socket's cgroup, always and
 * for everyone, whatever SO_MARK asks for; the packets of the socket carry it
 * from there. Observing changes nothing about that: it is the data path's
 * truth, and setsockopt() succeeds either way.
 */
#ifndef _VNET_MARK_H
#define _VNET_MARK_H

#include "events.h"

static __always_inline __u32 with_xid(__u32 mark, __u32 xid)
{
	return (mark & ~VNET_XID_MASK) | (xid & VNET_XID_MASK);
}

/* A refused socket() fails with this error, and not with EPERM (5.18+). */
static __always_inline int fail_with(int error)
{
	bpf_set_retval(-error);
	return 0;
}

SEC("cgroup/sock_create")
int vnet_sock_create(struct bpf_sock *ctx)
{
	struct policy p = in_force();
	__u32 xid = xid_of_sk(p, plain(ctx));
	struct vnet_event event = { .xid = xid };

	if (!xid)
		return 1;
	ctx->mark = with_xid(ctx->mark, xid);
	event.family = ctx->family;
	event.type = ctx->type;
	event.proto = ctx->protocol;
	event.mark = ctx->mark;
	if (ctx->type == SOCK_RAW) {
		if (find_in(grants, p, &xid) != VNET_RAW_DENY)
			return 1;
		event.kind = VNET_KIND_RAW;
		by_process(&event);
		return refuse(p, &event) ? fail_with(EACCES) : 1;
	}
	/*
	 * The kernel makes MPTCP's subflows itself, without this hook: they
	 * would carry no mark. Programs take this error for a kernel without
	 * MPTCP and use TCP.
	 */
	if (ctx->protocol == IPPROTO_MPTCP) {
		event.kind = VNET_KIND_MPTCP;
		by_process(&event);
		return refuse(p, &event) ? fail_with(EPROTONOSUPPORT) : 1;
	}
	return 1;
}

SEC("cgroup/setsockopt")
int vnet_setsockopt(struct bpf_sockopt *ctx)
{
	__u32 *mark = ctx->optval;
	struct vnet_event event = { };
	struct policy p;
	struct sock *sk;
	__u32 asked;

	if (ctx->level != SOL_SOCKET || ctx->optname != SO_MARK) {
		/* more than a page is not shown here: 0 lets it pass */
		if (ctx->optlen > 4096)
			ctx->optlen = 0;
		return 1;
	}
	/* too short for the kernel as well; the buffer has room for 16 bytes */
	if (ctx->optlen < (int)sizeof(*mark) ||
	    (void *)(mark + 1) > ctx->optval_end)
		return 1;
	p = in_force();
	sk = plain(ctx->sk);
	event.xid = xid_of_sk(p, sk);
	/* never 0, which would pass the original on, however long it says it is */
	ctx->optlen = sizeof(*mark);
	/*
	 * Of a slice that is no more, until it is adopted; or of one that only
	 * another instance of these programs knows of, which will see to it.
	 */
	if (!event.xid && (BPF_CORE_READ(sk, sk_mark) & VNET_XID_MASK))
		return 1;
	asked = *mark;
	*mark = with_xid(asked, event.xid);
	asked &= VNET_XID_MASK;
	if (!asked || asked == event.xid)
		return 1;
	event.kind = VNET_KIND_MARK;
	event.mark = asked;
	event.owner = asked;
	event.family = BPF_CORE_READ(sk, __sk_common.skc_family);
	event.type = BPF_CORE_READ(sk, sk_type);
	event.proto = BPF_CORE_READ(sk, sk_protocol);
	by_process(&event);
	p.observe = false;	/* it is not let through there either */
	refuse(p, &event);
	return 1;
}

/* The full socket that sends this packet; NULL where there is none. */
static __always_inline struct sock *sender_of(struct sk_buff *skb)
{
	struct sock *sk = BPF_CORE_READ(skb, sk);
	__u8 state;

	if (!sk)
		return NULL;
	state = BPF_CORE_READ(sk, __sk_common.skc_state);
	if (state == TCP_TIME_WAIT || state == TCP_NEW_SYN_RECV)
		return NULL;
	return sk;
}

static __always_inline bool is_ordinary(struct sock *sk)
{
	__u16 family = BPF_CORE_READ(sk, __sk_common.skc_family);

	return (family == AF_INET || family == AF_INET6) &&
	       BPF_CORE_READ(sk, sk_type) != SOCK_RAW;
}

/*
 * Whether a slice's raw or packet socket sends this. The node's do not count,
 * and so the sockets do not through which the kernel itself sends resets and
 * ICMP errors, which are raw ones, too: what they send is the connection's.
 */
SEC("socket")
int vnet_raw(struct __sk_buff *ctx)
{
	struct sk_buff *skb = plain(ctx);
	struct sock *sk = sender_of(skb);

	return sk && !is_ordinary(sk) && (ctx->mark & VNET_XID_MASK);
}

#endif /* _VNET_MARK_H */
