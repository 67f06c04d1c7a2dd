"""Files that are either whole or not there."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any


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
