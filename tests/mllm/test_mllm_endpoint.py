from __future__ import annotations

import itertools
import json
import math
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from server import Asked, Reply, Server, completion, proper, rating

from megu_cli.errors import ConfigError, MLLMError
from megu_cli.mllm.answers import Answers
from megu_cli.mllm.base import Question
from megu_cli.mllm.chat import CHATS
from megu_cli.mllm.endpoint import Endpoint
from megu_cli.mllm.masking import Key

KEY = "sk-test-Very/Secret+Key-0123456789"


def picture(position: int) -> Image.Image:
    return Image.new("RGB", (16, 12), (position % 256, 0, 0))


@pytest.fixture
def endpoint(server: Server, tmp_path: Path) -> Callable[..., Endpoint]:
    def make(**over: Any) -> Endpoint:
        settings = {
            "allow_remote": False,
            "show": picture,
            "answers": Answers(tmp_path / "similarity.answers.jsonl"),
            "retries": 2,
            "timeout": 5.0,
            **over,
            "key": Key(over.get("key"), "MEGU_API_KEY"),
        }
        return Endpoint("tiny", settings.pop("base_url", server.url), **settings)

    return make


def question(k: int = 10, images: int = 1, concept: str = "c0") -> Question:
    return Question(concept, [f"c{i}" for i in range(1, k)], list(range(images)))


def expected(asked: Question) -> dict[str, dict[str, float]]:
    return {asked.concept: {name: float(rating(name)) for name in asked.candidates}}


# -- calls ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "images"), [(10, 1), (10, 8), (51, 2), (52, 2), (100, 8)])
def test_one_call_per_image_and_fifty_names(endpoint: Any, server: Server, k: int, images: int) -> None:
    asked = question(k, images)
    calls = images * math.ceil((k - 1) / 50)
    assert endpoint().cost([asked]).calls == calls
    ratings = endpoint().rate([asked])
    assert len(server.asked) == calls
    assert ratings.scores == expected(asked)
    assert len({a.image for a in server.asked}) == images
    assert max(len(a.names) for a in server.asked) <= 50
    again = endpoint()
    assert (again.cost([asked]).calls, again.cost([asked]).answered) == (0, calls)
    assert again.rate([asked]).scores == ratings.scores
    assert len(server.asked) == calls  # nothing is sent twice


def test_by_name_alone_sends_no_image(endpoint: Any, server: Server) -> None:
    ratings = endpoint().rate([Question("c0", ["c1", "c2", "c3"], [])])
    assert len(server.asked) == 1
    assert server.asked[0].image is None
    assert ratings.provenance["images"] == {"shown": 0, "sent_to": server.url[7:-3], "left_the_machine": 0}


def test_calls_run_at_the_same_time_but_not_more_than_asked(endpoint: Any, server: Server) -> None:
    inside, most = itertools.count(), Counter[str]()
    running = 0

    def answer(asked: Asked) -> Reply:
        nonlocal running
        running += 1
        most["most"] = max(most["most"], running)
        import time

        time.sleep(0.05)
        running -= 1
        next(inside)
        return proper(asked)

    server.answer = answer
    endpoint(concurrency=3).rate([question(10, 12)])
    assert 2 <= most["most"] <= 3


def test_temperature_and_schema_are_dropped_for_a_server_that_refuses_them(endpoint: Any, server: Server) -> None:
    def answer(asked: Asked) -> Reply:
        if "response_format" in asked.payload or "temperature" in asked.payload:
            return Reply(b'{"error": {"message": "unsupported"}}', 400)
        return proper(asked)

    server.answer = answer
    asked = question(10, 4)
    assert endpoint().rate([asked]).scores == expected(asked)
    assert len(server.asked) == 4 + 3  # the first call finds it out, the others know


def test_only_the_schema_is_dropped_where_that_is_refused(endpoint: Any, server: Server) -> None:
    server.answer = lambda a: Reply(b"no grammar", 400) if "response_format" in a.payload else proper(a)
    endpoint().rate([question(10, 3)])
    assert [("response_format" in a.payload, "temperature" in a.payload) for a in server.asked] == [
        (True, True),
        *[(False, True)] * 3,
    ]


def test_a_refused_request_shows_what_the_server_said_of_the_whole(endpoint: Any, server: Server) -> None:
    server.answer = lambda a: Reply(b'{"error": {"message": "no such model: tiny"}}', 400)
    with pytest.raises(MLLMError, match="no such model: tiny"):
        endpoint().rate([question()])


