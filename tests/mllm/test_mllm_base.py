import json
import re
from pathlib import Path

import pytest
import torch

from megu_cli.errors import MLLMError
from megu_cli.mllm import pictures
from megu_cli.mllm.answers import Answers
from megu_cli.mllm.base import FORMS, Question, averaged, chat_prompt, parse, schema, single_prompt

NAMES = ["Coat", "Bag", "T-shirt/top"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"Coat": 7, "Bag": 0, "T-shirt/top": 10}', {"Coat": 7, "Bag": 0, "T-shirt/top": 10}),
        ('Sure!\n```json\n{"Coat": 7, "Bag": 2.5}\n```\nAnything else?', {"Coat": 7, "Bag": 2.5}),
        ('{"ratings": {"Coat": 3, "Bag": 1}}', {"Coat": 3, "Bag": 1}),
        ('<think>{"Coat": 1}? no</think> {"Coat": 9, "Bag": 4}', {"Coat": 9, "Bag": 4}),
        ('{"Coat": "7", "Bag": "seven"}', {"Coat": 7}),
        ('{"Coat": "7/10", "Bag": " 3 "}', {"Bag": 3}),
        ('{"Coat": 11, "Bag": -1, "T-shirt/top": 10}', {"T-shirt/top": 10}),
        ('{"Coat": true, "Bag": null, "T-shirt/top": [5]}', {}),
        ('{"Coat": NaN, "Bag": Infinity, "T-shirt/top": 1e999}', {}),
        ('{"Coat": 3, "Coat": 8, "Bag": 2, "Bag": 2}', {"Bag": 2}),
        ('{"Hat": 3}', {}),
        ('{"Coat": 3, "Bag": ', {}),
        ("I would say Coat 7, Bag 3.", {}),
        ("I am sorry, I cannot help with that.", {}),
        ("", {}),
        ("[7, 3]", {}),
        ('{"a": ' * 3000, {}),
    ],
)
def test_only_ratings_that_were_given_are_read(text: str, expected: dict[str, float]) -> None:
    assert parse(text, NAMES) == expected


def test_prompts_hold_the_names_and_no_example_numbers() -> None:
    for prompt in (
        chat_prompt("Shirt", NAMES, True),
        chat_prompt("Shirt", NAMES, False),
        single_prompt("Shirt", "Coat", True),
    ):
        assert '"Shirt"' in prompt
        assert '"Coat"' in prompt
        # The two ends of the scale, and no other number.
        assert sorted(set("".join(c if c.isdigit() else " " for c in prompt).split())) == ["0", "10"]


def test_the_schema_asks_for_each_name() -> None:
    asked = schema(NAMES)
    assert asked["required"] == NAMES
    assert asked["additionalProperties"] is False
    assert asked["properties"]["Coat"] == {"type": "integer", "minimum": 0, "maximum": 10}


def test_means_are_over_the_ratings_that_were_given() -> None:
    question = Question("Shirt", NAMES, [1, 2])
    given = {"Shirt": [{"Coat": 7.0, "Bag": 1.0}, {"Coat": 8.0, "T-shirt/top": 9.0}]}
    assert averaged([question], given, {}, FORMS["rating"]) == {"Shirt": {"Coat": 7.5, "Bag": 1.0, "T-shirt/top": 9.0}}


def test_rows_without_information_are_refused_by_name_and_all_together() -> None:
    questions = [Question(c, ["a", "b", "c"], []) for c in ("flat", "sparse", "good", "silent")]
    given = {
        "flat": [{"a": 5.0, "b": 5.0, "c": 5.4}],
        "sparse": [{"a": 5.0}],
        "good": [{"a": 5.0, "b": 5.5}],
        "silent": [{}],
    }
    with pytest.raises(MLLMError) as caught:
        averaged(questions, given, {"flat": "all\x1b[31m 5", "sparse": "dunno"}, FORMS["rating"])
    message = str(caught.value)
    assert "3 of 4" in message
    assert "flat: all ratings lie between 5.00 and 5.40; the model said: all [31m 5" in message
    assert "sparse: 1 of 3" in message
    assert "dunno" in message
    assert "silent: 0 of 3" in message
    assert "good:" not in message
    assert caught.value.exit_code == 4


def test_answers_survive_a_torn_line(tmp_path) -> None:
    path = tmp_path / "a.jsonl"
    first = Answers(path)
    first.append({"q": 1}, {"body": "ä\n"})
    first.append({"q": 2}, {"body": "two"})
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        again = Answers(path)
        known = [q for q in (1, 2) if again.find({"q": q})]
        ends = [whole.index(b"\n"), len(whole) - 1]
        assert known == [q for q, end in zip((1, 2), ends, strict=True) if cut >= end]
        again.append({"q": 3}, {"body": "three"})
        lines = [json.loads(line) for line in path.read_bytes().splitlines()]  # every line is whole
        assert [line["q"] for line in lines] == [*known, 3]
        assert Answers(path).find({"q": 3})["body"] == "three"


def test_pictures_are_downsized_never_enlarged_and_carry_no_metadata() -> None:
    import base64
    import io

    from PIL import Image

    pixels = torch.randint(0, 255, (3, 60, 90), dtype=torch.uint8)
    image = pictures.picture(pixels, 30)
    assert image.size == (30, 20)
    assert pictures.picture(pixels[:1], 448).size == (90, 60)
    assert pictures.picture(pixels[:1], 448).mode == "RGB"
    url = pictures.data_url(image)
    assert url.startswith("data:image/png;base64,")
    back = Image.open(io.BytesIO(base64.b64decode(url.split(",")[1])))
    back.load()
    assert back.info == {}
    assert back.tobytes() == image.tobytes()
    assert pictures.digest(image) == pictures.digest(back)
    assert pictures.digest(image) != pictures.digest(image.transpose(Image.Transpose.ROTATE_180))


def test_every_config_in_the_docs_is_one() -> None:
    import yaml

    from megu_cli.config import MLLMConfig

    text = (Path(__file__).parents[2] / "docs" / "mllm.md").read_text()
    found = [MLLMConfig(**yaml.safe_load(block)["mllm"]) for block in re.findall(r"```yaml\n(.*?)```", text, re.S)]
    assert {config.backend for config in found} == {"recorded", "local", "endpoint", "clip"}
    # The defaults that the text tells.
    assert (MLLMConfig().images_per_class, MLLMConfig().concurrency, MLLMConfig().key_env) == (8, 4, "MEGU_API_KEY")
