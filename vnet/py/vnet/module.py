"""Loading and unloading the kernel module, and why it cannot be."""

import os
import platform
import subprocess
import time
from pathlib import Path

from vnet.copyxid import MODULE
from vnet.errors import ModuleError

_SYS = Path("/sys/module") / MODULE
_SECURE_BOOT = Path("/sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c")


def loaded() -> bool:
    """Whether the kernel has it."""
    return _SYS.exists()


def loadable() -> None:
    """Raise ModuleError if loading is bound to fail. Changes nothing."""
    if loaded():
        return
    if not Path("/proc/modules").exists():
        raise ModuleError(
            f"module {MODULE}: this kernel ({platform.release()}) has no loadable modules",
            "boot a kernel that can load them, as every distribution's own can",
        )
    done = _kmod("modprobe", "--dry-run", MODULE)
    if done.returncode != 0:
        raise _explain(done.stderr)


def load() -> None:
    """modprobe it. Raises ModuleError with the reason and the cure."""
    done = _kmod("modprobe", MODULE)
    if done.returncode != 0:
        raise _explain(done.stderr)


def unload(seconds: float = 3.0) -> bool:
    """Unload it if nothing uses it; False: something does.

    nf_tables gives a deleted rule's reference back from a work queue
    (nf_tables_trans_destroy_work), so a moment may pass.
    """
    deadline = time.monotonic() + seconds
    while loaded():
        if users() == 0 and _kmod("rmmod", MODULE).returncode == 0:
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def users() -> int:
    """How many rules (and whatever else) hold the module; 0 if it is not loaded."""
    try:
        return int((_SYS / "refcnt").read_text())
    except (FileNotFoundError, ValueError):
        return 0


def secure_boot() -> bool:
    """Whether the firmware says that only signed code may run (UEFI specification, 3.3)."""
    try:
        return _SECURE_BOOT.read_bytes()[-1:] == b"\1"
    except OSError:
        return False


def signatures_enforced() -> bool:
    """Whether the kernel refuses modules that nobody it trusts has signed."""
    try:
        if Path("/sys/module/module/parameters/sig_enforce").read_text().strip() == "Y":
            return True
        lockdown = Path("/sys/kernel/security/lockdown").read_text()
    except OSError:
        return False
    return "[none]" not in lockdown


def _kmod(*argv: str) -> "subprocess.CompletedProcess[str]":
    environment = dict(os.environ, LC_ALL="C")
    environment["PATH"] = environment.get("PATH", "") + ":/usr/sbin:/sbin"
    try:
        # close_fds: see guard.lock
        return subprocess.run(
            argv, capture_output=True, text=True, env=environment, close_fds=False
        )
    except FileNotFoundError as error:
        raise ModuleError(f"{argv[0]}: not found", "install kmod") from error


_SIGN = (
    "the kernel refuses it: Secure Boot wants a signature it trusts",
    "sign it with a machine owner key and enroll that: mokutil --import /var/lib/dkms/mok.pub, "
    "then reboot; or switch Secure Boot off",
)
_REBUILD = (
    "it was built for another kernel",
    "build it again: `make module`, or `dkms autoinstall`",
)
_ABSENT = (
    "it is not built for this kernel",
    "install the headers (linux-headers-{release}), then `make module` in the source, or "
    "`dkms autoinstall` where it is registered with DKMS",
)
_CLOSED = (
    "the kernel allows no more modules, or this process may not load any",
    "run it as root; see /proc/sys/kernel/modules_disabled (only a reboot resets it) and "
    "/sys/kernel/security/lockdown",
)
#: what kmod prints
_REASONS = (
    ("not found in directory", _ABSENT),
    ("Key was rejected", _SIGN),
    ("Required key not available", _SIGN),
    ("Invalid module format", _REBUILD),
    ("Exec format error", _REBUILD),
    ("Unknown symbol", _REBUILD),
    ("Operation not permitted", _CLOSED),
)


def _explain(said: str) -> ModuleError:
    said = said.strip() or "modprobe failed without a word"
    for word, (reason, cure) in _REASONS:
        if word in said:
            return ModuleError(
                f"module {MODULE}: {reason}: {said}", cure.format(release=platform.release())
            )
    return ModuleError(f"module {MODULE}: {said}", "see `dmesg`")
