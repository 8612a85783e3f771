"""The report: what was asked, how it went, and what shows it, for a privacy officer and an engineer alike.

It reads artifacts, never a model: what the figures need is stored as counts in eval.json. Only the forgotten images,
where they are asked for, come from the data set.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megu_cli.errors import ArtifactError
from megu_cli.evaluation.requirements import Outcome
from megu_cli.pipeline.purge import SHOWS_FORGOTTEN
from megu_cli.pipeline.stages import STAGES
from megu_cli.run import artifacts, files, writing
from megu_cli.run.artifacts import Artifact
from megu_cli.text import markdown, printable, shown

if TYPE_CHECKING:
    from megu_cli.config import ForgetConfig
    from megu_cli.pipeline.context import RunContext
    from megu_cli.report.parts import Report, Sources

FORMATS = ("html", "md", "json")
_WEIGHTS = (files.WEIGHTS, files.ORIGINAL, files.ORACLE)
# Stages whose artifacts it shows.
_SHOWN = [name for name, stage in STAGES.items() if stage.file not in (*_WEIGHTS, files.EVALUATION)]
_EXAMPLES = 8


def write(
    context: RunContext,
    outcomes: Sequence[Outcome],
    *,
    form: str = "html",
    show_forgotten: bool = False,
    notices: Sequence[str] = (),
) -> Path:
    """Write the report into the run directory.

    Args:
        context: The run; its data set is loaded only for ``show_forgotten``.
        outcomes: The requirements, and what was measured.
        form: One of `FORMATS`.
        show_forgotten: Show a few forgotten images beside their noises.
        notices: What the reader must know.

    Returns:
        The file: report.html, report.md or report.json.

    Raises:
        ArtifactError: eval.json is missing or damaged, or the directory cannot be written.
    """
    from megu_cli.report.content import gather

    sources = _sources(context, outcomes, show_forgotten, notices)
    report = gather(sources if form == "json" else _readable(sources))
    text = _RENDER[form](report)
    path = context.directory.out / f"{files.REPORT}.{form}"
    with writing.replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def write_card(context: RunContext, outcomes: Sequence[Outcome], path: Path, notices: Sequence[str] = ()) -> None:
    """Write a Hugging Face model card of the unlearned model, which `card.check` has allowed.

    Raises:
        ArtifactError: eval.json is missing or damaged, or the file cannot be written.
    """
    from megu_cli.report.card import card
    from megu_cli.report.content import gather

    sources = _readable(_sources(context, outcomes, False, notices))
    report = gather(sources)
    metadata, parts = card(context, sources, report)
    text = f"---\n{metadata}\n---\n{_markdown(report, 'card.md.j2', card=parts)}\n"
    with writing.replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _sources(context: RunContext, outcomes: Sequence[Outcome], show_forgotten: bool, notices: Sequence[str]) -> Sources:
    from megu_cli.report.parts import Sources

    evaluation = artifacts.read(context.directory.out / files.EVALUATION)
    digests: dict[str, str] = {}
    for recorded in (*evaluation.meta["lineage"].values(), evaluation.meta):
        digests |= recorded["inputs"]
    found = {}
    for stage in _SHOWN:
        try:
            artifact = artifacts.read(context.directory.out / STAGES[stage].file)
        except ArtifactError:
            continue
        # Another process may be at work here: only what this evaluation was made from is shown beside it.
        if artifact.content == digests.get(stage):
            found[stage] = artifact
    comparison = None
    with contextlib.suppress(ArtifactError):
        beside = artifacts.read(context.directory.out / files.COMPARISON)
        comparison = beside if beside.body.get("request") == evaluation.body["request"] else None
    entry = context.directory.log.last(evaluation.meta["fingerprint"])
    shown, scale = _examples(context, found) if show_forgotten else ([], 1.0)
    notices = list(notices)
    if show_forgotten and not shown:
        notices.append(
            "Forgotten images are shown beside their labels and noises, and a retrained model has none."
            if "retrained_by" in evaluation.body
            else "Forgotten images were asked for, but the labels or noises made from them are not here any more."
        )
    finished = str(entry["time"]).replace("T", " ").replace("+00:00", " UTC") if entry else ""
    return Sources(
        evaluation,
        found,
        outcomes,
        _files(context.directory.out, found),
        finished,
        shown,
        scale,
        notices,
        comparison,
        asked=_asked(context.config.forget),
        model=_model(context),
        bgr=context.inputs.user_model.preprocessing.bgr,
    )


def _files(out: Path, found: dict[str, Artifact]) -> list[tuple[str, int, str]]:
    """(file, bytes, sha256) of the files of a run. The model may be more of them than model.safetensors."""
    deployed = found["finetune"].meta.get("files", {}) if "finetune" in found else {}
    names = dict.fromkeys(
        [_WEIGHTS[0], *deployed, *_WEIGHTS[1:], *(STAGES[stage].file for stage in _SHOWN), files.EVALUATION]
    )
    there = [(name, out / name) for name in names if (out / name).is_file()]
    return [(name, path.stat().st_size, artifacts.file_digest(path)) for name, path in there]


def _asked(settings: ForgetConfig) -> str:
    """The request as the config has it, without folders and without the ids of people."""
    if settings.samples is not None:
        return f"forget.samples: {settings.samples.name}"
    if settings.subjects is not None:
        return f"forget.subjects: {len(settings.subjects)} listed"
    if settings.random is not None:
        return "forget.random: " + ", ".join(
            f"{k} {v}" for k, v in settings.random.model_dump(exclude_none=True).items()
        )
    kind = "classes" if settings.classes is not None else "subclasses"
    return f"forget.{kind}: " + ", ".join(map(str, getattr(settings, kind)))


def _model(context: RunContext) -> str:
    """The model and its checkpoint by name, without folders."""
    from megu_cli.models.sources import shown

    name, checkpoint = shown(context.config.model.name), context.inputs.user_model.checkpoint
    return f"{name} ({checkpoint.name})" if checkpoint is not None else f"{name}, trained by megu"


def _readable(sources: Sources) -> Sources:
    """The sources with names as people see them, the same in each artifact; JSON stays as it is."""
    artifacts_ = {"": sources.evaluation, **sources.artifacts}
    if sources.comparison:
        artifacts_["compare"] = sources.comparison
    told = shown({name: [artifact.body, artifact.meta] for name, artifact in artifacts_.items()})
    named = {name: replace(artifact, body=told[name][0], meta=told[name][1]) for name, artifact in artifacts_.items()}
    return replace(
        sources,
        evaluation=named[""],
        artifacts={name: named[name] for name in sources.artifacts},
        comparison=named.get("compare"),
    )


def _examples(context: RunContext, found: dict[str, Artifact]) -> tuple[list[tuple[Any, int, int]], Any]:
    """A few forgotten images as (image from 0 to 1, class, perturbing label), and the unit of the noises in images."""
    split = context.inputs.data.train
    scale = split.std.numpy()
    if "labels" not in found or not found.get("noise", Artifact({})).tensors:
        return [], scale
    chosen = found["labels"].tensors["perturbing"]
    index = context.inputs.request.forget
    # One for each perturbing label first: variety tells more than order.
    first = [int((chosen == k).nonzero()[0, 0]) for k in chosen.unique()]
    places = list(dict.fromkeys([*first, *range(len(index))]))[:_EXAMPLES]
    pixels = next(iter(split.images.batches([index[places]]))).expand(-1, len(scale), -1, -1).numpy() / 255
    return [(pixels[i], int(split.labels[index[place]]), int(chosen[place])) for i, place in enumerate(places)], scale


def _environment() -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("megu_cli.report", "."),
        autoescape=jinja2.select_autoescape(["html.j2"]),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=_visible,
    )
    environment.filters["coded"] = _coded
    return environment


def _coded(text: str) -> Any:
    """Text as HTML, with what stands in backticks as code."""
    import markupsafe

    return markupsafe.Markup(re.sub(r"`([^`]*)`", r"<code>\1</code>", str(markupsafe.escape(printable(text)))))


def _visible(value: Any) -> Any:
    return printable(value) if type(value) is str else value  # Markup is ours


def _html(report: Report) -> str:
    from megu_cli.report.drawing import Look, drawn

    def picture(draw: Callable[[Look], Any]) -> dict[str, Any]:
        looks = {"narrow_dark": Look(True, True), "narrow": Look(False, True), "dark": Look(True), "light": Look()}
        return {name: drawn(draw, look) for name, look in looks.items()}

    template = _environment().get_template("template.html.j2")
    marker = SHOWS_FORGOTTEN if report.shows_forgotten else ""
    return str(template.render(report=report, picture=picture, marker=marker))


def _markdown(report: Report, template: str = "template.md.j2", **more: Any) -> str:
    def cell(text: str) -> str:
        return " · ".join(line for line in text.splitlines() if line)

    environment = _environment()
    environment.filters["cell"] = cell
    environment.filters["md"] = markdown
    return str(environment.get_template(template).render(report=report, **more))


def _json(report: Report) -> str:
    document = asdict(report)
    for section in document["sections"]:
        section["figures"] = [figure["alt"] for figure in section["figures"]]
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


_RENDER: dict[str, Callable[[Report], str]] = {"html": _html, "md": _markdown, "json": _json}
