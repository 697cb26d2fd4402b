"""The truth table: every kind of packet, each way, and whose it must be.

table    the rows, and what is expected of each under which rules
play     the ways a packet can go, and what was seen of it
tcp, udp, icmp, others    scenes: traffic that gives many cells at once
bed      a node with the rules, two slices in it, and a peer
agent    the programs that talk: one in each slice, one at the peer
page     docs/truth.md, written from what the runs have seen, and read back
report   a pytest plugin that keeps what was seen, out of guests too
"""
