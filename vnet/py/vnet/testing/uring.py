"""A few operations by io_uring, one at a time (linux/io_uring.h).

Each makes a ring, submits one entry, waits for its completion and raises
OSError with what that says. ``punt`` hands the work to a kernel thread
(IOSQE_ASYNC), which is not the caller but works in its name.
"""

import ctypes
import mmap
import os
import socket
import struct

_SETUP, _ENTER = 425, 426
_OP_SENDMSG, _OP_SOCKET, _OP_URING_CMD, _OP_BIND = 9, 45, 46, 56
_CMD_SETSOCKOPT = 3
_IOSQE_ASYNC = 1 << 4
_SQES_AT = 0x10000000
_libc = ctypes.CDLL(None, use_errno=True)


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("len", ctypes.c_size_t))


class _Msghdr(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_void_p),
        ("namelen", ctypes.c_uint32),
        ("iov", ctypes.POINTER(_Iovec)),
        ("iovlen", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("controllen", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


def _call(number: int, *arguments: object) -> int:
    found = int(_libc.syscall(number, *arguments))
    if found < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return found


def _submit(entry: bytes) -> int:
    """Submit one entry of 64 bytes and return its result."""
    params = bytearray(120)
    fd = _call(_SETUP, 1, (ctypes.c_char * 120).from_buffer(params))
    try:
        sq_entries, cq_entries = struct.unpack_from("=II", params, 0)
        _, sq_tail, sq_mask, _, _, _, array = struct.unpack_from("=7I", params, 40)
        cq_head, _, cq_mask, _, _, cqes = struct.unpack_from("=6I", params, 80)
        size = max(array + sq_entries * 4, cqes + cq_entries * 16)
        with mmap.mmap(fd, size) as ring, mmap.mmap(fd, sq_entries * 64, offset=_SQES_AT) as sqes:
            sqes[:64] = entry.ljust(64, b"\0")
            tail = struct.unpack_from("=I", ring, sq_tail)[0]
            mask = struct.unpack_from("=I", ring, sq_mask)[0]
            struct.pack_into("=I", ring, array + 4 * (tail & mask), 0)
            struct.pack_into("=I", ring, sq_tail, tail + 1)
            _call(_ENTER, fd, 1, 1, 1, None, 0)  # IORING_ENTER_GETEVENTS
            head = struct.unpack_from("=I", ring, cq_head)[0]
            mask = struct.unpack_from("=I", ring, cq_mask)[0]
            result = int(struct.unpack_from("=i", ring, cqes + 16 * (head & mask) + 8)[0])
    finally:
        os.close(fd)
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    return result


def _entry(op: int, fd: int, off: int, addr: int, length: int, flags: int, punt: bool) -> bytes:
    return struct.pack(
        "=BBHiQQII", op, _IOSQE_ASYNC if punt else 0, 0, fd, off, addr, length, flags
    )


def _sockaddr(address: str, port: int) -> bytes:
    if ":" in address:
        packed = socket.inet_pton(socket.AF_INET6, address)
        return struct.pack("=H", socket.AF_INET6) + struct.pack(">HI", port, 0) + packed + bytes(4)
    packed = socket.inet_pton(socket.AF_INET, address)
    return struct.pack("=H", socket.AF_INET) + struct.pack(">H", port) + packed + bytes(8)


def send(
    sock: socket.socket, data: bytes, address: str, port: int, mark: int = -1, punt: int = 0
) -> int:
    """sendmsg, with a cmsg SO_MARK if mark is 0 or more."""
    name = ctypes.create_string_buffer(_sockaddr(address, port))
    body = ctypes.create_string_buffer(data, len(data))
    iov = _Iovec(ctypes.addressof(body), len(data))
    header = _Msghdr(ctypes.addressof(name), len(name) - 1, ctypes.pointer(iov), 1)
    if mark >= 0:
        cmsg = struct.pack("=QiiI4x", 20, socket.SOL_SOCKET, socket.SO_MARK, mark)
        control = ctypes.create_string_buffer(cmsg, len(cmsg))
        header.control, header.controllen = ctypes.addressof(control), len(cmsg)
    return _submit(
        _entry(_OP_SENDMSG, sock.fileno(), 0, ctypes.addressof(header), 1, 0, bool(punt))
    )


def open(_: object, family: int, kind: int, proto: int, punt: int = 0) -> socket.socket:
    """socket(2), from 5.19 on."""
    return socket.socket(fileno=_submit(_entry(_OP_SOCKET, family, kind, 0, proto, 0, bool(punt))))


def bind(sock: socket.socket, address: str, port: int, punt: int = 0) -> int:
    """bind(2), from 6.11 on: EINVAL before."""
    name = ctypes.create_string_buffer(_sockaddr(address, port))
    at, size = ctypes.addressof(name), len(name) - 1
    return _submit(_entry(_OP_BIND, sock.fileno(), size, at, 0, 0, bool(punt)))


def setsockopt(sock: socket.socket, level: int, option: int, value: int) -> int:
    """setsockopt(2) of an int, from 6.7 on: EOPNOTSUPP before."""
    given = ctypes.c_int(value)
    head = struct.pack(
        *("=BBHiIIII", _OP_URING_CMD, 0, 0, sock.fileno(), _CMD_SETSOCKOPT, 0, level, option),
    )
    entry = head.ljust(44, b"\0") + struct.pack("=IQ", 4, ctypes.addressof(given))
    return _submit(entry)
