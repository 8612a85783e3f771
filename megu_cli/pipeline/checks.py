"""What is checked and said before anything is computed."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megu_cli.models.preflight import Finding
    from megu_cli.pipeline.workspace import Workspace


def passes(work: Workspace) -> bool:
    """Return True once data, request and model are resolved and fit together; raise what is at fault."""
    from megu_cli.models.sources import check_name, try_out

    check_name(work.config.model.name)
    _ = work.device, work.request, work.questions
    pixels = work.data.train.images[0]
    try_out(work.build(), (work.data.channels, *pixels.shape[1:]), len(work.data.classes))
    return True


def notes(work: Workspace) -> list[str]:
    """What the user should know of the request before it runs."""
    from megu_cli.request import resolve

    lines = resolve.notes(work.data, work.request, work.config.forget.duplicates)
    if work.config.mllm.backend == "none":
        lines.append(
            "no ratings (mllm.backend: none): every class counts as near as any other, and labels come from the "
            "proxy and the model's own prediction"
        )
    if work.data.test_made and work.own.foreign:
        lines.append(
            "the test split was made here (data.test_fraction): if the checkpoint was trained on its images too, "
            "figures on test images flatter, and membership attacks see no difference"
        )
    if work.data.borrowed:
        lines.append(
            f"{work.data.borrowed} of {work.data.borrowed + len(work.data.test)} test images are held out for "
            "validation (data.validation_from: test) and are in no figure of test images"
        )
    return lines


def preflight(work: Workspace) -> Finding:
    """See whether the original model classifies the data, and if not, why."""
    from megu_cli.data import NORMALISATION, SMALL
    from megu_cli.models import preflight

    config = work.config
    small = config.data.name in SMALL
    return preflight.examine(
        work.original(),
        work.data.train,
        work.data.classes,
        expected=config.model.expected_accuracy,
        own=NORMALISATION[config.data.name] if small else None,
        root=None if small else work.data.root,
        prepared=work.own.preprocessing,
        advised=work.own.advised,
        device=work.device,
        track=work.track,
    )
