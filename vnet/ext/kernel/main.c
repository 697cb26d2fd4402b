// SPDX-License-Identifier: GPL-2.0-only
/*
 * xt_copyxid - target "MARK", revision 128: revision 2 and --copy-xid
 *
 * --copy-xid writes the xid of the slice that owns the local end of a packet
 * into the low half of skb->mark, and its owner into the connection's half of
 * ct->mark. Whose packet it is, the first of these answers:
 *
 *   out	the sending socket; the connection
 *   in		the receiving socket (a filled half answers for TCP, so that
 *		no socket need be looked up); the connection
 *   through	nobody
 *
 * The frequent cases are in this file in one piece, the rest is called.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/module.h>
#include <linux/netfilter/x_tables.h>
#include <linux/skbuff.h>
#include <net/netfilter/nf_conntrack.h>

#include "internal.h"

MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("Xtables: packet mark by owning slice (MARK --copy-xid)");
MODULE_ALIAS("ipt_MARK");
MODULE_ALIAS("ip6t_MARK");

/* The socket did not answer: the connection does, or a counter says why not. */
static noinline u32 out_by_conn(const struct sk_buff *skb,
				const struct nf_hook_state *state,
				bool other_netns)
{
	enum ip_conntrack_info ctinfo;
	const struct nf_conn *ct;
	u32 xid;

	/*
	 * The kernel's own packets are made here; one that was received (the
	 * device is kept in skb_iif, and is cleared where a packet enters or
	 * leaves a tunnel) only passes through.
	 */
	if (skb->skb_iif) {
		copyxid_count(state->net, COPYXID_CNT_FORWARDED);
		return 0;
	}
	ct = nf_ct_get(skb, &ctinfo);
	if (ct) {
		xid = copyxid_half(ct, copyxid_end_out(ctinfo));
		if (xid) {
			copyxid_count(state->net, COPYXID_CNT_OUT_CONN);
			return xid;
		}
	}
	copyxid_count(state->net, other_netns ? COPYXID_CNT_OTHER_NETNS :
				  ct ? COPYXID_CNT_NO_SOCKET :
				       COPYXID_CNT_NO_CONNTRACK);
	return 0;
}

/* A sending socket that is none, not a full one, or not ours. */
static noinline u32 out_slow(const struct sk_buff *skb,
			     const struct nf_hook_state *state)
{
	enum ip_conntrack_info ctinfo;
	const struct sock *sk = skb->sk;
	struct nf_conn *ct;
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
	if (!owner) {
		copyxid_count(state->net, COPYXID_CNT_NODE_SOCKET);
		return 0;
	}
	copyxid_count(state->net, COPYXID_CNT_OUT_SOCKET);
	ct = nf_ct_get(skb, &ctinfo);
	if (ct && copyxid_half(ct, copyxid_end_out(ctinfo)) != owner)
		copyxid_record_sender(state, ct, ctinfo, sk, owner);
	return owner;
}

static __always_inline u32 out(const struct sk_buff *skb,
			       const struct nf_hook_state *state)
{
	enum ip_conntrack_info ctinfo;
	const struct sock *sk = skb->sk;
	struct nf_conn *ct;
	u32 xid;

	if (unlikely(!sk || !copyxid_sk_speaks(sk, state->net)))
		return out_slow(skb, state);

	xid = copyxid_sk_xid(sk);
	if (!xid) {
		copyxid_count(state->net, COPYXID_CNT_NODE_SOCKET);
		return 0;
	}
	copyxid_count(state->net, COPYXID_CNT_OUT_SOCKET);
	ct = nf_ct_get(skb, &ctinfo);
	if (likely(ct) &&
	    unlikely(copyxid_half(ct, copyxid_end_out(ctinfo)) != xid))
		copyxid_record_sender(state, ct, ctinfo, sk, xid);
	return xid;
}

