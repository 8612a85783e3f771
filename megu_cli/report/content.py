"""What the report says: its head and its limits, with the sections between them."""

from __future__ import annotations

from typing import Any

from megu_cli.report.parts import Report, Sources, Tile, View
from megu_cli.report.sections import answers, inside, judgement, method, provenance
from megu_cli.report.words import LIMITS, MODELS, RETRAINED_LIMITS, counted, listed, percent

# The limit that is about the run directory and not about the model.
TRACES = "Traces beside the model"


def gather(sources: Sources) -> Report:
    """Put the report together."""
    body = sources.evaluation.body
    models = [name for name in MODELS if name in body]
    if not body["request"]["classes"]:
        models.remove("mask")  # with no class to mask it is the original
    view = View(body, models, list(body["per_class"]["original"]["test"]), sources)
    builders = (
        judgement.verdict,
        judgement.results,
        answers.classes,
        answers.flow,
        method.similarity,
        method.noise,
        inside.histograms,
        inside.planes,
        judgement.comparison,
        provenance.digests,
        provenance.settings,
    )
    met = [outcome.met for outcome in sources.outcomes]
    return Report(
        title=_what(body["request"]),
        facts=_facts(view),
        summary=_summary(view),
        verdict=view.verdict["verdict"],
        requirements="none required" if not met else "met" if all(met) else "not met",
        tiles=_tiles(view),
        sections=[section for build in builders if (section := build(view))],
        limits=[*(RETRAINED_LIMITS if view.retrained_by else LIMITS), *_own_limits(view)],
        notices=[*sources.notices, *(f"{line[0].upper()}{line[1:]}." for line in body.get("warnings", []))],
        shows_forgotten=bool(sources.shown),
        metrics={name: body[name] for name in (*models, "comparison", "time")},
        megu=str(sources.evaluation.meta["megu"]),
    )


def _what(request: dict[str, Any]) -> str:
    names = listed(request["concepts"]) if request["concepts"] else ""
    many = len(request["concepts"]) > 1
    return {
        "classes": f"the class{'es' if many else ''} {names}",
        "subclasses": f"the sub-class{'es' if many else ''} {names}",
        "samples": counted(request["forget"], "listed image"),
        "subjects": counted(request["forget"], "image") + " of the listed subjects",
        "random": counted(request["forget"], "randomly drawn image"),
    }[request["kind"]]


def _facts(view: View) -> list[tuple[str, str]]:
    request, meta = view.request, view.sources.evaluation.meta
    facts = [
        ("To be forgotten", _what(request)),
        ("In the config", view.sources.asked),
        ("Forgotten training images", _numbers(request)),
        ("Kept training images", f"{request['retain']:,}"),
        ("Classes of the model", _classes(view)),
        ("Model", view.sources.model),
        ("Seed", str(meta["seed"])),
    ]
    if view.sources.finished:
        facts.append(("Measured", view.sources.finished))
    return facts


def _classes(view: View) -> str:
    """How many classes the model has, and how many of them have images."""
    number, shown = len(view.classes), len(view.shown)
    return f"{number:,}" if number == shown else f"{number:,}, of which {shown:,} have images"


def _numbers(request: dict[str, Any]) -> str:
    """How many images are forgotten, and how many of them as copies of those that were asked for."""
    copies = request.get("copies", 0)
    if not copies:
        return f"{request['forget']:,}"
    return f"{request['forget']:,}: {request['forget'] - copies:,} asked for, and {_copies(copies)} of these"


def _copies(number: int) -> str:
    return "1 copy" if number == 1 else f"{number:,} copies"


