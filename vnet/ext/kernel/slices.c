// SPDX-License-Identifier: GPL-2.0-only
/*
 * The table: cgroup id -> xid
 *
 * Readers (copyxid_cgroup_slice) hold nothing but the RCU read lock. An entry
 * costs 64 bytes, the buckets 256 KiB (in the module's own memory, so that no
 * pointer to them need be loaded): 10,000 slices stay below 1 MiB.
 */
#include <linux/cgroup.h>
#include <linux/mutex.h>
#include <linux/netlink.h>
#include <linux/slab.h>

#include "internal.h"

struct hlist_head copyxid_buckets[1 << COPYXID_HASH_BITS] __read_mostly;
u8 copyxid_deepest[COPYXID_LEVEL_MAX + 1] __read_mostly;
unsigned int copyxid_generation = 1;
DEFINE_MUTEX(copyxid_slices_mutex);	/* writers of all of this */

static unsigned int per_level[COPYXID_LEVEL_MAX + 1];
static unsigned int total;

static struct copyxid_slice *lookup(u64 id)
{
	struct copyxid_slice *s;

	hlist_for_each_entry_rcu(s, copyxid_bucket(id), node,
				 lockdep_is_held(&copyxid_slices_mutex)) {
		if (s->id == id)
			return s;
	}
	return NULL;
}

/*
 * A reader goes from copyxid_deepest[n] to copyxid_deepest[that - 1] and so
 * on: always upwards, whatever is written meanwhile.
 */
static void levels_changed(void)
{
	unsigned int level, deepest = 0;

	for (level = 0; level <= COPYXID_LEVEL_MAX; level++) {
		if (per_level[level])
			deepest = level;
		WRITE_ONCE(copyxid_deepest[level], deepest);
	}
}

static void unlink(struct copyxid_slice *s)
{
	if (!--per_level[s->level])
		levels_changed();
	total--;
	hlist_del_rcu(&s->node);
	kfree_rcu(s, rcu);
}

/* How deep is this cgroup? It has to exist, in the default hierarchy. */
static int level_of(u64 id, struct netlink_ext_ack *extack)
{
	struct cgroup *cgrp = cgroup_get_from_id(id);
	int level;

	if (IS_ERR(cgrp)) {
		NL_SET_ERR_MSG(extack, "no such cgroup in the unified hierarchy");
		return PTR_ERR(cgrp);
	}
	level = cgrp->level;
	cgroup_put(cgrp);

	if (!level) {
		NL_SET_ERR_MSG(extack, "the root cgroup is the node, not a slice");
		return -EINVAL;
	}
	if (level > COPYXID_LEVEL_MAX) {
		NL_SET_ERR_MSG(extack, "the cgroup is nested too deep");
		return -EINVAL;
	}
	return level;
}

int copyxid_slice_set(u64 id, u32 xid, u16 nlmsg_flags,
		      struct netlink_ext_ack *extack)
{
	int level = level_of(id, extack);
	struct copyxid_slice *s;
	int ret = 0;

	if (level < 0)
		return level;

	mutex_lock(&copyxid_slices_mutex);
	s = lookup(id);
	if (s) {
		if (nlmsg_flags & NLM_F_EXCL) {
			NL_SET_ERR_MSG(extack, "the cgroup is in the table already");
			ret = -EEXIST;
		} else if (s->xid != xid) {
			WRITE_ONCE(s->xid, xid);
			copyxid_generation++;
		}
		goto unlock;
	}
	if ((nlmsg_flags & NLM_F_REPLACE) && !(nlmsg_flags & NLM_F_CREATE)) {
		NL_SET_ERR_MSG(extack, "the cgroup is not in the table");
		ret = -ENOENT;
		goto unlock;
	}
	if (total >= COPYXID_SLICES_MAX) {
		NL_SET_ERR_MSG(extack, "the table is full");
		ret = -ENOSPC;
		goto unlock;
	}
	s = kzalloc(sizeof(*s), GFP_KERNEL_ACCOUNT);
	if (!s) {
		ret = -ENOMEM;
		goto unlock;
	}
	s->id = id;
	s->xid = xid;
	s->level = level;
	hlist_add_head_rcu(&s->node, copyxid_bucket(id));
	if (!per_level[level]++)
		levels_changed();
	total++;
	copyxid_generation++;
unlock:
	mutex_unlock(&copyxid_slices_mutex);
	return ret;
}

/* The cgroup itself may be gone by now; its entry is not. */
int copyxid_slice_del(u64 id, struct netlink_ext_ack *extack)
{
	struct copyxid_slice *s;
	int ret = 0;

	mutex_lock(&copyxid_slices_mutex);
	s = lookup(id);
	if (s) {
		unlink(s);
		copyxid_generation++;
	} else {
		NL_SET_ERR_MSG(extack, "the cgroup is not in the table");
		ret = -ENOENT;
	}
	mutex_unlock(&copyxid_slices_mutex);
	return ret;
}

void copyxid_slice_flush(void)
{
	struct hlist_node *next;
	struct copyxid_slice *s;
	unsigned int i;

	mutex_lock(&copyxid_slices_mutex);
	for (i = 0; total && i < ARRAY_SIZE(copyxid_buckets); i++) {
		hlist_for_each_entry_safe(s, next, &copyxid_buckets[i], node)
			unlink(s);
	}
	copyxid_generation++;
	mutex_unlock(&copyxid_slices_mutex);
}
