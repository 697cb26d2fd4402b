// SPDX-License-Identifier: GPL-2.0-only
/*
 * Whose socket is it, and which socket is at this end
 *
 * Look-ups go by the connection's tuple and not by the packet's headers: it
 * holds the addresses as the local socket sees them, before and after NAT,
 * and no header need be parsed. Only packets without a connection are parsed,
 * by nf_socket. Everything here runs under the RCU read lock of a netfilter
 * hook, which is what keeps UDP sockets and TCP listeners in place without a
 * reference.
 */
#include <linux/icmp.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/tcp.h>
#include <net/addrconf.h>
#include <net/inet_hashtables.h>
#include <net/inet6_hashtables.h>
#include <net/ip.h>
#include <net/ipv6.h>
#include <net/netfilter/nf_socket.h>
#include <net/route.h>
#include <net/udp.h>

#include "internal.h"

/* The xid of a socket's slice, 0 for the node's, negative if it cannot say. */
int copyxid_sk_owner(const struct sock *sk, const struct net *net)
{
	const struct copyxid_slice *s;

	if (!sk || !sk_fullsock(sk))
		return COPYXID_NOT_A_SOCKET;
	if (!net_eq(sock_net(sk), net))
		return COPYXID_OTHER_NETNS;
	if (!copyxid_sk_speaks(sk, net))
		return COPYXID_NOT_A_SOCKET;
	s = copyxid_sk_slice(sk);
	return s ? READ_ONCE(s->xid) : 0;
}

static struct copyxid_found find4(struct net *net, u8 proto,
				  const struct nf_conntrack_tuple *t,
				  int dif, int sdif, bool reopen)
{
	struct inet_hashinfo *hash = net->ipv4.tcp_death_row.hashinfo;
	struct copyxid_found found = { };

	switch (proto) {
	case IPPROTO_TCP:
		found.sk = __inet_lookup(net, hash, NULL, 0,
					 t->dst.u3.ip, t->dst.u.tcp.port,
					 t->src.u3.ip, t->src.u.tcp.port,
					 dif, sdif, &found.put);
		if (!reopen || !found.sk || found.sk->sk_state != TCP_TIME_WAIT)
			break;
		copyxid_found_put(found);
		found.put = false;
		found.sk = __inet_lookup_listener(net, hash, NULL, 0,
						  t->dst.u3.ip,
						  t->dst.u.tcp.port,
						  t->src.u3.ip,
						  ntohs(t->src.u.tcp.port),
						  dif, sdif);
		break;
	case IPPROTO_UDP:
		found.sk = __udp4_lib_lookup(net,
					     t->dst.u3.ip, t->dst.u.udp.port,
					     t->src.u3.ip, t->src.u.udp.port,
					     dif, sdif, copyxid_udp_table(net),
					     NULL);
		break;
	}
	return found;
}

#if IS_ENABLED(CONFIG_IPV6)
static struct copyxid_found find6(struct net *net, u8 proto,
				  const struct nf_conntrack_tuple *t,
				  int dif, int sdif, bool reopen)
{
	struct inet_hashinfo *hash = net->ipv4.tcp_death_row.hashinfo;
	struct copyxid_found found = { };

	switch (proto) {
	case IPPROTO_TCP:
		found.sk = __inet6_lookup(net, hash, NULL, 0,
					  &t->dst.u3.in6, t->dst.u.tcp.port,
					  &t->src.u3.in6,
					  ntohs(t->src.u.tcp.port),
					  dif, sdif, &found.put);
		if (!reopen || !found.sk || found.sk->sk_state != TCP_TIME_WAIT)
			break;
		copyxid_found_put(found);
		found.put = false;
		found.sk = inet6_lookup_listener(net, hash, NULL, 0,
						 &t->dst.u3.in6,
						 t->dst.u.tcp.port,
						 &t->src.u3.in6,
						 ntohs(t->src.u.tcp.port),
						 dif, sdif);
		break;
	case IPPROTO_UDP:
		found.sk = __udp6_lib_lookup(net,
					     &t->dst.u3.in6, t->dst.u.udp.port,
					     &t->src.u3.in6, t->src.u.udp.port,
					     dif, sdif, copyxid_udp_table(net),
					     NULL);
		break;
	}
	return found;
}
#else
static struct copyxid_found find6(struct net *net, u8 proto,
				  const struct nf_conntrack_tuple *t,
				  int dif, int sdif, bool reopen)
{
	return (struct copyxid_found) { };
}
#endif

/*
 * The TCP or UDP socket at one end of a connection: established, then
 * listening or bound, to a wildcard too. reopen: a SYN that opens a new
 * connection is for the listener, not for the TIME_WAIT of the last one.
 */
static struct copyxid_found find(struct net *net, const struct nf_conn *ct,
				 enum copyxid_end end, int dif, int sdif,
				 bool reopen)
{
	const struct nf_conntrack_tuple *t = &ct->tuplehash[end].tuple;

	if (nf_ct_l3num(ct) == NFPROTO_IPV4)
		return find4(net, nf_ct_protonum(ct), t, dif, sdif, reopen);
	return find6(net, nf_ct_protonum(ct), t, dif, sdif, reopen);
}

struct copyxid_found copyxid_find(struct net *net, const struct nf_conn *ct,
				  enum copyxid_end end, int dif, int sdif)
{
	return find(net, ct, end, dif, sdif, false);
}

