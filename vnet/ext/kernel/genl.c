// SPDX-License-Identifier: GPL-2.0-only
/*
 * The generic netlink family "copyxid"
 *
 * The attributes and commands are documented in xt_copyxid.h.
 */
#include <linux/mutex.h>
#include <net/genetlink.h>
#include <net/netlink.h>

#include "internal.h"

static struct genl_family copyxid_family;

/*
 * NLA_POLICY_RANGE() keeps its limits in 16 bits with a sign; and 6.1 wants
 * this writable.
 */
static struct netlink_range_validation xid_range __ro_after_init = {
	.min	= 1,
	.max	= COPYXID_XID_MAX,
};

static const struct nla_policy set_policy[] = {
	[COPYXID_A_CGROUP_ID]	= { .type = NLA_U64 },
	[COPYXID_A_XID]		= NLA_POLICY_FULL_RANGE(NLA_U32, &xid_range),
};

static const struct nla_policy del_policy[] = {
	[COPYXID_A_CGROUP_ID]	= { .type = NLA_U64 },
};

/* A command with no attributes has to say so: with no policy all would pass. */
static const struct nla_policy no_policy[] = {
	[COPYXID_A_PAD]		= { .type = NLA_REJECT },
};

static int slice_set(struct sk_buff *skb, struct genl_info *info)
{
	if (GENL_REQ_ATTR_CHECK(info, COPYXID_A_CGROUP_ID)) {
		GENL_SET_ERR_MSG(info, "which cgroup? CGROUP_ID is missing");
		return -EINVAL;
	}
	if (GENL_REQ_ATTR_CHECK(info, COPYXID_A_XID)) {
		GENL_SET_ERR_MSG(info, "which slice? XID is missing");
		return -EINVAL;
	}
	return copyxid_slice_set(nla_get_u64(info->attrs[COPYXID_A_CGROUP_ID]),
				 nla_get_u32(info->attrs[COPYXID_A_XID]),
				 info->nlhdr->nlmsg_flags, info->extack);
}

static int slice_del(struct sk_buff *skb, struct genl_info *info)
{
	if (GENL_REQ_ATTR_CHECK(info, COPYXID_A_CGROUP_ID)) {
		GENL_SET_ERR_MSG(info, "which cgroup? CGROUP_ID is missing");
		return -EINVAL;
	}
	return copyxid_slice_del(nla_get_u64(info->attrs[COPYXID_A_CGROUP_ID]),
				 info->extack);
}

static int slice_flush(struct sk_buff *skb, struct genl_info *info)
{
	copyxid_slice_flush();
	return 0;
}

static int put_slice(struct sk_buff *skb, struct netlink_callback *cb,
		     const struct copyxid_slice *s)
{
	void *hdr = genlmsg_put(skb, NETLINK_CB(cb->skb).portid,
				cb->nlh->nlmsg_seq, &copyxid_family,
				NLM_F_MULTI, COPYXID_CMD_SLICE_GET);

	if (!hdr)
		return -EMSGSIZE;
	genl_dump_check_consistent(cb, hdr);
	if (nla_put_u64_64bit(skb, COPYXID_A_CGROUP_ID, s->id, COPYXID_A_PAD) ||
	    nla_put_u32(skb, COPYXID_A_XID, s->xid) ||
	    nla_put_u32(skb, COPYXID_A_LEVEL, s->level)) {
		genlmsg_cancel(skb, hdr);
		return -EMSGSIZE;
	}
	genlmsg_end(skb, hdr);
	return 0;
}

/*
 * args[0] and args[1] are the bucket, and the place in it, to go on from. A
 * table that changed between two messages shows as NLM_F_DUMP_INTR.
 */
