"""The eBPF programs in the kernel: load, attach, pin, find, remove.

What is in the kernel is an *instance*: a directory in bpffs, named after the
objects' content, with ``progs/``, ``maps/`` and ``links/``. It appears whole
or not at all, and outlives who made it. Rules name its programs by path.
"""

import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vnet import bpfobjects, cgroups, policy
from vnet.bpfmaps import error, ffi, lib, pinned
from vnet.bpfobjects import Program
from vnet.errors import BpfError, VnetError

_PARTS = ("progs", "maps", "links")

#: Attached only while some raw socket may hear its own slice's packets only: it
#: costs every packet that any socket of the host receives.
HEARING = "vnet_ingress"


def version() -> str:
    """What an instance of these objects is called."""
    digest = hashlib.sha256()
    for path in bpfobjects.files():
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def instances(bpf_dir: Path) -> list[Path]:
    """The instances in the kernel, of whatever version."""
    try:
        found = list(bpf_dir.iterdir())
    except (FileNotFoundError, NotADirectoryError):  # or it goes in this moment
        return []
    return sorted(path for path in found if re.fullmatch(r"[0-9a-f]{12}", path.name))


def load(bpf_dir: Path, lsm: bool) -> Path:
    """Bring these objects into the kernel and return their instance.

    One that is there already is kept with its policy, and mended where a link
    is gone. ``lsm``: with the programs that need BPF LSM. Until a policy is
    written, nothing is anybody's and nothing is refused. Raises BpfError, and
    then nothing of the new instance is left.
    """
    _need_bpffs(bpf_dir)
    sweep(bpf_dir)
    instance = bpf_dir / version()
    if instance.is_dir():
        _fit_lsm(instance, lsm)
        _attach(instance, lsm)
        return instance
    new = bpf_dir / f"new-{version()}"  # bpffs allows no dots in names
    try:
        for part in _PARTS:
            (new / part).mkdir(parents=True)
        for name in bpfobjects.names(lsm):
            _pin(name, new)
        _attach(new, lsm)
        new.rename(instance)
    except BaseException:
        _unpin(new)
        _drop(bpf_dir)
        raise
    return instance


def detach(instance: Path) -> None:
    """Detach the programs of an instance; they stay pinned, and ``load`` attaches them again."""
    for path in instance.glob("links/*"):
        _unlink(path)


def remove(instance: Path) -> None:
    """Detach and unpin an instance. What uses its programs by itself (rules) keeps them."""
    old = instance.with_name(f"old-{instance.name}")
    with suppress(FileNotFoundError):
        instance.rename(old)
    _unpin(old)
    _drop(instance.parent)


def sweep(bpf_dir: Path) -> list[str]:
    """Remove what a killed ``load`` or ``remove`` left. Returns its names."""
    found = sorted(bpf_dir.glob("new-*")) + sorted(bpf_dir.glob("old-*"))
    for path in found:
        _unpin(path)
    return [path.name for path in found]


def healthy(instance: Path, lsm: bool | None = None) -> list[str]:
    """What of an instance is not as ``load`` left it, in words; [] if all is.

    ``lsm``: whether it must have the LSM programs; None: as it has them.
    """
    if not instance.is_dir():
        return [f"{instance}: not there"]
    if lsm is None:
        lsm = _has_lsm(instance)
    wrong = []
    top = cgroups.v2_root().stat().st_ino
    for name in bpfobjects.names(lsm):
        for program in bpfobjects.programs(name):
            if program.name == HEARING and not is_hearing_guarded(instance):
                continue
            if problem := _program_problem(instance, program, top):
                wrong.append(f"{instance}: {problem}")
    if not is_hearing_guarded(instance) and "own" in policy.read_grants(instance).values():
        wrong.append(f"{instance}: link {HEARING} is gone")
    return wrong


def is_hearing_guarded(instance: Path) -> bool:
    """Whether raw sockets are kept from hearing other slices' packets."""
    return (instance / "links" / HEARING).exists()


