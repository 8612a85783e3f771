"""The settings: every one is declared here once, with its type, default and meaning."""

from __future__ import annotations

import errno
import os
import re
import typing
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from megu_cli.errors import ConfigError, brief

# Data sets whose ratings come with megu.
SHIPPED_RATINGS = ("digits", "fashion_mnist")
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
# Of names alone, YAML's 7 is the name 7. Where it may be an index as well, neither true nor 3.0 is one.
_Name = Annotated[str, BeforeValidator(lambda given: str(given) if type(given) is int else given)]
_NameOrIndex = Annotated[str, Field(strict=True)] | Annotated[int, Field(strict=True)]
# What holds, or lists, the weights in a directory of transformers.
_HF_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


class Section(BaseModel):
    """A section of the config: unknown keys are refused, and it is never changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DataConfig(Section):
    """The images."""

    name: Literal[
        "digits", "fashion_mnist", "cifar10", "cifar20", "cifar100", "imagefolder", "manifest", "hf_dataset"
    ] = Field(
        description="digits | fashion_mnist | cifar10 | cifar20 | cifar100, or data of your own (see docs/data.md): "
        "imagefolder | manifest | hf_dataset"
    )
    root: Path | None = Field(
        None,
        description="folder of the images (imagefolder: holds train/ and test/, or the folders of the classes; "
        "hf_dataset: what save_to_disk wrote) or of the downloaded files",
    )
    manifest: Path | None = Field(
        None, description="manifest: CSV with the columns path,label and, where you like, split and subject"
    )
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.2, description="your own data without a test split: share of the images that become one (by hash)"
    )
    follow_links: bool = Field(False, description="your own data: links may lead out of data.root")
    superclasses: dict[_Name, list[_Name]] | None = Field(
        None, description="superclass -> its classes: turns any data set into a coarse-labelled one"
    )
    validation: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.05, description="share of the training images held out (by hash of their identity) for validation"
    )
    validation_from: Literal["auto", "train", "test"] = Field(
        "auto",
        description="auto | train | test: where the images held out come from; those of the test split leave it. auto: "
        "test for trained weights of your own, which may know all training images by heart; else train",
    )
    limit: Count | None = Field(
        None, description="use only this many training images (chosen by hash of their identity); null: all"
    )
    image_size: Count | None = Field(
        None,
        description="resize to this many pixels a side (your own data: needed); null: as the data set has it",
    )
    memory_limit: Positive = Field(
        2.0, description="GiB of decoded images to keep in memory; a larger split streams from disk"
    )
    workers: Annotated[int, Field(ge=0)] = Field(0, description="processes that decode images; 0: none but this one")

    @model_validator(mode="after")
    def _fits(self) -> DataConfig:
        if (self.name == "manifest") != (self.manifest is not None):
            raise ValueError("data.manifest goes with name: manifest, and neither without the other")
        return self


class ModelConfig(Section):
    """The classifier."""

    name: str = Field(
        description="small_cnn | small_resnet | resnet18 (the field's CIFAR variant) | hf:DIRECTORY_OR_ID | "
        "torchvision:NAME | timm:NAME | python:MODULE:FACTORY"
    )
    checkpoint: Path | None = Field(
        None,
        description="trained weights (.safetensors, or a .pth/.pt of tensors and plain data, bare or wrapped); null: "
        "those in the hf: directory, else original.safetensors in the run directory, which `megu train` writes",
    )
    key: str | None = Field(
        None,
        description="where the weights stand in the checkpoint, such as state_dict or model_ema; null: found by "
        "names and shapes, an average last",
    )
    classes: Annotated[list[_Name], Field(min_length=2)] | Path | None = Field(
        None,
        description="the data's classes in the order of the model's outputs (a list, or a file: a name a line, or "
        "JSON), of your own data also those without images; null: by id2label of a hf: directory, else as in the data",
    )
    mean: Annotated[list[float], Field(min_length=1)] | None = Field(
        None,
        description="normalisation: mean of each channel of pixels from 0 to 1; null: the model's, else the data's",
    )
    std: Annotated[list[Positive], Field(min_length=1)] | None = Field(
        None, description="normalisation: standard deviation of each channel; null: as for mean"
    )
    trust_remote_code: bool = Field(False, description="hf: run code that comes with the model")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of training steps: auto (bfloat16 autocast on a GPU that has it) | float32 | bfloat16"
    )
    preflight: bool = Field(
        True, description="before anything is computed, see that a checkpoint of your own classifies the data"
    )
    expected_accuracy: Fraction | None = Field(
        None, description="preflight: accuracy on training images to expect of the checkpoint, such as 0.95"
    )

    @property
    def trained(self) -> bool:
        """Whether the weights are the user's: named, or in the hf: directory; a hub id always comes with some."""
        source, _, folder = self.name.partition(":")
        own = source == "hf" and (not is_path(folder) or has_weights(Path(folder)))
        return own or self.checkpoint is not None

    @model_validator(mode="after")
    def _pair(self) -> ModelConfig:
        if (self.mean is None) != (self.std is None):
            raise ValueError("give both mean and std, or neither")
        return self


