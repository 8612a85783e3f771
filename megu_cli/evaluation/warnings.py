"""What the reader of an evaluation must be told before any figure: the yardstick is bad, or the run went wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# A model may lie this much below the original on retained test images: less is what two trainings differ by.
_BELOW = 0.05
# A rise of the accuracy on the forget set from which on it is told.
_RISE = 0.01


def warnings(evaluation: Mapping[str, Any]) -> list[str]:
    """Sentences about the figures in the body of eval.json; empty if nothing is wrong.

    Args:
        evaluation: Model -> its figures.
    """
    return [line for line in (_weak_oracle(evaluation), _damaged(evaluation), _rising(evaluation)) if line]


def _weak_oracle(evaluation: Mapping[str, Any]) -> str:
    by = evaluation.get("retrained_by")
    names = ("original", "unlearned" if by else "oracle")
    original, oracle = (evaluation.get(name, {}).get("retain_test_acc") for name in names)
    if original is None or oracle is None or original - oracle <= _BELOW:
        return ""
    called = "retrained model" if by else "oracle"
    beside = "" if by else "What is measured beside it also shows this difference in training. "
    advice = (
        "See that eval.oracle names the right file, and that it was trained as the original was"
        if by == "user"
        else "Train it as the original was trained (train.optimizer, train.lr, train.epochs, train.augment), or name "
        "your own retrained model in eval.oracle"
    )
    return (
        f"the {called} is well below the original: it classifies {100 * oracle:.1f}% of the retained test images "
        f"right, the original {100 * original:.1f}%. {beside}{advice}"
    )


def _damaged(evaluation: Mapping[str, Any]) -> str:
    before, after = _before_and_after(evaluation, "retain_test_acc")
    if before is None or after is None or before - after <= _BELOW:
        return ""
    return (
        f"the unlearned model is damaged: it classifies {100 * after:.1f}% of the retained test images right, the "
        f"original {100 * before:.1f}%. Set finetune.lr to a rate below the one in finetune.json"
    )


def _rising(evaluation: Mapping[str, Any]) -> str:
    before, after = _before_and_after(evaluation, "forget_train_acc")
    if before is None or after is None or after - before <= _RISE:
        return ""
    return (
        f"the accuracy on the forget set rose from {100 * before:.1f}% to {100 * after:.1f}%: the model knows the "
        "forgotten images better than before. Check that the checkpoint classifies these data (`megu check`), or lower "
        "finetune.lr"
    )


def _before_and_after(evaluation: Mapping[str, Any], figure: str) -> tuple[float | None, float | None]:
    """A figure of the original and of the unlearned model; of none where the model was retrained."""
    if "retrained_by" in evaluation:
        return None, None
    before, after = (evaluation.get(name, {}).get(figure) for name in ("original", "unlearned"))
    return before, after
