"""`megu compare`: cells are kept, failures told, the oracle is a true one, and no evaluation changes a model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_config
from scipy import stats
from torch import nn

from megu_cli import baselines
from megu_cli.baselines import finetune as finetune_module
from megu_cli.compare import Comparison, nearest, score, summary
from megu_cli.compare.methods import chosen
from megu_cli.config import changed, load_config
from megu_cli.errors import ConfigError
from megu_cli.evaluation import probe
from megu_cli.evaluation.measure import Measurement, Predictions, per_class
from megu_cli.models.weights import like
from megu_cli.pipeline.context import RunContext
from megu_cli.pipeline.steps.problem import evaluation_problem, fresh
from megu_cli.pipeline.times import reached
from megu_cli.run import artifacts

pytestmark = pytest.mark.slow
DOCS = Path(__file__).parents[2] / "docs"
FEW = ["original", "retrain", "megu", "finetune", "mask"]


@pytest.fixture
def small(tmp_path):
    return write_config(tmp_path, compare={"methods": FEW, "seeds": 2})


def comparison(file, said=None, **settings):
    config = changed(load_config(file), {f"compare.{key}": value for key, value in settings.items()})
    config.out.mkdir(exist_ok=True)
    return Comparison(RunContext.open(config), said.append if said is not None else lambda line: None)


def ran(said):
    return {line.split(":")[0] for line in said if ": running" in line}


@pytest.mark.slow
def test_cells_are_kept_and_only_what_is_new_is_computed(small):
    said: list[str] = []
    first = comparison(small, said).run()
    assert {f"{seed}/{name}" for seed in (0, 1) for name in (*FEW, "train", "oracle")} <= ran(said)

    said = []
    again = comparison(small, said).run()
    assert ran(said) == set()
    assert again == first

    said = []
    comparison(small, said, methods=[*FEW, "ssd"]).run()
    assert ran(said) == {"0/ssd", "1/ssd"}

    # One method's settings concern that method only.
    said = []
    comparison(small, said, settings={"finetune": {"lr": 0.02}}).run()
    assert ran(said) == {"0/finetune", "1/finetune"}

    # A further seed needs its own models, and changes who judges the last oracle.
    said = []
    comparison(small, said, seeds=3).run()
    assert ran(said) == {f"2/{name}" for name in (*FEW, "train", "oracle")} | {"0/finetune", "1/finetune", "1/retrain"}

    assert first["noise_floor"] is None
    third = json.loads((small.parent / "run" / "compare.json").read_text())
    assert third["seeds"] == [0, 1, 2]
    figures = [third["methods"]["retrain"]["seeds"][str(seed)]["metrics"] for seed in range(3)]
    pairs = [np.mean([abs(a[k] - b[k]) for k in ("retain_train_acc", "forget_train_acc", "retain_test_acc",
             "mia_entropy_lr")]) for a, b in ((figures[0], figures[1]), (figures[0], figures[2]),
             (figures[1], figures[2]))]  # fmt: skip
    assert third["noise_floor"] == pytest.approx(np.mean(pairs), abs=1e-9)
    for name in ("original", "finetune", "mask", "megu"):
        row = third["methods"][name]["seeds"]["0"]
        gap = np.mean([abs(row["metrics"][k] - figures[0][k]) for k in ("retain_train_acc", "forget_train_acc",
                       "retain_test_acc", "mia_entropy_lr")])  # fmt: skip
        assert row["comparison"]["avg_gap"] == pytest.approx(gap, abs=1e-9)
        assert row["seconds"] >= 0
        assert row["time_ratio"] >= 0


def test_killed_it_goes_on_with_the_cell_that_was_not_finished(small, monkeypatch):
    monkeypatch.setattr(finetune_module, "finetune", _interrupt)
    with pytest.raises(KeyboardInterrupt):
        comparison(small, methods=["original", "finetune", "mask"]).run()
    assert not (small.parent / "run" / "compare.json").exists()
    monkeypatch.undo()
    said: list[str] = []
    comparison(small, said, methods=["original", "finetune", "mask"]).run()
    assert "0/original" not in ran(said)
    assert {"0/finetune", "0/mask", "1/original"} <= ran(said)
    assert not {"0/train", "0/oracle", "1/train", "1/oracle"} & ran(said)


def _interrupt(*args: object, epochs: int = 1) -> None:
    raise KeyboardInterrupt


def _explode(model: object, task: object, *, rate: float = 0.5) -> None:
    raise RuntimeError("it went wrong")


def _diverge(model: nn.Module, task: object) -> None:
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))


class _Point:
    def __init__(self, name: str, function: object) -> None:
        self.name, self.value, self.load = name, "own:method", lambda: function


def test_a_method_that_fails_is_told_and_the_others_stand(small, monkeypatch, megu):
    points = [_Point("explode", _explode), _Point("diverge", _diverge)]
    monkeypatch.setattr(baselines, "entry_points", lambda group: points)
    called = megu("compare", "-c", small, "--methods", "explode,diverge,mask", "--seeds", "1", "--json")
    result = called.json
    assert called.code == 1
    assert result["failed"]["explode"] == {"0": "RuntimeError: it went wrong (compare/0-explode.error.txt)"}
    assert "in _explode" in (small.parent / "run" / "compare" / "0-explode.error.txt").read_text()
    assert "NaN" in result["failed"]["diverge"]["0"]
    assert result["methods"]["mask"]["seeds"]["0"]["metrics"]["forget_train_acc"] == 0
    assert "failed: explode (RuntimeError: it went wrong" in called.err


def test_the_table_the_plan_and_wrong_names(small, megu):
    plan = megu("compare", "-c", small, "--methods", "original,mask", "--seeds", "1", "--dry-run", "--json")
    assert [row["action"] for row in plan.json["plan"]] == ["run", "run"]
    assert not (small.parent / "run").exists()
    called = megu("compare", "-c", small, "--methods", "original,mask", "--seeds", "1", "-q")
    assert called.code == 0
    assert "mask" in called.out
    assert "avg gap" in called.out
    plan = megu("compare", "-c", small, "--methods", "original,mask", "--seeds", "1", "--dry-run", "--json")
    assert [row["action"] for row in plan.json["plan"]] == ["keep", "keep"]
    wrong = megu("compare", "-c", small, "--methods", "magic")
    assert wrong.code == 2
    assert "no method magic" in wrong.err
    wrong = megu("compare", "-c", small, "--set", "compare.settings={ssd: {alhpa: 3}}")
    assert wrong.code == 2
    assert "ssd has no setting alhpa" in wrong.err


def test_tuning_takes_the_best_of_each_grid_and_is_kept(small):
    said: list[str] = []
    result = comparison(small, said, methods=["megu", "ssd", "mask"], seeds=1).run(tune=True)
    assert set(result["tuned"]) == {"megu", "ssd"}
    for name, trials in result["tuned"].items():
        assert len(trials) == baselines.GRID_SIZE
        winner = max(trials, key=lambda trial: trial["score"])
        used = result["methods"][name]["settings"]
        assert {key: used[key] for key in winner["settings"]} == winner["settings"]
    assert sum("tuning" in line for line in said) == 2 * baselines.GRID_SIZE
    said = []
    assert comparison(small, said, methods=["megu", "ssd", "mask"], seeds=1).run(tune=True) == result
    assert not any("tuning" in line for line in said)


def test_a_subclass_request_is_tuned_on_classes(tmp_path):
    groups = {"low": ["0", "1", "2"], "mid": ["3", "4", "5"], "high": ["6", "7", "8", "9"]}
    file = write_config(tmp_path, data={"superclasses": groups}, forget={"subclasses": ["8"]})
    built = comparison(file, methods=["ssd"], seeds=1)
    arena = built.arenas[0]
    arena.prepare()
    tuning = arena._tuning
    assert tuning.inputs.request.kind == "classes"
    assert [tuning.inputs.data.classes[c] for c in tuning.inputs.request.classes] == ["high"]
    assert -1 <= arena.trial("ssd", 0, {"alpha": 1.0}).body["score"] <= 1
    assert -1 <= arena.trial("megu", 0, {}).body["score"] <= 1
    assert built.base.inputs.request.kind == "subclasses"


def test_the_score_by_hand(small, monkeypatch):
    work = RunContext.open(load_config(small))
    retained, gone = work.inputs.request.validation, work.inputs.request.forget
    monkeypatch.setattr("megu_cli.training.accuracy", lambda model, split, index, execution: {len(retained): 0.9,
                        len(gone): 0.2}[len(index)])  # fmt: skip
    assert score(nn.Identity(), work) == pytest.approx(0.9 - 0.2)
    monkeypatch.undo()
    single = RunContext.open(changed(load_config(small), {"forget": {"random": {"count": 40}}}))

    def says(model, split, index, execution):
        return 0.3 if torch.equal(index, single.inputs.request.forget) else 0.8

    monkeypatch.setattr("megu_cli.training.accuracy", says)
    assert score(nn.Identity(), single) == pytest.approx(0.8 - abs(0.3 - 0.8))

    # A class that was forgotten before changes nothing; of one that a list holds all of, nothing is to be right.
    small.with_name("eights.yaml").write_text(small.read_text())
    before = {"random": {"count": 40}, "already": [str(small.with_name("eights.yaml"))]}
    single = RunContext.open(changed(load_config(small), {"forget": before}))
    assert single.inputs.request.classes
    assert score(nn.Identity(), single) == pytest.approx(0.8 - abs(0.3 - 0.8))
    labels, held = single.inputs.data.train.labels, ~single.inputs.data.trainable
    listed = torch.cat([torch.where((labels == 3) & ~held)[0], torch.where((labels == 5) & ~held)[0][:10]])
    small.with_name("list.csv").write_text("\n".join(map(str, listed.tolist())))
    single = RunContext.open(changed(load_config(small), {"forget": {"samples": small.with_name("list.csv")}}))
    assert score(nn.Identity(), single) == pytest.approx(0.8 - abs(0.3 - 0.8 * 10 / len(listed)))


def test_every_seed_has_the_same_request(tmp_path):
    file = write_config(tmp_path, forget={"random": {"count": 30}}, compare={"methods": ["mask"], "seeds": 2})
    built = comparison(file)
    first, second = (arena.context for arena in built.arenas)
    assert second.config.seed == 1
    assert torch.equal(first.inputs.request.forget, second.inputs.request.forget)


def test_the_oracle_differs_from_the_original_in_every_layer_at_initialisation(small):
    work = RunContext.open(load_config(small))
    for name in ("small_cnn", "small_resnet", "resnet18"):
        net = work.sibling(changed(work.config, {"model.name": name}))
        original, oracle, again = (fresh(net, purpose) for purpose in ("train", "oracle", "oracle"))
        for (key, one), two in zip(original.named_modules(), oracle.modules(), strict=True):
            if isinstance(one, (nn.Conv2d, nn.Linear)):
                for (part, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
                    assert not (a == b).all(), f"{name}: {key}.{part}"
        assert all(torch.equal(a, b) for a, b in zip(oracle.parameters(), again.parameters(), strict=True))


def test_the_oracle_stage_starts_from_that_initialisation(small, monkeypatch):
    from megu_cli.pipeline.steps import train
    from megu_cli.training import History

    config = load_config(small)
    work = RunContext.open(config)
    monkeypatch.setattr("megu_cli.baselines.retrain.train_classifier", lambda *a, **k: History([0.0], [], 0))
    product = train.oracle(work, {})
    expected = fresh(work, "oracle").state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in product.artifact.tensors.items())


@pytest.mark.parametrize(
    ("forget", "told_apart", "asked_of"), [({"classes": ["high"]}, 3, 0), ({"subclasses": ["8"]}, 10, 8)]
)
def test_a_probe_for_a_forgotten_sub_class_tells_sub_classes_apart(tmp_path, monkeypatch, forget, told_apart, asked_of):
    coarse = {"superclasses": {"low": ["0", "1", "2", "3"], "middle": ["4", "5", "6"], "high": ["7", "8", "9"]}}
    work = RunContext.open(load_config(write_config(tmp_path, data=coarse, forget=forget)))
    problem = evaluation_problem(work)
    predictions = Predictions.of(fresh(work, "train").eval(), problem, "x")
    asked = []
    monkeypatch.setattr(probe, "probe_acc", lambda *given: asked.append(given))
    assert Measurement(problem, predictions, predictions).figures["probe_acc"] is None
    [(_, y, _, y_test)] = asked
    assert len(y.unique()) == told_apart
    assert y_test.unique().tolist() == [asked_of]


def test_an_evaluation_never_changes_a_model(small):
    work = RunContext.open(changed(load_config(small), {"eval.relearn_epochs": 2}))
    model, judge = fresh(work, "train").train(), fresh(work, "oracle").eval()

    def digest():
        return [artifacts.state_digest(like(m.state_dict(), m.state_dict())) for m in (model, judge)]

    before = digest()
    problem = evaluation_problem(work)
    seen, reference = Predictions.of(model, problem, "x"), Predictions.of(judge, problem, "y")
    measured = Measurement(problem, seen, reference, model)
    oracle = Measurement(problem, reference, reference, judge)
    assert digest() == before
    steps = {
        "figures": lambda: measured.figures,  # relearning among them
        "beside": lambda: measured.beside(oracle),
        "entanglement": lambda: measured.entanglement,
        "per_class": lambda: per_class(seen, work.inputs.data),
        "score": lambda: score(judge, work),
    }
    logits = seen.train.logits.clone()
    for name, step in steps.items():
        step()
        assert digest() == before, name
        assert torch.equal(seen.train.logits, logits), name
    assert "relearn_epochs" in measured.figures
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_summary_by_hand_and_against_scipy():
    rows = [{"a": 0.1, "b": 1.0}, {"a": 0.3, "b": None}, {"a": 0.8, "b": 3.0}]
    found = summary(rows)
    values = [0.1, 0.3, 0.8]
    low, high = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
    assert found["mean"]["a"] == pytest.approx(0.4)
    assert found["interval"]["a"] == pytest.approx((high - low) / 2, abs=1e-6)
    assert found["mean"]["b"] is None
    assert summary(rows[:1])["interval"]["a"] is None


def test_nearest_to_the_target_of_a_figure_in_the_mean_over_seeds():
    def row(probes, agreements):
        cells = {
            str(seed): {"metrics": {"probe_acc": p}, "comparison": {"agreement": a}, "entanglement": {}}
            for seed, (p, a) in enumerate(zip(probes, agreements, strict=True))
        }
        return {"seeds": {seed: {**cell, "seconds": 1.0, "time_ratio": 0.1} for seed, cell in cells.items()}}

    rows = {
        "retrain": row([0.4, 0.6], [1.0, 1.0]),
        "near": row([0.45, 0.55], [0.7, 0.7]),
        "mean": row([0.6, 0.4], [0.8, 0.8]),  # the oracle's in the mean, of no seed
        "none": row([None, None], [None, None]),
        "once": row([0.4], [1.0]),
    }
    assert nearest(rows, "probe_acc", ("retrain",)) == "near"
    assert nearest(rows, "probe_acc") == "retrain"
    assert nearest(rows, "agreement", ("retrain",)) == "mean"
    assert nearest({"none": rows["none"]}, "agreement") is None
    assert nearest({"near": rows["near"]}, "probe_acc") is None  # no oracle to be near to


def test_share_of_a_training_after_which_it_had_reached_its_end():
    assert reached([0.5, 0.899, 0.95, 0.90]) == 0.5
    assert reached([0.5, 0.8, 0.9]) == 1.0
    assert reached([]) is None


def test_names_of_methods():
    everything = chosen(None)
    assert {"original", "retrain", "megu", "megu-paper", "mask"} <= set(everything)
    assert len(everything) == len(set(everything))
    assert chosen(["mask", "ssd", "mask"]) == ["mask", "ssd"]
    with pytest.raises(ConfigError):
        chosen(["magic"])


def test_the_method_of_the_page_takes_part_as_an_installed_package(small, monkeypatch, tmp_path):
    page = (DOCS / "methods.md").read_text()
    code, toml = (re.search(rf"```{kind}\n(.*?)```", page, re.DOTALL)[1] for kind in ("python", "toml"))
    group, name, value = re.search(r'entry-points\."(.*?)"\]\n(\w+) = "(.*?)"', toml).groups()
    site = tmp_path / "site"
    (site / "my_methods-0.1.dist-info").mkdir(parents=True)
    (site / "my_methods.py").write_text(code)
    (site / "my_methods-0.1.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: my-methods\nVersion: 0.1\n"
    )
    (site / "my_methods-0.1.dist-info" / "entry_points.txt").write_text(f"[{group}]\n{name} = {value}\n")
    monkeypatch.syspath_prepend(site)
    said: list[str] = []
    result = comparison(small, said, methods=[name, "mask"], seeds=1).run()
    assert not result["failed"]
    assert result["methods"][name]["settings"] == {"epochs": 2, "lr": 0.01, "weight": 0.2}
    assert len(baselines.methods()[name].grid) == baselines.GRID_SIZE


def test_the_pages_name_every_method_setting_and_metric(small):
    page = (DOCS / "methods.md").read_text()
    for name, method in baselines.methods().items():
        row = re.search(rf"^\| `{name}` \|.*$", page, re.MULTILINE)
        assert row, name
        if name != "retrain":
            for key, value in method.settings({}).items():
                assert f"`{key}` ({value:g})" in row[0], f"{name}: {key}"
    metrics = (DOCS / "metrics.md").read_text()
    comparison(small, methods=["mask"], seeds=1).run()
    row = json.loads((small.parent / "run" / "compare.json").read_text())["methods"]["mask"]["seeds"]["0"]
    for key in (*row["metrics"], *row["comparison"], *row["entanglement"], "time_ratio"):
        assert f"`{key}`" in metrics, key


def test_two_seeds_show_their_range_and_three_an_interval(small, megu):
    """With two seeds Student's interval is wider than any figure."""
    for seeds, said, sign in ((2, "the range of two seeds", "–"), (3, "95% interval over 3 seeds", "±")):
        given = ["--set", f"compare.seeds={seeds}", "--set", "compare.methods=[original,retrain]"]
        answer = megu("compare", "-c", small, *given)
        assert answer.code == 0, answer.err
        assert said in answer.out
        row = next(line for line in answer.out.splitlines() if "original" in line)
        assert sign in row