static bool bound_to_any(const struct sock *sk)
{
#if IS_ENABLED(CONFIG_IPV6)
	if (sk->sk_family == AF_INET6)
		return ipv6_addr_any(&sk->sk_v6_rcv_saddr);
#endif
	return !sk->sk_rcv_saddr;
}

/* Before routing: will this address be delivered here at all? */
static bool is_local(const struct nf_hook_state *state,
		     const union nf_inet_addr *addr)
{
	unsigned int type;

#if IS_ENABLED(CONFIG_IPV6)
	if (state->pf == NFPROTO_IPV6)
		return ipv6_addr_is_multicast(&addr->in6) ||
		       ipv6_chk_addr(state->net, &addr->in6, NULL, 0);
#endif
	type = inet_addr_type_dev_table(state->net, state->in, addr->ip);
	return type == RTN_LOCAL || type == RTN_BROADCAST ||
	       type == RTN_MULTICAST;
}

/* Without a connection: raw PREROUTING, which is before it, and NOTRACK. */
static struct copyxid_found find_untracked(const struct sk_buff *skb,
					   const struct nf_hook_state *state,
					   union nf_inet_addr *local)
{
	struct copyxid_found found = { };

#if IS_ENABLED(CONFIG_IPV6)
	if (state->pf == NFPROTO_IPV6) {
		local->in6 = ipv6_hdr(skb)->daddr;
		found.sk = nf_sk_lookup_slow_v6(state->net, skb, state->in);
		found.put = !!found.sk;
		return found;
	}
#endif
	local->ip = ip_hdr(skb)->daddr;
	found.sk = nf_sk_lookup_slow_v4(state->net, skb, state->in);
	found.put = !!found.sk;
	return found;
}

/*
 * A connection's first packet that is RELATED may be the one that a helper
 * foretold (FTP's data connection): that has a receiver. An ICMP error is
 * RELATED to the connection of the packet that it quotes: it has none.
 */
static bool is_icmp_error(const struct sk_buff *skb,
			  const struct nf_hook_state *state,
			  enum ip_conntrack_info ctinfo)
{
	if (ctinfo % IP_CT_IS_REPLY != IP_CT_RELATED)
		return false;
	if (state->pf == NFPROTO_IPV4)
		return ip_hdr(skb)->protocol == IPPROTO_ICMP;
#if IS_ENABLED(CONFIG_IPV6)
	return ipv6_find_hdr(skb, &(unsigned int) { 0 }, IPPROTO_ICMPV6, NULL,
			     NULL) >= 0;
#else
	return false;
#endif
}

/*
 * Does this packet begin a connection? Connection tracking may not have noticed:
 * it ignores a SYN on one that it holds for established or closed until that is
 * answered (tcp_packet()), and keeps entry and mark even then.
 */
bool copyxid_opens(const struct sk_buff *skb,
		   const struct nf_hook_state *state, const struct nf_conn *ct,
		   enum ip_conntrack_info ctinfo)
{
	const struct tcphdr *th;
	struct tcphdr buffer;
	int at;

	if (!ct)
		return false;
	if (ctinfo == IP_CT_NEW)
		return true;
	if (nf_ct_protonum(ct) != IPPROTO_TCP ||
	    ctinfo % IP_CT_IS_REPLY == IP_CT_RELATED)
		return false;
	at = skb_network_offset(skb) + ip_hdrlen(skb);
#if IS_ENABLED(CONFIG_IPV6)
	if (state->pf == NFPROTO_IPV6) {
		at = 0;
		if (ipv6_find_hdr(skb, &at, IPPROTO_TCP, NULL, NULL) < 0)
			return false;
	}
#endif
	th = skb_header_pointer(skb, at, sizeof(buffer), &buffer);
	return th && th->syn && !th->ack;
}

/*
 * The socket that will receive this packet, as far as can be told here. opens:
 * it begins a connection.
 */
struct copyxid_found copyxid_find_receiver(struct sk_buff *skb,
					   const struct nf_hook_state *state,
					   const struct nf_conn *ct,
					   enum ip_conntrack_info ctinfo,
					   bool opens)
{
	struct copyxid_found none = { }, found;
	union nf_inet_addr local;
	int dif, sdif;

	if (!ct) {
		found = find_untracked(skb, state, &local);
	} else {
		enum copyxid_end end = copyxid_end_in(ctinfo);
		u8 proto = nf_ct_protonum(ct);

		if (proto != IPPROTO_TCP && proto != IPPROTO_UDP)
			return none;
		if (is_icmp_error(skb, state, ctinfo))
			return none;
		if (state->pf == NFPROTO_IPV4) {
			dif = inet_iif(skb);
			sdif = inet_sdif(skb);
		} else {
			dif = inet6_iif(skb);
			sdif = inet6_sdif(skb);
		}
		found = find(state->net, ct, end, dif, sdif, opens);
		local = ct->tuplehash[end].tuple.src.u3;
	}
	/*
	 * A socket bound to no address would also match what is only passing
	 * through, which before routing cannot be seen otherwise.
	 */
	if (found.sk && state->hook == NF_INET_PRE_ROUTING &&
	    sk_fullsock(found.sk) && bound_to_any(found.sk) &&
	    !is_local(state, &local)) {
		copyxid_found_put(found);
		return none;
	}
	return found;
}
