"""The thread that writes: the store's work is done there while events are being read.

Jobs are done one after another in the order they were given, so that what is
given after something is done when that is durable. One for which there is no
memory, because a question has it all, is done once more when there is. After
any other failure no more jobs are done: the store stays as of its last commit.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

from netflow import store

T = TypeVar("T")


@dataclass
class Writer:
    """The thread, and why it failed. The bell is rung when it does."""

    pool: ThreadPoolExecutor
    bell: socket.socket
    failed: BaseException | None = None


def start(bell: socket.socket) -> Writer:
    """A writer that waits for jobs."""
    return Writer(ThreadPoolExecutor(1, thread_name_prefix="writer"), bell)


def post(writer: Writer, job: Callable[[], T]) -> Future[T]:
    """Have a job done later. Raises what an earlier one failed with."""
    check(writer)
    return writer.pool.submit(_do, writer, job)


def call(writer: Writer, job: Callable[[], T]) -> T:
    """Have a job done after all that wait; returns what it returns, raises what it raises."""
    return post(writer, job).result()


def check(writer: Writer) -> None:
    """Raise what a job failed with, if one has."""
    if writer.failed is not None:
        raise writer.failed


def stop(writer: Writer) -> None:
    """Do what waits, and end the thread."""
    writer.pool.shutdown()


def _do(writer: Writer, job: Callable[[], T]) -> T:
    check(writer)
    try:
        return store.patiently(job)
    except BaseException as error:
        writer.failed = error
        with suppress(OSError):
            writer.bell.send(b"\0")
        raise
