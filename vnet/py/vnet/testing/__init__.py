"""What tests of slices stand on: namespaces, links, slices, traffic and what was seen.

    poll     wait for a fact with a deadline, never with a sleep
    net      network namespaces and veth links between them
    cgroup   cgroup v2 directories, which is what a slice is made of
    launch   starts a program inside a namespace and a cgroup
    attempts, agents  somebody in a slice who does what it is told
    packets, steps    what he is told to send and to do
    traffic  small TCP and UDP programs that count what they sent and received
    apps     starts those programs and reads their counts
    nflog    every packet a hook saw, with its mark
    plugin   pytest fixtures made of these (docs/check.md)

Everything made here carries the maker's process id in its name (``vnt-PID-``)
and is removed when its ``with`` block ends, however it ends. What a killed
run left behind is removed by the next one (``sweep`` in net and cgroup), and
nothing else is ever touched.

    with namespace() as node, namespace() as peer, veth(node, peer) as link:
        with cgroup() as a, apps.start(peer, "tcp-server", bind=link.b4) as server:
            with apps.start(node, "tcp-client", cgroup=a, to=link.b4, port=server.port) as c:
                assert c.result()["sent"] == 1000
"""
