"""A vision-language model behind an OpenAI-compatible server: one call for each image and chunk of class names."""

from __future__ import annotations

import base64
import contextlib
import ipaddress
import json
import math
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from megu_cli.errors import ConfigError, MLLMError
from megu_cli.mllm import pictures
from megu_cli.mllm.answers import Answers
from megu_cli.mllm.base import (
    PROMPT_VERSION,
    Cost,
    Question,
    Ratings,
    Show,
    averaged,
    chat_prompt,
    excerpt,
    parse,
    schema,
    unrated,
)
from megu_cli.runtime import Track, silent

if TYPE_CHECKING:
    from openai import APIStatusError, OpenAI

# Names asked about in one call.
CHUNK = 50
# For the estimate of tokens: characters of text per token, pixels of image per token (Qwen2-VL: 28 x 28), and what a
# small image costs at least (LLaVA-1.5: 24 x 24 patches, whatever its size).
_CHARACTERS, _PIXELS, _SMALLEST = 4, 28 * 28, 576
# With the JSON schema or without, with temperature and length or without: what a server may refuse, in the order in
# which it is tried.
_OPTIONS = ((True, True), (False, True), (True, False), (False, False))
# A shorter key is no secret but a filler for servers that want some key, and may be part of any word.
_SECRET = 6


@dataclass(frozen=True)
class _Call:
    """One question to the server: a concept, one image of it or none, and a chunk of names."""

    concept: str
    position: int | None
    image: str | None
    candidates: tuple[str, ...]