class RandomForget(Section):
    """A random share of the training images."""

    fraction: Annotated[float, Field(gt=0, lt=1)] | None = Field(None, description="share of the training images")
    count: Count | None = Field(None, description="number of training images")

    @model_validator(mode="after")
    def _one(self) -> RandomForget:
        if (self.fraction is None) == (self.count is None):
            raise ValueError("give exactly one of fraction, count")
        return self


class ForgetConfig(Section):
    """What to forget: exactly one of classes, subclasses, samples, subjects, random."""

    classes: list[_NameOrIndex] | None = Field(None, description="class names (or indices): forget whole classes")
    subclasses: list[_Name] | None = Field(None, description="members of data.superclasses: forget sub-classes")
    samples: Path | None = Field(None, description="list with one relative path or training index per line")
    subjects: list[_NameOrIndex] | None = Field(None, description="ids of data with subjects: everything of a person")
    random: RandomForget | None = Field(None, description="{fraction: 0.03} or {count: 100}")
    duplicates: Literal["include", "warn"] = Field(
        "include",
        description="samples, subjects: copies of an image, byte for byte, are forgotten with it | or only named",
    )
    already: list[Path] | None = Field(
        None,
        description="what the checkpoint was made to forget before, and is not to learn again: run directories, "
        "deletion lists (.csv, .tsv, .txt) or configs (.yaml), beside what an unlearned checkpoint says itself; []: "
        "it may be learned again",
    )

    already_missing: Literal["error", "ignore"] = Field(
        "error",
        description="lines and classes of earlier requests that match nothing: error | ignore, when their images were "
        "deleted from the data",
    )

    @model_validator(mode="after")
    def _one(self) -> ForgetConfig:
        kinds = ("classes", "subclasses", "samples", "subjects", "random")
        given = [name for name in kinds if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of {', '.join(kinds)} (given: {', '.join(given) or 'none'})")
        return self


class MLLMConfig(Section):
    """Where the similarity ratings come from."""

    backend: Literal["auto", "none", "recorded", "local", "endpoint", "clip"] = Field(
        "auto",
        description="auto (recorded where mllm.ratings is set, and for digits and fashion_mnist; else none) | none: no "
        "ratings, every class is as near as any other | recorded: replay the ratings in a file | local: a "
        "vision-language model of transformers | endpoint: an OpenAI-compatible server | clip: a CLIP or SigLIP model "
        "of transformers",
    )
    ratings: Path | None = Field(
        None, description="recorded: file of ratings; null: those shipped for digits and fashion_mnist"
    )
    model: Path | str | None = Field(
        None,
        description="local, clip: a hub id, or a directory (absolute, or beginning with ./ or ../); endpoint: the "
        "model's name there",
    )
    revision: str | None = Field(None, description="local, clip: commit or tag of a hub id; null: its main branch")
    base_url: str | None = Field(None, description="endpoint: address, such as http://localhost:8000/v1")
    key_env: str = Field(
        "MEGU_API_KEY",
        description="endpoint: environment variable that holds the key; one other than MEGU_API_KEY must be set",
    )
    allow_remote: bool = Field(False, description="endpoint: images may be sent to a host that is not this machine")
    images: Literal["auto", "retain-only", "none"] = Field(
        "auto",
        description="which images may be shown: auto (retained ones; forgotten ones only where a class or sub-class "
        "is asked for) | retain-only | none (rate by name alone)",
    )
    images_per_class: Count = Field(8, description="images shown of each class that is asked about")
    image_size: Count = Field(448, description="images are downsized to this many pixels on the longer side")
    concurrency: Count = Field(4, description="endpoint: calls at the same time")
    timeout: Positive = Field(
        120.0, description="endpoint: seconds for a whole call, after which its connection is closed"
    )
    retries: Annotated[int, Field(ge=0)] = Field(
        5, description="endpoint: times that a call is repeated after 429, 5xx, a time-out or a cut connection"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="local, clip: auto (float32 on cpu, bfloat16 on cuda, float16 on mps) | float32 | ..."
    )
    trust_remote_code: bool = Field(False, description="local, clip: run code that comes with the model")

    @field_validator("key_env", mode="plain")
    @classmethod
    def _a_name(cls, value: Any) -> str:
        # What stands here by mistake may be the key itself: a message must not repeat it.
        if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", value):
            raise PydanticCustomError("key_env", "give the name of an environment variable, not the key itself")
        return value

    @model_validator(mode="after")
    def _complete(self) -> MLLMConfig:
        if self.backend in ("local", "endpoint", "clip") and not self.model:
            raise ValueError(f"backend: {self.backend} needs mllm.model")
        if self.backend == "endpoint":
            try:
                url = urlsplit(self.base_url or "")
                complete = url.scheme in ("http", "https") and bool(url.hostname)
                _ = url.port
            except ValueError:
                complete = False
            if not complete:
                raise ValueError("backend: endpoint needs mllm.base_url, such as http://localhost:8000/v1")
            if url.username or url.password or url.query or url.fragment:
                raise PydanticCustomError("base_url", "base_url: give the address only, and a key by mllm.key_env")
        return self


class TransitionConfig(Section):
    """From ratings to the transition matrix."""

    temperature: Positive = Field(3.0, description="softmax temperature over ratings from 0 to 10")


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
    strength: Literal["uniform", "full"] = Field(
        "uniform", description="uniform: strength drawn from U(0,1) per sample | full: always 1"
    )
    batch: Count = Field(8, description="noises per perturbing label and per forgotten class")
    steps: Count = Field(60, description="optimiser steps of the pair")
    lr: Positive = Field(0.1, description="Adam learning rate, in normalised pixel units")
    penalty: NonNegative = Field(0.1, description="lambda: weight of the mean squared noise")


class FinetuneConfig(Section):
    """Fragment-Align: the short finetuning."""

    epochs: Count = Field(1, description="passes; each draws the noises anew")
    retain_fraction: Literal["auto"] | Positive = Field(
        "auto", description="retained samples per epoch, as a share of all; auto: 12,000 images, but at most 20 passes"
    )
    max_steps: Count | None = Field(
        None, description="optimiser steps at most, where epochs would take more; the schedule fits; null: no limit"
    )
    batch: Count = Field(128, description="retained samples per step")
    forget_batch: Literal["auto"] | Count = Field(
        "auto", description="forgotten samples per step; auto: as make three passes over them, from 8 to 64"
    )
    weight: Literal["auto"] | Positive = Field(
        "auto", description="weight of the loss on forgotten samples; auto: 0.1 for hard labels, else 0.2"
    )
    adversary: NonNegative = Field(
        0.2,
        description="wholly forgotten classes: weight of the loss on how surely a linear discriminant finds "
        "clean samples in the features; it acts while it finds more than one on thumbnails of the images",
    )
    clean: Fraction = Field(0.2, description="share of forgotten samples left without noise, where there is noise")
    reassign: bool = Field(
        True,
        description="hard labels follow the current model: argmax of log p(k|x) + beta * log T[y,k]; "
        "not where labels.source leaves the prediction out",
    )
    beta: NonNegative = Field(0.3, description="weight of the transition matrix when labels are reassigned")
    lr: Positive = Field(0.02, description="SGD learning rate at the start; it falls to 0 as a cosine")
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="SGD momentum")
    weight_decay: NonNegative = Field(5e-4, description="SGD weight decay")
    patience: Count = Field(2, description="stop after so many epochs without a gain in validation accuracy")


