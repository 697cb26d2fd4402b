"""One command at a time, and whole or not at all, whatever dies on the way.

The work is done by a forked worker; its parent only guards. The worker undoes
what it began when a step fails or when its parent is gone; the parent undoes
it when the worker dies without a word. If both are killed at once, the journal
stays behind, and the next command begins with it.
"""

import ctypes
import fcntl
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

from vnet import errors
from vnet.paths import Paths

# include/uapi/linux/prctl.h
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36

_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

Result = dict[str, Any]


@contextmanager
def lock(paths: Paths, seconds: float = 30.0) -> Iterator[None]:
    """Be the only command that changes this node. Raises LockError.

    The descriptor is left open in children (iptables-restore, modprobe): the
    lock is then free only when the last of them has ended, even if all of
    ours were killed. They must be started with close_fds=False.
    """
    paths.run_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
    fd = os.open(paths.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        deadline = time.monotonic() + seconds
        while not _try(fd):
            if time.monotonic() > deadline:
                raise errors.LockError(
                    f"another vnet command has been at work for {seconds:.0f} s "
                    f"(it holds {paths.lock})",
                    "wait for it, or see what it hangs on: fuser -v " + str(paths.lock),
                )
            time.sleep(0.05)
        os.set_inheritable(fd, True)
        yield
    finally:
        os.close(fd)


def busy(paths: Paths) -> bool:
    """Whether some command holds the lock now."""
    try:
        fd = os.open(paths.lock, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return not _try(fd, fcntl.LOCK_SH)
    finally:
        os.close(fd)


def _try(fd: int, kind: int = fcntl.LOCK_EX) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def guarded(work: Callable[[], Result], undo: Callable[[], object]) -> Result:
    """Do ``work`` in a child and return its result; undone if it does not end well.

    Raises what the work raised (as the same VnetError, by way of JSON), or
    NodeError if it was killed.
    """
    # The worker's own children come to us when it is killed, and are ended
    # before its work is undone.
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    reading, writing = os.pipe2(os.O_CLOEXEC)
    guard = os.getpid()
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
    worker = os.fork()
    if worker == 0:
        os.close(reading)
        _work(guard, writing, work, undo)
    os.close(writing)

    def forward(_number: int, _frame: FrameType | None) -> None:
        with suppress(ProcessLookupError):
            os.kill(worker, signal.SIGTERM)

    before = {number: signal.signal(number, forward) for number in _STOPS}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)
    try:
        with os.fdopen(reading, "rb") as pipe:
            report = pipe.read()
        _, status = os.waitpid(worker, 0)
        if not report:
            _end_group(worker)
            undo()
            how = os.waitstatus_to_exitcode(status)
            raise errors.NodeError(
                f"the command was killed half-way (exit code {how}); what it had done is undone",
                "run it again",
            )
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _prctl(_PR_SET_CHILD_SUBREAPER, 0)
    result: Result = json.loads(report)
    if "error" in result:
        kind = getattr(errors, result["error"], errors.NodeError)
        error = errors.VnetError.__new__(kind)
        errors.VnetError.__init__(error, result["message"], result["cure"])
        raise error
    return result


def _work(
    guard: int, pipe: int, work: Callable[[], Result], undo: Callable[[], object]
) -> NoReturn:
    """The worker's whole life; never returns into the caller's code."""
    code = 1
    try:
        signal.set_wakeup_fd(-1)  # `vnet watch` has one: what stops us is not meant for it
        os.setpgid(0, 0)
        for number in _STOPS:
            signal.signal(number, _interrupted)
        _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)
            if os.getppid() != guard:  # it died before we asked to be told
                raise errors.Interrupted("the command was killed")
            result = work()
            code = 0
        except BaseException as error:
            ignore_stops()
            _end_children()
            result = _report(error, undo)
        with suppress(BrokenPipeError), os.fdopen(pipe, "wb") as out:
            out.write(json.dumps(result).encode())
    finally:
        os._exit(code)


def _report(error: BaseException, undo: Callable[[], object]) -> Result:
    known = (
        error
        if isinstance(error, errors.VnetError)
        else errors.NodeError(f"{error}" if isinstance(error, OSError) else repr(error))
    )
    try:
        undo()
    except errors.VnetError as second:
        known = errors.NodeError(
            f"{known.message}\nand then, undoing it: {second.message}", second.cure
        )
    return {"error": type(known).__name__, "message": known.message, "cure": known.cure}


def ignore_stops() -> None:
    """For the worker: what it has done stands, whatever signal comes now."""
    for number in _STOPS:
        signal.signal(number, signal.SIG_IGN)


def _interrupted(_number: int, _frame: FrameType | None) -> NoReturn:
    raise errors.Interrupted("the command was interrupted; what it had done is undone")


def _end_children() -> None:
    """End a modprobe or iptables-restore that the interrupt left running.

    A signal that comes while subprocess starts one leaves it without a keeper.
    All of them are in our group, and we ignore the signal.
    """
    os.killpg(0, signal.SIGTERM)
    with suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)


def _end_group(group: int) -> None:
    """End what the dead worker left running, and wait until it is gone."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)
    with suppress(ChildProcessError):
        while True:
            os.waitpid(-group, 0)


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")
