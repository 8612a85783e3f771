"""Ctrl-C and SIGTERM end the process within two seconds, at whatever moment they come."""

from __future__ import annotations

import contextlib
import functools
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import subprocess_environment, write_config

sys.path.insert(0, str(Path(__file__).parents[1] / "mllm"))

from server import Asked, Reply, Server, proper

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
# The script as pip writes it, which says when its handlers are to be asked for.
STARTED = "import megu_cli.entry as e, os; os.write(1, b'!'); e.script()"


@pytest.fixture(scope="module")
def hanging() -> Iterator[str]:
    """The address of a server that accepts calls and never answers."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(64)
        taken = []

        def take() -> None:
            with contextlib.suppress(OSError):
                while True:
                    taken.append(listening.accept())

        threading.Thread(target=take, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1"


@pytest.fixture
def waiting(tmp_path: Path, hanging: str) -> Path:
    """A config whose similarity ratings never arrive."""
    mllm = {"backend": "endpoint", "model": "m", "base_url": hanging, "timeout": 100}
    return write_config(tmp_path, mllm=mllm)


def end(config: Path, number: signal.Signals, moment: Callable[[], object]) -> tuple[int, float, str]:
    """Send a signal at a moment after the first import; gives exit code, seconds until the end, stderr."""
    child = subprocess.Popen(
        [sys.executable, "-c", STARTED, "similarity", "-c", str(config)],
        env=subprocess_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored, where tests run in the background
    )  # fmt: skip
    assert child.stdout is not None
    try:
        assert child.stdout.read(1) == b"!"
        moment()
        sent = time.monotonic()
        child.send_signal(number)
        err = child.communicate(timeout=30)[1].decode()
        return child.returncode, time.monotonic() - sent, err
    finally:
        child.kill()


@pytest.mark.parametrize("number", CODES)
@pytest.mark.parametrize("delay", [0.02, 0.2, 0.7, 2.0])
def test_a_signal_ends_the_process_with_a_word(waiting: Path, number: signal.Signals, delay: float) -> None:
    code, seconds, err = end(waiting, number, lambda: time.sleep(delay))
    assert (code, err.count("interrupted")) == (CODES[number], 1), err
    assert "Traceback" not in err
    assert seconds < 2


@pytest.mark.parametrize(
    ("answered", "number"),
    [
        (1, signal.SIGINT),
        pytest.param(0, signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(0, signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(1, signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_a_signal_while_calls_hang(tmp_path: Path, number: signal.Signals, answered: int) -> None:
    # The first call is made by itself, the others at the same time.
    calls = threading.Semaphore(0)
    over = threading.Event()

    def answer(asked: Asked) -> Reply:
        calls.release()
        if len(server.asked) > answered:
            over.wait(60)
        return proper(asked)

    server = Server(answer)
    try:
        mllm = {"backend": "endpoint", "model": "m", "base_url": server.url, "timeout": 100, "concurrency": 3}
        config = write_config(tmp_path, mllm=mllm)
        code, seconds, err = end(config, number, lambda: [calls.acquire(timeout=60) for _ in range(1 + 3 * answered)])
        assert (code, "interrupted; what was finished is kept" in err) == (CODES[number], True), err
        assert seconds < 2
        answers = tmp_path / "run" / "similarity.answers.jsonl"
        assert len(answers.read_text().splitlines() if answers.exists() else []) == answered
    finally:
        over.set()
        server.close()


@pytest.mark.slow
@pytest.mark.parametrize("number", CODES)
def test_a_hundred_random_moments(waiting: Path, number: signal.Signals) -> None:
    draw = random.Random(0)
    wrong = []
    for _ in range(100):
        delay = draw.uniform(0.005, 2.0) if draw.random() < 0.95 else draw.uniform(2, 8)
        code, seconds, err = end(waiting, number, functools.partial(time.sleep, delay))
        if code != CODES[number] or seconds > 2 or "interrupted" not in err or "Traceback" in err:
            wrong.append((delay, code, seconds, err[-300:]))
    assert not wrong


@pytest.mark.parametrize(("number", "code"), CODES.items())
@pytest.mark.parametrize("deed", ["caught", "busy"])
def test_an_interrupt_that_is_lost_ends_the_process_all_the_same(number: signal.Signals, code: int, deed: str) -> None:
    # Some code catches KeyboardInterrupt; while C computes, none is raised.
    deeds = {
        "caught": "\nwhile True:\n try: time.sleep(9)\n except BaseException: pass",
        "busy": "hashlib.pbkdf2_hmac('md5', b'', b'', 1 << 30)",
    }
    script = f"import hashlib, time, os, megu_cli.entry as e; e._listen(); os.write(1, b'!')\n{deeds[deed]}"
    child = subprocess.Popen(
        [sys.executable, "-c", script], env=subprocess_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        assert child.stdout is not None
        assert child.stdout.read(1) == b"!"
        time.sleep(0.5)  # it is within the deed
        sent = time.monotonic()
        child.send_signal(number)
        assert child.communicate(timeout=20)[1] == b"interrupted\n"
        assert child.returncode == code
        assert time.monotonic() - sent < 2
    finally:
        child.kill()
