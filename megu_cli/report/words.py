"""What the figures are called, and what they mean in plain words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

MODELS = {
    "original": "original",
    "mask": "masked",
    "unlearned": "unlearned",
    "oracle": "retrained",
}


@dataclass(frozen=True)
class Metric:
    """A metric in words.

    Attributes:
        label: Short name.
        plain: What it tells.
        percent: Shown in percent, rather than as a number.
    """

    label: str
    plain: str
    percent: bool = True


METRICS = {
    "forget_train_acc": Metric("Forgotten images recognised", "How often it still names the forgotten images right."),
    "forget_test_acc": Metric(
        "New images of the forgotten classes recognised", "The same on images that no model has ever seen."
    ),
    "already_train_acc": Metric(
        "Images forgotten before recognised", "What earlier requests made it forget, and should stay so."
    ),
    "retain_train_acc": Metric("Kept training images recognised", "What it should still know, and was trained on."),
    "retain_test_acc": Metric("Kept classes, new images recognised", "What it should still know, on unseen images."),
    "mia_entropy_lr": Metric(
        "Attack by certainty: taken for training images",
        "An attacker looks at how certain the model is, and says which forgotten images it was trained on.",
    ),
    "mia_confidence_svc": Metric(
        "Attack by confidence: taken for strangers",
        "Another attacker looks at the true class's probability; this is the share it thinks were not trained on.",
    ),
    "mia_entropy_lr_ssd": Metric(
        "Attack by certainty, against all test images",
        "The same attack as some published tables have it; only for comparison with them.",
    ),
    "mia_loss_auc": Metric("Attack by loss", "How well an attacker tells forgotten from unseen images; 50% is chance."),
    "mia_loss_tpr_at_1fpr": Metric(
        "Attack by loss, when hardly ever wrong",
        "Forgotten images found while at most 1% of unseen ones are accused; 1% is chance.",
    ),
    "zrf": Metric("Likeness to an untrained model", "How much its answers on forgotten images look like guessing."),
    "relearn_epochs": Metric("Passes to learn it again", "Few mean that much of it was still there.", percent=False),
    "probe_acc": Metric(
        "Forgotten classes found in the inner features",
        "A small classifier on the model's inner features: what is hidden rather than gone.",
    ),
    "js_divergence": Metric(
        "Distance of its answers to retrained (JS, nats)",
        "0 would be the same answers on the forgotten images, 0.69 entirely other ones.",
        percent=False,
    ),
    "activation_distance": Metric(
        "Distance of its answers to retrained (L2)",
        "0 would be the same answers, 1.41 entirely other ones.",
        percent=False,
    ),
    "agreement": Metric("Same answer as retrained", "How often both name the same class on forgotten images."),
    "label_agreement": Metric(
        "Well-chosen new labels", "How often an image was led to the class that the retrained model sees in it."
    ),
    "avg_gap": Metric("Average gap to retrained", "Mean difference of three accuracies and the attack by certainty."),
    "tow": Metric("Tug of war", "Forgetting and keeping in one number; 100% is retrained."),
}


def metric(name: str) -> Metric:
    """A metric in words; one that has none here goes by its own name."""
    return METRICS.get(name, Metric(name, "See docs/metrics.md.", percent=False))


def shown(name: str, value: Any) -> str:
    """A metric's value as text."""
    if value is None:
        return "–"
    return percent(value) if metric(name).percent else f"{value:.3f}"


def percent(value: float | None) -> str:
    """A fraction in percent, with one decimal."""
    return "–" if value is None else f"{100 * value:.1f}%"


def listed(names: list[str], most: int = 5) -> str:
    """Names in a sentence."""
    names = names if len(names) <= most else [*names[:most], f"{len(names) - most} more"]
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def counted(number: int, what: str) -> str:
    """A number of things."""
    return f"{number:,} {what}" + ("" if number == 1 else "es" if what.endswith("s") else "s")


LIMITS = [
    (
        "Empirical evidence, no formal guarantee",
        "Every figure here was measured on this data and with these attacks. None of them proves that the data are "
        "gone: a stronger attack may find what these did not.",
    ),
    (
        "One model",
        "Only model.safetensors has forgotten. The original checkpoint, its backups, the images themselves, logs, and "
        "whatever was made from them elsewhere are as they were.",
    ),
    (
        "One run",
        "The figures are those of one seed. Another seed gives slightly different ones; differences to the retrained "
        "model that are smaller than those between two retrained models mean nothing.",
    ),
    (
        "Knowledge that others share",
        "What the retained images teach about the forgotten ones stays, as it would after retraining: the measure is "
        "the retrained model, not zero.",
    ),
    (
        "Digests identify, they do not hide",
        "The digest of a very short list of images can be found by trying lists out. Treat it as you treat the list.",
    ),
]

DIGESTED = {
    "train_data": "the training images and labels",
    "test_data": "the test images and labels",
    "forget": "the forget request, as a list of images",
    "concepts": "the classes that were rated",
    "ratings": "the recorded similarity ratings",
    "checkpoint": "the original model, as it was given",
    "train": "the original model",
    "oracle": "the retrained model",
    "similarity": "similarity ratings",
    "transition": "transition matrix",
    "labels": "perturbing labels",
    "noise": "noise pair",
    "finetune": "record of the finetuning",
    "eval": "evaluation",
}