class Endpoint:
    """Ratings by chat completions.

    Args:
        model: The model's name at the server.
        base_url: The server's address.
        key: Its key, if it wants one.
        key_env: The environment variable that the key comes from, for messages.
        key_needed: Whether there must be a key.
        allow_remote: Whether the server may be on another machine.
        show: Gives the pictures.
        answers: Where raw answers are kept.
        concurrency: Calls at the same time.
        timeout: Seconds to wait for an answer.
        retries: Times that a call is repeated when it fails.
        track: Reports progress.
    """

    def __init__(
        self,
        model: str,
        base_url: str,
        *,
        key: str | None,
        key_env: str,
        key_needed: bool = False,
        allow_remote: bool,
        show: Show,
        answers: Answers,
        concurrency: int = 4,
        timeout: float = 120.0,
        retries: int = 5,
        track: Track = silent,
    ) -> None:
        self.model, self.base_url, self.show, self.answers = model, base_url, show, answers
        self.concurrency, self.timeout, self.retries, self.track = concurrency, timeout, retries, track
        self.allow_remote = allow_remote
        self._key, self._key_env, self._key_needed = key, key_env, key_needed
        self._client: OpenAI | None = None
        self._lock = threading.Lock()
        self._refused = 0  # how many of _OPTIONS the server refused: they are not sent again

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
            tokens += len(chat_prompt(call.concept, call.candidates, call.image is not None)) // _CHARACTERS
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
        scores = averaged(questions, given, said)
        shown = len({call.image for call in calls if call.image})
        provenance = {
            "prompt": {"version": PROMPT_VERSION, "text": chat_prompt("…", ["…"], shown > 0)},
            "images": {"shown": shown, "sent_to": self.host, "left_the_machine": shown if self.remote else 0},
            "missing": unrated(questions, scores),
        }
        return Ratings(f"{self.model} at {self.host}", scores, provenance)

    # -- what to ask -----------------------------------------------------------------------------------------------

    def _calls(self, questions: list[Question]) -> Iterator[_Call]:
        for question in questions:
            for position in question.positions or (None,):
                image = None if position is None else pictures.digest(self._picture(position))
                for start in range(0, len(question.candidates), CHUNK):
                    yield _Call(question.concept, position, image, tuple(question.candidates[start : start + CHUNK]))

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
        }

    # -- asking ----------------------------------------------------------------------------------------------------

    def _all(self, calls: list[_Call]) -> list[tuple[dict[str, float], str]]:
        """Answer all calls, several at a time; what arrives is kept even where another call fails."""
        results: list[tuple[dict[str, float], str]] = [({}, "")] * len(calls)
        left = [i for i, call in enumerate(calls) if not self._answered(call)]
        if left:
            self._check()
        with (
            self.track("similarity", len(calls)) as advance,
            self._connected(),
            ThreadPoolExecutor(self.concurrency) as pool,
        ):
            # The first call by itself: it finds out what the server takes, and whether it is there at all.
            for i in left[:1]:
                results[i] = self._answer(calls[i])
                advance()
            futures: dict[Future[tuple[dict[str, float], str]], int] = {
                pool.submit(self._answer, call): i for i, call in enumerate(calls) if i not in left[:1]
            }
            try:
                pending = set(futures)
                while pending:
                    finished, pending = wait(pending, timeout=1, return_when=FIRST_EXCEPTION)
                    for future in finished:
                        results[futures[future]] = future.result()
                        advance()
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
        return results

    def _answered(self, call: _Call) -> bool:
        """Whether the answers on disk have all that would be asked for a call."""
        entry = self.answers.find(self._asked(call, 1))
        if entry is None:
            return False
        again = self._again(call, parse(_text(_unpacked(entry)), call.candidates))
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
        if self._key_needed and not self._key:
            raise ConfigError(
                f"mllm.key_env: the environment variable {self._key_env} is not set",
                "Set it to the key, or leave mllm.key_env out if the server wants none.",
            )
        # The libraries below would repeat the whole header in their message.
        if self._key and not (self._key.isascii() and self._key.isprintable()):
            raise ConfigError(
                f"mllm.key_env: the key in the environment variable {self._key_env} has characters that cannot be sent",
                "A key is one line of ASCII characters.",
            )

    def _answer(self, call: _Call) -> tuple[dict[str, float], str]:
        """Ratings of one call, and the text they were read from; what is not there is asked for once more."""
        body = self._said(call, 1)
        ratings = parse(_text(body), call.candidates)
        if again := self._again(call, ratings):
            second = self._said(again, 2)
            ratings |= parse(_text(second), again.candidates)
            body = second if _text(second) else body
        return ratings, _text(body) or body.decode(errors="replace")

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
            prompt = chat_prompt(call.concept, call.candidates, call.position is not None, again=attempt > 1)
            content.append({"type": "text", "text": prompt})
            started = time.perf_counter()
            body = self._post([{"role": "user", "content": content}], call.candidates)
            seconds = round(time.perf_counter() - started, 3)
            entry = self.answers.append(asked, {"seconds": seconds, "tokens": _tokens(body), **self._packed(body)})
        return _unpacked(entry)

    def _packed(self, body: bytes) -> dict[str, str]:
        """A body, byte for byte; only where a server repeats the key to us is the key taken out."""
        body = self._without_key(body.decode("latin-1")).encode("latin-1")  # which leaves all other bytes as they are
        try:
            return {"body": body.decode()}
        except UnicodeDecodeError:
            return {"body_base64": base64.b64encode(body).decode()}

    # -- the connection --------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _connected(self) -> Iterator[None]:
        try:
            yield
        finally:
            with self._lock:
                client, self._client = self._client, None
            if client:
                client.close()

    def _connection(self) -> OpenAI:
        """The client, made when something is first sent."""
        import openai

        with self._lock:
            if self._client is None:
                # Without redirects: a 307 would send the images to wherever it says. The user's proxy is for other
                # machines.
                http = openai.DefaultHttpxClient(follow_redirects=False, timeout=self.timeout, trust_env=self.remote)
                self._client = openai.OpenAI(
                    base_url=self.base_url,
                    api_key=self._key or "none",
                    timeout=self.timeout,
                    max_retries=self.retries,
                    http_client=http,
                )
                # The library takes these from the environment of OpenAI's own users; they are no business of another
                # server.
                self._client.organization = self._client.project = None
            if self._client.base_url.host != urlsplit(self.base_url).hostname:
                raise ConfigError(f"mllm.base_url: {self.base_url} can be read as more than one address")
            return self._client

    def _post(self, messages: list[dict[str, Any]], candidates: tuple[str, ...]) -> bytes:
        """The body of an answer with status 200.

        Raises:
            MLLMError: There is none, after all retries.
        """
        import openai

        refused: APIStatusError | None = None
        first = self._refused
        for number, (structured, tuned) in enumerate(_OPTIONS[first:], first):
            options: dict[str, Any] = {}
            if structured:
                options["response_format"] = {
                    "type": "json_schema",
                    "json_schema": {"name": "ratings", "strict": True, "schema": schema(candidates)},
                }
            if tuned:
                options |= {"temperature": 0, "max_tokens": 512 + sum(16 + len(name) for name in candidates)}
            try:
                raw = self._connection().chat.completions.with_raw_response.create(
                    model=self.model, messages=messages, **options  # type: ignore[arg-type]
                )  # fmt: skip
                self._refused = max(self._refused, number)
                return bytes(raw.http_response.content)
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                refused = refused or error  # what it says of the whole request tells most
            except openai.APIStatusError as error:
                raise self._failed(error) from None
            except openai.APITimeoutError:
                raise MLLMError(
                    f"{self.host}: no answer within {self.timeout:g} seconds, {self.retries + 1} times over",
                    "Raise mllm.timeout, or lower mllm.concurrency; what was answered is kept.",
                ) from None
            except openai.APIConnectionError as error:
                reason = self._without_key(str(error.__cause__ or error))
                raise MLLMError(
                    f"{self.host}: no connection ({reason})",
                    "Is the server running, and mllm.base_url right? What was answered is kept.",
                ) from None
        assert refused is not None
        raise self._failed(refused) from None

    def _failed(self, error: APIStatusError) -> MLLMError:
        status = error.status_code
        if 300 <= status < 400:
            to = self._without_key(error.response.headers.get("location", "another address"))
            return MLLMError(
                f"{self.host}: answers with a redirect to {to}, and none is followed",
                "Set mllm.base_url to the address itself, if images may be sent there.",
            )
        hints = {
            401: f"It wants a key: set the environment variable {self._key_env}.",
            403: f"It wants another key: see the environment variable {self._key_env}.",
            404: "Check mllm.base_url (most end in /v1) and mllm.model.",
            429: "Lower mllm.concurrency, or come back later; what was answered is kept.",
        }
        wait = error.response.headers.get("retry-after")
        told = f" (Retry-After: {wait})" if wait else ""
        told = self._without_key(f"{told}: {excerpt(self._without_key(error.response.text))}")
        return MLLMError(
            f"{self.host}: HTTP status {status}{told}",
            hints.get(status, "What was answered is kept; the same command goes on from there."),
        )

    def _without_key(self, text: str) -> str:
        """A text from outside without the key, in whichever way it is written."""
        key = self._key or ""
        if len(key) >= _SECRET:
            for form in (key, json.dumps(key)[1:-1], key.replace("/", "\\/"), quote(key), quote(key, safe="")):
                text = text.replace(form, "[key]")
        return text


def _unpacked(entry: dict[str, Any]) -> bytes:
    if "body" in entry:
        return str(entry["body"]).encode()
    return base64.b64decode(entry["body_base64"])


def _text(body: bytes) -> str:
    """The assistant's words in the body of a chat completion; empty where there are none."""
    try:
        message = json.loads(body)["choices"][0]["message"]
        content = message.get("content") or message.get("refusal") or ""
    except (ValueError, LookupError, TypeError, AttributeError):
        return ""
    if isinstance(content, list):  # some servers answer in parts
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return str(content)


def _tokens(body: bytes) -> dict[str, Any] | None:
    """Token counts as the server reports them."""
    try:
        usage = json.loads(body)["usage"]
        return {"in": usage.get("prompt_tokens"), "out": usage.get("completion_tokens")}
    except (ValueError, LookupError, TypeError, AttributeError):
        return None
