# SPDX-License-Identifier: Apache-2.0
"""Requests to a server that nobody trusts. Each ends within its time, and each failure has a name.

A server may refuse the connection, drop it, stall, answer a byte a second, or answer without end. It may answer with
something other than JSON. Each of these is a `ServerFault`. An answer with a status of 400 or more is `Unwilling`.
"""

from __future__ import annotations

import json
import ssl
import zlib
from collections.abc import Mapping
from contextlib import suppress
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from threading import Timer
from time import monotonic, sleep
from typing import Any
from urllib.parse import urlsplit

from refmoe.engines.process import BROKEN, CRASHED, TIMED_OUT
from refmoe.errors import InputError
from refmoe.files.numbers import decimal
from refmoe.files.parsing import strict_json
from refmoe.files.sentences import one_line, quoted, shown

LARGEST = 64 << 20
"""Bytes of an answer, at most."""
PIECE = 1 << 16
"""Bytes that are read at once."""
TRIES = 2
"""A request whose connection is dropped is sent so many times in all. A server may drop one that it has no room for."""
PAUSE, LONGEST_PAUSE = 0.2, 5.0
"""Seconds before a request is sent again. For a busy server they double each time, up to the second number."""
BUSY = (429, 503)
"""The statuses by which a server asks to be asked again later. It is, until the time for a request has passed."""
FAILED = (500, 502, 504)
"""The statuses by which a server, or one before it, says that it has failed."""
UNPACKED = {"gzip": 31, "x-gzip": 31, "deflate": 15}
"""Per encoding of an answer its window bits, as zlib counts them. None is asked for, but some servers always pack."""


class ServerFault(Exception):
    """A server has failed at a request."""

    def __init__(self, kind: str, reason: str) -> None:
        """kind: CRASHED, TIMED_OUT or BROKEN   reason: one sentence"""
        super().__init__(reason)
        self.kind = kind
        self.reason = reason


class Unwilling(Exception):
    """A server has answered that it does not do what it was asked for."""

    def __init__(self, status: int, reason: str, after: float | None = None) -> None:
        """status: of HTTP   reason: one sentence   after: the seconds after which it wants to be asked again"""
        super().__init__(reason)
        self.status = status
        self.reason = reason
        self.after = after


class Address:
    """The address of a server, such as ``http://127.0.0.1:8000``."""

    def __init__(self, url: str) -> None:
        """Raises InputError for anything but http or https, a host, and optionally a port and a path."""
        expected = "a URL such as http://127.0.0.1:8000 was expected"
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            raise InputError(f"--server {quoted(url)} cannot be read, but {expected}") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(f"--server {quoted(url)} names no server of HTTP, but {expected}")
        if parts.query or parts.fragment or parts.username is not None:
            raise InputError(f"--server {quoted(url)} has more than a host, a port and a path, but {expected}")
        self.secure = parts.scheme == "https"
        self.host: str = parts.hostname
        self.port = port if port is not None else 443 if self.secure else 80
        self.path = parts.path.rstrip("/").removesuffix("/v1")
        self.url = f"{parts.scheme}://{parts.netloc}{self.path}"

    def connect(self, limit: float) -> HTTPConnection:
        """A connection that is not open yet.   limit: seconds for each of its operations"""
        if self.secure:
            return HTTPSConnection(self.host, self.port, timeout=limit, context=ssl.create_default_context())
        return HTTPConnection(self.host, self.port, timeout=limit)


