// SPDX-License-Identifier: GPL-2.0-only
/*
 * xt_copyxid - target "MARK", revision 128: revision 2 and --copy-xid
 *
 * --copy-xid writes the xid of the slice that owns the local end of a packet
 * into the low half of skb->mark, and its owner into the connection's half of
 * ct->mark. Whose packet it is, the first of these answers:
 *
 *   out	the sending socket; the connection
 *   in		the receiving socket (a filled half answers for established
 *		TCP, so that no socket need be looked up); the connection
 *   through	the container whose interface it came in by; the connection of
 *		the container that it goes to
 *
 * The frequent cases are in this file in one piece, the rest is called.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/kmod.h>
#include <linux/module.h>
#include <linux/netfilter/x_tables.h>
#include <linux/skbuff.h>
#include <net/netfilter/nf_conntrack.h>

#include "internal.h"

MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("Xtables: packet mark by owning slice (MARK --copy-xid)");
MODULE_ALIAS("ipt_MARK");
MODULE_ALIAS("ip6t_MARK");
MODULE_SOFTDEP("pre: xt_mark");

/*
 * Masked by being 16 bits wide: one instruction, and none of the upper half's
 * owners ever sees a moment's other value.
 */
static __always_inline unsigned int set_xid(struct sk_buff *skb, u16 xid)
{
	u16 *half = (u16 *)&skb->mark;

	BUILD_BUG_ON(COPYXID_MARK_MASK != U16_MAX);
	half[IS_ENABLED(CONFIG_CPU_BIG_ENDIAN)] = xid;
	return XT_CONTINUE;
}

static noinline unsigned int nobody(struct sk_buff *skb,
				    const struct nf_hook_state *state,
				    enum copyxid_counter why)
{
	copyxid_count(state->net, why);
	return set_xid(skb, 0);
}

/* It passes through: from a container, or to one, or neither. */
static noinline unsigned int through(struct sk_buff *skb,
				     const struct nf_hook_state *state)
{
	enum ip_conntrack_info ctinfo;
	struct nf_conn *ct = nf_ct_get(skb, &ctinfo);
	u32 xid = copyxid_container(skb);

	if (xid) {	/* which is the mark already */
		copyxid_count(state->net, COPYXID_CNT_THROUGH_INTERFACE);
		if (ct && skb->skb_iif)
			copyxid_record_container(state->net, ct, ctinfo, xid);
		return XT_CONTINUE;
	}
	xid = ct ? copyxid_half(ct, copyxid_end_in(ctinfo)) : 0;
	if (!xid)
		return nobody(skb, state, COPYXID_CNT_FORWARDED);
	copyxid_count(state->net, COPYXID_CNT_THROUGH_CONN);
	return set_xid(skb, xid);
}

/* The socket does not answer: the connection does, or a counter says why not. */
static noinline unsigned int
out_by_conn(struct sk_buff *skb, const struct nf_hook_state *state,
	    bool other_netns)
{
	enum ip_conntrack_info ctinfo;
	const struct nf_conn *ct;
	u32 xid;

	/*
	 * The kernel's own packets are made here; one that was received (the
	 * device is kept in skb_iif, and is cleared where a packet enters or
	 * leaves a tunnel) only passes through. A tunnel's outer packet is
	 * the container's that sent the inner one; the tunnel is not.
	 */
	if (skb->skb_iif || copyxid_container(skb))
		return through(skb, state);

	ct = nf_ct_get(skb, &ctinfo);
	if (ct) {
		xid = copyxid_half(ct, copyxid_end_out(ctinfo));
		if (xid) {
			copyxid_count(state->net, COPYXID_CNT_OUT_CONN);
			return set_xid(skb, xid);
		}
	}
	return nobody(skb, state,
		      other_netns ? COPYXID_CNT_OTHER_NETNS :
		      ct ? COPYXID_CNT_NO_SOCKET : COPYXID_CNT_NO_CONNTRACK);
}

/* Out of line, so that the frequent case needs no stack frame. */
static noinline unsigned int
record_sender(const struct nf_hook_state *state, struct nf_conn *ct,
	      enum ip_conntrack_info ctinfo, const struct sock *sk, u32 xid)
{
	copyxid_record_sender(state, ct, ctinfo, sk, xid);
	return XT_CONTINUE;
}

/*
 * The sending socket is the node's, which erases no slice's half; unless it
 * opens a connection, see copyxid_opens().
 */
static noinline unsigned int
out_node(struct sk_buff *skb, const struct nf_hook_state *state,
	 const struct sock *sk)
{
	enum ip_conntrack_info ctinfo;
	struct nf_conn *ct = nf_ct_get(skb, &ctinfo);

	if (ct && copyxid_half(ct, copyxid_end_out(ctinfo)) &&
	    sk->sk_state == TCP_SYN_SENT && sk_is_tcp(sk))
		copyxid_disown(state->net, ct, copyxid_end_out(ctinfo));
	return nobody(skb, state, COPYXID_CNT_NODE_SOCKET);
}

