"""A chat-completions server on loopback that answers as it is told to, and remembers what it was asked."""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Reply:
    """What the server does with one request."""

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    cut: bool = False  # send half of the body, then reset the connection


@dataclass
class Asked:
    """One request."""

    path: str
    headers: dict[str, str]
    payload: dict[str, Any]
    time: float

    @property
    def names(self) -> list[str]:
        """The class names asked about, as the prompt lists them."""
        text = self.text.split("Classes: ", 1)[1].rsplit(".\nAnswer", 1)[0]
        return json.loads(f"[{text}]")

    @property
    def text(self) -> str:
        return next(p["text"] for p in self.payload["messages"][0]["content"] if p["type"] == "text")

    @property
    def image(self) -> str | None:
        parts = self.payload["messages"][0]["content"]
        return next((p["image_url"]["url"] for p in parts if p["type"] == "image_url"), None)


def completion(content: Any, **more: Any) -> bytes:
    """The body of a chat completion with this content."""
    message = {"role": "assistant", "content": content, **more}
    usage = {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}
    return json.dumps(
        {"object": "chat.completion", "choices": [{"index": 0, "message": message}], "usage": usage}
    ).encode()


def rating(name: str) -> int:
    """A rating from 0 to 10 that depends on the name alone."""
    return sum(name.encode()) % 11


def proper(asked: Asked) -> Reply:
    """A good answer."""
    return Reply(completion(json.dumps({name: rating(name) for name in asked.names})))


class Server:
    """The server; ``answer`` decides on each request."""

    def __init__(self, answer: Callable[[Asked], Reply] = proper) -> None:
        self.answer = answer
        self.asked: list[Asked] = []
        self.bodies: list[bytes] = []
        lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                length = int(self.headers.get("content-length", 0))
                payload = json.loads(self.rfile.read(length))
                asked = Asked(self.path, {k.lower(): v for k, v in self.headers.items()}, payload, time.monotonic())
                with lock:
                    outer.asked.append(asked)
                reply = outer.answer(asked)
                time.sleep(reply.delay)
                if reply.status == 200 and not reply.cut:
                    with lock:
                        outer.bodies.append(reply.body)
                try:
                    self.send_response(reply.status)
                    for name, value in {"content-type": "application/json", **reply.headers}.items():
                        self.send_header(name, value)
                    self.send_header("content-length", str(len(reply.body)))
                    self.end_headers()
                    if reply.cut:
                        self.wfile.write(reply.body[: len(reply.body) // 2])
                        self.wfile.flush()
                        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                        self.connection.close()
                        self.close_connection = True
                    else:
                        self.wfile.write(reply.body)
                except OSError:
                    self.close_connection = True

            def log_message(self, *args: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}/v1"

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
