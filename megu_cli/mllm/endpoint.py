"""A vision-language model behind an OpenAI-compatible server: one call for each image and chunk of class names.

A chunk is fifty names that are rated together, or one that is said to be alike or not; see `megu_cli.mllm.chat`.
"""

from __future__ import annotations

import base64
import ipaddress
import json
import math
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from megu_cli.errors import ConfigError, MLLMError
from megu_cli.execution.runtime import Track, silent
from megu_cli.mllm import completion, http, pictures
from megu_cli.mllm.answers import Answers
from megu_cli.mllm.base import (
    FORMS,
    PROMPT_VERSION,
    SCALE,
    Cost,
    Question,
    Ratings,
    Show,
    averaged,
    excerpt,
    unrated,
)
from megu_cli.mllm.chat import CHATS
from megu_cli.mllm.masking import Key, masked

if TYPE_CHECKING:
    from megu_cli.mllm.backends import Setup

# For the estimate of tokens: characters of text per token, pixels of image per token (Qwen2-VL: 28 x 28), and what a
# small image costs at least (LLaVA-1.5: 24 x 24 patches, whatever its size).
_CHARACTERS, _PIXELS, _SMALLEST = 4, 28 * 28, 576
# With the JSON schema or without (token probabilities for true_false), with temperature and length or without: what a
# server may refuse, in the order in which it is tried.
_OPTIONS = ((True, True), (False, True), (True, False), (False, False))
# Seconds: the longest Retry-After that is waited for; the first wait where a server names none, and the longest.
_PATIENCE, _FIRST_WAIT, _LAST_WAIT = 120.0, 0.5, 8.0
_BUSY = (408, 409, 429)

# The ratings of one call, and the text that they were read from.
_Answer = tuple[dict[str, float], str]


@dataclass(frozen=True)
class _Call:
    """One question to the server: a concept, one image of it or none, and a chunk of names."""

    concept: str
    position: int | None
    image: str | None
    candidates: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """All names that the question holds."""
        return (self.concept, *self.candidates)


