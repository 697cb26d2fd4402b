/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What a packet says of itself: addresses, protocol, ports
 *
 * Packets of raw senders may say anything and stop anywhere: options,
 * extension headers, fragments, half a header. All positions are counted from
 * the IP header, which is where iptables' matches and cgroup hooks begin.
 */
#ifndef _VNET_PACKET_H
#define _VNET_PACKET_H

#include "reserved.h"

#define ETH_P_IP	0x0800
#define ETH_P_IPV6	0x86dd

/* linux/in6.h and linux/in.h are not to be had together here */
#define IPPROTO_HOPOPTS		0
#define IPPROTO_ROUTING		43
#define IPPROTO_FRAGMENT	44
#define IPPROTO_DSTOPTS		60

#define ICMP_ECHO		8
#define ICMPV6_ECHO_REQUEST	128

/* More than any sender needs, and the verifier must see an end to it. */
#define EXTENSIONS_MAX	12

enum packet_state {
	PACKET_READ,		/* to the ports, or its protocol has none */
	PACKET_LATER,		/* a fragment, not the first: has no ports */
	PACKET_SHORT,		/* ends before its headers do, or is no IP */
	PACKET_DEEP,		/* too many extension headers to follow */
};

struct packet {
	struct vnet_address saddr;
	struct vnet_address daddr;
	__u32 state;		/* enum packet_state */
	__u16 sport;		/* host order; ICMP: type and code */
	__u16 dport;		/* ICMP: id of an echo */
	__u32 echo;		/* ICMP: checksum; below it an echo's number */
	__u8 family;
	__u8 proto;
};

/* RFC 791 and RFC 8200: what is read of the headers */
struct ip4_header {
	__u8 version_ihl;
	__u8 tos;
	__be16 length;
	__be16 id;
	__be16 fragment;
	__u8 ttl;
	__u8 proto;
	__be16 checksum;
	__be32 saddr;
	__be32 daddr;
};

#define IP4_PROTOCOL	9	/* positions in the fixed headers */
#define IP4_SOURCE	12
#define IP6_NEXT	6
#define IP6_ADDRESSES	8
#define IP6_LENGTH	40

/* The least that an extension header is */
struct ip6_extension {
	__u8 next;
	__u8 length;		/* of the whole, in units of its own */
	__be16 fragment;	/* a fragment's: offset in the upper 13 bits */
	__be32 id;
};

static __always_inline __u32 read_ip4(struct __sk_buff *skb, struct packet *pkt,
				      __u32 *transport)
{
	struct ip4_header ip;
	__u32 length;

	if (bpf_skb_load_bytes(skb, 0, &ip, sizeof(ip)))
		return PACKET_SHORT;
	pkt->saddr = mapped(ip.saddr);
	pkt->daddr = mapped(ip.daddr);
	pkt->proto = ip.proto;
	length = (ip.version_ihl & 0xf) * 4;
	if (ip.version_ihl >> 4 != 4 || length < sizeof(ip))
		return PACKET_SHORT;
	*transport = length;
	return ip.fragment & bpf_htons(0x1fff) ? PACKET_LATER : PACKET_READ;
}

static __always_inline __u32 read_ip6(struct __sk_buff *skb, struct packet *pkt,
				      __u32 *transport)
{
	struct ip6_extension extension;
	__u32 offset = IP6_LENGTH;
	bool later = false;
	__u8 version;

	/* both addresses at once: they follow each other in both places */
	if (bpf_skb_load_bytes(skb, 0, &version, sizeof(version)) ||
	    bpf_skb_load_bytes(skb, IP6_NEXT, &pkt->proto, 1) ||
	    bpf_skb_load_bytes(skb, IP6_ADDRESSES, &pkt->saddr,
			       2 * sizeof(pkt->saddr)))
		return PACKET_SHORT;
	if (version >> 4 != 6)
		return PACKET_SHORT;
	for (int n = 0; n < EXTENSIONS_MAX; n++) {
		*transport = offset;
		switch (pkt->proto) {
		case IPPROTO_HOPOPTS:
		case IPPROTO_ROUTING:
		case IPPROTO_DSTOPTS:
		case IPPROTO_FRAGMENT:
		case IPPROTO_AH:
			break;
		default:
			return PACKET_READ;
		}
		if (bpf_skb_load_bytes(skb, offset, &extension,
				       sizeof(extension)))
			return PACKET_SHORT;
		if (pkt->proto == IPPROTO_FRAGMENT) {
			later = extension.fragment & bpf_htons(0xfff8);
			offset += sizeof(extension);
		} else if (pkt->proto == IPPROTO_AH) {
			offset += (extension.length + 2) * 4;	/* RFC 4302 */
		} else {
			offset += (extension.length + 1) * 8;
		}
		pkt->proto = extension.next;
		if (later)
			return PACKET_LATER;
	}
	return PACKET_DEEP;
}

/* Not inlined: its buffers would fill the stack of whoever reads packets. */
static __noinline __u32 read_packet(struct __sk_buff *skb, struct packet *pkt)
{
	__u32 protocol = skb->protocol, transport = 0, state;
	__be16 word[4];

	__builtin_memset(pkt, 0, sizeof(*pkt));
	if (protocol == bpf_htons(ETH_P_IP)) {
		pkt->family = AF_INET;
		state = read_ip4(skb, pkt, &transport);
	} else {
		pkt->family = AF_INET6;
		state = read_ip6(skb, pkt, &transport);
	}
	if (state != PACKET_READ)
		goto out;
	if (has_reservable_ports(pkt->proto)) {
		if (bpf_skb_load_bytes(skb, transport, word, 4)) {
			state = PACKET_SHORT;
			goto out;
		}
		pkt->sport = bpf_ntohs(word[0]);
		pkt->dport = bpf_ntohs(word[1]);
	} else if (pkt->proto == IPPROTO_ICMP || pkt->proto == IPPROTO_ICMPV6) {
		/* type and code; checksum; id and number of an echo */
		if (bpf_skb_load_bytes(skb, transport, word, 8)) {
			state = PACKET_SHORT;
			goto out;
		}
		pkt->sport = bpf_ntohs(word[0]);
		pkt->dport = bpf_ntohs(word[2]);
		pkt->echo = bpf_ntohs(word[1]) << 16 | bpf_ntohs(word[3]);
	}
out:
	pkt->state = state;
	return state;
}

/* An echo request, and it is the right ICMP for its IP. */
static __always_inline bool is_echo_request(const struct packet *pkt)
{
	if (pkt->family == AF_INET)
		return pkt->proto == IPPROTO_ICMP &&
		       pkt->sport >> 8 == ICMP_ECHO;
	return pkt->proto == IPPROTO_ICMPV6 &&
	       pkt->sport >> 8 == ICMPV6_ECHO_REQUEST;
}

#endif /* _VNET_PACKET_H */
