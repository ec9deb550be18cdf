# SPDX-License-Identifier: Apache-2.0
"""Standard output and standard error, as every command writes to them.

No character of a stranger acts on a terminal, any encoding can take any text, and a reader that is gone or a full disk
stops no command: what it writes to files is written, and its exit status is its own.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from refmoe.report.neutral import READABLE, neutral


class Styled:
    """A stream that takes text with our own styles and movements of the cursor. It never raises."""

    def __init__(self, raw: Any) -> None:
        self.raw = raw
        self.failure: OSError | None = None
        """The reason for which what was written last is lost."""

    def write(self, text: str) -> int:
        """Write text, or drop it if the stream is broken."""
        self._attempt(lambda: self.raw.write(text))
        return len(text)

    def flush(self) -> None:
        """Hand on all that was written."""
        self._attempt(lambda: self.raw.flush())

    def _attempt(self, action: Any) -> None:
        if self.failure is not None or self.raw is None:
            return
        try:
            action()
        except (OSError, ValueError) as error:
            self.failure = error if isinstance(error, OSError) else OSError(errno.EBADF, os.strerror(errno.EBADF))
            _discard(self.raw)

    @property
    def reader_gone(self) -> bool:
        """Whether nobody reads: then all is well, as with ``| head``, but there is no use in writing more."""
        return self.failure is not None and self.failure.errno in (errno.EPIPE, errno.ECONNRESET)

    @property
    def encoding(self) -> str:
        return getattr(self.raw, "encoding", None) or "utf-8"

    @property
    def errors(self) -> str:
        return READABLE

    def isatty(self) -> bool:
        return self.raw is not None and bool(self.raw.isatty())

    def fileno(self) -> int:
        if self.raw is None:
            raise io.UnsupportedOperation("fileno")
        return int(self.raw.fileno())

    def writable(self) -> bool:
        return True


class Plain(Styled):
    """A stream that takes text of any origin. Rich, which makes our styles, writes to `rich_proxied_file` instead.

    It has no `buffer`, so that nobody writes around it.
    """

    def __init__(self, raw: Any) -> None:
        super().__init__(raw)
        self.rich_proxied_file = Styled(raw)

    def write(self, text: str) -> int:
        self.rich_proxied_file.write(neutral(text))
        return len(text)

    def flush(self) -> None:
        self.rich_proxied_file.flush()

    @property
    def lost(self) -> Styled:
        """The stream that knows whether it failed."""
        return self.rich_proxied_file


def _discard(raw: Any) -> None:
    """Send all that is yet to come to nowhere, also what the stream still holds and writes when the program ends."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, raw.fileno())
        os.close(nowhere)


def _open_missing() -> None:
    """Open standard streams that were closed when the program began, else the next file would get their number."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


@contextmanager
def safe_streams() -> Iterator[Plain]:
    """Let standard output and standard error take any text until the end of the body. Yields standard output."""
    _open_missing()
    before = sys.stdout, sys.stderr
    handlers = [getattr(raw, "errors", None) for raw in before]
    for raw in before:
        if isinstance(raw, io.TextIOWrapper):
            with suppress(OSError, ValueError):
                raw.reconfigure(errors=READABLE)
    out, err = Plain(sys.stdout), Plain(sys.stderr)
    sys.stdout, sys.stderr = out, err
    try:
        yield out
    finally:
        out.flush()
        err.flush()
        sys.stdout, sys.stderr = before
        for raw, handler in zip(before, handlers, strict=True):
            if isinstance(raw, io.TextIOWrapper) and handler is not None:
                with suppress(OSError, ValueError):
                    raw.reconfigure(errors=handler)


def reader_gone() -> bool:
    """Whether nobody reads standard output any more."""
    return isinstance(sys.stdout, Plain) and sys.stdout.lost.reader_gone
