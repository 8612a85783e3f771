"""`megu compare --tune` on other images and another seed than it judges on, and what is said of pairs of methods."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import write_config
from scipy import stats

from megu_cli import baselines
from megu_cli.baselines import methods
from megu_cli.baselines.task import BASELINE_EPOCHS
from megu_cli.compare import Comparison, distances, paired
from megu_cli.compare.methods import OURS, chosen
from megu_cli.compare.tuning import grid, winner
from megu_cli.config import FinetuneConfig, load_config
from megu_cli.errors import ConfigError, MeguError
from megu_cli.pipeline.context import RunContext
from megu_cli.pipeline.steps.problem import problem, task
from megu_cli.run import artifacts

APART = {"methods": ["original", "retrain", "megu", "ssd"], "seeds": 2, "tune_limit": 200, "tune_seed": 7}


def comparison(file, said=None):
    config = load_config(file)
    config.out.mkdir(exist_ok=True)
    return Comparison(RunContext.open(config), said.append if said is not None else lambda line: None)


def test_paired_differences_are_those_of_a_paired_t_test():
    draw = np.random.default_rng(0)
    ours, other = draw.random(5), draw.random(5)
    found = paired(
        {str(i): {"avg_gap": float(x)} for i, x in enumerate(other)},
        {str(i): {"avg_gap": float(x)} for i, x in enumerate(ours)},
    )["avg_gap"]
    low, high = stats.ttest_rel(other, ours).confidence_interval(0.95)
    assert found["mean"] - found["interval"] == pytest.approx(low, abs=1e-12)
    assert found["mean"] + found["interval"] == pytest.approx(high, abs=1e-12)
    assert found["seeds"] == 5


def test_paired_differences_are_of_seeds_and_figures_that_both_have():
    ours = {"0": {"avg_gap": 0.1, "probe_acc": 0.0}, "1": {"avg_gap": 0.2}}
    other = {"0": {"avg_gap": 0.4}, "1": {"avg_gap": 0.1}, "2": {"avg_gap": 9.0}}
    found = paired(other, ours)
    assert list(found) == ["avg_gap"]
    assert found["avg_gap"]["mean"] == pytest.approx(0.1)
    assert found["avg_gap"]["seeds"] == 2
    assert paired({"0": {"avg_gap": 0.4}}, ours)["avg_gap"] == {
        "mean": pytest.approx(0.3),
        "interval": None,
        "seeds": 1,
    }
    assert paired(other, {}) == {}


def test_a_distance_is_to_the_oracle_of_the_seed_or_to_a_fixed_target():
    own = {"avg_gap": 0.02, "agreement": 0.9, "probe_acc": 0.5, "mia_loss_auc": None, "relearn_epochs": 1, "tow": 0.3}
    oracle = {"probe_acc": 0.7, "mia_loss_auc": 0.5, "relearn_epochs": 4}
    assert distances(own, oracle) == {
        "avg_gap": pytest.approx(0.02),
        "agreement": pytest.approx(0.1),
        "probe_acc": pytest.approx(0.2),
        "relearn_epochs": 3,
    }
    assert set(distances(own, {})) == {"avg_gap", "agreement"}


@pytest.mark.parametrize("kind", ["classes", "subclasses", "samples", "subjects", "random"])
def test_a_grid_has_four_points_and_the_defaults_are_one_of_them(kind):
    default = FinetuneConfig()
    for name in chosen(None):
        points = grid(name, kind)
        if not points:
            assert name in ("original", "retrain", "mask")
            continue
        assert len({tuple(point.values()) for point in points}) == 4
        ours = {**{f"finetune.{key}": value for key, value in default}, **OURS.get(name, {})}
        own = ours if name in OURS else methods()[name].settings({})
        assert any(all(own[key] == value for key, value in point.items()) for point in points), name


def test_settings_that_yaml_gives_as_text_are_what_the_defaults_are():
    assert methods()["ssd"].settings({"alpha": "1e1"})["alpha"] == 10.0
    with pytest.raises(ConfigError, match="ssd: alpha is 'much', which is no float"):
        methods()["ssd"].settings({"alpha": "much"})


def test_what_was_forgotten_before_is_the_same_among_fewer_images(tmp_path):
    before = write_config(tmp_path / "a", forget={"random": {"count": 60}})
    forget = {"classes": ["3"], "already": [str(before)]}
    built = comparison(write_config(tmp_path / "b", forget=forget, compare=APART))
    there, base = built.tuning.context, built.base
    gone = {base.inputs.data.train.names[i] for i in base.inputs.request.already.tolist()}
    assert {there.inputs.data.train.names[i] for i in there.inputs.request.already.tolist()} == gone & {
        *there.inputs.data.train.names
    }
    assert len(there.inputs.request.already)


def test_a_list_of_all_of_a_class_is_tuned_on_that_class(tmp_path):
    eights = RunContext.open(load_config(write_config(tmp_path))).inputs.request.forget.tolist()
    (tmp_path / "list.csv").write_text("\n".join(map(str, eights)))
    built = comparison(write_config(tmp_path, forget={"samples": "list.csv"}, compare=APART))
    request = built.tuning.context.inputs.request
    assert (request.kind, request.classes) == ("classes", [8])
    assert len(request.forget) < len(eights)


def test_what_the_config_gives_a_method_is_not_varied(tmp_path):
    settings = {"scrub": {"lr": 0.003}, "ssd": {"alpha": 5.0}}
    built = comparison(write_config(tmp_path, compare={"methods": ["scrub", "ssd"], "settings": settings}))
    assert built._points("scrub") == [{"alpha": 0.1}, {"alpha": 0.5}]
    assert built._points("ssd") == []


def test_a_method_that_fails_with_all_settings_has_no_best_of_them():
    point = {"settings": {"lr": 0.1}, "score": None}
    assert winner([point, {"settings": {"lr": 0.2}, "score": -0.5}]) == {"lr": 0.2}
    with pytest.raises(MeguError, match="every setting"):
        winner([point, point])


def test_baselines_see_the_forget_set_as_often_as_megu(tmp_path):
    passes, shown = passes_over_the_forget_set(tmp_path, finetune={"forget_batch": "auto"})
    assert passes == pytest.approx(3, rel=0.2)
    assert shown == pytest.approx(passes, rel=0.2)


@pytest.mark.parametrize(("count", "own", "theirs"), [(100, 3, 3), (10, 8.8, 17.6), (250, 1, 2)])
def test_but_in_batches_of_8_to_64_a_baselines_two_epochs_may_see_it_twice_as_often(tmp_path, count, own, theirs):
    finetune = {"forget_batch": "auto", "batch": 32, "retain_fraction": 1.0, "epochs": 1}
    passes, shown = passes_over_the_forget_set(tmp_path, finetune=finetune, forget={"random": {"count": count}})
    assert passes == pytest.approx(own, rel=0.2)
    assert shown == pytest.approx(theirs, rel=0.2)


def passes_over_the_forget_set(tmp_path, **settings):
    """Of megu's finetuning, and of a baseline of the usual epochs."""
    work = RunContext.open(load_config(write_config(tmp_path, **settings)))
    own, theirs = problem(work), task(work)
    assert theirs.samples == own.retain_samples
    steps = theirs.steps / len(work.inputs.request.forget)
    return own.finetune.epochs * steps * own.forget_batch, BASELINE_EPOCHS * steps * theirs.forget_batch