def test_a_schema_refused_for_one_image_while_another_is_being_rated(endpoint: Any, server: Server) -> None:
    images = {}

    def answer(asked: Asked) -> Reply:
        number = images.setdefault(asked.image, len(images))
        if number == 1:  # taken with the schema, but slowly
            return Reply(proper(asked).body, delay=0.5)
        if number > 1 and "response_format" in asked.payload:
            return Reply(b"no grammar", 400)
        return proper(asked)

    server.answer = answer
    asked = question(10, 4)
    assert endpoint(concurrency=2).rate([asked]).scores == expected(asked)


# -- True or False -----------------------------------------------------------------------------------------------------


def said(word: str, probabilities: dict[str, float]) -> bytes:
    """An answer of one word, with the probabilities of its token and the alternatives."""
    body = json.loads(completion(word))
    top = [{"token": token, "logprob": math.log(p)} for token, p in probabilities.items()]
    first = {"token": word, "logprob": math.log(probabilities[word]), "top_logprobs": top}
    body["choices"][0]["logprobs"] = {"content": [first, {"token": ".", "logprob": -0.1, "top_logprobs": []}]}
    return json.dumps(body).encode()


def candidate(asked: Asked) -> str:
    return asked.text.split('is similar to the class "')[1].split('"')[0]


def test_true_or_false_by_the_probabilities_of_its_token(endpoint: Any, server: Server) -> None:
    answers = {
        "c1": said("True", {"True": 0.6, " true": 0.15, "False": 0.25}),
        "c2": said("False", {"False": 0.8, "True": 0.2}),
        "c3": said("False", {"False": 0.9}),
    }
    server.answer = lambda asked: Reply(answers[candidate(asked)])
    asked = Question("c0", ["c1", "c2", "c3"], [0, 1])
    rater = endpoint(question="true_false")
    assert (rater.cost([asked]).calls, rater.cost([asked]).images) == (6, 2)  # one for each image and candidate
    ratings = rater.rate([asked])
    assert ratings.scores["c0"] == pytest.approx({"c1": 7.5, "c2": 2.0, "c3": 0.0})
    assert len(server.asked) == 6
    payload = server.asked[0].payload
    assert (payload["logprobs"], payload["top_logprobs"], "response_format" in payload) == (True, 5, False)
    assert (ratings.provenance["question"], ratings.provenance["token_probabilities"]) == ("true_false", True)
    # Answers are kept, and an answer to one question is none to the other.
    assert (endpoint(question="true_false").cost([asked]).calls, endpoint().cost([asked]).calls) == (0, 2)


def test_without_probabilities_it_is_the_share_of_true_over_the_images(endpoint: Any, server: Server) -> None:
    def answer(asked: Asked) -> Reply:
        if "logprobs" in asked.payload:
            return Reply(b"unsupported", 400)
        shown = len({a.image for a in server.asked if "logprobs" not in a.payload})
        true = candidate(asked) == "c1" and shown <= 3
        return Reply(completion("**True**." if true else "False, although both are round."))

    server.answer = answer
    ratings = endpoint(question="true_false", concurrency=1).rate([Question("c0", ["c1", "c2"], [0, 1, 2, 3])])
    assert ratings.scores["c0"] == {"c1": 7.5, "c2": 0.0}
    assert ratings.provenance["token_probabilities"] is False
    assert len(server.asked) == 8 + 1  # the first call finds out that there are none


@pytest.mark.parametrize(
    "body",
    [
        completion("That depends."),
        completion("untrue"),
        completion('{"c1": 9}'),
        b"[]",
    ],
)
def test_what_is_neither_true_nor_false_is_asked_once_more_and_is_then_missing(
    endpoint: Any, server: Server, body: bytes
) -> None:
    asked = Question("c0", ["c1", "c2", "c3", "c4"], [])
    server.answer = lambda a: Reply(
        body if candidate(a) == "c1" else completion("True" if candidate(a) == "c2" else "False")
    )
    ratings = endpoint(question="true_false").rate([asked])
    assert ratings.scores["c0"] == {"c2": 10.0, "c3": 0.0, "c4": 0.0}
    assert ratings.provenance["missing"] == {"c0": ["c1"]}
    assert [a.text.endswith("and write nothing else.") for a in server.asked if candidate(a) == "c1"] == [False, True]


