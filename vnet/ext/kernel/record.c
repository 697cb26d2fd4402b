// SPDX-License-Identifier: GPL-2.0-only
/*
 * A packet's owner goes into its half of ct->mark
 *
 * Called (but for containers) only when the half does not hold that owner
 * already, so once or twice in a connection's life. A half is empty, or
 * somebody's:
 *
 *   empty		filled
 *   somebody else's	the newer owner takes it over, with an event for
 *			accounting - if the packet came from an ordinary socket
 *			that is really at this end of the connection
 */
#include <linux/icmp.h>
#include <linux/in.h>
#include <linux/in6.h>
#include <net/inet_sock.h>
#include <net/ipv6.h>
#include <net/netfilter/nf_conntrack_ecache.h>
#include <net/route.h>

#include "internal.h"

/*
 * Two CPUs may fill the two halves at once, hence the loop. An event only for
 * a connection that userspace has already heard of: the event of a new one is
 * sent later and carries the mark anyway.
 */
static void write_half(const struct net *net, struct nf_conn *ct,
		       enum copyxid_end end, u32 xid, bool take_over)
{
	unsigned int shift = copyxid_shift(end);
	u32 mark = READ_ONCE(ct->mark);
	u32 old, want;

	do {
		old = (mark >> shift) & COPYXID_XID_MAX;
		if (old == xid)
			return;
		if (old && !take_over) {
			copyxid_count(net, COPYXID_CNT_INTRUSION);
			return;
		}
		want = (mark & ~(COPYXID_XID_MAX << shift)) | xid << shift;
	} while (!try_cmpxchg(&ct->mark, &mark, want));

	copyxid_count(net, old ? COPYXID_CNT_CONFLICT : COPYXID_CNT_FILLED);
	if (nf_ct_is_confirmed(ct))
		nf_conntrack_event_cache(IPCT_MARK, ct);
}

/* The connection is another one by now, and this end of it the node's. */
void copyxid_disown(const struct net *net, struct nf_conn *ct,
		    enum copyxid_end end)
{
	if (!nf_ct_is_template(ct))
		write_half(net, ct, end, 0, true);
}

/*
 * A raw sender may have a half that is still empty where the connection is
 * its own: it has just made it, or nobody else is there. An ordinary socket
 * may be there and not have sent anything yet.
 */
static bool raw_may_fill(const struct nf_hook_state *state,
			 const struct nf_conn *ct, enum copyxid_end end,
			 enum ip_conntrack_info ctinfo)
{
	struct copyxid_found found;

	if (!nf_ct_is_confirmed(ct))
		return true;
	/* a forged ICMP error says nothing about the connection it quotes */
	if (ctinfo % IP_CT_IS_REPLY == IP_CT_RELATED)
		return false;

	switch (nf_ct_protonum(ct)) {
	case IPPROTO_TCP:
	case IPPROTO_UDP:
		found = copyxid_find(state->net, ct, end,
				     state->out ? state->out->ifindex : 0, 0);
		copyxid_found_put(found);
		return !found.sk;
	case IPPROTO_ICMP:	/* the kernel answers these itself */
	case IPPROTO_ICMPV6:
	case IPPROTO_SCTP:	/* has sockets that cannot be looked up */
	case IPPROTO_DCCP:
		return false;
	default:
		return true;
	}
}

/*
 * A UDP socket that is bound to an address can send from another (IP_PKTINFO),
 * where it hears nothing and somebody else may: it is worth no more than a raw
 * one then. What goes to a group is no conversation, and its senders may well
 * share a port.
 */
static bool sends_from_elsewhere(struct net *net, const struct sock *sk,
				 const struct nf_conntrack_tuple *t)
{
	unsigned int type;

	if (sk->sk_protocol != IPPROTO_UDP)
		return false;
#if IS_ENABLED(CONFIG_IPV6)
	if (t->src.l3num == NFPROTO_IPV6)
		return !ipv6_addr_any(&sk->sk_v6_rcv_saddr) &&
		       !ipv6_addr_equal(&sk->sk_v6_rcv_saddr,
					&t->src.u3.in6) &&
		       !ipv6_addr_is_multicast(&t->dst.u3.in6);
#endif
	if (!sk->sk_rcv_saddr || sk->sk_rcv_saddr == t->src.u3.ip)
		return false;
	type = inet_addr_type(net, t->dst.u3.ip);
	return type != RTN_MULTICAST && type != RTN_BROADCAST;
}

/* sk sent this packet and is owned by xid, which is not what the half says. */
void copyxid_record_sender(const struct nf_hook_state *state,
			   struct nf_conn *ct, enum ip_conntrack_info ctinfo,
			   const struct sock *sk, u32 xid)
{
	enum copyxid_end end = copyxid_end_out(ctinfo);
	const struct nf_conntrack_tuple *t = &ct->tuplehash[end].tuple;
	bool is_raw = (sk->sk_family != AF_INET && sk->sk_family != AF_INET6) ||
		      sk->sk_type == SOCK_RAW;

	if (nf_ct_is_template(ct))
		return;
	/*
	 * A tunnel's outer packet still carries the socket of the inner one:
	 * that socket pays for this packet, but does not own the tunnel.
	 */
	if (!is_raw && (sk->sk_protocol != nf_ct_protonum(ct) ||
			inet_sk(sk)->inet_sport != t->src.u.all))
		return;
	if (is_raw || sends_from_elsewhere(state->net, sk, t)) {
		if (!copyxid_half(ct, end) &&
		    !raw_may_fill(state, ct, end, ctinfo)) {
			copyxid_count(state->net, COPYXID_CNT_INTRUSION);
			return;
		}
		write_half(state->net, ct, end, xid, false);
		return;
	}
	write_half(state->net, ct, end, xid, true);
}

/* A socket of xid receives here. Never a raw one: those are not looked up. */
void copyxid_record_receiver(const struct net *net, struct nf_conn *ct,
			     enum copyxid_end end, u32 xid)
{
	if (!nf_ct_is_template(ct))
		write_half(net, ct, end, xid, true);
}

/*
 * A container of xid sends this. Whoever is root in there may send anything, so
 * it has no more rights than a raw sender: it fills what is empty.
 */
void copyxid_record_container(const struct net *net, struct nf_conn *ct,
			      enum ip_conntrack_info ctinfo, u32 xid)
{
	enum copyxid_end end = copyxid_end_out(ctinfo);

	if (copyxid_half(ct, end) == xid || nf_ct_is_template(ct))
		return;
	/* an ICMP error says nothing about the connection that it quotes */
	if (ctinfo % IP_CT_IS_REPLY == IP_CT_RELATED && nf_ct_is_confirmed(ct))
		return;
	write_half(net, ct, end, xid, false);
}
