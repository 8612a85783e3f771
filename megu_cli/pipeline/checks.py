"""What is checked and said before anything is computed."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megu_cli.models.preflight import Finding
    from megu_cli.pipeline.context import RunContext
    from megu_cli.pipeline.run_inputs import RunInputs


def passes(context: RunContext) -> bool:
    """Return True once data, request and model are resolved and fit together; raise what is at fault."""
    from megu_cli.models.sources import check_name, try_out

    check_name(context.config.model.name)
    context.runtime.start()
    _ = context.inputs.request
    if not context.config.retrains:
        _ = context.inputs.questions
    pixels = context.inputs.data.train.images[0]
    try_out(context.build(), (context.inputs.data.channels, *pixels.shape[1:]), len(context.inputs.data.classes))
    return True


def notes(inputs: RunInputs) -> list[str]:
    """What the user should know of the request before it runs."""
    from megu_cli.config import PRESETS
    from megu_cli.request import resolve

    lines = resolve.notes(inputs.data, inputs.request, inputs.config.forget.duplicates)
    if preset := inputs.config.preset:
        question, alone = inputs.config.mllm.question, inputs.config.noise.input
        asked = f"mllm.question: {question}, " if inputs.config.takes_ratings else ""
        lines.append(f"preset: {preset}, version {PRESETS[preset].version} ({asked}noise.input: {alone})")
    if inputs.config.retrains:
        lines.append(
            "method: retrain: the model is trained from scratch on the retained images alone, and no label is made; "
            "--set method=megu unlearns instead"
        )
    elif not inputs.config.knows_near:
        lines.append(
            "no ratings (mllm.backend: none): every class counts as near as any other, and labels come from the "
            "proxy and the model's own prediction"
        )
    if number := len(inputs.without_images):
        lines.append(
            f"{number:,} of {len(inputs.data.classes):,} outputs have no images: unlearning costs them accuracy that "
            "no figure shows, most where they resemble what is forgotten; add images of those classes where you can"
        )
    if inputs.data.test_made and inputs.user_model.foreign:
        lines.append(
            "the test split was made here (data.test_fraction): if the checkpoint was trained on its images too, "
            "figures on test images flatter, and membership attacks see no difference"
        )
    if inputs.data.borrowed:
        lines.append(
            f"{inputs.data.borrowed} of {inputs.data.borrowed + len(inputs.data.test)} test images are held out for "
            "validation (data.validation_from: test) and are in no figure of test images"
        )
    return lines


def preflight(context: RunContext) -> Finding:
    """See whether the original model classifies the data, and if not, why."""
    from megu_cli.models import preflight

    config = context.config
    source = config.data.source
    context.runtime.start()
    return preflight.examine(
        context.original(),
        context.inputs.data.train,
        context.inputs.data.classes,
        expected=config.model.expected_accuracy,
        own=None if source.users else source.normalisation,
        root=context.inputs.data.root if source.users else None,
        prepared=context.inputs.user_model.preprocessing,
        advised=context.inputs.user_model.advised,
        device=context.runtime.device,
        track=context.runtime.track,
    )