def guard_hearing(instance: Path, on: bool) -> bool:
    """Keep raw sockets from hearing other slices' packets, or no longer. False: it was so already.

    Attached before a policy that asks for it is in force, detached when none
    does any more. Raises BpfError.
    """
    if on == is_hearing_guarded(instance):
        return False
    if on:
        with _root() as root:
            base = bpfobjects.programs(bpfobjects.BASE)
            each = next(each for each in base if each.name == HEARING)
            _pin_link(instance, each, root)
    else:
        _unlink(instance / "links" / HEARING)
    return True


def settled(instance: Path) -> tuple[int, int]:
    """(sent, received) packets of connections that named their slice already. Raises BpfError."""
    path = instance / "maps" / "settled"
    if not path.exists():  # of a version that had its rules count
        return 0, 0
    with pinned(path) as found:
        out, into = (
            sum(int.from_bytes(one, sys.byteorder) for one in found.get_each_cpu(key))
            for key in (_index(lib.VNET_SETTLED_OUT), _index(lib.VNET_SETTLED_IN))
        )
    return out, into


def _index(number: int) -> bytes:
    return int(number).to_bytes(4, sys.byteorder)


def program(instance: Path, name: str) -> int:
    """An open descriptor of a pinned program; the caller closes it. Raises BpfError."""
    path = instance / "progs" / name
    fd: int = lib.bpf_obj_get(os.fsencode(path))
    if fd < 0:
        raise error(f"opening the eBPF program {path}")
    return fd


def lacking() -> list[str]:
    """What this kernel lacks for the programs that every data path's guard needs."""
    if not Path("/sys/kernel/btf/vmlinux").exists():
        return ["BTF of the kernel (/sys/kernel/btf/vmlinux; CONFIG_DEBUG_INFO_BTF)"]
    try:
        cgroups.v2_root()
        for name in bpfobjects.names(lsm=False):
            with bpfobjects.loaded(name, {}):
                pass
    except VnetError as problem:
        return [problem.message]
    return []


def lsm_lacking() -> str:
    """What this kernel lacks for the LSM programs, tried by loading and attaching; "" if nothing.

    They are attached for a moment, with an empty policy: they refuse nothing.
    """
    try:
        with bpfobjects.loaded(bpfobjects.LSM, {}) as handle:
            for each, raw in bpfobjects.programs_of(handle):
                os.close(_link(each, lib.bpf_program__fd(raw), -1))
    except BpfError as problem:
        return problem.message
    return ""


