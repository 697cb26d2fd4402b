/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What is said about a refusal: always a number, now and then an event
 *
 * An event costs its reader time, and who is refused may try a million times
 * a second: each slice, kind and CPU has a bucket of VNET_EVENT_BURST tokens,
 * refilled with VNET_EVENT_PER_SECOND. What gets no event is counted.
 */
#ifndef _VNET_EVENTS_H
#define _VNET_EVENTS_H

#include "policy.h"

#define EVENT_INTERVAL	(1000000000ull / VNET_EVENT_PER_SECOND)

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, struct vnet_counter_key);
	__type(value, struct vnet_counter);
} counters SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 20);
} events SEC(".maps");

/* This CPU's counters of a slice and kind; NULL where there is no memory. */
static __always_inline struct vnet_counter *counter_of(__u32 xid, __u32 kind)
{
	struct vnet_counter_key key = { .xid = xid, .kind = kind };
	struct vnet_counter *c = bpf_map_lookup_elem(&counters, &key);

	if (!c) {
		struct vnet_counter none = { };

		bpf_map_update_elem(&counters, &key, &none, BPF_NOEXIST);
		c = bpf_map_lookup_elem(&counters, &key);
	}
	return c;
}

/*
 * A softirq may come in between, or another task of this CPU: then a token
 * counts for two, which is no harm. The counters are added to atomically.
 */
static __always_inline bool take_token(struct vnet_counter *c, __u64 now)
{
	__u64 tokens = c->tokens;
	__u64 more = (now - c->refilled) / EVENT_INTERVAL;

	if (more) {
		tokens += more;
		if (tokens > VNET_EVENT_BURST)
			tokens = VNET_EVENT_BURST;
		c->refilled = now;
	}
	if (tokens)
		c->tokens = tokens - 1;
	else
		c->tokens = 0;
	return tokens;
}

/*
 * Refuse what `event` tells about: the caller has filled in at least xid and
 * kind, and pid and comm where there is a process (by_process() does).
 * Returns whether to refuse it really: false where the guard only observes.
 */
static __always_inline bool refuse(struct policy p, struct vnet_event *event)
{
	struct vnet_counter *c = counter_of(event->xid, event->kind);
	__u64 now = bpf_ktime_get_boot_ns();

	if (!c)
		return !p.observe;
	__sync_fetch_and_add(p.observe ? &c->observed : &c->refused, 1);
	if (take_token(c, now)) {
		__u64 untold = c->untold;

		event->when = now;
		event->suppressed = untold;
		event->observed = p.observe;
		if (!bpf_ringbuf_output(&events, event, sizeof(*event), 0)) {
			__sync_fetch_and_add(&c->untold, -untold);
			return !p.observe;
		}
	}
	__sync_fetch_and_add(&c->suppressed, 1);
	__sync_fetch_and_add(&c->untold, 1);
	return !p.observe;
}

/*
 * Who is asking, where the program runs in the process that asks. Not in
 * programs of section "socket": 6.1 refuses these helpers to them.
 */
static __always_inline void by_process(struct vnet_event *event)
{
	event->pid = bpf_get_current_pid_tgid() >> 32;
	bpf_get_current_comm(event->comm, sizeof(event->comm));
}

#endif /* _VNET_EVENTS_H */
