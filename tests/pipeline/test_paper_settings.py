"""Settings that follow the paper, or take another source than its: the stages that they change, and no others."""

from __future__ import annotations

import pytest
import yaml
from conftest import listing, write_config

from megu_cli.compare.methods import OURS
from megu_cli.config import PRESETS, changed, load_config
from megu_cli.errors import ConfigError
from megu_cli.pipeline.context import RunContext
from megu_cli.pipeline.freshness import Freshness


def keys(folder, **sections):
    """Stage -> the settings in its key."""
    context = RunContext.open(load_config(write_config(folder, **sections)))
    stages = Freshness(context).stages.values()
    return {s.name: context.inputs.settings([*s.settings, *s.by_config(context.config)[0]]) for s in stages}


def test_a_noise_alone_changes_the_key_of_the_noise_and_the_default_none(tmp_path):
    added, alone = keys(tmp_path), keys(tmp_path, noise={"input": "alone"})
    assert [name for name in added if added[name] != alone[name]] == ["noise"]
    assert alone["noise"] == {**added["noise"], "noise.input": "alone"}
    assert "noise.input" not in added["noise"]  # artifacts of earlier versions stay fresh


def test_ratings_that_are_not_needed_are_asked_of_nobody(megu, finished, monkeypatch):
    from megu_cli.mllm import http

    monkeypatch.setattr(http, "post", lambda *_: pytest.fail("a server was asked"))
    # The rater that is configured could not answer, and all images that it might be shown are to be forgotten.
    config = yaml.safe_load(finished.read_text())
    config["mllm"] = {
        "backend": "endpoint",
        "model": "m",
        "base_url": "https://example.com/v1",
        "images": "retain-only",
    }
    config["transition"] = {"from": "confusions"}
    finished.write_text(yaml.safe_dump(config))
    (finished.parent / "run" / "similarity.json").unlink()
    answer = megu("similarity", "-c", finished)
    assert answer.code == 0, answer.err
    assert "transition: running (stale: changed: transition.from ratings -> confusions)" in answer.err
    assert not [name for name in listing(finished.parent / "run") if "similarity" in name]
    for option in (("--show",), ("--against", "other.json")):
        answer = megu("similarity", "-c", finished, *option)
        assert (answer.code, "transition.from: confusions takes no ratings" in answer.err) == (2, True)
    # Another source makes the transition anew.
    stages = megu("status", "-c", finished, "--set", "transition.from=embeddings", "--json").json["stages"]
    assert "similarity" not in stages
    assert stages["transition"]["reason"] == "changed: transition.from confusions -> embeddings"
    # It is made from the original model.
    (finished.parent / "run" / "original.safetensors").unlink()
    answer = megu("similarity", "-c", finished, "--force")
    assert (answer.code, "megu train" in answer.err) == (2, True)


def test_default_ratings_have_the_keys_of_earlier_versions(tmp_path):
    assert keys(tmp_path)["transition"] == {"transition": {"temperature": 3.0}}
    measured = keys(tmp_path, transition={"from": "embeddings"})
    assert measured.keys() == keys(tmp_path).keys() - {"similarity"}
    assert measured["transition"]["transition"] == {"temperature": 3.0, "from": "embeddings"}


def test_what_needs_ratings_takes_confusions_for_them(megu, tmp_path):
    sources = {"mllm": {"backend": "none"}, "transition": {"from": "confusions"}, "compare": {"seeds": 1}}
    file = write_config(tmp_path, preset="paper", **sources)
    assert load_config(file).knows_near
    cells = megu("compare", "-c", file, "--methods", "megu-paper,megu", "--list-cells").out.split()
    assert "0/megu-paper" in cells
    assert "ratings" not in cells


ENDPOINT = {"backend": "endpoint", "model": "m", "base_url": "http://127.0.0.1:9/v1"}


