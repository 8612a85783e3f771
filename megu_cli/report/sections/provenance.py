"""What the result was made from: digests and settings."""

from __future__ import annotations

from megu_cli.pipeline.freshness import flat
from megu_cli.report.parts import Section, Table, View
from megu_cli.report.words import DIGESTED


def digests(view: View) -> Section:
    """Digests of all inputs and outputs; those of purged files are known from what was made of them."""
    meta = view.sources.evaluation.meta
    known: dict[str, str] = {}
    for recorded in (*meta["lineage"].values(), meta):
        known |= recorded["inputs"]
    known["eval"] = view.sources.evaluation.content
    made = [name for name in known if name in meta["lineage"] or name == "eval"]
    ordered = [name for name in dict.fromkeys((*DIGESTED, *known)) if name in known]
    given = [[DIGESTED.get(name, name), known[name]] for name in ordered if name not in made]
    outputs = [[DIGESTED.get(name, name), known[name]] for name in ordered if name in made]
    finetune = view.sources.artifacts.get("finetune")
    for file, digest in (finetune.meta["weights"] if finetune else {}).items():
        outputs.append([f"the unlearned model ({file}), its tensors", digest])
    files = [[file, f"{size:,}", digest] for file, size, digest in view.sources.files]
    lead = (
        "Fingerprints of everything that went in and came out. Whoever has the files can check that this report is "
        "about them: sha256sum model.safetensors must give the line below."
    )
    detail = (
        "sha256. Inputs and artifacts are digested by content (names, labels, pixels; tensors), which does not depend "
        "on how a file is laid out; the last table digests the files byte by byte."
    )
    tables = [
        Table(["input", "digest of its content"], given),
        Table(["output", "digest of its content"], outputs),
        Table(["file", "bytes", "sha256 of the file"], files),
    ]
    return Section("digests", "Digests", lead, detail, tables=tables)


def settings(view: View) -> Section:
    """All settings that the result depends on."""
    meta = view.sources.evaluation.meta
    rows = []
    for stage, recorded in {**meta["lineage"], "eval": meta}.items():
        for key, value in flat(recorded["settings"]).items():
            rows.append([stage, key, str(value)])
    lead = "The settings that this result was made with, stage by stage."
    return Section(
        "settings", "Settings", lead, tables=[Table(["stage", "setting", "value"], rows, folded="All settings")]
    )