class Client:
    """A server, asked one request at a time by any thread."""

    def __init__(self, address: Address, limit: float) -> None:
        """limit: seconds for each request, its answer included"""
        self.address, self.limit = address, limit
        self.requests = 0
        """The number of requests that were sent."""
        self.again = 0
        """The number of requests that had to be sent again."""

    def get(self, path: str, limit: float | None = None) -> Any:
        """The JSON that a server gives at a path. Raises ServerFault or Unwilling."""
        return self._asked("GET", path, None, limit)

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The JSON that a server answers to a body. Raises ServerFault or Unwilling."""
        return self._asked("POST", path, body, None)

    def begin(self, path: str, body: Mapping[str, Any], seconds: float) -> None:
        """Send a request, wait for the first bytes of its answer, and break the connection off.

        seconds: the longest wait for these bytes. Raises ServerFault where no connection can be made.
        """
        connection = self.address.connect(seconds)
        self.requests += 1
        try:
            self._send(connection, "POST", path, body)
            with suppress(OSError, HTTPException):
                connection.getresponse().read1(1)
        except (OSError, HTTPException) as error:
            raise ServerFault(CRASHED, f"the connection for {path} cannot be made: {_words(error)}") from None
        finally:
            connection.close()

    def _send(self, connection: HTTPConnection, method: str, path: str, body: Mapping[str, Any] | None) -> None:
        headers = {"Accept": "application/json", "Connection": "close"}
        data = None
        if body is not None:
            data = json.dumps(body, allow_nan=False).encode()
            headers["Content-Type"] = "application/json"
        connection.request(method, self.address.path + path, data, headers)

    def _asked(self, method: str, path: str, body: Mapping[str, Any] | None, limit: float | None) -> Any:
        limit = self.limit if limit is None else limit
        deadline, dropped, pause = monotonic() + limit, 0, PAUSE
        while True:
            try:
                return self._once(method, path, body, limit)
            except ServerFault as fault:
                dropped += 1
                if fault.kind != CRASHED or dropped == TRIES:
                    raise
                wait = PAUSE
            except Unwilling as refusal:
                if refusal.status not in BUSY:
                    raise
                wait, pause = refusal.after if refusal.after is not None else pause, min(2 * pause, LONGEST_PAUSE)
                if monotonic() + wait > deadline:
                    reason = f"{refusal.reason}; it had no time for {method} {path} within {limit:g} seconds"
                    raise ServerFault(TIMED_OUT, reason) from None
            self.again += 1
            sleep(wait)

    def _once(self, method: str, path: str, body: Mapping[str, Any] | None, limit: float) -> Any:
        connection = self.address.connect(limit)
        deadline = monotonic() + limit
        # a limit for each operation does not end an answer that comes a byte at a time
        watchdog = Timer(limit, _shut, [connection])
        watchdog.daemon = True
        watchdog.start()
        self.requests += 1
        try:
            self._send(connection, method, path, body)
            response = connection.getresponse()
            data = _content(response, path)
        except (OSError, HTTPException, ValueError) as error:
            if monotonic() >= deadline or isinstance(error, TimeoutError):
                raise ServerFault(TIMED_OUT, f"no answer to {method} {path} within {limit:g} seconds") from None
            raise ServerFault(CRASHED, f"the connection for {method} {path} failed: {_words(error)}") from None
        finally:
            watchdog.cancel()
            connection.close()
        if monotonic() >= deadline:  # headers that are cut off look complete
            raise ServerFault(TIMED_OUT, f"no answer to {method} {path} within {limit:g} seconds")
        data = _unpacked(data, response.getheader("Content-Encoding", ""), path)
        if response.status >= 300:
            raise _refusal(response, data, path)
        return _value(data, path)


def _shut(connection: HTTPConnection) -> None:
    """End the operation that waits on a connection, in whichever thread it does."""
    with suppress(OSError, AttributeError):
        connection.sock.shutdown(2)


def _content(response: HTTPResponse, path: str) -> bytes:
    """The body of an answer. Raises ServerFault for one without end, HTTPException for one that is cut short."""
    pieces: list[bytes] = []
    size = 0
    while piece := response.read(PIECE):
        pieces.append(piece)
        size += len(piece)
        if size > LARGEST:
            raise ServerFault(BROKEN, f"the answer of {path} is longer than {LARGEST} bytes")
    if response.length:
        raise HTTPException(f"the answer ends {response.length} bytes before the length that it states")
    return b"".join(pieces)


def _unpacked(data: bytes, encoding: str, path: str) -> bytes:
    """The body of an answer without its encoding. Raises ServerFault for one that is unknown, broken or too long."""
    encoding = encoding.strip().lower()
    if encoding in ("", "identity"):
        return data
    if encoding not in UNPACKED:
        raise ServerFault(BROKEN, f"the answer of {path} has the encoding {shown(encoding)}, but none was asked for")
    unpacking = zlib.decompressobj(UNPACKED[encoding])
    try:
        found = unpacking.decompress(data, LARGEST + 1)
    except zlib.error as error:
        raise ServerFault(BROKEN, f"the answer of {path} is no {encoding}: {one_line(error)}") from None
    if len(found) > LARGEST:
        raise ServerFault(BROKEN, f"the answer of {path} is longer than {LARGEST} bytes")
    if not unpacking.eof:
        raise ServerFault(BROKEN, f"the answer of {path} ends within its {encoding}")
    return found


def _refusal(response: HTTPResponse, data: bytes, path: str) -> Unwilling:
    """The refusal that an answer with a status of 300 or more is."""
    place = response.getheader("Location")
    told = f"it leads to {shown(place)}" if place and response.status < 400 else _reason(data)
    after = decimal(response.getheader("Retry-After", "").strip())  # a date is no number, and is not waited for
    return Unwilling(
        response.status,
        f"{path} answers with status {response.status}: {told}",
        after if after is not None and after >= 0 else None,
    )


def _value(data: bytes, path: str) -> Any:
    try:
        return strict_json(data)
    except ValueError as error:
        start = shown(data[:40].decode(errors="replace"))
        raise ServerFault(BROKEN, f"the answer of {path} begins with {start}: {one_line(error)}") from None


def _reason(data: bytes) -> str:
    """The message of a refusal, however the server words it."""
    try:
        value = strict_json(data)
    except ValueError:
        return one_line(data[:300].decode(errors="replace")) or "no message"
    for name in ("error", "detail", "message"):
        if isinstance(value, dict) and name in value:
            value = value[name]
    return one_line(value if isinstance(value, str) else shown(value))


def _words(error: Exception) -> str:
    strerror = getattr(error, "strerror", None)
    return strerror if isinstance(strerror, str) and strerror else one_line(error) or type(error).__name__
