"""Answers of an endpoint: ratings come from an answer that is what was asked for, or the call ends with a reason."""

from __future__ import annotations

import gzip
import html
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from conftest import write_config
from hypothesis import strategies as st
from mllm.server import Reply, Server, completion

from .conftest import PHOTOS
from .harness import call, fresh, fuzz
from .material import as_json, changed, damaged, junk, texts

SCORES = {"dog": 3, "eel": 8}
KEY = "sk-hostile-Very/Secret+Key&0123456789"
STATUS = (200,) * 12 + (201, 204, 206, 301, 307, 400, 401, 403, 404, 422, 429, 500, 503)
HEADERS = (
    {},
    {},
    {},
    {"content-type": "text/html"},
    {"content-type": "application/json; charset=nonsense"},
    {"location": "http://127.0.0.1:1/x"},
    {"location": f"/{KEY}"},
    {"retry-after": "1e999"},
    {"retry-after": "-1"},
    {"content-encoding": "gzip"},
    {"content-encoding": "br, zstd"},
    {"x-request-id": "\x1b[2J"},
)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.close()


@st.composite
def answers(draw: st.DrawFn) -> Any:
    """What the model says."""
    proper = json.dumps(SCORES)
    return draw(
        st.one_of(
            st.just(proper),
            changed(SCORES).map(as_json),
            changed({**SCORES, "x": {**SCORES}}).map(as_json),
            texts().map(lambda text: f"{text}{proper}{text}"),
            st.sampled_from(
                (
                    f"```json\n{proper}\n```",
                    f"I cannot rate {proper}; rather {{'dog': 1}}",
                    '{"dog": 3, "dog": 9, "eel": 2}',
                    '{"dog": NaN, "eel": Infinity}',
                    '{"dog": 1e400, "eel": -0.0}',
                    f'{{"dog": {"9" * 5000}, "eel": 2}}',
                    f'{{"dog": "{"9" * 5000}", "eel": "2"}}',
                    "{" * 100_000,
                    '{"a":' * 50_000,
                    "[" * 100_000 + "]" * 100_000,
                    f"the key is {KEY}",
                    "",
                )
            ),
            junk(),
        )
    )


# Bodies that have been at fault.
BODIES = (
    completion(json.dumps(SCORES)).replace(b'"completion_tokens": 5', b'"completion_tokens": NaN'),
    completion(json.dumps(SCORES)).replace(b'"prompt_tokens": 7', b'"prompt_tokens": ' + b"[" * 5000 + b"]" * 5000),
    completion(json.dumps(SCORES)).replace(b'"index": 0', b'"index": ' + b"9" * 5000),
    completion(json.dumps(SCORES)).replace(b"chat.completion", b"\\ud800"),
    completion(None, refusal=f"No: {json.dumps(SCORES)}"),
    b"[" * 100_000 + b"]" * 100_000,
    b'{"a":' * 100_000,
    b"{" * 1_000_000,
    bytes(1 << 22),
)


def shows_key(content: bytes) -> bool:
    """Whether the key can be read in what was written, in any usual spelling."""
    text = content.decode("utf-8", "replace")
    plain = re.sub(r"\\+u([0-9a-fA-F]{4})", lambda found: chr(int(found[1], 16)), text).replace("\\", "")
    return any(
        KEY in form for form in (text, plain, unquote(plain), html.unescape(plain), unquote(html.unescape(plain)))
    )


@st.composite
def replies(draw: st.DrawFn) -> Reply:
    """What the server sends."""
    body = completion(draw(answers()))
    kind = draw(st.sampled_from(("proper", "proper", "nodes", "bytes", "anything", "echo", "known")))
    if kind == "nodes":
        body = as_json(draw(changed(json.loads(body)))).encode("utf-8", "replace")
    elif kind == "bytes":
        body = draw(damaged(body))
    elif kind == "anything":
        body = draw(junk().map(as_json).map(lambda text: text.encode("utf-8", "replace")) | st.binary(max_size=64))
    elif kind == "known":
        body = draw(st.sampled_from(BODIES))
    elif kind == "echo":
        escaped = "".join(f"\\u{ord(c):04X}" for c in KEY)
        body = draw(st.sampled_from((KEY, escaped, KEY.replace("/", "%2f"), KEY.replace("&", "&amp;")))).encode()
        body = draw(st.sampled_from((body, completion("@").replace(b"@", body))))
    headers = dict(draw(st.sampled_from(HEADERS)))
    if headers.get("content-encoding") == "gzip" and draw(st.booleans()):
        body = draw(st.sampled_from((gzip.compress(body), zlib.compress(body), gzip.compress(bytes(1 << 24))[:-3])))
    return Reply(body, draw(st.sampled_from(STATUS)), headers, cut=draw(st.integers(0, 19)) == 0)


@fuzz(first=replies(), second=replies())
def test_endpoint_bodies(photos: Path, server: Server, first: Reply, second: Reply) -> None:
    waiting = [first, second]
    server.answer = lambda asked: waiting.pop(0) if len(waiting) > 1 else waiting[0]
    run = photos / "asked"
    fresh(run)
    mllm = {
        "backend": "endpoint",
        "base_url": server.url,
        "model": "tiny",
        "key_env": "HOSTILE_KEY",
        "images": "none",
        "retries": 0,
        "timeout": 5,
        "ratings": None,
    }
    config = {**PHOTOS, "mllm": mllm, "forget": {"classes": ["cat"]}, "out": "asked"}
    write_config(photos, **config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOSTILE_KEY", KEY)
        answer = call("similarity", "-c", photos / "megu.yaml", user=photos, run=run, writes=True)
    assert answer.code in (0, 2, 4)
    assert not shows_key((answer.err + answer.out).encode())
    for file in run.rglob("*"):
        assert not file.is_file() or not shows_key(file.read_bytes()), file.name
    if answer.code == 0:
        scores = json.loads((run / "similarity.json").read_text(encoding="utf-8"))["scores"]
        assert scores.keys() == {"cat"}
        assert scores["cat"].keys() <= SCORES.keys()
        assert all(0 <= value <= 10 for value in scores["cat"].values())
    fresh(run)