def test_a_variant_is_a_row_that_shares_what_it_does_not_change(small):
    variants = {"no-noise": {"noise.use": "none"}, "gentle": {"method": "finetune", "lr": 0.001}}
    said: list[str] = []
    result = comparison(small, said, methods=["retrain", "megu"], variants=variants).run()
    assert not result["failed"]
    assert list(result["methods"]) == ["retrain", "megu", "no-noise", "gentle"]
    assert result["methods"]["no-noise"]["variant_of"] == "megu"
    assert result["methods"]["no-noise"]["settings"] == {"noise.use": "none"}
    assert result["methods"]["gentle"]["settings"]["lr"] == 0.001
    assert result["methods"]["no-noise"]["paired"]
    seed = small.parent / "run" / "compare" / "0"
    for name, same in (("similarity.json", True), ("labels.safetensors", True), ("noise.safetensors", False)):
        assert ((seed / "megu" / name).read_bytes() == (seed / "no-noise" / name).read_bytes()) is same, name
    entries = [json.loads(line)["stage"] for line in (seed / "no-noise" / "runs.jsonl").read_text().splitlines()]
    assert entries.count("labels") == 1  # the time it took is known

    said = []
    assert comparison(small, said, methods=["retrain", "megu"], variants=variants).run() == result
    assert ran(said) == set()
    said = []
    changed_one = variants | {"no-noise": {"noise.use": "none", "finetune.lr": 0.001}}
    comparison(small, said, methods=["retrain", "megu"], variants=changed_one).run()
    assert ran(said) == {"0/no-noise", "1/no-noise"}


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("x", {"noise.ues": "none"}, "compare.variants.x: noise.ues: unknown key; did you mean use?"),
        ("x", {"nosie.use": "none"}, "compare.variants.x: nosie: unknown key; did you mean noise?"),
        ("x", {"data.limit": 100}, "data.limit: all methods of a comparison share this setting"),
        ("x", {"seed": 5}, "seed: all methods of a comparison share this setting"),
        ("x", {"noise": {"use": "none"}}, "noise is a section"),
        ("x", {"method": "ssd", "alhpa": 3}, "ssd has no setting alhpa"),
        ("x", {"method": "magic"}, "there is no method 'magic'"),
        ("mask", {"noise.use": "none"}, "is the name of a method"),
        ("oracle", {"noise.use": "none"}, "is the name of a file or stage of megu"),
        ("../x", {"noise.use": "none"}, "is no name for a variant"),
    ],
)
def test_a_variant_that_cannot_be_is_refused(small, name, settings, said):
    with pytest.raises(ConfigError) as error:
        comparison(small, methods=["megu"], variants={name: settings})
    assert said in error.value.message


def test_a_path_of_a_variant_is_relative_to_the_config(tmp_path):
    file = write_config(tmp_path, compare={"variants": {"rated": {"mllm.ratings": "mine.json"}}})
    config = load_config(file)
    assert config.compare.variants["rated"] == {"mllm.ratings": tmp_path / "mine.json"}
