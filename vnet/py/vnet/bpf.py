"""The eBPF programs in the kernel: load, attach, pin, find, remove.

What is in the kernel is an *instance*: a directory in bpffs, named after the
objects' content, with ``progs/``, ``maps/`` and ``links/``. It appears whole
or not at all, and outlives who made it. Rules name its programs by path.
"""

import errno
import hashlib
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vnet import cgroups
from vnet.bpfmaps import error, ffi, lib, pinned
from vnet.errors import BpfError, VnetError

OBJECTS = Path(__file__).with_name("bpf_objects")
_SUFFIX = ".bpf.o"
_LSM = "lsm"
_PARTS = ("progs", "maps", "links")
_LOG_LINES = 12

_CGROUP_KINDS = (
    lib.BPF_PROG_TYPE_CGROUP_SKB,
    lib.BPF_PROG_TYPE_CGROUP_SOCK,
    lib.BPF_PROG_TYPE_CGROUP_SOCK_ADDR,
    lib.BPF_PROG_TYPE_CGROUP_SOCKOPT,
)

lib.vnet_listen()


@dataclass(frozen=True)
class Program:
    """A program of an object."""

    name: str
    kind: int  #: enum bpf_prog_type
    attach: int  #: enum bpf_attach_type

    @property
    def attached(self) -> bool:
        """Whether it is attached by a link, rather than named by a rule or filter."""
        return self.kind in _CGROUP_KINDS or self.kind == lib.BPF_PROG_TYPE_LSM


def version() -> str:
    """What an instance of these objects is called."""
    digest = hashlib.sha256()
    for path in sorted(OBJECTS.glob("*" + _SUFFIX)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def instances(bpf_dir: Path) -> list[Path]:
    """The instances in the kernel, of whatever version."""
    if not bpf_dir.is_dir():
        return []
    return sorted(p for p in bpf_dir.iterdir() if re.fullmatch(r"[0-9a-f]{12}", p.name))


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
        for name in _objects(lsm):
            _pin(name, new)
        _attach(new, lsm)
        new.rename(instance)
    except BaseException:
        _unpin(new)
        _drop(bpf_dir)
        raise
    return instance


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
    for name in _objects(lsm):
        for program in _programs(name):
            if problem := _program_problem(instance, program, top):
                wrong.append(f"{instance}: {problem}")
    return wrong


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
        for name in _objects(lsm=False):
            with _loaded(name, {}):
                pass
    except VnetError as problem:
        return [problem.message]
    return []


def lsm_lacking() -> str:
    """What this kernel lacks for the LSM programs, tried by loading and attaching; "" if nothing.

    They are attached for a moment, with an empty policy: they refuse nothing.
    """
    try:
        with _loaded(_LSM, {}) as handle:
            for each, raw in _programs_of(handle):
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
        ["mount", "-t", "bpf", "bpf", top], capture_output=True, text=True, check=False
    )
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
        raise BpfError(f"{path} is not on a bpffs", "mount -t bpf bpf /sys/fs/bpf")


# -- objects --------------------------------------------------------------


def _objects(lsm: bool) -> list[str]:
    """The objects to load; base comes first, because the others use its maps."""
    names = sorted(path.name.removesuffix(_SUFFIX) for path in OBJECTS.glob("*" + _SUFFIX))
    if "base" not in names:
        raise BpfError(f"{OBJECTS}: the eBPF objects are not there", "build the package anew")
    names.remove("base")
    return ["base", *(name for name in names if lsm or name != _LSM)]


@contextmanager
def _opened(name: str) -> Iterator[Any]:
    path = OBJECTS / (name + _SUFFIX)
    lib.vnet_forget()
    handle = lib.bpf_object__open_file(os.fsencode(path), ffi.NULL)
    if handle == ffi.NULL:
        raise error(f"opening {path}")
    try:
        yield handle
    finally:
        lib.bpf_object__close(handle)