static int slice_dump(struct sk_buff *skb, struct netlink_callback *cb)
{
	unsigned long bucket, place, skip = cb->args[1];
	const struct copyxid_slice *s;

	mutex_lock(&copyxid_slices_mutex);
	cb->seq = copyxid_generation;
	for (bucket = cb->args[0]; bucket < ARRAY_SIZE(copyxid_buckets); bucket++) {
		place = 0;
		hlist_for_each_entry(s, &copyxid_buckets[bucket], node) {
			if (place >= skip && put_slice(skb, cb, s))
				goto full;
			place++;
		}
		skip = 0;
	}
	place = 0;
full:
	mutex_unlock(&copyxid_slices_mutex);
	cb->args[0] = bucket;
	cb->args[1] = place;
	return skb->len;
}

static int put_stats(struct sk_buff *skb, struct netlink_callback *cb,
		     const struct copyxid_net *cn)
{
	void *hdr = genlmsg_put(skb, NETLINK_CB(cb->skb).portid,
				cb->nlh->nlmsg_seq, &copyxid_family,
				NLM_F_MULTI, COPYXID_CMD_STATS_GET);
	struct copyxid_counters sum;

	if (!hdr)
		return -EMSGSIZE;
	copyxid_counters_sum(cn, &sum);
	if (nla_put_u32(skb, COPYXID_A_NETNS, cn->inum) ||
	    nla_put(skb, COPYXID_A_COUNTERS, sizeof(sum), &sum)) {
		genlmsg_cancel(skb, hdr);
		return -EMSGSIZE;
	}
	genlmsg_end(skb, hdr);
	return 0;
}

/* args[0] is the seq of the last namespace told of: the list is in its order. */
static int stats_dump(struct sk_buff *skb, struct netlink_callback *cb)
{
	const struct copyxid_net *cn;

	mutex_lock(&copyxid_nets_mutex);
	list_for_each_entry(cn, &copyxid_nets, list) {
		if (cn->seq <= (unsigned long)cb->args[0])
			continue;
		if (put_stats(skb, cb, cn))
			break;
		cb->args[0] = cn->seq;
	}
	mutex_unlock(&copyxid_nets_mutex);
	return skb->len;
}

static const struct genl_ops copyxid_ops[] = {
	{
		.cmd		= COPYXID_CMD_SLICE_SET,
		.flags		= GENL_ADMIN_PERM,
		.policy		= set_policy,
		.maxattr	= ARRAY_SIZE(set_policy) - 1,
		.doit		= slice_set,
	},
	{
		.cmd		= COPYXID_CMD_SLICE_DEL,
		.flags		= GENL_ADMIN_PERM,
		.policy		= del_policy,
		.maxattr	= ARRAY_SIZE(del_policy) - 1,
		.doit		= slice_del,
	},
	{
		.cmd		= COPYXID_CMD_SLICE_FLUSH,
		.flags		= GENL_ADMIN_PERM,
		.policy		= no_policy,
		.maxattr	= ARRAY_SIZE(no_policy) - 1,
		.doit		= slice_flush,
	},
	{
		.cmd		= COPYXID_CMD_SLICE_GET,
		.flags		= GENL_ADMIN_PERM,
		.policy		= no_policy,
		.maxattr	= ARRAY_SIZE(no_policy) - 1,
		.dumpit		= slice_dump,
	},
	{
		.cmd		= COPYXID_CMD_STATS_GET,
		.flags		= GENL_ADMIN_PERM,
		.policy		= no_policy,
		.maxattr	= ARRAY_SIZE(no_policy) - 1,
		.dumpit		= stats_dump,
	},
};

static struct genl_family copyxid_family __ro_after_init = {
	.name		= COPYXID_GENL_NAME,
	.version	= COPYXID_GENL_VERSION,
	.module		= THIS_MODULE,
	.ops		= copyxid_ops,
	.n_ops		= ARRAY_SIZE(copyxid_ops),
	/*
	 * From this command on generic netlink refuses NLM_F_CREATE, _EXCL and
	 * _REPLACE, which SLICE_SET understands; the commands after it do not.
	 */
	.resv_start_op	= COPYXID_CMD_SLICE_SET + 1,
};

int __init copyxid_genl_init(void)
{
	return genl_register_family(&copyxid_family);
}

void copyxid_genl_exit(void)
{
	genl_unregister_family(&copyxid_family);
}
