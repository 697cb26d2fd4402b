// SPDX-License-Identifier: GPL-2.0-only
/*
 * Per namespace, per CPU: why packets got the marks they got
 *
 * The initial namespace has static counters, the others theirs by
 * net_generic(). The list is for the dump, which may find namespaces come and
 * gone between two of its messages.
 */
#include <linux/mutex.h>
#include <net/net_namespace.h>

#include "internal.h"

DEFINE_PER_CPU(struct copyxid_counters, copyxid_init_counters);
unsigned int copyxid_net_id __read_mostly;
LIST_HEAD(copyxid_nets);
DEFINE_MUTEX(copyxid_nets_mutex);	/* copyxid_nets and last_seq */

static u64 last_seq;

/* Counts in any namespace but the initial one. */
void copyxid_count_elsewhere(const struct net *net, enum copyxid_counter which)
{
	const struct copyxid_net *cn = net_generic(net, copyxid_net_id);

	this_cpu_inc(cn->counters->n[which]);
}

void copyxid_counters_sum(const struct copyxid_net *cn,
			  struct copyxid_counters *sum)
{
	unsigned int i;
	int cpu;

	memset(sum, 0, sizeof(*sum));
	for_each_possible_cpu(cpu) {
		const struct copyxid_counters *c =
			per_cpu_ptr(cn->counters, cpu);

		for (i = 0; i < COPYXID_CNT_MAX; i++)
			sum->n[i] += READ_ONCE(c->n[i]);
	}
}

static int __net_init counters_net_init(struct net *net)
{
	struct copyxid_net *cn = net_generic(net, copyxid_net_id);

	if (net_eq(net, &init_net)) {
		cn->counters = &copyxid_init_counters;
	} else {
		cn->counters = alloc_percpu_gfp(struct copyxid_counters,
						GFP_KERNEL_ACCOUNT);
		if (!cn->counters)
			return -ENOMEM;
	}
	cn->inum = net->ns.inum;

	mutex_lock(&copyxid_nets_mutex);
	cn->seq = ++last_seq;
	list_add_tail(&cn->list, &copyxid_nets);
	mutex_unlock(&copyxid_nets_mutex);
	return 0;
}

/* The namespace's hooks are gone, and a grace period has passed since. */
static void __net_exit counters_net_exit(struct net *net)
{
	struct copyxid_net *cn = net_generic(net, copyxid_net_id);

	mutex_lock(&copyxid_nets_mutex);
	list_del(&cn->list);
	mutex_unlock(&copyxid_nets_mutex);

	if (!net_eq(net, &init_net))
		free_percpu(cn->counters);
}

static struct pernet_operations counters_net_ops = {
	.init	= counters_net_init,
	.exit	= counters_net_exit,
	.id	= &copyxid_net_id,
	.size	= sizeof(struct copyxid_net),
};

int __init copyxid_counters_init(void)
{
	return register_pernet_subsys(&counters_net_ops);
}

void copyxid_counters_exit(void)
{
	unregister_pernet_subsys(&counters_net_ops);
}
