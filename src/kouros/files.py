"""Files that are either whole or not there."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Write to a temporary name beside ``path``, then rename: a failure leaves the old file whole.

    Yields:
      The temporary path, with the suffix of ``path``.

    Raises:
      OSError: the file cannot be written; the message says how much room the disk has.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        free = shutil.disk_usage(path.parent).free / 1e6
        reason = error.strerror or error
        raise OSError(f"could not write {path} ({reason}); {free:,.0f} MB are free there") from error
    finally:
        temporary.unlink(missing_ok=True)


def plain(content: Any) -> Any:
    """As JSON has it: tuples become lists, paths strings, and NaN and infinity, unknown to JSON, None."""
    return json.loads(json.dumps(content, default=str), parse_constant=lambda _: None)


def write_json(path: str | Path, content: Any) -> None:
    """Write :func:`plain` content as JSON, whole or not at all.

    Raises:
      OSError: the file cannot be written.
    """
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(plain(content), indent=2) + "\n", "utf-8")


def read_table(path: str | Path, *keys: str) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
      ValueError: it is none, or lacks one of the ``keys``.
    """
    try:
        content = json.loads(Path(path).read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: damaged, not JSON ({error})") from error
    lacking = set(keys) - set(content) if isinstance(content, dict) else keys or ("object",)
    if lacking:
        raise ValueError(f"{path}: damaged, or of something else: no {', '.join(sorted(lacking))} in it")
    return content


class Forgiving:
    """A text stream that loses what a full disk has no room for."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._forgiving():
            return self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._forgiving():
            self._stream.flush()

    @staticmethod
    @contextlib.contextmanager
    def _forgiving() -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
