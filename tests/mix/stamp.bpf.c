/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The mark of every packet that leaves, into its frame's source address
 *
 * Attached to the egress of the node's link, which is after POSTROUTING and
 * where a packet is in as many fragments as it will be. The IP packet stays as
 * it is, and whoever captures at the peer has mark and packet in one piece.
 */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

#define SOURCE	6	/* of the frame's source address */

SEC("tc")
int stamp(struct __sk_buff *skb)
{
	__u8 source[6] = { 0x02 };	/* locally administered, one host's */
	__u32 mark = skb->mark;

	/* the upper half, as far as it matters, goes into one byte */
	source[1] = (mark >> 16) & 0xff;
	source[2] = (mark >> 24) & 0xff;
	source[4] = (mark >> 8) & 0xff;
	source[5] = mark & 0xff;
	bpf_skb_store_bytes(skb, SOURCE, source, sizeof(source), 0);
	return 0;	/* TC_ACT_OK */
}

char _license[] SEC("license") = "GPL";
