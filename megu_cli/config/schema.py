"""The settings of the method, of training, evaluation, comparison and record, and the whole config."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, create_model, model_validator

from megu_cli.config.base import Count, Fraction, NonNegative, Positive, Section
from megu_cli.config.presets import PRESETS, PresetName
from megu_cli.config.raters import ASKING, TRUE_FALSE
from megu_cli.config.sources import (
    DataConfig,
    ForgetConfig,
    MLLMConfig,
    ModelConfig,
)

_From = Literal["ratings", "confusions", "embeddings"]
if TYPE_CHECKING:
    _WithFrom = Section
else:
    # `from` is a keyword of Python: the one setting that a class body cannot declare.
    _WithFrom = create_model(
        "_WithFrom",
        __base__=Section,
        **{
            "from": (
                _From,
                Field(
                    "ratings",
                    description="ratings (see mllm) | confusions (the original model's predictions on images of the "
                    "class) | embeddings (cosine of the classes' mean features in the original model); no rater is "
                    "asked for the last two",
                ),
            )
        },
    )


class TransitionConfig(_WithFrom):
    """The transition matrix: which class resembles which."""

    added: ClassVar = ("from", "images")
    temperature: Positive = Field(3.0, description="ratings, embeddings: softmax temperature over ratings from 0 to 10")
    images: Count = Field(
        64,
        description="confusions, embeddings: images of each class that are looked at, at most; held-out ones first",
    )

    @property
    def source(self) -> _From:
        """The setting ``from``."""
        found: _From = getattr(self, "from")
        return found


class ProxyConfig(Section):
    """The proxy: small networks trained on thumbnails of retained images, never on a forgotten one."""

    images: Count = Field(6000, description="retained images that it is trained on, at most")
    networks: Count = Field(2, description="networks whose answers are averaged; one takes half the time")
    width: Count = Field(16, description="channels after the first of three convolutions")
    passes: Literal["auto"] | Count = Field(
        "auto", description="passes over its images; auto: as make 60,000 samples, from 10 to 40"
    )
    ratings: Literal["auto"] | NonNegative = Field(
        "auto",
        description="wholly forgotten classes: exponent of the transition matrix beside the proxy's answer; auto: from "
        "0 to 2, the more the less accurate the proxy is on held-out images (few retained images)",
    )
    prediction: NonNegative = Field(
        0.4, description="wholly forgotten classes: exponent of the original model's own prediction beside it"
    )


class LabelsConfig(Section):
    """The perturbing labels."""

    source: Literal["auto", "proxy", "transition+prediction", "transition", "prediction", "random"] = Field(
        "auto",
        description="auto (proxy; transition+prediction where the proxy is poor, or mode or keep is set) | proxy | "
        "transition+prediction | transition | prediction | random",
    )
    proxy: ProxyConfig = Field(default_factory=ProxyConfig)  # type: ignore[arg-type]
    mode: Literal["auto", "hard", "sample", "soft", "matched"] = Field(
        "auto",
        description="labels made without the proxy: auto (hard for wholly forgotten classes, else matched) | hard | "
        "sample | soft | matched; the proxy's are distributions",
    )
    alpha: NonNegative = Field(
        0.75, description="transition+prediction: exponent of the model's own prediction in T[y,k] * p(k|x)^alpha"
    )
    keep: Literal["auto"] | Fraction = Field(
        "auto",
        description="soft, sample: mass that stays on the true label; matched: share of the images that keep it; "
        "auto: what the model gives it on held-out images of the same class",
    )


class NoiseConfig(Section):
    """The positive-negative feature noise pair."""

    added: ClassVar = ("input",)
    use: Literal["auto", "both", "positive", "negative", "none"] = Field(
        "auto",
        description="auto (none; negative for hard labels of wholly forgotten classes) | both | positive | negative | "
        "none",
    )
    negative: Literal["away", "carry"] = Field(
        "carry",
        description="away: moves forgotten images off their class | carry: learned on retained images, to make them "
        "look like it",
    )
    input: Literal["added", "alone"] = Field(
        "added",
        description="what the model sees while a noise is trained: added (images with the noise) | alone (the "
        "noise, as in the paper); the finetuning adds it to images in any case",
    )
    strength: Literal["uniform", "full"] = Field(
        "uniform", description="uniform: strength drawn from U(0,1) per sample | full: always 1"
    )
    batch: Count = Field(8, description="noises per perturbing label and per forgotten class")
    steps: Count = Field(60, description="optimiser steps of the pair")
    lr: Positive = Field(0.1, description="Adam learning rate, in normalised pixel units")
    penalty: NonNegative = Field(0.1, description="lambda: weight of the mean squared noise")


class FinetuneConfig(Section):
    """Fragment-Align: the short finetuning."""

    added: ClassVar = ("accumulate", "distillation")
    epochs: Count = Field(1, description="passes; each draws the noises anew")
    retain_fraction: Literal["auto"] | Positive = Field(
        "auto",
        description="retained samples per epoch, as a share of all; auto: 12,000 images, but at most 3.75 passes, a "
        "quarter of what retraining takes by default; of fewer than 1,100 images 4,000, in at most 20 passes",
    )
    max_steps: Count | None = Field(
        None, description="optimiser steps at most, where epochs would take more; the schedule fits; null: no limit"
    )
    batch: Count = Field(128, description="retained samples per step")
    forget_batch: Literal["auto"] | Count = Field(
        "auto", description="forgotten samples per step; auto: as make three passes over them, from 8 to 64"
    )
    accumulate: Count = Field(
        1,
        description="slices of a step, whose gradients are summed: a step takes less memory (noise as well), and the "
        "result is the same but for rounding, batch norm and dropout; raise it where memory is short",
    )
    weight: Literal["auto"] | Positive = Field(
        "auto",
        description="weight of the loss on forgotten samples; auto: 0.1 for hard labels, else 0.2, "
        "but for single images by a proxy sqrt(forget_batch) / 15",
    )
    adversary: NonNegative = Field(
        0.2,
        description="wholly forgotten classes: weight of the loss on how surely a linear discriminant finds "
        "clean samples in the features; it acts while it finds more than one on thumbnails of the images",
    )
    calibrate: bool = Field(
        True,
        description="wholly forgotten classes, labels from the proxy: after the last epoch, set the classes' rows of a "
        "linear classifier, in closed form, to give the proxy's log-odds; finetuning alone lowers them too far",
    )
    distillation: NonNegative = Field(
        1.0,
        description="outputs without images: weight of the divergence from the original model's answers on retained "
        "images, which keeps these outputs where they were; 0: they drift",
    )
    clean: Fraction = Field(0.2, description="share of forgotten samples left without noise, where there is noise")
    reassign: bool = Field(
        True,
        description="hard labels follow the current model: argmax of log p(k|x) + beta * log T[y,k]; "
        "not where labels.source leaves the prediction out",
    )
    beta: NonNegative = Field(0.3, description="weight of the transition matrix when labels are reassigned")
    lr: Literal["auto"] | Positive = Field(
        "auto",
        description="SGD learning rate at the start; it falls to 0 as a cosine; auto: 0.02, and a quarter of it (twice "
        "at most) where the accuracy on held-out retained images has fallen by more than 5 points",
    )
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="SGD momentum")
    weight_decay: NonNegative = Field(5e-4, description="SGD weight decay")
    patience: Count = Field(2, description="stop after so many epochs without a gain in validation accuracy")

    def keyed(self) -> dict[str, Any]:
        """All settings as they enter a key; without distillation, as before there was one."""
        return {key: value for key, value in super().keyed().items() if key != "distillation" or value}


class TrainConfig(Section):
    """How `megu train` trains the original model and the oracle."""

    added: ClassVar = ("optimizer", "accumulate")
    epochs: Count = Field(15, description="passes over the training images")
    batch: Count = Field(128, description="samples per step")
    accumulate: Count = Field(
        1,
        description="slices of a batch, whose gradients are summed: a step takes less memory, and the result is the "
        "same but for rounding, batch norm and dropout; raise it where memory is short",
    )
    optimizer: Literal["sgd", "adamw"] = Field(
        "sgd", description="sgd | adamw (transformers): as the original was trained, so that the oracle is as good"
    )
    lr: Literal["auto"] | Positive = Field(
        "auto", description="peak learning rate of the one-cycle schedule; auto: 0.1 for sgd, 0.001 for adamw"
    )
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="sgd: momentum (Nesterov)")
    weight_decay: NonNegative = Field(5e-4, description="weight decay; adamw: decoupled, often 0.01 to 0.1")
    augment: Literal["none", "flip", "crop+flip"] = Field("none", description="none | flip | crop+flip")

    @property
    def peak_lr(self) -> float:
        """The peak learning rate, resolved."""
        return {"sgd": 0.1, "adamw": 0.001}[self.optimizer] if self.lr == "auto" else self.lr

    def keyed(self) -> dict[str, Any]:
        """All settings as they enter a key: with the learning rate that ``auto`` stands for."""
        return {**super().keyed(), "lr": self.peak_lr}


class EvalConfig(Section):
    """How the result is judged."""

    oracle: bool | Path = Field(
        False,
        description="true: `megu run` also retrains from scratch without the forget set (slow; the judge of all) | a "
        "checkpoint of your own that was retrained so; it is read like model.checkpoint",
    )
    require: list[str] = Field(
        default_factory=list,
        description="requirements such as forget_test_acc<=0.02 or verdict=forgotten; one unmet: exit code 3",
    )
    attack_samples: Count = Field(
        5000, description="members and as many non-members that train the support vector attack, at most"
    )
    probe_samples: Count = Field(10000, description="training images that train the linear probe, at most")
    relearn_epochs: Annotated[int, Field(ge=0)] = Field(
        0, description="measure in how many epochs the forget set is relearned, up to so many; 0: do not"
    )
    batch: Literal["auto"] | Count = Field(
        "auto",
        description="samples per forward pass, wherever nothing is learned; auto: 250 on a CPU, 1,000 on a GPU, fewer "
        "of images larger than 64 x 64 pixels",
    )

    @property
    def own_oracle(self) -> Path | None:
        """The checkpoint that is named as the oracle; ``None``: megu trains it, or there is none."""
        return self.oracle if isinstance(self.oracle, Path) else None


class CompareConfig(Section):
    """What `megu compare` sets beside each other."""

    methods: list[str] | None = Field(None, description="names of methods; null: all there are")
    seeds: Annotated[int, Field(ge=1, le=1000)] = Field(
        3, description="seeds, counted up from `seed`, at most 1,000; the noise floor needs three"
    )
    settings: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="method -> its own settings, e.g. {ssd: {alpha: 5}}; see docs/methods.md"
    )
    variants: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="name -> settings of megu by dotted key, e.g. {with-noise: {noise.use: both}}: a row of its own; "
        "with `method: NAME` a variant of another method",
    )
    tune_limit: Count | None = Field(
        None,
        description="--tune: choose settings on only this many training images, with an original of their own; null: "
        "on all that data.limit leaves",
    )
    tune_seed: Annotated[int, Field(ge=0, lt=2**32)] | None = Field(
        None,
        description="--tune: seed of the original and, where it is random, of the request that settings are chosen "
        "on; one beside those compared, so that the choice says nothing of their figures; null: the first of them",
    )


class RecordConfig(Section):
    """What a run remembers of the images that it forgot (see docs/records.md)."""

    fingerprints: Literal["none", "bytes", "lookalikes"] = Field(
        "bytes",
        description="forgotten.json, for `megu record` and `megu check-data`: bytes (the start of each image's sha256; "
        "finds exact copies) | lookalikes (also a perceptual hash, which finds resized and re-encoded copies and "
        "shows a coarse outline of the image) | none",
    )


class TrackingConfig(Section):
    """Where settings and figures are also reported to (see docs/ci.md)."""

    tracker: Literal["none", "mlflow", "tensorboard", "trackio", "wandb"] = Field(
        "none",
        description="none | mlflow | tensorboard | trackio | wandb: needs the extra accelerate and the tracker's own "
        "package; no path and no name of an image, class or person is reported",
    )
    project: Annotated[str, Field(min_length=1)] = Field("megu", description="project or experiment there")


class Config(Section):
    """A whole megu.yaml."""

    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(0, description="seed of everything random")
    device: Literal["auto", "cpu", "cuda", "mps"] = Field("auto", description="auto | cpu | cuda | mps")
    out: Path = Field(Path("megu-run"), description="the run directory")
    checkpoint_seconds: NonNegative = Field(
        30.0,
        description="seconds of work between two checkpoints of train and finetune, from which a run that was killed "
        "goes on; more where saving would take over 5% of the time",
    )
    method: Literal["auto", "megu", "retrain"] = Field(
        "auto",
        description="megu: unlearn by a short finetuning | retrain: train from scratch on the retained images alone, "
        "which is exact; `train` has the recipe | auto: as the model in the run directory was made, else megu",
    )
    preset: PresetName | None = Field(
        None,
        description=" | ".join(f"{name}, version {preset.version}: {preset.text}" for name, preset in PRESETS.items())
        + " (see docs/decisions.md)",
    )
    data: DataConfig
    model: ModelConfig
    forget: ForgetConfig
    mllm: MLLMConfig = Field(default_factory=MLLMConfig)  # type: ignore[arg-type]
    transition: TransitionConfig = Field(default_factory=TransitionConfig)  # type: ignore[arg-type]
    labels: LabelsConfig = Field(default_factory=LabelsConfig)  # type: ignore[arg-type]
    noise: NoiseConfig = Field(default_factory=NoiseConfig)  # type: ignore[arg-type]
    finetune: FinetuneConfig = Field(default_factory=FinetuneConfig)  # type: ignore[arg-type]
    train: TrainConfig = Field(default_factory=TrainConfig)  # type: ignore[arg-type]
    eval: EvalConfig = Field(default_factory=EvalConfig)  # type: ignore[arg-type]
    compare: CompareConfig = Field(default_factory=CompareConfig)  # type: ignore[arg-type]
    record: RecordConfig = Field(default_factory=RecordConfig)  # type: ignore[arg-type]
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)  # type: ignore[arg-type]

    @property
    def retrains(self) -> bool:
        """True if the result is a network retrained from scratch, and not an unlearned one."""
        return self.method == "retrain"

    @property
    def takes_ratings(self) -> bool:
        """True if the transition matrix comes from a rater, be it from none; else from the original model."""
        return self.transition.source == "ratings"

    @property
    def knows_near(self) -> bool:
        """True if the transition matrix tells near classes from far ones."""
        return not self.takes_ratings or self.mllm.rater.rates

    @model_validator(mode="after")
    def _held_out(self) -> Config:
        looks = self.labels.mode != "hard" and self.labels.keep == "auto" and self.forget.classes is None
        if looks and self.data.validation == 0 and not self.retrains:
            raise ValueError("labels of images whose class stays need held-out images: raise data.validation")
        return self

    @model_validator(mode="after")
    def _resolved(self) -> Config:
        # Once and for all: a config derived from this one that names a checkpoint of megu's has the same data.
        if self.data.validation_from == "auto":
            resolved = {"validation_from": "test" if self.model.trained else "train"}
            # The only way to a section of a frozen model while it is validated.
            object.__setattr__(self, "data", self.data.model_copy(update=resolved))
        if self.mllm.backend == "auto":
            rated = self.mllm.ratings is not None or self.data.source.rated
            found = self.mllm.model_copy(update={"backend": "recorded" if rated else "none"})
            object.__setattr__(self, "mllm", found)
        if self.mllm.question == "auto":
            question = "true_false" if "true_false" in self.mllm.rater.questions else "rating"
            object.__setattr__(self, "mllm", self.mllm.model_copy(update={"question": question}))
        return self

    @model_validator(mode="after")
    def _asked(self) -> Config:
        given = self.mllm
        if self.takes_ratings and not self.retrains and given.question not in given.rater.questions:
            raise ValueError(
                f"mllm.question: {given.question} cannot be put to mllm.backend: {given.backend} "
                f"({given.rater.text}). Set mllm.backend to {TRUE_FALSE}, or leave mllm.question out"
            )
        return self

    @model_validator(mode="after")
    def _rated(self) -> Config:
        rated = self.labels.source in ("transition", "transition+prediction") and not self.retrains
        if rated and not self.knows_near:
            taker = f"preset: {self.preset}" if self.preset else f"labels.source: {self.labels.source}"
            why = f"{taker} takes labels from ratings"
            raise ValueError(
                f"{why}, and there are none (mllm.backend: none). Let a model rate (mllm.backend: {ASKING}), "
                "fill in the file that `megu similarity --template FILE` writes and name it in mllm.ratings, or do "
                "without ratings: transition.from: confusions"
            )
        return self


def get(config: Section, key: str) -> Any:
    """Value of a dotted key as plain JSON data; a section gives all its settings."""
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    if isinstance(value, Section):
        return value.keyed()
    return str(value) if isinstance(value, Path) else value
