"""Signals: Ctrl-C and SIGTERM end a command once what it is writing is on the disk.

SIGTERM, which job schedulers send before they kill, raises `Terminated` where Ctrl-C raises KeyboardInterrupt, which is
its base class: what is done after the one is done after the other.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Terminated(KeyboardInterrupt):
    """SIGTERM came."""


def exit_code(interrupt: KeyboardInterrupt) -> int:
    """Return the exit code of a command after an interrupt, by the convention of shells: 128 and the signal."""
    return 128 + (signal.SIGTERM if isinstance(interrupt, Terminated) else signal.SIGINT)


def past_tense(interrupt: KeyboardInterrupt) -> str:
    """Return what happened to a command, for its last line."""
    return "terminated" if isinstance(interrupt, Terminated) else "interrupted"


def ignore_further() -> None:
    """Ignore Ctrl-C from now on: a second one must not end the last line of a command. SIGTERM is ignored already."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def terminable() -> Generator[None]:
    """Raise `Terminated` in the block when SIGTERM comes, and ignore further ones.

    An error that it becomes on its way, in code that catches all exceptions or in a package's own handler, becomes
    `Terminated` again at the end of the block. In another than the main thread, and where SIGTERM has a handler
    already, the block is as it was.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    received = False

    def terminate(number: int, frame: FrameType | None) -> None:
        nonlocal received
        received = True
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Terminated

    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except Exception as error:
        if received:
            raise Terminated from error
        raise
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def delayed() -> Generator[None]:
    """Delay Ctrl-C and SIGTERM until the end of the block, which writes files that belong together."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)

    before: dict[int, Any] = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) not in (signal.SIG_IGN, None):  # None: of another language, and cannot be restored
            before[number] = signal.signal(number, note)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in dict.fromkeys(came):
            signal.raise_signal(number)