/* No half that may answer for TCP, no early demux: look the receiver up. */
static noinline u32 in_slow(struct sk_buff *skb,
			    const struct nf_hook_state *state)
{
	enum ip_conntrack_info ctinfo;
	struct nf_conn *ct = nf_ct_get(skb, &ctinfo);
	struct copyxid_found found;
	int owner = COPYXID_NOT_A_SOCKET;
	bool early;
	u32 xid;

	/*
	 * Before INPUT skb->sk may still be the sender's, in a bridge even
	 * that of another namespace; unless BPF has chosen the receiver.
	 */
	early = skb->sk && (state->hook == NF_INET_LOCAL_IN ||
			    skb_sk_is_prefetched(skb));
	if (early)
		found = (struct copyxid_found) { .sk = skb->sk };
	else
		found = copyxid_find_receiver(skb, state, ct, ctinfo);

	if (found.sk) {
		const struct sock *sk = found.sk;

		if (sk->sk_state == TCP_NEW_SYN_RECV)
			sk = inet_reqsk(sk)->rsk_listener;
		owner = copyxid_sk_owner(sk, state->net);
		copyxid_found_put(found);
	}
	if (owner > 0) {
		copyxid_count(state->net, early ? COPYXID_CNT_IN_SOCKET :
						  COPYXID_CNT_IN_LOOKUP);
		if (ct)
			copyxid_record_receiver(state->net, ct,
						copyxid_end_in(ctinfo), owner);
		return owner;
	}
	if (!owner) {
		copyxid_count(state->net, COPYXID_CNT_NODE_SOCKET);
		return 0;
	}
	if (ct) {
		xid = copyxid_half(ct, copyxid_end_in(ctinfo));
		if (xid) {
			copyxid_count(state->net, COPYXID_CNT_IN_CONN);
			return xid;
		}
	}
	copyxid_count(state->net,
		      owner == COPYXID_OTHER_NETNS ? COPYXID_CNT_OTHER_NETNS :
		      ct ? COPYXID_CNT_NO_SOCKET : COPYXID_CNT_NO_CONNTRACK);
	return 0;
}

static __always_inline u32 in(struct sk_buff *skb,
			      const struct nf_hook_state *state)
{
	enum ip_conntrack_info ctinfo;
	const struct sock *sk;
	enum copyxid_end end;
	struct nf_conn *ct;
	u32 half, xid;

	ct = nf_ct_get(skb, &ctinfo);
	if (unlikely(!ct))
		return in_slow(skb, state);

	end = copyxid_end_in(ctinfo);
	half = copyxid_half(ct, end);
	/*
	 * UDP alone is not believed: its port can change hands while the
	 * connection lasts. A TCP connection's cannot, nothing else has a
	 * receiving socket of its own.
	 */
	if (half && likely(nf_ct_protonum(ct) != IPPROTO_UDP)) {
		copyxid_count(state->net, COPYXID_CNT_IN_CONN);
		return half;
	}

	sk = skb->sk;
	if (!sk || state->hook != NF_INET_LOCAL_IN ||
	    unlikely(!copyxid_sk_speaks(sk, state->net)))
		return in_slow(skb, state);

	xid = copyxid_sk_xid(sk);
	if (!xid) {
		copyxid_count(state->net, COPYXID_CNT_NODE_SOCKET);
		return 0;
	}
	copyxid_count(state->net, COPYXID_CNT_IN_SOCKET);
	if (unlikely(half != xid))
		copyxid_record_receiver(state->net, ct, end, xid);
	return xid;
}

static __always_inline void set_mark(struct sk_buff *skb, u32 mask, u32 xid)
{
	u32 mark = (skb->mark & ~mask) ^ xid;

	if (skb->mark != mark)
		skb->mark = mark;
}

static unsigned int copyxid_tg(struct sk_buff *skb,
			       const struct xt_action_param *par)
{
	const struct xt_mark_copyxid_tginfo *info = par->targinfo;
	const struct nf_hook_state *state = par->state;
	u32 xid = 0;

	if (unlikely(!(info->flags & XT_MARK_COPYXID))) {
		set_mark(skb, info->mask, info->mark);
		return XT_CONTINUE;
	}
	if (state->hook >= NF_INET_LOCAL_OUT)
		xid = out(skb, state);
	else if (likely(state->hook != NF_INET_FORWARD))
		xid = in(skb, state);
	else
		copyxid_count(state->net, COPYXID_CNT_FORWARDED);

	set_mark(skb, COPYXID_MARK_MASK, xid);
	return XT_CONTINUE;
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

	ret = copyxid_slices_init();
	if (ret)
		return ret;
	ret = copyxid_counters_init();
	if (ret)
		goto err_slices;
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
err_slices:
	copyxid_slices_exit();
	return ret;
}

static void __exit copyxid_exit(void)
{
	xt_unregister_targets(copyxid_tg_reg, ARRAY_SIZE(copyxid_tg_reg));
	copyxid_genl_exit();
	copyxid_counters_exit();
	copyxid_slices_exit();
}

module_init(copyxid_init);
module_exit(copyxid_exit);
