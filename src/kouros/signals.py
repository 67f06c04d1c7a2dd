"""Ctrl-C and SIGTERM as a question that a loop asks."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def interrupted() -> Iterator[threading.Event]:
    """Set by the first Ctrl-C or SIGTERM; a second one is a ``KeyboardInterrupt``, as always.

    Only the main thread hears signals: elsewhere nothing sets it, and nothing is changed.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def handler(number: int, frame: object) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, old in before.items():
            signal.signal(number, old)