@pytest.mark.parametrize(
    ("mllm", "question"),
    [({}, "rating"), ({"backend": "none"}, "rating"), ({"backend": "clip", "model": "m"}, "rating"),
     (ENDPOINT, "true_false"), ({"backend": "local", "model": "m"}, "true_false")],
    ids=["recorded", "none", "clip", "endpoint", "local"],
)  # fmt: skip
def test_true_or_false_is_put_to_models_that_chat_alone(tmp_path, mllm, question):
    def load(value: str, **sections):
        return load_config(write_config(tmp_path, mllm={**mllm, "question": value}, **sections))

    assert load("auto").mllm.question == question
    if question == "true_false":
        assert load("true_false").mllm.question == question
        return
    with pytest.raises(ConfigError) as failure:
        load("true_false")
    assert "mllm.question: true_false cannot be put to mllm.backend" in failure.value.message
    assert "Set mllm.backend to local or endpoint, or leave mllm.question out" in failure.value.message
    assert load("true_false", transition={"from": "confusions"})  # nobody is asked


def test_another_question_makes_the_ratings_anew_and_the_default_keeps_their_key(tmp_path):
    rating, asked = keys(tmp_path, mllm=ENDPOINT), keys(tmp_path, mllm={**ENDPOINT, "question": "true_false"})
    assert "mllm.question" not in rating["similarity"]
    assert [name for name in rating if rating[name] != asked[name]] == ["similarity"]


def test_the_dry_run_counts_a_call_for_each_image_and_class(megu, tmp_path):
    file = write_config(tmp_path, mllm={**ENDPOINT, "images_per_class": 3})
    asked = ("--set", "mllm.question=true_false")
    costs = [megu("similarity", "-c", file, *more, "--dry-run", "--json").json["cost"] for more in ((), asked)]
    assert [cost["calls"] for cost in costs] == [3, 3 * 9]
    assert [cost["images"] for cost in costs] == [3, 3]
    assert costs[1]["tokens"] > 9 * 3 * 576  # each call shows its image


def test_all_rows_of_a_comparison_find_the_answers_of_each_other(tmp_path):
    base = RunContext.open(load_config(write_config(tmp_path, mllm=ENDPOINT)))
    _ = base.inputs.request
    other = {"mllm.question": "true_false", "out": tmp_path / "other"}
    assert base.sibling(changed(base.config, other)).inputs.answers == base.inputs.answers
    fewer = base.sibling(changed(base.config, {**other, "data.limit": 300}), data=False)
    assert fewer.inputs.answers == tmp_path / "other" / "similarity.answers.jsonl"


def test_the_preset_follows_the_paper_where_the_rater_can_and_keeps_its_first_version(tmp_path):
    def load(preset: str, **sections):
        return load_config(write_config(tmp_path, preset=preset, **sections))

    second, first = load("paper", mllm=ENDPOINT), load("paper-added", mllm=ENDPOINT)
    assert (second.mllm.question, second.noise.input) == ("true_false", "alone")
    assert (first.mllm.question, first.noise.input) == ("rating", "added")
    same = {"mllm": first.mllm, "noise": first.noise, "preset": "paper-added"}
    assert second.model_copy(update=same) == first  # and nothing else differs
    assert load("paper").mllm.question == "rating"  # recorded ratings stay ratings
    assert load("paper", mllm={**ENDPOINT, "question": "rating"}).mllm.question == "rating"
    # In a comparison its row takes the ratings of the others.
    given = load_config(write_config(tmp_path, mllm=ENDPOINT))
    row = changed(given, OURS["megu-paper"])
    assert (row.mllm, row.labels.source, row.noise.input) == (given.mllm, second.labels.source, "alone")


@pytest.mark.parametrize("preset", PRESETS)
def test_a_run_says_which_version_of_a_preset_it_has(tmp_path, preset):
    context = RunContext.open(load_config(write_config(tmp_path, preset=preset)))
    (line,) = [note for note in context.inputs.notes if note.startswith("preset: ")]
    alone = {"paper": "alone", "paper-added": "added"}[preset]
    assert line == f"preset: {preset}, version {PRESETS[preset].version} (mllm.question: rating, noise.input: {alone})"
    assert not [n for n in RunContext.open(load_config(write_config(tmp_path))).inputs.notes if "preset" in n]