@pytest.mark.parametrize(
    "tokens",
    [
        [("<think>", {"True": 0.2, "False": 0.01}), ("</think>", {}), ("False", {"False": 0.99, "True": 0.01})],
        [("**", {"True": 0.25, "False": 0.03}), ("False", {"False": 0.99, "True": 0.01}), ("**", {})],
        [
            ("<think>", {}), ("It is", {}), (" false", {" false": 0.4, " true": 0.6}), ("</", {}), ("think>", {}),
            ("False", {"False": 0.99, "True": 0.01}),
        ],
    ],
)  # fmt: skip
def test_probabilities_are_those_of_the_token_that_is_the_answer(tokens: list[tuple[str, dict[str, float]]]) -> None:
    content = [
        {
            "token": token,
            "logprob": math.log(likely.get(token, 0.9)),
            "top_logprobs": [{"token": other, "logprob": math.log(p)} for other, p in likely.items() if other != token],
        }
        for token, likely in tokens
    ]
    message = {"content": "".join(token for token, _ in tokens)}
    body = {"choices": [{"message": message, "logprobs": {"content": content}}]}
    assert CHATS["true_false"].read(json.dumps(body).encode(), ["c1"], ["c1"]) == {"c1": pytest.approx(0.1)}


@pytest.mark.parametrize(
    "logprobs",
    [
        "none",
        {"content": "none"},
        {"content": [{"token": "True", "logprob": "high"}]},
        {"content": [{"token": "True", "logprob": 3.0, "top_logprobs": 1}]},
        {"content": [{"token": "True", "logprob": float("nan")}]},
        {"content": [{"token": "Tr", "logprob": -0.1}, {"token": "ue", "logprob": -0.1}]},
    ],
)
def test_probabilities_that_cannot_be_read_leave_the_word(logprobs: Any) -> None:
    body = json.loads(completion("True"))
    body["choices"][0]["logprobs"] = logprobs
    assert CHATS["true_false"].read(json.dumps(body).encode(), ["c1"], ["c1"]) == {"c1": 10.0}


# -- a server that misbehaves ------------------------------------------------------------------------------------------


def test_429_waits_as_long_as_it_is_told(endpoint: Any, server: Server) -> None:
    server.answer = lambda a: Reply(b"slow down", 429, {"retry-after": "1"}) if len(server.asked) == 1 else proper(a)
    asked = question()
    assert endpoint().rate([asked]).scores == expected(asked)
    assert len(server.asked) == 2
    assert server.asked[1].time - server.asked[0].time >= 1.0


def test_a_wait_longer_than_is_sensible_ends_the_stage_at_once(endpoint: Any, server: Server) -> None:
    server.answer = lambda a: Reply(b"quota", 429, {"retry-after": "3600"})
    with pytest.raises(MLLMError, match=r"HTTP status 429 \(Retry-After: 3600\): quota"):
        endpoint().rate([question()])
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    "trouble",
    [
        Reply(b"oops", 500),
        Reply(b"", 503),
        Reply(completion("{}"), cut=True),
        Reply(completion("{}"), delay=0.6),
    ],
    ids=["500", "503", "cut", "time-out"],
)
def test_passing_trouble_is_sat_out(endpoint: Any, server: Server, trouble: Reply) -> None:
    server.answer = lambda a: trouble if len(server.asked) == 1 else proper(a)
    asked = question()
    assert endpoint(timeout=0.4).rate([asked]).scores == expected(asked)
    assert len(server.asked) == 2


@pytest.mark.parametrize(
    ("trouble", "says"),
    [
        (Reply(b"oops", 500), "HTTP status 500: oops"),
        (Reply(b"", 429), "HTTP status 429"),
        (Reply(b"who?", 401), "HTTP status 401: who?"),
        (Reply(completion("{}"), cut=True), "no connection"),
        pytest.param(
            Reply(completion("{}"), delay=2.0), "no answer within 1.5 seconds, 2 times over", marks=pytest.mark.slow
        ),
    ],
    ids=["500", "429", "401", "cut", "time-out"],
)
def test_lasting_trouble_ends_the_stage_and_keeps_what_was_answered(
    endpoint: Any, server: Server, tmp_path: Path, trouble: Reply, says: str
) -> None:
    server.answer = lambda a: trouble if len(server.asked) > 3 else proper(a)
    with pytest.raises(MLLMError, match=says):
        endpoint(timeout=1.5, retries=1, concurrency=1).rate([question(10, 8)])
    assert len((tmp_path / "similarity.answers.jsonl").read_text().splitlines()) == 3
    sent = len(server.asked)
    server.answer = proper
    endpoint().rate([question(10, 8)])
    assert len(server.asked) == sent + 5


def test_no_server_at_all(endpoint: Any, server: Server) -> None:
    server.close()
    with pytest.raises(MLLMError, match="no connection"):
        endpoint(retries=0).rate([question()])


