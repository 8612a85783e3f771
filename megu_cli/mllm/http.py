"""One HTTP request with a body of JSON, bounded in time and memory, that reads nothing from the environment."""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import quote, urlsplit

from megu_cli import __version__

# Bytes of the longest body that is read.
LARGEST = 4_000_000
_UNRESERVED = "/%:@!$&'()*+,;=~-._"


@dataclass(frozen=True)
class Response:
    """A server's answer.

    Attributes:
        status: The status code.
        headers: Header fields by their names in lower case.
        body: The body, at most `LARGEST` bytes.
        fault: Why the body is not to be used; empty if it is sound.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes
    fault: str = ""


def post(url: str, body: bytes, headers: Mapping[str, str], seconds: float) -> Response:
    """Send a request and read the whole answer. No redirect is followed, no proxy is used.

    Args:
        url: An http or https address.
        body: JSON.
        headers: Further header fields.
        seconds: Time for the whole call, from the look-up of the name to the last byte.

    Raises:
        TimeoutError: The call took longer; its connection is closed.
        ConnectionError: There is no connection, or what came is no HTTP; the message says why.
    """
    call = _Call(url, body, headers, seconds)
    # A thread of its own: neither the look-up of a name nor a server that sends a byte now and then can be bounded
    # from within.
    threading.Thread(target=call.run, daemon=True).start()
    try:
        if not call.ended.wait(seconds):
            raise TimeoutError
    finally:
        call.close()
    if isinstance(call.error, TimeoutError):
        raise TimeoutError from None
    if call.error is not None:
        raise ConnectionError(str(call.error) or type(call.error).__name__) from None
    assert call.response is not None
    return call.response


class _Call:
    """A request under way."""

    def __init__(self, url: str, body: bytes, headers: Mapping[str, str], seconds: float) -> None:
        self.url, self.body, self.headers = urlsplit(url), body, headers
        self.deadline = time.monotonic() + seconds
        self.ended = threading.Event()
        self.response: Response | None = None
        self.error: Exception | None = None
        self._lock = threading.Lock()
        self._closed = False
        # A second handle of the connection: to shut it down ends what waits for the first, within TLS too.
        self._handle: socket.socket | None = None

    def run(self) -> None:
        """Do the request; what comes of it is in ``response`` or ``error``."""
        try:
            self.response = self._exchanged()
        # ValueError: a host that is no name.
        except (OSError, http.client.HTTPException, ValueError, MemoryError) as error:
            self.error = error
        finally:
            self.ended.set()

    def close(self) -> None:
        """End the connection, whoever waits for it."""
        with self._lock:
            self._closed = True
            if self._handle is not None:
                with contextlib.suppress(OSError):  # the server has closed it
                    self._handle.shutdown(socket.SHUT_RDWR)
                self._handle.close()
                self._handle = None

    def _exchanged(self) -> Response:
        host = self.url.hostname or ""
        secure = self.url.scheme == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        connection = kind(host, self.url.port)
        try:
            connection.sock = self._connected(host, connection.port, secure)
            fields = {
                "accept": "application/json",
                "accept-encoding": "identity",
                "connection": "close",
                "content-type": "application/json",
                "user-agent": f"megu/{__version__}",
                **self.headers,
            }
            connection.request("POST", quote(self.url.path, safe=_UNRESERVED), self.body, fields)
            with connection.getresponse() as response:
                return _read(response)
        finally:
            connection.close()

    def _connected(self, host: str, port: int, secure: bool) -> socket.socket:
        plain = socket.create_connection((host, port), max(self.deadline - time.monotonic(), 0.001))
        try:
            with self._lock:
                if self._closed:
                    raise TimeoutError
                self._handle = plain.dup()
            if not secure:
                return plain
            import ssl

            import truststore

            # The certificates of the system. Unlike ssl.create_default_context(), it writes no keys to SSLKEYLOGFILE.
            return truststore.SSLContext(ssl.PROTOCOL_TLS_CLIENT).wrap_socket(plain, server_hostname=host)
        except BaseException:
            plain.close()
            raise


def _read(response: http.client.HTTPResponse) -> Response:
    """The answer with its body, up to what is read of one.

    Raises:
        ConnectionError: The connection ended within the body.
    """
    headers = {name.lower(): value for name, value in response.getheaders()}
    encoding = headers.get("content-encoding", "").strip().lower()
    if encoding not in ("", "identity"):
        return Response(response.status, headers, b"", f"its body is encoded ({encoding}), which was not asked for")
    body = response.read(LARGEST + 1)
    if len(body) > LARGEST:
        return Response(response.status, headers, body[:LARGEST], f"its body is longer than {LARGEST:,} bytes")
    if response.length:
        raise ConnectionError("the connection ended within the answer")
    return Response(response.status, headers, body)