/* The sending socket is xid's. */
static __always_inline unsigned int
out_owned(struct sk_buff *skb, const struct nf_hook_state *state,
	  const struct net *net, const struct sock *sk, u32 xid)
{
	enum ip_conntrack_info ctinfo;
	struct nf_conn *ct;

	set_xid(skb, xid);
	copyxid_count(net, COPYXID_CNT_OUT_SOCKET);
	ct = nf_ct_get(skb, &ctinfo);
	if (ct && unlikely(copyxid_half(ct, copyxid_end_out(ctinfo)) != xid))
		return record_sender(state, ct, ctinfo, sk, xid);
	return XT_CONTINUE;
}

/* No sending socket, not a full one, not ours; or in a namespace of its own. */
static noinline unsigned int
out_slow(struct sk_buff *skb, const struct nf_hook_state *state)
{
	const struct sock *sk = skb->sk;
	int owner;

	/* the copy of a multicast packet that loops back has lost its socket */
	if (!sk)
		sk = state->sk;
	if (!sk)
		return out_by_conn(skb, state, false);
	if (sk->sk_state == TCP_NEW_SYN_RECV)
		sk = inet_reqsk(sk)->rsk_listener;

	owner = copyxid_sk_owner(sk, state->net);
	if (owner < 0)
		return out_by_conn(skb, state, owner == COPYXID_OTHER_NETNS);
	if (!owner)
		return out_node(skb, state, sk);
	return out_owned(skb, state, state->net, sk, owner);
}

static __always_inline unsigned int
out(struct sk_buff *skb, const struct nf_hook_state *state)
{
	const struct net *net = state->net;
	const struct sock *sk = skb->sk;
	const struct copyxid_slice *s;

	if (!sk || unlikely(!net_eq(net, &init_net) ||
			    !copyxid_sk_speaks(sk, net)))
		return out_slow(skb, state);

	s = copyxid_sk_slice(sk);
	if (!s)
		return out_node(skb, state, sk);
	return out_owned(skb, state, net, sk, READ_ONCE(s->xid));
}

/* PREROUTING, and all that the short cuts of in() leave over. */
static noinline unsigned int
in_slow(struct sk_buff *skb, const struct nf_hook_state *state)
{
	enum ip_conntrack_info ctinfo;
	struct nf_conn *ct = nf_ct_get(skb, &ctinfo);
	enum copyxid_end end = copyxid_end_in(ctinfo);
	struct copyxid_found found = { .sk = skb->sk };
	int owner = COPYXID_NOT_A_SOCKET;
	bool early, opens;
	u32 half = ct ? copyxid_half(ct, end) : 0;
	u32 sender = copyxid_container(skb);

	/* the mark becomes the receiver's: the last that tells the sender */
	if (sender && ct)
		copyxid_record_container(state->net, ct, ctinfo, sender);
	if (half && copyxid_half_answers(ct)) {
		copyxid_count(state->net, COPYXID_CNT_IN_CONN);
		return set_xid(skb, half);
	}
	opens = copyxid_opens(skb, state, ct, ctinfo);
	/*
	 * Before INPUT skb->sk may still be the sender's, in a bridge even
	 * that of another namespace; unless BPF has chosen the receiver. And
	 * a SYN that opens a new connection is not for the last one's
	 * TIME_WAIT, which is what early demux finds.
	 */
	early = found.sk &&
		(state->hook == NF_INET_LOCAL_IN || skb_sk_is_prefetched(skb)) &&
		!(opens && found.sk->sk_state == TCP_TIME_WAIT);
	if (!early)
		found = copyxid_find_receiver(skb, state, ct, ctinfo, opens);

	if (found.sk) {
		const struct sock *sk = found.sk;

		if (sk->sk_state == TCP_NEW_SYN_RECV)
			sk = inet_reqsk(sk)->rsk_listener;
		owner = copyxid_sk_owner(sk, state->net);
		copyxid_found_put(found);
	}
	if (!owner) {
		if (half && opens && nf_ct_protonum(ct) == IPPROTO_TCP)
			copyxid_disown(state->net, ct, end);
		return nobody(skb, state, COPYXID_CNT_NODE_SOCKET);
	}
	if (owner > 0) {
		set_xid(skb, owner);
		copyxid_count(state->net, early ? COPYXID_CNT_IN_SOCKET :
						  COPYXID_CNT_IN_LOOKUP);
		if (ct && half != owner)
			copyxid_record_receiver(state->net, ct, end, owner);
		return XT_CONTINUE;
	}
	if (half) {
		copyxid_count(state->net, COPYXID_CNT_IN_CONN);
		return set_xid(skb, half);
	}
	return nobody(skb, state,
		      owner == COPYXID_OTHER_NETNS ? COPYXID_CNT_OTHER_NETNS :
		      ct ? COPYXID_CNT_NO_SOCKET : COPYXID_CNT_NO_CONNTRACK);
}