def test_a_size_that_the_config_gives_holds_for_the_baselines_too(tmp_path):
    work = RunContext.open(load_config(write_config(tmp_path, finetune={"forget_batch": 24})))
    assert problem(work).forget_batch == task(work).forget_batch == 24


def test_settings_are_chosen_on_fewer_images_another_seed_and_another_draw(tmp_path):
    built = comparison(write_config(tmp_path, forget={"random": {"fraction": 0.1}}, compare=APART))
    work, base = built.tuning.context, built.base
    assert built.tuning not in built.arenas
    assert work.config.seed == 7
    assert len(work.inputs.data.train) == 200
    assert len(base.inputs.data.train) == 400
    forgotten, those = (
        {w.inputs.data.train.names[i] for i in w.inputs.request.forget.tolist()} & set(work.inputs.data.train.names)
        for w in (work, base)
    )
    assert forgotten != those
    assert built.tuning.goals == ["train"]  # no oracle
    assert work.directory.out == base.directory.out / "compare" / "tune-7"


def test_listed_images_are_tuned_on_as_large_a_share_of_fewer_images(tmp_path):
    (tmp_path / "list.csv").write_text("\n".join(map(str, range(40))))
    built = comparison(write_config(tmp_path, forget={"samples": "list.csv"}, compare=APART))
    request, base = built.tuning.context.inputs.request, built.base.inputs.request
    assert request.kind == "random"
    assert len(request.forget) / len(request.retain) == pytest.approx(len(base.forget) / len(base.retain), abs=0.02)
    # With a seed alone the images stay those that are listed.
    built = comparison(write_config(tmp_path, forget={"samples": "list.csv"}, compare={**APART, "tune_limit": None}))
    assert built.tuning.context.inputs.request.forget.tolist() == base.forget.tolist()