_IN_WORDS = {
    "forgotten": "By the checks below it now behaves like a model that never saw them.",
    "not forgotten": "By the checks below it does not behave like a model that never saw them.",
    "undecided": "The checks below do not decide whether it behaves like a model that never saw them.",
}
# What stands beside an unlearned model, and what was done instead of unlearning.
_BESIDE = {
    "oracle": "Beside it stands a model retrained from scratch without them, which shows what forgetting looks like.",
    "": "No retrained model stands beside it, so there is no yardstick for what real forgetting looks like.",
}
_RETRAINED = {
    "megu": "It was not unlearned: a new model was trained from scratch without them, which is exact.",
    "factory": "It was not unlearned: the model of your factory was trained without them.",
    "user": "It was not unlearned: your own model takes its place, which was retrained without them.",
}


def _summary(view: View) -> list[str]:
    """What happened, in sentences that hold only what was measured."""
    request, oracle = view.request, "oracle" in view.models

    def say(name: str, text: str, compared: str) -> list[str]:
        before, now, target = (view.value(m, name) for m in ("original", "unlearned", "oracle"))
        if before is None or now is None:
            return []
        ending = compared.format(percent(target)) if oracle and target is not None else ""
        return [text.format(percent(before), percent(now)) + ending + "."]

    if view.retrained_by:
        how = [_RETRAINED[view.retrained_by]]
    else:
        how = [_BESIDE["oracle" if oracle else ""], _IN_WORDS[view.verdict["verdict"]]]
    asked = f"The model was asked to forget {_what(request)}: {counted(request['forget'], 'training image')}."
    sentences = [f"{asked} {how[0]}", *how[1:]]
    sentences += say(
        "forget_train_acc",
        "Of the forgotten images it recognised {} before and {} now",
        "; the retrained model recognises {}",
    )
    sentences += say(
        "retain_test_acc",
        "Of new images of what it should still know it recognised {} before and {} now",
        "; retrained: {}",
    )
    sentences += say(
        "mia_entropy_lr",
        "An attacker who tries to tell by the model's certainty which images it was trained on took {} of the "
        "forgotten ones for training images before, and {} now",
        "; with the retrained model, which never saw them, it would be {}",
    )
    return sentences


def _tiles(view: View) -> list[Tile]:
    names = {
        "forget_train_acc": "Forgotten images still recognised",
        "retain_test_acc": "What it should know, recognised",
        "mia_entropy_lr": "Taken by an attacker for training images",
        "probe_acc": "Still to be found in the inner features",
    }
    return [
        Tile(label, *(percent(view.value(m, name)) for m in ("original", "unlearned", "oracle")))
        for name, label in names.items()
        if view.value("unlearned", name) is not None
    ]


def _own_limits(view: View) -> list[tuple[str, str]]:
    """Limits of this very run."""
    limits = []
    if "oracle" not in view.models and not view.retrained_by:
        text = "No model was retrained without the forgotten images, so nearness to real forgetting was not measured."
        limits.append(("No yardstick", text))
    if view.retrained_by == "factory":
        text = (
            "The training began with the weights that the factory in model.name returns: that they never saw the "
            "forgotten images is the word of whoever trained them."
        )
        limits.append(("Weights from elsewhere", text))
    if "retrained" in view.sources.evaluation.meta["inputs"]:
        text = (
            "The retrained model was given (eval.oracle), not trained here: that it never saw the forgotten images is "
            "the word of whoever trained it."
        )
        limits.append((f"A {'model' if view.retrained_by else 'yardstick'} from elsewhere", text))
    probe, target = view.value("unlearned", "probe_acc"), view.value("oracle", "probe_acc")
    if probe is not None and target is not None and probe > target:
        text = (
            f"A classifier on the inner features finds {percent(probe)} of the forgotten classes' images, and "
            f"{percent(target)} in the retrained model: some of what was forgotten may be hidden rather than gone."
        )
        limits.append(("Hidden knowledge", text))
    if view.sources.artifacts.keys() & {"labels", "noise"}:
        text = (
            "When this was written, the run directory held labels or noises made from the forgotten images. "
            "`megu purge` deletes them once the result is accepted."
        )
        limits.append((TRACES, text))
    return limits