/* INPUT: early demux has been here. */
static __always_inline unsigned int
in(struct sk_buff *skb, const struct nf_hook_state *state)
{
	const struct net *net = state->net;
	enum ip_conntrack_info ctinfo;
	const struct nf_conn *ct = nf_ct_get(skb, &ctinfo);
	const struct copyxid_slice *s;
	const struct sock *sk;
	u32 half;

	if (unlikely(!ct || !net_eq(net, &init_net) || copyxid_container(skb)))
		return in_slow(skb, state);
	half = copyxid_half(ct, copyxid_end_in(ctinfo));
	if (nf_ct_protonum(ct) != IPPROTO_UDP) {
		if (!half || !copyxid_half_answers(ct))
			return in_slow(skb, state);
		copyxid_count(net, COPYXID_CNT_IN_CONN);
		return set_xid(skb, half);
	}
	/*
	 * Early demux finds connected sockets. Where one says what the half
	 * says, no more need be asked of it; else in_slow() asks.
	 */
	sk = skb->sk;
	if (!sk || sk->sk_state != TCP_ESTABLISHED)
		return in_slow(skb, state);
	s = copyxid_sk_slice(sk);
	if (!s || READ_ONCE(s->xid) != half)	/* an empty half is no xid */
		return in_slow(skb, state);
	copyxid_count(net, COPYXID_CNT_IN_SOCKET);
	return set_xid(skb, half);
}

static unsigned int copyxid_tg(struct sk_buff *skb,
			       const struct xt_action_param *par)
{
	const struct xt_mark_copyxid_tginfo *info = par->targinfo;
	const struct nf_hook_state *state = par->state;

	if (unlikely(!(info->flags & XT_MARK_COPYXID))) {
		skb->mark = (skb->mark & ~info->mask) ^ info->mark;
		return XT_CONTINUE;
	}
	if (state->hook == NF_INET_LOCAL_IN)
		return in(skb, state);
	if (state->hook >= NF_INET_LOCAL_OUT)
		return out(skb, state);
	if (state->hook == NF_INET_PRE_ROUTING)
		return in_slow(skb, state);
	return through(skb, state);
}

static int copyxid_tg_check(const struct xt_tgchk_param *par)
{
	const struct xt_mark_copyxid_tginfo *info = par->targinfo;
	int ret;

	if (info->flags & ~XT_MARK_COPYXID) {
		pr_info_ratelimited("MARK: unknown flags %#x\n",
				    info->flags & ~XT_MARK_COPYXID);
		return -EINVAL;
	}
	if (!(info->flags & XT_MARK_COPYXID))
		return 0;
	if (info->mark || info->mask) {
		pr_info_ratelimited("MARK: --copy-xid takes no mark and no mask\n");
		return -EINVAL;
	}
	if (par->family != NFPROTO_IPV4 && par->family != NFPROTO_IPV6) {
		pr_info_ratelimited("MARK: --copy-xid is for IPv4 and IPv6, not for family %u\n",
				    par->family);
		return -EINVAL;
	}
	ret = nf_ct_netns_get(par->net, par->family);
	if (ret < 0)
		pr_info_ratelimited("MARK: --copy-xid: no connection tracking for family %u (%d)\n",
				    par->family, ret);
	return ret;
}

static void copyxid_tg_destroy(const struct xt_tgdtor_param *par)
{
	const struct xt_mark_copyxid_tginfo *info = par->targinfo;

	if (info->flags & XT_MARK_COPYXID)
		nf_ct_netns_put(par->net, par->family);
}

static struct xt_target copyxid_tg_reg[] __read_mostly = {
	{
		.name		= "MARK",
		.revision	= XT_MARK_COPYXID_REVISION,
		.family		= NFPROTO_UNSPEC,
		.target		= copyxid_tg,
		.checkentry	= copyxid_tg_check,
		.destroy	= copyxid_tg_destroy,
		.targetsize	= sizeof(struct xt_mark_copyxid_tginfo),
		.me		= THIS_MODULE,
	},
};

static int __init copyxid_init(void)
{
	int ret;

	/*
	 * The kernel loads a target by its name only while no revision of it
	 * is there: once ours is, nobody would load stock's, and -j MARK of
	 * programs with the stock plugin would fail.
	 */
	request_module("xt_mark");

	ret = copyxid_counters_init();
	if (ret)
		return ret;
	ret = copyxid_genl_init();
	if (ret)
		goto err_counters;
	ret = xt_register_targets(copyxid_tg_reg, ARRAY_SIZE(copyxid_tg_reg));
	if (ret)
		goto err_genl;
	return 0;

err_genl:
	copyxid_genl_exit();
err_counters:
	copyxid_counters_exit();
	return ret;
}

static void __exit copyxid_exit(void)
{
	xt_unregister_targets(copyxid_tg_reg, ARRAY_SIZE(copyxid_tg_reg));
	copyxid_genl_exit();
	copyxid_counters_exit();
	copyxid_slice_flush();	/* kfree_rcu() needs nothing of this module */
}

module_init(copyxid_init);
module_exit(copyxid_exit);