class TrainConfig(Section):
    """How `megu train` trains the original model and the oracle."""

    epochs: Count = Field(15, description="passes over the training images")
    batch: Count = Field(128, description="samples per step")
    lr: Positive = Field(0.1, description="peak learning rate of one-cycle SGD")
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="SGD momentum (Nesterov)")
    weight_decay: NonNegative = Field(5e-4, description="SGD weight decay")
    augment: Literal["none", "flip", "crop+flip"] = Field("none", description="none | flip | crop+flip")


class EvalConfig(Section):
    """How the result is judged."""

    oracle: bool = Field(
        False,
        description="`megu run` also retrains from scratch without the forget set (slow; the judge of all)",
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
        description="samples per forward pass, wherever nothing is learned; auto: 1,000, fewer of images larger than "
        "64 x 64 pixels",
    )


class CompareConfig(Section):
    """What `megu compare` sets beside each other."""

    methods: list[str] | None = Field(None, description="names of methods; null: all there are")
    seeds: Annotated[int, Field(ge=1, le=1000)] = Field(
        3, description="seeds, counted up from `seed`, at most 1,000; the noise floor needs three"
    )
    settings: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="method -> its own settings, e.g. {ssd: {alpha: 5}}; see docs/methods.md"
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
    preset: Literal["paper"] | None = Field(
        None, description="paper: the paper's method without what is ours (see docs/decisions.md)"
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

    @model_validator(mode="after")
    def _held_out(self) -> Config:
        looks = self.labels.mode != "hard" and self.labels.keep == "auto" and self.forget.classes is None
        if looks and self.data.validation == 0:
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
            rated = self.mllm.ratings is not None or self.data.name in SHIPPED_RATINGS
            found = self.mllm.model_copy(update={"backend": "recorded" if rated else "none"})
            object.__setattr__(self, "mllm", found)
        return self

    @model_validator(mode="after")
    def _rated(self) -> Config:
        if self.mllm.backend == "none" and self.labels.source in ("transition", "transition+prediction"):
            why = "preset: paper takes labels from ratings" if self.preset == "paper" else (
                f"labels.source: {self.labels.source} takes labels from ratings"
            )  # fmt: skip
            raise ValueError(
                f"{why}, and there are none (mllm.backend: none). Let a model rate (mllm.backend: local, endpoint or "
                "clip), or fill in the file that `megu similarity --template FILE` writes and name it in mllm.ratings"
            )
        return self


def get(config: BaseModel, key: str) -> Any:
    """Value of a dotted key as plain JSON data; a section gives all its settings."""
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    return str(value) if isinstance(value, Path) else value


def checked_path(path: Path, key: str) -> Path:
    """The path, if a file can have it.

    Raises:
        ConfigError: It holds a NUL, or is too long for the file system.
    """
    try:
        os.lstat(path)
    except ValueError:
        raise ConfigError(f"{key}: {brief(str(path))} is no path: it holds a NUL or half a character") from None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise ConfigError(f"{key}: {brief(str(path))} is too long a path") from None
    return path


def has_weights(folder: Path) -> bool:
    """Whether trained weights lie in a directory of transformers, or only the config of a model to be trained."""
    return any((folder / name).is_file() for name in _HF_WEIGHTS)


def is_path(value: str | Path) -> bool:
    """Whether what may be a name or a path is a path."""
    return isinstance(value, Path) or value.startswith(("/", "./", "../", "~"))


def alternatives(annotation: Any) -> tuple[Any, ...]:
    """The types that a setting may have."""
    return typing.get_args(annotation) or (annotation,)
