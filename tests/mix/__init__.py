"""The adversarial mix: a seed's worth of traffic, and what must have become of each packet.

    packets   what is sent (templates that scapy has built) and what was captured
    wire      every packet on the wire, on loopback and at INPUT, with its mark
    actors    processes in slices, which make the sockets and may use them
    truth     the model: docs/meanings.md as a program, fed with what is done
    sock      who plays, with which ports, and what is kept of a socket
    world     all that is in play; each send goes by way of the truth
    compare   what was captured against what must be
    stage     brings the node up, and the peer
    acts      what is done: one function for each kind of action in acts_udp, acts_tcp,
              acts_raw, acts_life
    records   flow records against the truth
    play      the loop and the summary; the command

Nothing is random but by the seed. One action follows another, and after each what
was captured is compared with the truth, so that the action that went wrong is the
one that is named. The actions themselves come from many processes, sockets and
network stacks at once.
"""
