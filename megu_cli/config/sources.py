"""The settings that say what a run works on: data, model, forget request, rater."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from megu_cli.config.base import Count, Fraction, Positive, Section
from megu_cli.config.datasets import DATA_SOURCES, DataName, DataSource
from megu_cli.config.model_sources import MODEL_SOURCES, source_of
from megu_cli.config.raters import RATERS, TRUE_FALSE, RaterKind, RaterName
from megu_cli.errors import ConfigError, brief

# Of names alone, YAML's 7 is the name 7. Where it may be an index as well, neither true nor 3.0 is one.
_Name = Annotated[str, BeforeValidator(lambda given: str(given) if type(given) is int else given)]
_NameOrIndex = Annotated[str, Field(strict=True)] | Annotated[int, Field(strict=True)]
# Data sets whose ratings come with megu.
_RATED = " and ".join(source.name for source in DATA_SOURCES.values() if source.rated)


class DataConfig(Section):
    """The images."""

    name: DataName = Field(
        description=" | ".join(source.name for source in DATA_SOURCES.values() if not source.users)
        + ", or data of your own (see docs/data.md): "
        + " | ".join(source.name for source in DATA_SOURCES.values() if source.users)
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

    @property
    def source(self) -> DataSource:
        """The data set that ``name`` names."""
        return DATA_SOURCES[self.name]

    @model_validator(mode="after")
    def _fits(self) -> DataConfig:
        if (self.name == "manifest") != (self.manifest is not None):
            raise ValueError("data.manifest goes with name: manifest, and neither without the other")
        return self


class ModelConfig(Section):
    """The classifier."""

    name: str = Field(
        description=" | ".join(
            ["small_cnn | small_resnet | resnet18 (the field's CIFAR variant)"]
            + [source.form for source in MODEL_SOURCES.values()]
        )
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
        description="normalisation: mean of each channel of pixels from 0 to 1, in the order of model.channel_order; "
        "null: the model's, else the data's",
    )
    std: Annotated[list[Positive], Field(min_length=1)] | None = Field(
        None, description="normalisation: standard deviation of each channel; null: as for mean"
    )
    channel_order: Literal["rgb", "bgr"] | None = Field(
        None,
        description="rgb | bgr: order of the channels of colour images in the model's input; bgr for a model that was "
        "trained on images as OpenCV reads them; null: the model's, else rgb",
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
        source, name = source_of(self.name)
        return source.trained(name) or self.checkpoint is not None

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


# Raters whose model is loaded here, and those that ask a server.
_LOADED = ", ".join(rater.name for rater in RATERS.values() if "rater_model" in rater.inputs)
_SERVED = ", ".join(rater.name for rater in RATERS.values() if "base_url" in rater.needs)


class MLLMConfig(Section):
    """Where the similarity ratings come from."""

    added: ClassVar = ("question",)
    backend: RaterName = Field(
        "auto",
        description=f"auto (recorded where mllm.ratings is set, and for {_RATED}; else none) | "
        + " | ".join(f"{rater.name}: {rater.text}" for rater in RATERS.values()),
    )
    ratings: Path | None = Field(None, description=f"recorded: file of ratings; null: those shipped for {_RATED}")
    model: Path | str | None = Field(
        None,
        description=f"{_LOADED}: a hub id, or a directory (absolute, or beginning with ./ or ../); {_SERVED}: the "
        "model's name there",
    )
    revision: str | None = Field(None, description=f"{_LOADED}: commit or tag of a hub id; null: its main branch")
    base_url: str | None = Field(None, description=f"{_SERVED}: address, such as http://localhost:8000/v1")
    key_env: str = Field(
        "MEGU_API_KEY",
        description=f"{_SERVED}: environment variable that holds the key; one other than MEGU_API_KEY must be set",
    )
    allow_remote: bool = Field(False, description=f"{_SERVED}: images may be sent to a host that is not this machine")
    question: Literal["rating", "true_false", "auto"] = Field(
        "rating",
        description="what a model is asked of two classes: rating (from 0 to 10) | true_false (is one similar to the "
        f"other; the rating is ten times the probability of True; {TRUE_FALSE}) | auto (true_false where the backend "
        "can be asked, else rating)",
    )
    images: Literal["auto", "retain-only", "none"] = Field(
        "auto",
        description="which images may be shown: auto (retained ones; forgotten ones only where a class or sub-class "
        "is asked for) | retain-only | none (rate by name alone)",
    )
    images_per_class: Count = Field(8, description="images shown of each class that is asked about")
    image_size: Count = Field(448, description="images are downsized to this many pixels on the longer side")
    concurrency: Count = Field(4, description=f"{_SERVED}: calls at the same time")
    timeout: Positive = Field(
        120.0, description=f"{_SERVED}: seconds for a whole call, after which its connection is closed"
    )
    retries: Annotated[int, Field(ge=0)] = Field(
        5, description=f"{_SERVED}: times that a call is repeated after 429, 5xx, a time-out or a cut connection"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description=f"{_LOADED}: auto (float32 on cpu, bfloat16 on cuda, float16 on mps) | float32 | ..."
    )
    trust_remote_code: bool = Field(False, description=f"{_LOADED}: run code that comes with the model")

    @property
    def rater(self) -> RaterKind:
        """The rater that ``backend`` names, once auto is resolved.

        Raises:
            ConfigError: There is none.
        """
        if self.backend not in RATERS:
            raise ConfigError(f"mllm.backend: there is no rater {brief(self.backend)}", f"Known: {', '.join(RATERS)}.")
        return RATERS[self.backend]

    @field_validator("key_env", mode="plain")
    @classmethod
    def _a_name(cls, value: Any) -> str:
        # What stands here by mistake may be the key itself: a message must not repeat it.
        if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", value):
            raise PydanticCustomError("key_env", "give the name of an environment variable, not the key itself")
        return value

    @model_validator(mode="after")
    def _complete(self) -> MLLMConfig:
        needs = () if self.backend == "auto" else self.rater.needs
        for name in needs:
            if name != "base_url" and not getattr(self, name):
                raise ValueError(f"backend: {self.backend} needs mllm.{name}")
        if "base_url" in needs:
            try:
                url = urlsplit(self.base_url or "")
                complete = url.scheme in ("http", "https") and bool(url.hostname)
                _ = url.port
            except ValueError:
                complete = False
            if not complete:
                raise ValueError(f"backend: {self.backend} needs mllm.base_url, such as http://localhost:8000/v1")
            if url.username or url.password or url.query or url.fragment:
                raise PydanticCustomError("base_url", "base_url: give the address only, and a key by mllm.key_env")
        return self