def test_an_original_of_ones_own_is_replaced_by_one_that_has_seen_fewer_images(tmp_path):
    file = write_config(tmp_path, model={"checkpoint": "own.safetensors"}, compare=APART)
    (tmp_path / "own.safetensors").touch()
    assert comparison(file).tuning.goals == ["train"]
    file = write_config(tmp_path, model={"checkpoint": "own.safetensors"}, compare={"methods": ["ssd"], "tune_seed": 7})
    assert comparison(file).tuning.goals == []


@pytest.fixture
def with_weights(tmp_path):
    """The config of a comparison from a directory with weights, with fewer images for tuning."""
    from transformers import ResNetConfig, ResNetForImageClassification

    model = ResNetForImageClassification(
        ResNetConfig(num_channels=1, embedding_size=4, hidden_sizes=[4], depths=[1], num_labels=10)
    )
    model.save_pretrained(tmp_path / "hf")
    settings = {"methods": ["mask"], "seeds": 1, "tune_limit": 200}
    return write_config(tmp_path, model={"name": "hf:hf", "preflight": False}, compare=settings)


def test_a_directory_with_weights_cannot_be_tuned_on_fewer_images(with_weights):
    built = comparison(with_weights)
    with pytest.raises(ConfigError, match="tune_limit"):
        _ = built.tuning


@pytest.mark.slow
def test_what_tuning_cannot_do_matters_only_where_something_is_tuned(with_weights):
    assert comparison(with_weights).run()["failed"] == {}


def test_without_keys_of_its_own_tuning_is_on_the_first_seed(tmp_path):
    built = comparison(write_config(tmp_path, compare={"methods": ["ssd"], "seeds": 2}))
    assert built.tuning is built.arenas[0]


def test_the_plan_names_each_point_of_each_grid(tmp_path, megu):
    file = write_config(tmp_path, compare=APART)
    called = megu("compare", "-c", file, "--tune", "--dry-run", "--json")
    plan = called.json["plan"]
    assert {row["action"] for row in plan} == {"run"}
    assert sum(row["stage"].startswith("tune megu ") for row in plan) == baselines.GRID_SIZE
    assert sum(row["stage"].startswith("tune ") for row in plan) == 2 * baselines.GRID_SIZE
    assert sum("/" in row["stage"] for row in plan) == 8
    told = {row["stage"]: row["reason"] for row in plan}
    assert told["0/megu"] == "its settings are still to be chosen"
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_tuning_apart_is_kept_planned_and_only_in_part_done_again(tmp_path, megu):
    file = write_config(tmp_path, compare=APART)
    said: list[str] = []
    first = comparison(file, said).run(tune=True)
    assert first["tuning"] == {"seed": 7, "images": 200}
    assert {line.split(":")[0] for line in said if ": running" in line and line.startswith("tune-7/")} == {
        "tune-7/train"
    }
    assert not (tmp_path / "run" / "compare" / "tune-7" / "oracle.safetensors").exists()
    assert set(first["methods"]["ssd"]["paired"]) >= {"avg_gap", "js_divergence", "probe_acc", "retain_test_acc"}
    rows = [first["methods"][name]["seeds"] for name in ("ssd", "megu")]
    apart = [[row[seed]["comparison"]["avg_gap"] for seed in ("0", "1")] for row in rows]
    low, high = stats.ttest_rel(*apart).confidence_interval(0.95)
    found = first["methods"]["ssd"]["paired"]["avg_gap"]
    assert [found["mean"] - found["interval"], found["mean"] + found["interval"]] == pytest.approx([low, high])

    said = []
    assert comparison(file, said).run(tune=True) == first
    assert not any("tuning with" in line or ": running" in line for line in said)
    plan = megu("compare", "-c", file, "--tune", "--dry-run", "--json").json["plan"]
    assert {row["action"] for row in plan} == {"keep"}

    # Killed while it was tuned: the points that were done are kept, and what hangs on the choice is said to wait.
    (tmp_path / "run" / "compare" / "tune-7" / "tune" / "ssd-2.json").unlink()
    plan = megu("compare", "-c", file, "--tune", "--dry-run", "--json").json["plan"]
    assert sorted(row["stage"] for row in plan if row["action"] == "run") == ["0/ssd", "1/ssd", "tune ssd alpha=50.0"]
    said = []
    assert comparison(file, said).run(tune=True) == first
    assert sum("tuning with" in line for line in said) == 1

    # What is tuned knows neither oracles nor test images.
    point = artifacts.read(tmp_path / "run" / "compare" / "tune-7" / "tune" / "ssd-0.json")
    assert "oracle" not in point.meta["inputs"]
    assert set(point.body) == {"score", "settings"}
