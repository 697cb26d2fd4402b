"""A process in a slice: makes sockets for others, and uses what it is handed.

    python -I -S actor.py FD

FD is a UNIX socket (SEQPACKET). A request is a pickled (word, arguments...), an answer
a pickled (errno, value); descriptors travel beside them. A socket belongs to the slice
in which this process makes it, whoever uses it later.
"""

import errno
import os
import pickle
import socket
import sys


def do_open(_sock, family, kind, proto, options=(), bind=None, connect=None, listen=0):
    """Make a socket; returns its own address."""
    with socket.socket(family, kind, proto) as sock:
        for level, option, value in options:
            sock.setsockopt(level, option, value)
        if bind:
            sock.bind(bind)
        if listen:
            sock.listen(listen)
        if connect:
            sock.setblocking(False)
            code = sock.connect_ex(connect)
            if code not in (0, errno.EINPROGRESS):
                raise OSError(code, "connect")
        name = None if kind == socket.SOCK_RAW else sock.getsockname()
        return name, sock.detach()


def do_send(sock, data, where, control=()):
    """Send what it is told through a socket that it is handed."""
    sock.sendmsg([data], control, 0, *([where] if where else []))
    return None, None


def do_mark(sock, value):
    """Ask for a mark; returns the one that it got."""
    sock.setsockopt(socket.SOL_SOCKET, 36, value)
    return sock.getsockopt(socket.SOL_SOCKET, 36), None


def do_hold(sock):
    """Keep a socket that it is handed until this process ends."""
    HELD.append(os.dup(sock.fileno()))
    return None, None


HELD: list[int] = []


def main() -> None:
    """Serve until the other end is closed."""
    door = socket.socket(fileno=int(sys.argv[1]))
    door.send(b"ready")
    while True:
        data, given, _, _ = socket.recv_fds(door, 1 << 18, 4)
        if not data:
            return
        word, *arguments = pickle.loads(data)
        sock = socket.socket(fileno=given[0]) if given else None
        code, value, made = 0, None, None
        try:
            value, made = globals()[f"do_{word}"](sock, *arguments)
        except OSError as e:
            code = e.errno or errno.EIO
        if sock:
            sock.close()
        if made is not None:
            socket.send_fds(door, [b"socket"], [made])
            os.close(made)  # before the answer: whoever gets it may close the last one
        door.send(pickle.dumps((code, value)))


if __name__ == "__main__":
    main()