NAMES = [f"c{i}" for i in range(1, 6)]
FULL = {"c1": 1, "c2": 2, "c3": 3, "c4": 4, "c5": 5}
BAD = {
    "empty body": b"",
    "empty answer": completion(""),
    "null": completion(None),
    "prose": completion("I would give c1 a 7 and c2 a 9."),
    "refusal": completion(None, refusal="I cannot rate people."),
    "no choices": b'{"choices": []}',
    "html": b"<html>hello 5</html>",
    "not utf-8": b'{"choices": [{"message": {"content": "\xff\xfe"}}]}',
    "class missing": completion(json.dumps({k: v for k, v in FULL.items() if k != "c3"})),
    "eleven": completion(json.dumps({**FULL, "c3": 11})),
    "minus one": completion(json.dumps({**FULL, "c3": -1})),
    "a word": completion(json.dumps({**FULL, "c3": "three"})),
    "true": completion(json.dumps({**FULL, "c3": True})),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_answer_is_asked_for_once_more(endpoint: Any, server: Server, kind: str) -> None:
    server.answer = lambda a: Reply(BAD[kind]) if len(server.asked) == 1 else proper(a)
    scores = endpoint().rate([Question("c0", NAMES, [0])]).scores["c0"]
    assert len(server.asked) == 2
    kept = {k: float(v) for k, v in FULL.items() if k != "c3"} if b'\\"c1\\"' in BAD[kind] else {}
    assert server.asked[1].names == [n for n in NAMES if n not in kept]  # only what is missing
    assert scores == {name: kept.get(name, float(rating(name))) for name in NAMES}


@pytest.mark.parametrize("kind", BAD)
def test_what_stays_bad_is_missing_or_ends_the_stage(endpoint: Any, server: Server, tmp_path: Path, kind: str) -> None:
    server.answer = lambda a: Reply(BAD[kind])
    partial = b'\\"c1\\"' in BAD[kind]
    for _ in range(2):  # the second time from the answers on disk
        if partial:
            ratings = endpoint().rate([Question("c0", NAMES, [0])])
            assert ratings.scores == {"c0": {k: float(v) for k, v in FULL.items() if k != "c3"}}
            assert ratings.provenance["missing"] == {"c0": ["c3"]}
        else:
            with pytest.raises(MLLMError, match="c0: 0 of 5 ratings were given"):
                endpoint().rate([Question("c0", NAMES, [0])])
        assert len(server.asked) == 2
    assert bodies(tmp_path / "similarity.answers.jsonl") == server.bodies


def test_a_number_as_text_is_the_number(endpoint: Any, server: Server) -> None:
    server.answer = lambda a: Reply(completion(json.dumps({k: str(v) for k, v in FULL.items()})))
    assert endpoint().rate([Question("c0", NAMES, [0])]).scores == {"c0": {k: float(v) for k, v in FULL.items()}}
    assert len(server.asked) == 1


def test_five_to_everything_ends_the_stage_with_what_was_said(endpoint: Any, server: Server) -> None:
    server.answer = lambda a: Reply(completion(json.dumps(dict.fromkeys(a.names, 5))))
    with pytest.raises(MLLMError) as caught:
        endpoint().rate([question(5, 2), question(5, 2, "other")])
    assert '  c0: all ratings lie between 5.00 and 5.00; the model said: {"c1": 5' in str(caught.value)
    assert "  other: " in str(caught.value)


def test_an_answer_without_words_is_shown_as_it_came(endpoint: Any, server: Server) -> None:
    server.answer = lambda a: Reply(b'{"error": {"message": "out of credits"}}')
    with pytest.raises(MLLMError, match=r"the model said: .*out of credits"):
        endpoint().rate([question()])


def bodies(path: Path) -> list[bytes]:
    import base64

    entries = [json.loads(line) for line in path.read_text().splitlines()]
    return [e["body"].encode() if "body" in e else base64.b64decode(e["body_base64"]) for e in entries]


def test_answers_hold_bodies_byte_for_byte_and_what_they_took(endpoint: Any, server: Server, tmp_path: Path) -> None:
    from megu_cli.mllm import pictures

    endpoint().rate([question(60, 3)])
    path = tmp_path / "similarity.answers.jsonl"
    assert Counter(bodies(path)) == Counter(server.bodies)
    entry = json.loads(path.read_text().splitlines()[0])
    assert entry["image"] in {pictures.digest(picture(i)) for i in range(3)}
    assert entry["tokens"] == {"in": 7, "out": 5}
    assert (entry["model"], entry["prompt"], entry["attempt"]) == ("tiny", 1, 1)
    assert entry["seconds"] > 0


# -- privacy -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_no_redirect_is_followed(endpoint: Any, server: Server, status: int) -> None:
    elsewhere = Server()
    try:
        server.answer = lambda a: Reply(b"", status, {"location": f"{elsewhere.url}/chat/completions"})
        with pytest.raises(MLLMError, match="redirect"):
            endpoint().rate([question()])
        assert len(server.asked) == 1
        assert elsewhere.asked == []
    finally:
        elsewhere.close()


def test_no_proxy_stands_between_us_and_this_machine(
    endpoint: Any, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = Server()
    try:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, elsewhere.url.removesuffix("/v1"))
        endpoint().rate([question()])
        assert (len(server.asked), len(elsewhere.asked)) == (1, 0)
    finally:
        elsewhere.close()


@pytest.mark.parametrize(
    "url",
    [
        "https://api.example.com/v1",
        "http://192.168.1.7:8000/v1",
        "http://127.0.0.1.example.com/v1",
        "http://localhost.example.com/v1",
        "http://0.0.0.0:8000/v1",
        "http://2130706433/v1",
    ],
)
def test_another_host_must_be_allowed(endpoint: Any, url: str) -> None:
    remote = endpoint(base_url=url)
    cost = remote.cost([question()])
    assert (cost.leaves, cost.allowed) == (True, False)
    with pytest.raises(ConfigError, match="is not this machine"):
        remote.rate([question()])
    assert endpoint(base_url=url, allow_remote=True).cost([question()]).allowed


@pytest.mark.parametrize("url", ["http://localhost:1/v1", "http://127.0.0.9:1/v1", "http://[::1]:1/v1"])
def test_loopback_needs_no_permission(endpoint: Any, url: str) -> None:
    assert not endpoint(base_url=url).cost([question()]).leaves


def test_nothing_of_openais_own_environment_is_sent(
    endpoint: Any, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_WEBHOOK_SECRET"):
        monkeypatch.setenv(name, f"mine-{name}")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "x-secret: mine-header")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1/v1")
    endpoint().rate([question()])
    assert "mine-" not in str(server.asked[0].headers)


@pytest.mark.parametrize("key", ["two\nlines-of-a-key", "schlüssel-0123456789", "tab\tin-the-key"])
def test_a_key_that_cannot_be_sent_is_refused_and_not_repeated(endpoint: Any, server: Server, key: str) -> None:
    with pytest.raises(ConfigError, match=r"mllm\.key_env") as caught:
        endpoint(key=key).rate([question()])
    assert server.asked == []
    assert not any(part in str(caught.value) for part in (key, repr(key)[1:-1], "-of-a-key", "0123456789"))


@pytest.mark.parametrize("form", [KEY, KEY.replace("/", "\\/"), "sk-test-Very%2FSecret%2BKey-0123456789"])
def test_the_key_is_masked_in_whichever_way_it_is_written(
    endpoint: Any, server: Server, tmp_path: Path, form: str
) -> None:
    for reply in (
        Reply(f'{{"error": "{form}"}}'.encode(), 401),
        Reply(b"", 302, {"location": f"http://127.0.0.1:1/?k={form}"}),
        Reply(f'{{"choices": [{{"message": {{"content": "{form}"}}}}]}}'.encode()),
    ):
        server.answer = lambda a, reply=reply: reply
        with pytest.raises(MLLMError) as caught:
            endpoint(key=KEY).rate([question()])
        assert "[key]" in str(caught.value)
        assert "Secret" not in str(caught.value)
    assert "Secret" not in (tmp_path / "similarity.answers.jsonl").read_text()


def test_a_filler_key_does_not_spoil_the_answers(endpoint: Any, server: Server, tmp_path: Path) -> None:
    asked = Question("c0", ["box", "ox", "7"], [0])
    server.answer = lambda a: Reply(completion(json.dumps({"box": 7, "ox": 1, "7": 3})))
    for key in ("x", "7"):
        assert endpoint(key=key).rate([asked]).scores == {"c0": {"box": 7.0, "ox": 1.0, "7": 3.0}}
        (tmp_path / "similarity.answers.jsonl").unlink()


# -- through the command line ------------------------------------------------------------------------------------------


def settings(server: Server, **over: Any) -> dict[str, Any]:
    return {"backend": "endpoint", "model": "tiny", "base_url": server.url, "images_per_class": 4, "retries": 1, **over}


def test_the_key_is_in_no_file_and_no_output(
    megu: Any, write_config: Any, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    outputs = []
    file = write_config(mllm=settings(server, key_env="MY_KEY", images_per_class=2))
    # The server repeats the key in errors, in a redirect, and in an answer.
    for reply in (
        Reply(f"bad key {KEY}".encode(), 401),
        Reply(json.dumps({"error": {"message": f"Incorrect API key: {KEY}"}}).encode(), 400),
        Reply(b"", 307, {"location": f"http://127.0.0.1:1/?key={KEY}"}),
        Reply(completion(f"your key is {KEY}")),
    ):
        server.answer = lambda a, reply=reply: reply
        for verbose in ((), ("-v",)) if reply.status == 400 else ((),):
            code, *output = megu("similarity", "-c", file, *verbose)
            assert code == 4
            assert not verbose or "Traceback" in output[1]
            outputs += output
    (tmp_path / "run" / "similarity.answers.jsonl").rename(tmp_path / "run" / "old.jsonl")
    server.answer = proper
    code, *output = megu("similarity", "-c", file, "-v")
    assert code == 0
    outputs += output
    assert all(asked.headers["authorization"] == f"Bearer {KEY}" for asked in server.asked)
    assert not any(KEY in output for output in outputs)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 4
    for path in files:
        assert KEY.encode() not in path.read_bytes(), path


def test_a_key_in_the_config_is_refused_and_not_repeated(megu: Any, write_config: Any, server: Server) -> None:
    code, out, err = megu("similarity", "-c", write_config(mllm=settings(server, key_env=KEY)))
    assert code == 2
    assert "mllm.key_env" in err
    assert KEY not in out + err
    with_key = server.url.replace("http://", f"http://user:{KEY.replace('/', '_')}@")
    code, out, err = megu("similarity", "-c", write_config(mllm=settings(server, base_url=with_key)))
    assert code == 2
    assert "Secret" not in out + err


def test_the_whole_stage(megu: Any, write_config: Any, server: Server, tmp_path: Path) -> None:
    file = write_config(mllm=settings(server))
    code, out, _ = megu("similarity", "-c", file, "--dry-run")
    assert code == 0
    assert "4 calls, 4 images, about" in out
    assert server.url[7:-3] in out
    assert "Nothing leaves this machine." in out
    assert server.asked == []
    assert not (tmp_path / "run").exists()

    code, out, _ = megu("similarity", "-c", file, "--json")
    assert code == 0
    assert len(server.asked) == 4
    body = json.loads(out)["similarity"]
    digits = [str(i) for i in range(10)]
    assert body["classes"] == digits
    assert body["scores"] == {"8": {d: float(rating(d)) for d in digits if d != "8"}}
    assert body["rater"] == f"tiny at {server.url[7:-3]}"
    assert body["images"] == {"shown": 4, "sent_to": server.url[7:-3], "left_the_machine": 0}

    # Complete: nothing is sent, whatever does not determine the answers.
    for over in ([], ["--set", "mllm.concurrency=9", "--set", "mllm.timeout=7", "--set", "mllm.key_env=OTHER"]):
        code, _, err = megu("similarity", "-c", file, *over)
        assert (code, len(server.asked)) == (0, 4)
        assert "similarity: fresh" in err
    megu("similarity", "-c", file, "--force")
    megu("similarity", "-c", file, "--set", "seed=5")
    assert len(server.asked) == 4
    # One image more costs one call more.
    code, _, err = megu("similarity", "-c", file, "--set", "mllm.images_per_class=5")
    assert (code, len(server.asked)) == (0, 5)
    assert "mllm.images_per_class 4 -> 5" in err
    code, out, _ = megu("similarity", "-c", file, "--set", "mllm.images_per_class=5", "--dry-run", "--json")
    assert json.loads(out)["cost"] is None
    code, out, _ = megu("similarity", "-c", file, "--set", "mllm.images_per_class=7", "--dry-run", "--json")
    assert json.loads(out)["cost"]["calls"] == 2


def test_what_was_asked_can_be_replayed(megu: Any, write_config: Any, server: Server, tmp_path: Path) -> None:
    answers = {"9": None}  # is never rated

    def answer(asked: Asked) -> Reply:
        return Reply(completion(json.dumps({n: rating(n) for n in asked.names if n not in answers})))

    server.answer = answer
    code, out, _ = megu("similarity", "-c", write_config(mllm=settings(server)))
    assert code == 0
    assert "not rated, and so never a label: 8: 9" in out
    asked = json.loads((tmp_path / "run" / "similarity.json").read_text())
    recorded = {"backend": "recorded", "ratings": str(tmp_path / "run" / "similarity.json")}
    code, _, err = megu("similarity", "-c", write_config(mllm=recorded, out="replay"))
    assert code == 0, err
    replayed = json.loads((tmp_path / "replay" / "similarity.json").read_text())
    for key in ("classes", "scores", "rater", "missing", "prompt"):
        assert replayed[key] == asked[key]


def test_a_random_request_asks_only_for_rows_in_the_forget_set_and_shows_no_forgotten_image(
    megu: Any, write_config: Any, server: Server, tmp_path: Path
) -> None:
    from megu_cli.config import load_config
    from megu_cli.mllm.pictures import data_url
    from megu_cli.pipeline.context import RunContext

    file = write_config(forget={"random": {"count": 6}}, mllm=settings(server, images_per_class=3))
    work = RunContext.open(load_config(file))
    rows = {work.inputs.data.concepts[c] for c in work.inputs.request.asked}
    assert 1 < len(rows) < 10
    code, _, err = megu("similarity", "-c", file)
    assert code == 0, err
    assert len(server.asked) == 3 * len(rows)
    scores = json.loads((tmp_path / "run" / "similarity.json").read_text())["scores"]
    assert scores.keys() == rows
    forgotten = {data_url(work.inputs.picture(i)) for i in work.inputs.request.forget.tolist()}
    assert not forgotten & {asked.image for asked in server.asked}


def test_which_images_may_be_shown(megu: Any, write_config: Any, server: Server) -> None:
    code, _, err = megu("similarity", "-c", write_config(mllm=settings(server, images="retain-only")))
    assert code == 2
    assert "leaves no image of 8" in err
    assert server.asked == []
    code, *_ = megu("similarity", "-c", write_config(mllm=settings(server, images="none")))
    assert code == 0
    assert [asked.image for asked in server.asked] == [None]


def test_all_images_of_a_class_listed_one_by_one_are_not_shown(
    megu: Any, write_config: Any, server: Server, tmp_path: Path
) -> None:
    from megu_cli.config import load_config
    from megu_cli.pipeline.context import RunContext

    work = RunContext.open(load_config(write_config()))
    (tmp_path / "list.csv").write_text("\n".join(map(str, work.inputs.request.forget.tolist())))
    code, _, err = megu("similarity", "-c", write_config(forget={"samples": "list.csv"}, mllm=settings(server)))
    assert code == 2
    assert "mllm.images" in err
    assert server.asked == []


def test_another_machine_is_refused_before_anything_is_sent(megu: Any, write_config: Any, server: Server) -> None:
    file = write_config(mllm=settings(server, base_url="http://mllm.invalid/v1"))
    code, out, _ = megu("similarity", "-c", file, "--dry-run")
    assert code == 0
    assert "This leaves the machine, and is refused unless mllm.allow_remote is true." in out
    code, _, err = megu("similarity", "-c", file)
    assert code == 2
    assert "mllm.allow_remote" in err


def test_a_key_variable_that_is_named_must_be_set(
    megu: Any, write_config: Any, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MY_KEY", raising=False)
    file = write_config(mllm=settings(server, key_env="MY_KEY", images_per_class=1))
    assert megu("similarity", "-c", file, "--dry-run")[0] == 0
    code, _, err = megu("similarity", "-c", file)
    assert (code, server.asked) == (2, [])
    assert "the environment variable MY_KEY is not set" in err
    monkeypatch.setenv("MY_KEY", f" {KEY}\n")  # as a file of it would give it
    assert megu("similarity", "-c", file)[0] == 0
    assert server.asked[0].headers["authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize("force", [(), ("--force",)])
def test_what_is_wrong_with_the_rater_is_told_before_anything_is_trained(
    megu: Any, write_config: Any, server: Server, tmp_path: Path, force: tuple[str, ...]
) -> None:
    flat = {"base_url": server.url}
    for over, code in (
        ({"base_url": "http://mllm.invalid/v1"}, 2),
        ({"key_env": "NOT_SET_ANYWHERE"}, 2),
        ({"base_url": "http://127.0.0.1:1/v1", "retries": 0}, 4),
        (flat, 4),
    ):
        server.answer = lambda a: Reply(completion(json.dumps(dict.fromkeys(a.names, 5))))
        file = write_config(mllm=settings(server, **over))
        ended, _, err = megu("run", "-c", file, *force)
        assert ended == code, err
        assert "train: running" not in err
        assert not (tmp_path / "run" / "original.safetensors").exists()


@pytest.mark.slow
def test_a_comparison_pays_once_for_all_methods_and_seeds(
    megu: Any, write_config: Any, server: Server, tmp_path: Path
) -> None:
    file = write_config(
        mllm=settings(server),
        data={"name": "digits", "limit": 400, "validation": 0.1},
        train={"epochs": 1, "batch": 32},
        finetune={"epochs": 1, "retain_fraction": 0.5},
        noise={"steps": 2},
        compare={
            "methods": ["megu", "megu-paper"],
            "seeds": 2,
            "variants": {"asked": {"method": "megu-paper", "mllm.question": "true_false"}},
        },
    )

    def answer(asked: Asked) -> Reply:
        if "True or False" not in asked.text:
            return proper(asked)
        assert not (tmp_path / "run" / "original.safetensors").exists()  # before anything is trained
        return Reply(completion("True" if candidate(asked) in "03" else "False"))

    server.answer = answer
    code, _, err = megu("compare", "-c", file)
    assert code == 0, err
    # Both methods share ratings from 4 images; the variant asks True or False of each and the nine other classes.
    assert len(server.asked) == 4 + 4 * 9
    assert err.index("similarity: running") < err.index("train: running")
    assert len(list((tmp_path / "run").rglob("similarity.answers.jsonl"))) == 1
    found = [json.loads(f.read_text())["scores"]["8"] for f in (tmp_path / "run").rglob("asked/similarity.json")]
    assert found == [{name: 10.0 if name in "03" else 0.0 for name in "012345679"}] * 2
    code, _, err = megu("run", "-c", file)
    assert code == 0, err
    assert len(server.asked) == 4 + 4 * 9


def test_with_a_single_candidate_nothing_is_asked(megu: Any, write_config: Any, server: Server, tmp_path: Path) -> None:
    for folder in ("train/a", "train/b", "test/a", "test/b"):
        (tmp_path / "images" / folder).mkdir(parents=True)
        for shade in range(3):
            Image.new("RGB", (8, 8), (shade * 90, 0, 0)).save(tmp_path / "images" / folder / f"{shade}.png")
    (tmp_path / "list.csv").write_text("0\n")
    data = {"name": "imagefolder", "root": "images", "image_size": 8, "validation": 0}
    file = write_config(data=data, forget={"samples": "list.csv"}, labels={"keep": 0.9}, mllm=settings(server))
    code, out, err = megu("similarity", "-c", file, "--dry-run")
    assert "Nothing is asked." in out
    code, out, err = megu("similarity", "-c", file, "--json")
    assert (code, server.asked) == (0, []), err
    assert json.loads(out)["similarity"]["scores"] == {}
    assert not (tmp_path / "run" / "similarity.answers.jsonl").exists()


_KILLED = """
import sys
sys.argv = ["megu", "similarity", "-c", sys.argv[1]]
from megu_cli.cli.app import main
main()
"""


@pytest.mark.slow
def test_killed_after_half_of_the_calls_the_next_run_sends_the_other_half(
    megu: Any, write_config: Any, server: Server, tmp_path: Path
) -> None:
    holding: dict[str, subprocess.Popen[bytes]] = {}

    def answer(asked: Asked) -> Reply:
        if len(server.asked) > 4:
            holding["run"].send_signal(signal.SIGKILL)
            holding["run"].wait()
        return proper(asked)

    server.answer = answer
    file = write_config(mllm=settings(server, images_per_class=8, concurrency=1))
    holding["run"] = subprocess.Popen([sys.executable, "-c", _KILLED, str(file)])
    assert holding["run"].wait(600) == -signal.SIGKILL
    path = tmp_path / "run" / "similarity.answers.jsonl"
    killed = path.read_bytes()
    lines = killed.splitlines(keepends=True)
    assert len(lines) == 4
    first = [json.loads(line)["image"] for line in lines]
    server.answer = proper
    # As it was left, and as it would be if the kill had come within the writing of the fourth or fifth answer.
    for content, kept in (
        (killed, 4),
        (killed[:-1], 4),
        (killed[: -len(lines[3]) // 2], 3),
        (killed + lines[0][:99], 4),
    ):
        path.write_bytes(content)
        server.asked.clear()
        code, _, err = megu("similarity", "-c", file, "--force")
        assert code == 0, err
        assert len(server.asked) == 8 - kept
        entries = [json.loads(line) for line in path.read_text().splitlines()]
        assert [entry["image"] for entry in entries[:kept]] == first[:kept]
        assert len({entry["image"] for entry in entries}) == len(entries) == 8
        megu("similarity", "-c", file)
        assert len(server.asked) == 8 - kept