@contextmanager
def _loaded(name: str, maps: dict[str, Path]) -> Iterator[Any]:
    """An object in the kernel; ``maps``: pinned ones to use instead of its own."""
    with _opened(name) as handle:
        for each, raw in _maps_of(handle):
            if each in maps:
                with pinned(maps[each]) as there:
                    if lib.bpf_map__reuse_fd(raw, there.fd):
                        raise error(f"using {maps[each]} for {name}")
        if code := lib.bpf_object__load(handle):
            raise _load_error(name, -code)
        yield handle


def _load_error(name: str, code: int) -> BpfError:
    said = ffi.string(lib.vnet_heard()).decode(errors="replace").splitlines()
    said = [f"  {line.strip()}" for line in said if line.strip()][-_LOG_LINES:]
    what = f"loading the eBPF programs of {name}: {os.strerror(code)}"
    cure = "needs root, and a kernel that lets root use BPF (lockdown=none)"
    if code != errno.EPERM:
        cure = "needs Linux 6.1 or newer"
    return BpfError("\n".join([what, *said]), cure)


def _programs_of(handle: Any) -> Iterator[tuple[Program, Any]]:
    raw = lib.bpf_object__next_program(handle, ffi.NULL)
    while raw != ffi.NULL:
        name = ffi.string(lib.bpf_program__name(raw)).decode()
        yield (
            Program(name, lib.bpf_program__type(raw), lib.bpf_program__expected_attach_type(raw)),
            raw,
        )
        raw = lib.bpf_object__next_program(handle, raw)


def _maps_of(handle: Any) -> Iterator[tuple[str, Any]]:
    raw = lib.bpf_object__next_map(handle, ffi.NULL)
    while raw != ffi.NULL:
        if not lib.bpf_map__is_internal(raw):
            yield ffi.string(lib.bpf_map__name(raw)).decode(), raw
        raw = lib.bpf_object__next_map(handle, raw)


def _programs(name: str) -> list[Program]:
    with _opened(name) as handle:
        return [each for each, _raw in _programs_of(handle)]


# -- pins and links -------------------------------------------------------


def _pin(name: str, directory: Path) -> None:
    """Load an object and pin what is in it."""
    maps = {path.name: path for path in (directory / "maps").iterdir()}
    with _loaded(name, maps) as handle:
        for each, raw in _maps_of(handle):
            if each not in maps:
                _pin_fd(lib.bpf_map__fd(raw), directory / "maps" / each)
        for program, raw in _programs_of(handle):
            _pin_fd(lib.bpf_program__fd(raw), directory / "progs" / program.name)


def _pin_fd(fd: int, path: Path) -> None:
    if lib.bpf_obj_pin(fd, os.fsencode(path)):
        raise error(f"pinning {path}")


def _attach(directory: Path, lsm: bool) -> None:
    """Make the links that are not there, or are no longer what they were."""
    root = os.open(cgroups.v2_root(), os.O_RDONLY | os.O_DIRECTORY)
    try:
        top = os.fstat(root).st_ino
        for name in _objects(lsm):
            for each in _programs(name):
                if not each.attached or not _program_problem(directory, each, top):
                    continue
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
    finally:
        os.close(root)


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
    return (OBJECTS / (_LSM + _SUFFIX)).exists() and any(
        each.name in names for each in _programs(_LSM)
    )


def _fit_lsm(instance: Path, lsm: bool) -> None:
    """Add the LSM programs to an instance that has none, or take them away."""
    if lsm == _has_lsm(instance):
        return
    for each in _programs(_LSM):
        for part in ("links", "progs"):
            (instance / part / each.name).unlink(missing_ok=True)
    if lsm:
        _pin(_LSM, instance)


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
    for path in directory.glob("links/*"):
        # At once: the kernel lets an unpinned link go a moment later only.
        fd = lib.bpf_obj_get(os.fsencode(path))
        if fd >= 0:
            lib.bpf_link_detach(fd)  # not of an LSM program (EOPNOTSUPP)
            os.close(fd)
        path.unlink(missing_ok=True)
    for part in _PARTS:
        for path in directory.glob(f"{part}/*"):
            path.unlink(missing_ok=True)
        with suppress(FileNotFoundError):
            (directory / part).rmdir()
    with suppress(FileNotFoundError):
        directory.rmdir()