def mount(bpf_dir: Path, top: Path = Path("/sys/fs/bpf")) -> bool:
    """Mount bpffs at its usual place, if that is where ``bpf_dir`` is and nothing is there.

    Returns whether it was mounted now. Raises BpfError.
    """
    if top not in (bpf_dir, *bpf_dir.parents) or is_bpffs(bpf_dir):
        return False
    done = subprocess.run(
        # As systemd mounts it: without a mode everybody may make names in it.
        ["mount", "-t", "bpf", "-o", "mode=700", "bpf", top],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise BpfError(f"mounting bpffs at {top}: {done.stderr.strip()}", "CONFIG_BPF_SYSCALL")
    return True


def is_bpffs(path: Path) -> bool:
    """Whether ``path``, or what of it exists, is on a bpffs."""
    best, kind = "", ""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _device, point, of, *_rest = line.split(" ")
        if (path == Path(point) or Path(point) in path.parents) and len(point) >= len(best):
            best, kind = point, of
    return kind == "bpf"


def _need_bpffs(path: Path) -> None:
    if not is_bpffs(path):
        raise BpfError(f"{path} is not on a bpffs", "mount -t bpf -o mode=700 bpf /sys/fs/bpf")


# -- pins and links -------------------------------------------------------


def _pin(name: str, directory: Path) -> None:
    """Load an object and pin what is in it."""
    maps = {path.name: path for path in (directory / "maps").iterdir()}
    with bpfobjects.loaded(name, maps) as handle:
        for each, raw in bpfobjects.maps_of(handle):
            if each not in maps:
                _pin_fd(lib.bpf_map__fd(raw), directory / "maps" / each)
        for program, raw in bpfobjects.programs_of(handle):
            _pin_fd(lib.bpf_program__fd(raw), directory / "progs" / program.name)


def _pin_fd(fd: int, path: Path) -> None:
    if lib.bpf_obj_pin(fd, os.fsencode(path)):
        raise error(f"pinning {path}")


def _attach(directory: Path, lsm: bool) -> None:
    """Make the links that are not there, or are no longer what they were."""
    with _root() as root:
        top = os.fstat(root).st_ino
        for name in bpfobjects.names(lsm):
            for each in bpfobjects.programs(name):
                if each.name == HEARING and not is_hearing_guarded(directory):
                    continue
                if each.attached and _program_problem(directory, each, top):
                    _pin_link(directory, each, root)


@contextmanager
def _root() -> Iterator[int]:
    """The root of the cgroups, open."""
    root = os.open(cgroups.v2_root(), os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield root
    finally:
        os.close(root)


def _pin_link(directory: Path, each: Program, root: int) -> None:
    path = directory / "links" / each.name
    path.unlink(missing_ok=True)
    fd = program(directory, each.name)
    try:
        link = _link(each, fd, root)
    finally:
        os.close(fd)
    try:
        _pin_fd(link, path)
    finally:
        os.close(link)


def _link(each: Program, fd: int, root: int) -> int:
    """Attach, and return the link's descriptor: closing it detaches, unless it is pinned."""
    if each.kind == lib.BPF_PROG_TYPE_LSM:
        link: int = lib.bpf_raw_tracepoint_open(ffi.NULL, fd)
    else:
        link = lib.bpf_link_create(fd, root, each.attach, ffi.NULL)
    if link < 0:
        raise error(f"attaching the eBPF program {each.name}")
    return link


def _has_lsm(instance: Path) -> bool:
    names = {path.name for path in (instance / "links").iterdir()}
    return bpfobjects.LSM in bpfobjects.names(lsm=True) and any(
        each.name in names for each in bpfobjects.programs(bpfobjects.LSM)
    )


def _fit_lsm(instance: Path, lsm: bool) -> None:
    """Add the LSM programs to an instance that has none, or take them away."""
    if lsm == _has_lsm(instance):
        return
    for each in bpfobjects.programs(bpfobjects.LSM):
        for part in ("links", "progs"):
            (instance / part / each.name).unlink(missing_ok=True)
    if lsm:
        _pin(bpfobjects.LSM, instance)


def _program_problem(instance: Path, each: Program, top: int) -> str:
    """What is wrong with a program's pin or link; "" if nothing."""
    fd = lib.bpf_obj_get(os.fsencode(instance / "progs" / each.name))
    if fd < 0:
        return f"program {each.name} is gone"
    number = lib.vnet_prog_id(fd)
    os.close(fd)
    if not each.attached:
        return ""
    fd = lib.bpf_obj_get(os.fsencode(instance / "links" / each.name))
    if fd < 0:
        return f"link {each.name} is gone"
    numbers = ffi.new("uint64_t[3]")
    code = lib.vnet_link_info(fd, numbers)
    os.close(fd)
    if code:
        return f"link {each.name}: {os.strerror(-code)}"
    _kind, linked, cgroup = list(numbers)
    if linked != number:
        return f"link {each.name} is of another program"
    if each.kind != lib.BPF_PROG_TYPE_LSM and cgroup != top:
        return f"link {each.name} is detached"
    return ""


def _drop(bpf_dir: Path) -> None:
    with suppress(OSError):  # another instance is in it, or it is where bpffs is mounted
        bpf_dir.rmdir()


def _unpin(directory: Path) -> None:
    """Detach and unpin all of a directory; what is gone is gone."""
    detach(directory)
    for part in _PARTS:
        for path in directory.glob(f"{part}/*"):
            path.unlink(missing_ok=True)
        with suppress(FileNotFoundError):
            (directory / part).rmdir()
    with suppress(FileNotFoundError):
        directory.rmdir()


def _unlink(path: Path) -> None:
    """Detach and unpin a link; at once: the kernel lets an unpinned one go a moment later only."""
    fd = lib.bpf_obj_get(os.fsencode(path))
    if fd >= 0:
        lib.bpf_link_detach(fd)  # not of an LSM program (EOPNOTSUPP)
        os.close(fd)
    path.unlink(missing_ok=True)
