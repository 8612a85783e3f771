"""What every similarity backend is given and answers, the question that is put, and what counts as an answer."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from megu_cli.errors import MLLMError

if TYPE_CHECKING:
    from PIL import Image

SCALE = (0.0, 10.0)
# Raised whenever the wording of a question changes: answers to another question are not reused.
PROMPT_VERSION = 1
# A row whose ratings lie closer together than this says nothing about which concept is near.
FLAT = 0.5
# What ends the thoughts of a model that writes them into its answer.
END_OF_THOUGHTS = "</think>"

# Gives the picture at a position of the training split, as it may be shown.
Show = Callable[[int], "Image.Image"]


@dataclass(frozen=True)
class Question:
    """One row of ratings: how similar is ``concept`` to each of ``candidates``?

    Attributes:
        concept: Name of the concept that is to be forgotten.
        candidates: Names of the retained concepts, in the data set's order.
        positions: Positions of images of the concept in the training split that may be shown to a model; empty
            where it is asked by name alone.
    """

    concept: str
    candidates: list[str]
    positions: list[int]


@dataclass(frozen=True)
class Ratings:
    """Answers to all questions.

    Attributes:
        rater: Who or what gave the ratings.
        scores: concept -> candidate -> rating on `SCALE`; what was not rated is not there.
        provenance: What else is known of how they came about.
    """

    rater: str
    scores: dict[str, dict[str, float]]
    provenance: dict[str, Any]


@dataclass(frozen=True)
class Cost:
    """What it takes to answer all questions, told before anything is sent.

    Attributes:
        calls: Calls of an endpoint, or image encodings of a local model, still to be made.
        answered: Those whose answers are on disk already.
        images: Different images that these calls show.
        tokens: Estimate of the tokens that go in.
        host: Where the images go; ``None`` where they stay in this process.
        leaves: Whether that is another machine.
        allowed: Whether the config allows it.
    """

    calls: int = 0
    answered: int = 0
    images: int = 0
    tokens: int = 0
    host: str | None = None
    leaves: bool = False
    allowed: bool = True


class Backend(Protocol):
    """Gives ratings."""

    def rate(self, questions: list[Question]) -> Ratings:
        """Answer all questions; nothing is filled in that was not answered.

        Raises:
            MLLMError: The backend failed, or what it said carries no information.
            InputError: What the user gave it is at fault.
        """

    def cost(self, questions: list[Question]) -> Cost:
        """What `rate` would take; nothing is loaded or sent.

        Raises:
            InputError: What the user gave it is at fault.
        """


def chat_prompt(concept: str, candidates: Sequence[str], shown: bool, again: bool = False) -> str:
    """The question to a chat model, about many candidates at once.

    It holds no example of an answer: small models copy the numbers of an example.

    Args:
        concept: What is shown.
        candidates: What it is compared with.
        shown: Whether an image goes with it.
        again: Whether a first answer was not usable.
    """
    opening, concept_shown = _presented(concept, shown)
    return (
        f"{opening}How similar is {concept_shown} to each of the classes listed below? Rate each from 0 (nothing in "
        "common) to 10 (hardly distinguishable), by what the two look like.\n"
        f"Classes: {', '.join(map(_quoted, candidates))}.\n"
        "Answer with one JSON object: its keys are exactly the names of these classes, the value of each is your "
        "rating as a number." + (" Write the JSON object only, without any other words." if again else "")
    )


def single_prompt(concept: str, candidate: str, shown: bool) -> str:
    """The question about one candidate, to a model whose likelihoods are read.

    The candidate comes as late as possible: what stands before it is computed once for all of them.
    """
    opening, concept_shown = _presented(concept, shown)
    return (
        f"{opening}On a scale from 0 (nothing in common) to 10 (hardly distinguishable), by what the two look like, "
        f"answer with one whole number: how similar is {concept_shown} to the class {_quoted(candidate)}?"
    )


def true_false_prompt(concept: str, candidate: str, shown: bool, again: bool = False) -> str:
    """The question whether one candidate is alike, to be answered by one word.

    Args:
        concept: What is shown.
        candidate: What it is compared with.
        shown: Whether an image goes with it.
        again: Whether a first answer was not usable.
    """
    opening, concept_shown = _presented(concept, shown)
    return (
        f"{opening}True or False: by what the two look like, {concept_shown} is similar to the class "
        f"{_quoted(candidate)}. Answer with one word, True or False" + (", and write nothing else." if again else ".")
    )


@dataclass(frozen=True)
class Form:
    """One value of ``mllm.question``, as a question about one candidate whose answers' likelihoods are read.

    Attributes:
        name: The value.
        prompt: (concept, candidate, whether an image is shown) -> the question.
        answers: Answer -> the rating that it stands for.
        flat: Ratings of a row that differ by less carry no information.
    """

    name: str
    prompt: Callable[[str, str, bool], str]
    answers: Mapping[str, float]
    flat: float

    @property
    def key(self) -> dict[str, str]:
        """What it adds to the key of an answer; nothing for ratings, so that earlier answers are found."""
        return {} if self.name == "rating" else {"question": self.name}


FORMS = {
    form.name: form
    for form in (
        Form("rating", single_prompt, {str(v): float(v) for v in range(int(SCALE[0]), int(SCALE[1]) + 1)}, FLAT),
        # A likelihood of True that is small for all classes still says which is nearest.
        Form("true_false", true_false_prompt, {"True": SCALE[1], "False": SCALE[0]}, 0.01),
    )
}


def _presented(concept: str, shown: bool) -> tuple[str, str]:
    """How a question begins, and what it calls the concept."""
    if shown:
        return f"The image shows an example of the class {_quoted(concept)}. ", "the concept shown"
    return "", f"the class {_quoted(concept)}"


def _quoted(name: str) -> str:
    return json.dumps(name, ensure_ascii=False)


def schema(candidates: Sequence[str]) -> dict[str, Any]:
    """JSON schema of an answer: one whole number on `SCALE` for each candidate."""
    low, high = (int(end) for end in SCALE)
    return {
        "type": "object",
        "properties": {name: {"type": "integer", "minimum": low, "maximum": high} for name in candidates},
        "required": list(candidates),
        "additionalProperties": False,
    }


def parse(text: str, candidates: Sequence[str], names: Sequence[str] = ()) -> dict[str, float]:
    """The ratings that an answer holds.

    They are read from an answer that is one JSON object, in a code fence or not, after whatever the model has thought.
    Such an object may be partial. Where other words surround it, it must rate more than half of the candidates, and
    be the only one that does: a refusal may quote a class name in which an object stands. A number written as text is
    a number; words, true, a name twice with different values, or a number off the scale are no rating.

    Args:
        text: The answer.
        candidates: The names that were asked about.
        names: Further names that the answer may quote.

    Returns:
        candidate -> rating, for those that were rated.
    """
    for whole in (text, without_thoughts(text)):
        if isinstance(found := _loaded(_unfenced(whole)), _Object):
            return _ratings(_unwrapped(found), candidates)
    text = without_thoughts(text)
    quoted = _quotations(text, {*candidates, *names})
    answers: list[dict[str, float]] = []
    for start, pairs in _objects(text):
        ratings = _ratings(_unwrapped(pairs), candidates)
        inside = any(begin <= start < end for begin, end in quoted)
        if 2 * len(ratings) > len(candidates) and not inside and ratings not in answers:
            answers.append(ratings)
    return answers[0] if len(answers) == 1 else {}


_NUMBER = re.compile(r"\s*[-+]?\d{1,9}(\.\d{1,30})?\s*")
# Beginnings of objects in prose that are tried: an answer with more is none.
_TRIES = 100
_BEGINNING = re.compile(r'\{\s*"')
# Whole numbers as floats: int() refuses very long ones.
_DECODER_OPTIONS: dict[str, Any] = {"parse_int": float}


class _Object(list[tuple[str, Any]]):
    """A JSON object as its pairs, names that stand twice among them."""


def _loaded(text: str) -> Any:
    """The JSON value that a text is; ``None`` if it is none."""
    try:
        return json.loads(text, object_pairs_hook=_Object, **_DECODER_OPTIONS)
    except (ValueError, RecursionError):
        return None


def without_thoughts(text: str) -> str:
    """What follows the last end of thoughts; nothing where thoughts begin and do not end."""
    rest = text.rpartition(END_OF_THOUGHTS)[2].strip()
    return "" if rest.startswith("<think>") else rest


def _unfenced(text: str) -> str:
    """What stands in a code fence that is the whole text; else the text."""
    text = text.strip()
    if not (text.startswith("```") and text.endswith("```") and "\n" in text):
        return text
    return text[text.index("\n") : -3]


def _unwrapped(pairs: _Object) -> _Object:
    """The object within one that has a single pair, as in {"ratings": {...}}; else the object itself."""
    if len(pairs) == 1 and isinstance(pairs[0][1], _Object):
        return pairs[0][1]
    return pairs


def _objects(text: str) -> Iterator[tuple[int, _Object]]:
    """JSON objects that stand in a text, outermost ones only, with their places.

    The text is read once: after a fault the search goes on behind it, and the number of faults is bounded.
    """
    decoder = json.JSONDecoder(object_pairs_hook=_Object, **_DECODER_OPTIONS)
    end = 0
    for _ in range(_TRIES):
        beginning = _BEGINNING.search(text, end)
        if beginning is None:
            return
        start = beginning.start()
        try:
            pairs, end = decoder.raw_decode(text, start)
            yield start, pairs
        except json.JSONDecodeError as error:
            end = max(error.pos, start + 1)
        except RecursionError:
            return  # nested as no answer is


def _quotations(text: str, names: Iterable[str]) -> list[tuple[int, int]]:
    """Where a text quotes names in which an object may begin."""
    spans = []
    for name in names:
        for form in {name, json.dumps(name)[1:-1], _quoted(name)[1:-1]} if "{" in name else ():
            spans += [(match.start(), match.end()) for match in re.finditer(re.escape(form), text)]
    return spans


def _ratings(pairs: _Object, candidates: Sequence[str]) -> dict[str, float]:
    low, high = SCALE
    values: dict[str, list[float | None]] = {}
    for name, value in pairs:
        number: float | None = None
        if isinstance(value, str) and _NUMBER.fullmatch(value):
            value = float(value)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high:
            number = float(value)
        values.setdefault(name, []).append(number)
    return {
        name: values[name][0]  # type: ignore[misc]
        for name in candidates
        if name in values and None not in values[name] and len(set(values[name])) == 1
    }


def averaged(
    questions: Iterable[Question],
    given: Mapping[str, Sequence[Mapping[str, float]]],
    said: Mapping[str, str],
    form: Form,
) -> dict[str, dict[str, float]]:
    """Mean ratings over the images of each row, refused where a row carries no information.

    Args:
        questions: The rows.
        given: concept -> for each image (or for the one question by name) candidate -> rating, where there is one.
        said: concept -> something of what the model said, for the message.
        form: What was asked.

    Returns:
        concept -> candidate -> rating; a candidate that no image was rated for is not there.

    Raises:
        MLLMError: Of a row less than half of the ratings were given, or they differ by less than `Form.flat`; all such
            rows are named.
    """
    scores: dict[str, dict[str, float]] = {}
    faults = []
    for question in questions:
        answers = given[question.concept]
        wanted = len(question.candidates) * len(answers)
        count = sum(len(answer) for answer in answers)
        row = {}
        for name in question.candidates:
            values = [answer[name] for answer in answers if name in answer]
            if values:
                row[name] = round(sum(values) / len(values), 6)
        scores[question.concept] = row
        fault = None
        if 2 * count < wanted:
            fault = f"{count} of {wanted} ratings were given"
        elif max(row.values()) - min(row.values()) < form.flat:
            fault = f"all ratings lie between {min(row.values()):.2f} and {max(row.values()):.2f}"
        if fault:
            faults.append(f"  {question.concept}: {fault}; the model said: {excerpt(said.get(question.concept, ''))}")
    if faults:
        other = "" if form.name == "rating" else "mllm.question to rating, "
        raise MLLMError(
            f"{len(faults)} of {len(scores)} rows of ratings carry no information\n" + "\n".join(faults),
            f"Its answers are in similarity.answers.jsonl. Set mllm.model to a more capable model, {other}or "
            "mllm.backend to recorded; to have the same model asked again, delete that file.",
        )
    return scores


def unrated(questions: Iterable[Question], scores: Mapping[str, Mapping[str, float]]) -> dict[str, list[str]]:
    """Candidates without a rating, by concept, where there are any."""
    missing = {q.concept: [c for c in q.candidates if c not in scores[q.concept]] for q in questions}
    return {concept: names for concept, names in missing.items() if names}


def excerpt(text: str, length: int = 200) -> str:
    """The beginning of a text on one line, without control characters; for messages."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text[: 4 * length]).split())
    return (line[:length] + " …" if len(line) > length else line) or "(nothing)"
