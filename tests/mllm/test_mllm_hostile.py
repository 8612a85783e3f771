"""Servers that mean harm: each costs a bounded time and memory, and the stage ends with the reason. Loopback only."""

from __future__ import annotations

import base64
import contextlib
import gzip
import html
import json
import socket
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from server import Reply, Server, completion
from test_mllm_endpoint import KEY, endpoint, question  # noqa: F401

from megu_cli.errors import MLLMError
from megu_cli.mllm import http
from megu_cli.mllm.base import parse
from megu_cli.mllm.completion import tokens
from megu_cli.mllm.masking import masked

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"


@contextlib.contextmanager
def raw(first: bytes, then: bytes, pause: float = 0.0) -> Iterator[str]:
    """The address of a server that answers each call with ``first``, and then with ``then`` for ever."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(16)

        def serve(connection: socket.socket) -> None:
            with contextlib.suppress(OSError), connection:
                connection.recv(65536)
                connection.sendall(first)
                while True:
                    connection.sendall(then)
                    time.sleep(pause)

        def take() -> None:
            with contextlib.suppress(OSError):
                while True:
                    threading.Thread(target=serve, args=(listening.accept()[0],), daemon=True).start()

        threading.Thread(target=take, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1"


@contextlib.contextmanager
def bounded(seconds: float, megabytes: float) -> Iterator[None]:
    tracemalloc.start()
    started = time.monotonic()
    try:
        yield
        assert time.monotonic() - started < seconds
        assert tracemalloc.get_traced_memory()[1] < megabytes * 1e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("first", "then", "pause", "says"),
    [
        (b"", b"", 0.05, "no answer within 1 seconds"),
        (b"HTTP/1.1 200 OK\r\nx: ", b"y", 0.05, "no answer within 1 seconds"),
        (HEAD + b"content-length: 99999\r\n\r\n", b" ", 0.05, "no answer within 1 seconds"),
        (HEAD + b"transfer-encoding: chunked\r\n\r\n", b"1\r\n \r\n", 0.05, "no answer within 1 seconds"),
        (HEAD + b"transfer-encoding: chunked\r\n\r\n0\r\n", b"x: y\r\n", 0.05, "no answer within 1 seconds"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.001, "no answer within 1 seconds"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 999, 0.0, "no answer within 1 seconds"),
        (HEAD + b"\r\n", b"[" * 65536, 0.0, "its body is longer than 4,000,000 bytes"),
        (HEAD + b"content-length: 99999999999\r\n\r\n", b"{" * 65536, 0.0, "its body is longer than"),
        (HEAD, b"x: y\r\n" * 999, 0.0, "no connection .*100 headers"),
        (HEAD + b"x: ", b"y" * 65536, 0.0, "no connection"),
        (b"HTTP/1.1 200 ", b"y" * 65536, 0.0, "no connection"),
        (HEAD + b"transfer-encoding: chunked\r\n\r\n", b"f" * 65536, 0.0, "no connection"),
        (HEAD + b"content-encoding: gzip\r\n\r\n", b"", 0.05, r"its body is encoded \(gzip\)"),
    ],
    ids=["nothing", "headers", "body", "chunks", "trailers", "continue slowly", "continue", "endless", "long",
         "many headers", "long header", "long status", "chunk size", "gzip"],
)  # fmt: skip
def test_a_server_without_end_costs_the_time_of_a_call(
    endpoint: Callable[..., Any], first: bytes, then: bytes, pause: float, says: str  # noqa: F811
) -> None:  # fmt: skip
    with raw(first, then, pause) as url, bounded(4, 40), pytest.raises(MLLMError, match=says):
        endpoint(base_url=url, timeout=1.0, retries=0).rate([question()])


def test_a_compressed_answer_is_not_asked_for_and_not_read(endpoint: Any, server: Server) -> None:  # noqa: F811
    server.answer = lambda a: Reply(gzip.compress(bytes(400_000_000), 1), headers={"content-encoding": "gzip"})
    with pytest.raises(MLLMError, match=r"its body is encoded \(gzip\)"):
        endpoint().rate([question()])
    assert server.asked[0].headers["accept-encoding"] == "identity"
    assert len(server.asked) == 1


@pytest.mark.parametrize("usage", ["NaN", '{"prompt_tokens": NaN}', "[" * 900 + "]" * 900, '{"prompt_tokens": 1e999}',
                                   '{"prompt_tokens": -1, "completion_tokens": true}', '"x"', "7"])  # fmt: skip
def test_odd_metadata_costs_no_answer(endpoint: Any, server: Server, usage: str) -> None:  # noqa: F811
    server.answer = lambda a: Reply(
        completion(json.dumps({name: i for i, name in enumerate(a.names)})).split(b', "usage"')[0]
        + f', "usage": {usage}}}'.encode()
    )
    assert endpoint().rate([question()]).scores["c0"]["c3"] == 2
    assert len(server.asked) == 1


def test_counts_are_whole_numbers() -> None:
    assert tokens(b'{"usage": {"prompt_tokens": 3, "completion_tokens": 4.5}}') == {"in": 3, "out": None}


@pytest.mark.parametrize("body", [b"[" * 3_000_000, b'{"choices":' * 300_000, b'{"a":1e' + b"9" * 99_999, b"9" * 9999])
def test_a_body_that_cannot_be_parsed_ends_the_stage(endpoint: Any, server: Server, body: bytes) -> None:  # noqa: F811
    server.answer = lambda a: Reply(body)
    with bounded(20, 200), pytest.raises(MLLMError, match="0 of 9 ratings were given"):
        endpoint().rate([question()])


@pytest.mark.parametrize("part", ["{", '{"', '{"a":', '{"a":[', '{"a":1,', '{"a" ', '{"a":{}} ', "<think>", "```\n",
                                  '{"a":1}', "{ ", '{"\\', "9"])  # fmt: skip
def test_the_parser_takes_linear_time(part: str) -> None:
    text = part * (2_000_000 // len(part))
    started = time.monotonic()
    assert parse(text, ["b", "c"], ["{b}"]) == {}
    assert time.monotonic() - started < 3


@pytest.mark.parametrize(
    ("text", "names", "expected"),
    [
        ('I cannot rate x {"b": 9}.', ['x {"b": 9}', "b"], {}),
        ('I cannot rate x {"b": 9}.', ["b"], {}),  # asked once more, for b only
        ('I cannot rate "x {\\"b\\": 9}", sorry.', ["b"], {}),
        ('Sorry: {"b": 1}', ["a", "b"], {}),
        ('{"b": 1}', ["a", "b"], {"b": 1}),
        ('First {"a": 1, "b": 2}, no, {"a": 3, "b": 2}', ["a", "b"], {}),
        ('First {"a": 1, "b": 2}; so {"a": 1, "b": 2}', ["a", "b"], {"a": 1, "b": 2}),
        ('A brace { and then {"a": 1, "b": 2}', ["a", "b"], {"a": 1, "b": 2}),
        ('<think>{"a": 1, "b": 2}', ["a", "b"], {}),
        ('so {"a": 9}</think>```json\n{"a": 1}\n```', ["a", "b"], {"a": 1}),
        ('{"x {\\"b\\": 9}": 3, "b": 4}', ['x {"b": 9}', "b"], {'x {"b": 9}': 3, "b": 4}),
    ],
)
def test_ratings_come_from_one_object(text: str, names: list[str], expected: dict[str, float]) -> None:
    assert parse(text, names, ['x {"b": 9}']) == expected


SPELLINGS = {
    "json": json.dumps(KEY).replace("/", "\\/"),
    "plus": KEY.replace("+", "\\u002B"),
    "all": "".join(f"\\u{ord(c):04X}" for c in KEY),
    "twice": json.dumps(json.dumps(KEY.replace("/", "\\/"))),
    "percent": KEY.replace("/", "%2f").replace("+", "%2b"),
    "percent twice": quote(quote(KEY, safe=""), safe=""),
    "entities": html.escape("".join(f"&#x{ord(c):x};" for c in KEY)),
    "named": KEY.replace("/", "&sol;").replace("+", "&plus;"),
    "mixed": KEY.replace("/", "\\u00252F").replace("+", "&#37;2B"),
    "base64": base64.b64encode(KEY.encode()).decode(),
    "basic": base64.b64encode(b"user:" + KEY.encode()).decode(),
    "utf-16": KEY.encode("utf-16-le").decode(),
    "shortened": f"{KEY[:8]}***{KEY[-8:]}",
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_key_is_masked_in_every_spelling(
    endpoint: Any, server: Server, tmp_path: Path, spelling: str  # noqa: F811
) -> None:  # fmt: skip
    form = SPELLINGS[spelling]
    for reply in (
        Reply(json.dumps({"error": form}).encode(), 401),
        Reply(f'{{"error": "{form}"}}'.encode(), 400),
        Reply(b"", 302, {"location": f"http://127.0.0.1:1/?k={form.replace(chr(0), '')}"}),
        Reply(completion(form)),
    ):
        server.answer = lambda a, reply=reply: reply
        with pytest.raises(MLLMError) as caught:
            endpoint(key=KEY).rate([question()])
        written = (tmp_path / "similarity.answers.jsonl").read_text() if reply.status == 200 else ""
        for text in (str(caught.value), written):
            assert not text or "[key]" in text
            # Nothing is left that decodes to an end of the key.
            assert masked(text, KEY) == text
            assert not any(part in text for part in (form, KEY[:8], KEY[-8:], "Secret"))


def test_masking_leaves_all_else_as_it_is_and_json_whole() -> None:
    text = '{"a": "100% \\"sure\\" &amp; \\\\ %41 \\u00e9 é", "b": "%s"}'
    assert masked(text, KEY) == text
    for form in ("json", "plus", "all", "percent"):
        assert json.loads(masked('{"a": "\\n' + SPELLINGS[form].strip('"') + '\\n"}', KEY)) == {"a": "\n[key]\n"}


@pytest.mark.parametrize("part", ["%25", "25", "\\", "\\n", "&#", "&#0", "&amp", "\\u0073", KEY[:8], "\0"])
def test_masking_takes_linear_time(part: str) -> None:
    started = time.monotonic()
    masked("%" + part * (300_000 // len(part)), KEY)
    assert time.monotonic() - started < 2


def test_escapes_without_end_mask_the_whole_text() -> None:
    assert masked("%" + "25" * 40 + "2F", KEY) == "[key]"


def test_a_call_ends_with_its_connection() -> None:
    before = threading.active_count()
    with raw(HEAD + b"content-length: 9999\r\n\r\n", b" ", 0.01) as url:
        with pytest.raises(TimeoutError):
            http.post(f"{url}/chat/completions", b"{}", {}, 0.3)
        time.sleep(0.5)
        assert threading.active_count() <= before + 2  # the server's