class Endpoint:
    """Ratings by chat completions.

    Args:
        model: The model's name at the server.
        base_url: The server's address.
        key: Its key, if it wants one.
        allow_remote: Whether the server may be on another machine.
        show: Gives the pictures.
        answers: Where raw answers are kept.
        concurrency: Calls at the same time.
        timeout: Seconds for a whole call, after which its connection is closed.
        retries: Times that a call is repeated when it fails.
        question: The setting ``mllm.question``.
        track: Reports progress.
    """

    def __init__(
        self,
        model: str,
        base_url: str,
        *,
        key: Key,
        allow_remote: bool,
        show: Show,
        answers: Answers,
        concurrency: int = 4,
        timeout: float = 120.0,
        retries: int = 5,
        question: str = "rating",
        track: Track = silent,
    ) -> None:
        self.form, self.chat = FORMS[question], CHATS[question]
        self.model, self.base_url, self.show, self.answers = model, base_url, show, answers
        self.concurrency, self.timeout, self.retries, self.track = concurrency, timeout, retries, track
        self.allow_remote = allow_remote
        self._key = key
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._refused = 0  # how many of _OPTIONS the server refused: they are not sent again

    @classmethod
    def of(cls, setup: Setup) -> Endpoint:
        """Return the rater of a run."""
        settings = setup.settings
        return cls(
            str(settings.model),
            settings.base_url or "",
            key=Key.of(settings),
            allow_remote=settings.allow_remote,
            show=setup.show,
            answers=Answers(setup.answers),
            concurrency=settings.concurrency,
            timeout=settings.timeout,
            retries=settings.retries,
            question=settings.question,
            track=setup.track,
        )

    @property
    def host(self) -> str:
        """Host (and port) that is talked to."""
        return urlsplit(self.base_url).netloc

    @property
    def remote(self) -> bool:
        """Whether that may be another machine: anything but a loopback address or the name localhost."""
        name = urlsplit(self.base_url).hostname or ""
        try:
            return not ipaddress.ip_address(name).is_loopback
        except ValueError:
            return name != "localhost"

    def cost(self, questions: list[Question]) -> Cost:
        """See `Backend.cost`."""
        calls = list(self._calls(questions))
        left = [call for call in calls if self.answers.find(self._asked(call, 1)) is None]
        tokens = 0
        for call in left:
            tokens += len(self.chat.prompt(call.concept, call.candidates, call.image is not None)) // _CHARACTERS
            if call.position is not None:
                width, height = self._picture(call.position).size
                tokens += max(_SMALLEST, math.ceil(width * height / _PIXELS))
        images = len({call.image for call in left if call.image})
        allowed = self.allow_remote or not self.remote
        return Cost(len(left), len(calls) - len(left), images, tokens, self.host, self.remote, allowed)

    def rate(self, questions: list[Question]) -> Ratings:
        """See `Backend.rate`."""
        calls = list(self._calls(questions))
        found = self._all(calls)

        given: dict[str, list[dict[str, float]]] = {}
        said: dict[str, str] = {}
        for question in questions:
            rows: dict[str | int | None, dict[str, float]] = {}
            for call, (ratings, text) in zip(calls, found, strict=True):
                if call.concept == question.concept:
                    rows.setdefault(call.position, {}).update(ratings)
                    said.setdefault(call.concept, text)
            given[question.concept] = list(rows.values())
        scores = averaged(questions, given, said, self.form)
        shown = len({call.image for call in calls if call.image})
        low, high = SCALE
        graded = any(low < rating < high for ratings, _ in found for rating in ratings.values())
        provenance = {
            **({**self.form.key, "token_probabilities": graded} if self.form.key else {}),
            "prompt": {"version": PROMPT_VERSION, "text": self.chat.prompt("…", ["…"], shown > 0)},
            "images": {"shown": shown, "sent_to": self.host, "left_the_machine": shown if self.remote else 0},
            "missing": unrated(questions, scores),
        }
        return Ratings(f"{self.model} at {self.host}", scores, provenance)

    # -- what to ask -----------------------------------------------------------------------------------------------

    def _calls(self, questions: list[Question]) -> Iterator[_Call]:
        for question in questions:
            for position in question.positions or (None,):
                image = None if position is None else pictures.digest(self._picture(position))
                for start in range(0, len(question.candidates), self.chat.chunk):
                    names = question.candidates[start : start + self.chat.chunk]
                    yield _Call(question.concept, position, image, tuple(names))

    def _picture(self, position: int) -> Any:
        with self._lock:  # images are decoded by one thread at a time
            return self.show(position)

    def _asked(self, call: _Call, attempt: int) -> dict[str, Any]:
        return {
            "backend": "endpoint",
            "model": self.model,
            "base_url": self.base_url,
            "prompt": PROMPT_VERSION,
            "concept": call.concept,
            "image": call.image,
            "candidates": list(call.candidates),
            "attempt": attempt,
            **self.form.key,
        }

    # -- asking ----------------------------------------------------------------------------------------------------

    def _all(self, calls: list[_Call]) -> list[_Answer]:
        """Answer all calls, several at a time; what arrives is kept even where another call fails."""
        results: list[_Answer] = [({}, "")] * len(calls)
        left = [i for i, call in enumerate(calls) if not self._answered(call)]
        if left:
            self._check()
        self._stopped.clear()
        # Daemons, so that an interrupted process does not wait for a server.
        workers: list[threading.Thread] = []
        with self.track("similarity", len(calls)) as advance:
            try:
                # The first call by itself: it finds out what the server takes, and whether it is there at all.
                for first in (left[:1], [i for i in range(len(calls)) if i not in left[:1]]):
                    todo: queue.SimpleQueue[int] = queue.SimpleQueue()
                    done: queue.SimpleQueue[tuple[int, _Answer | Exception]] = queue.SimpleQueue()
                    for i in first:
                        todo.put(i)
                    for _ in range(min(self.concurrency, len(first))):
                        workers.append(threading.Thread(target=self._work, args=(calls, todo, done), daemon=True))
                        workers[-1].start()
                    for _ in first:
                        i, answer = done.get()
                        if isinstance(answer, Exception):
                            raise answer
                        results[i] = answer
                        advance()
            except Exception:
                # The calls under way are paid for: what they bring is kept. Each ends by its time-out.
                self._stopped.set()
                for worker in workers:
                    worker.join()
                raise
            finally:
                self._stopped.set()
        return results

    def _work(self, calls: list[_Call], todo: queue.SimpleQueue[int], done: queue.SimpleQueue[Any]) -> None:
        """Answer calls until there are no more, or until all are to stop."""
        while not self._stopped.is_set():
            try:
                i = todo.get_nowait()
            except queue.Empty:
                return
            try:
                done.put((i, self._answer(calls[i])))
            except Exception as error:
                done.put((i, error))

    def _answered(self, call: _Call) -> bool:
        """Whether the answers on disk have all that would be asked for a call."""
        entry = self.answers.find(self._asked(call, 1))
        if entry is None:
            return False
        again = self._again(call, self.chat.read(completion.unpacked(entry), call.candidates, call.names))
        return again is None or self.answers.find(self._asked(again, 2)) is not None

    def _check(self) -> None:
        """What is at fault before anything is sent.

        Raises:
            ConfigError: The host is not allowed, or the key is not there or no key.
        """
        if self.remote and not self.allow_remote:
            raise ConfigError(
                f"mllm.base_url: {self.host} is not this machine, and images would be sent to it",
                "Set mllm.allow_remote: true if they may; `megu similarity --dry-run` shows how many.",
            )
        if self._key.needed and not self._key.value:
            raise ConfigError(
                f"mllm.key_env: the environment variable {self._key.variable} is not set",
                "Set it to the key, or leave mllm.key_env out if the server wants none.",
            )
        # http.client would repeat the whole header in its message.
        if self._key.value and not (self._key.value.isascii() and self._key.value.isprintable()):
            raise ConfigError(
                f"mllm.key_env: the key in the variable {self._key.variable} has characters that cannot be sent",
                "A key is one line of ASCII characters.",
            )

    def _answer(self, call: _Call) -> _Answer:
        """Ratings of one call, and the text they were read from; what is not there is asked for once more."""
        body = self._said(call, 1)
        ratings = self.chat.read(body, call.candidates, call.names)
        if again := self._again(call, ratings):
            second = self._said(again, 2)
            ratings |= self.chat.read(second, again.candidates, call.names)
            body = second if completion.text(second) else body
        return ratings, self._masked(completion.text(body) or body.decode(errors="replace"))

    def _again(self, call: _Call, ratings: dict[str, float]) -> _Call | None:
        """The call for what an answer did not rate; ``None`` if it rated all."""
        missing = tuple(name for name in call.candidates if name not in ratings)
        return replace(call, candidates=missing) if missing else None

    def _said(self, call: _Call, attempt: int) -> bytes:
        """The body of the server's answer, from the answers on disk where it was given before."""
        asked = self._asked(call, attempt)
        entry = self.answers.find(asked)
        if entry is None:
            content: list[dict[str, Any]] = []
            if call.position is not None:
                url = pictures.data_url(self._picture(call.position))
                content.append({"type": "image_url", "image_url": {"url": url}})
            prompt = self.chat.prompt(call.concept, call.candidates, call.position is not None, again=attempt > 1)
            content.append({"type": "text", "text": prompt})
            started = time.perf_counter()
            body = self._post([{"role": "user", "content": content}], call.candidates)
            seconds = round(time.perf_counter() - started, 3)
            entry = self.answers.append(
                asked, {"seconds": seconds, "tokens": completion.tokens(body), **self._packed(body)}
            )
        return completion.unpacked(entry)

    def _packed(self, body: bytes) -> dict[str, str]:
        """A body, byte for byte; only where a server repeats the key to us is the key taken out."""
        body = self._masked(body.decode("latin-1")).encode("latin-1")  # which leaves all other bytes as they are
        try:
            return {"body": body.decode()}
        except UnicodeDecodeError:
            return {"body_base64": base64.b64encode(body).decode()}

    # -- the connection --------------------------------------------------------------------------------------------

    def _post(self, messages: list[dict[str, Any]], candidates: tuple[str, ...]) -> bytes:
        """The body of an answer with status 200.

        Raises:
            MLLMError: There is none, after all retries.
        """
        refused: http.Response | None = None
        first = self._refused
        for number, (structured, tuned) in enumerate(_OPTIONS[first:], first):
            request: dict[str, Any] = {"model": self.model, "messages": messages}
            if structured:
                request |= self.chat.options(candidates)
            if tuned:
                request |= {"temperature": 0, "max_tokens": self.chat.length(candidates)}
            response = self._persistently(json.dumps(request).encode())
            if 200 <= response.status < 300 and not response.fault:
                self._refused = max(self._refused, number)
                return response.body
            if response.status not in (400, 422):
                raise self._failed(response)
            refused = refused or response  # what it says of the whole request tells most
        assert refused is not None
        raise self._failed(refused)

    def _persistently(self, request: bytes) -> http.Response:
        """The first answer that another try would not change, or the last.

        Raises:
            MLLMError: There was none.
        """
        headers = {"authorization": f"Bearer {self._key.value}"} if self._key.value else {}
        url = self.base_url.rstrip("/") + "/chat/completions"
        for left in range(self.retries, -1, -1):
            pause = min(_FIRST_WAIT * 2.0 ** (self.retries - left), _LAST_WAIT)
            final = not left or self._stopped.is_set()
            try:
                response = http.post(url, request, headers, self.timeout)
            except TimeoutError:
                if final:
                    raise self._fault(
                        f"no answer within {self.timeout:g} seconds, {self.retries - left + 1} times over",
                        "Raise mllm.timeout, or lower mllm.concurrency; what was answered is kept.",
                    ) from None
            except ConnectionError as error:
                if final:
                    raise self._fault(
                        f"no connection ({excerpt(self._masked(str(error)))})",
                        "Is the server running, and mllm.base_url right? What was answered is kept.",
                    ) from None
            else:
                pause = _retry_after(response) or pause
                passing = response.status in _BUSY or response.status >= 500
                if final or not passing or pause > _PATIENCE:
                    return response
            self._stopped.wait(pause)
        raise AssertionError("unreachable")

    def _failed(self, response: http.Response) -> MLLMError:
        status = response.status
        if 300 <= status < 400:
            to = excerpt(self._masked(response.headers.get("location", "another address")))
            return self._fault(
                f"answers with a redirect to {to}, and none is followed",
                "Set mllm.base_url to the address itself, if images may be sent there.",
            )
        hints = {
            401: f"It wants a key: set the environment variable {self._key.variable}.",
            403: f"It wants another key: see the environment variable {self._key.variable}.",
            404: "Check mllm.base_url (most end in /v1) and mllm.model.",
            429: "Lower mllm.concurrency, or come back later; what was answered is kept.",
        }
        wait = response.headers.get("retry-after")
        told = f" (Retry-After: {excerpt(self._masked(wait))})" if wait else ""
        text = response.fault or response.body.decode(errors="replace")
        return self._fault(
            f"HTTP status {status}{told}: {excerpt(self._masked(text))}",
            hints.get(status, "What was answered is kept; the same command goes on from there."),
        )

    def _fault(self, what: str, hint: str) -> MLLMError:
        return MLLMError(f"{self.host}: {self._masked(what)}", hint)

    def _masked(self, text: str) -> str:
        """A text from outside without the key."""
        return masked(text, self._key.value or "")


def _retry_after(response: http.Response) -> float | None:
    """Seconds that the server asks to wait, if it says so."""
    value = response.headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        from email.utils import parsedate_to_datetime

        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return None
    return seconds if seconds > 0 else None
