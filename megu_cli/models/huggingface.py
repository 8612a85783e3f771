"""Image classifiers of transformers: a directory is read whole, and the unlearned model is written as one.

Nothing of the hub is asked for what is in the directory or in the local cache. Weights come from safetensors, or from a
``pytorch_model.bin`` of which nothing but tensors is unpickled; code in the directory runs only where it is allowed.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megu_cli.config import has_weights
from megu_cli.data.decode import Preprocessing
from megu_cli.errors import CheckpointError, ConfigError, brief
from megu_cli.models.architecture import Architecture
from megu_cli.models.marks import MARK, MARK_IN_CONFIG
from megu_cli.models.weights import State

HF = "hf:"
_CONFIG, _PREPROCESSOR, _WEIGHTS = "config.json", "preprocessor_config.json", "model.safetensors"
# Of config.json, what says nothing of the architecture.
_INCIDENTAL = (
    *("_name_or_path", "transformers_version", "id2label", "label2id", "dtype", "torch_dtype", "architectures"),
    MARK_IN_CONFIG,
)
_INTERPOLATION = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}


class HuggingFaceModel(Architecture):
    """An image classifier of transformers: a directory, or a hub id."""

    def build(self, classes: int, channels: int) -> nn.Module:
        """See `Architecture.build`."""
        return fresh(self.name, classes, self.trust_remote_code)

    def channels(self) -> int | None:
        """See `Architecture.channels`."""
        return channels(self.name, self.trust_remote_code)

    def preprocessing(self, folder_like: bool) -> Preprocessing:
        """See `Architecture.preprocessing`."""
        return preprocessing(self.name, self.trust_remote_code)

    def identity(self) -> Any:
        """See `Architecture.identity`."""
        return [HF, identity(self.name, self.trust_remote_code)]


def folder_of(name: str) -> Path:
    """The directory of a model: named as such, or the snapshot of a hub id in the local cache.

    The network is used only where a hub id is not in the cache.

    Raises:
        ConfigError: It is neither there nor to be downloaded.
    """
    folder = Path(name)
    if folder.is_absolute():
        if not (folder / _CONFIG).is_file():
            raise ConfigError(
                f"model.name: {HF}{name}: there is no {_CONFIG} in that directory",
                "Name a directory that save_pretrained() wrote.",
            )
        return folder
    from huggingface_hub import snapshot_download

    trouble = ""
    for only_local in (True, False):
        try:
            found = Path(
                snapshot_download(
                    name, local_files_only=only_local, allow_patterns=["*.json", "*.safetensors", "*.bin", "*.py"]
                )
            )
        except Exception as error:  # huggingface_hub lets through what its HTTP client raises
            trouble = str(error).strip().splitlines()[0]
            continue
        if (found / _CONFIG).is_file() and has_weights(found):
            return found
    raise ConfigError(
        f"model.name: {HF}{name} is no directory here, not in the local cache, and cannot be downloaded ({trouble})",
        "Give a directory (relative to the YAML), or a hub id.",
    )


def config_of(name: str, trust_remote_code: bool = False) -> Any:
    """The config of a model.

    Raises:
        ConfigError: It cannot be read, needs code that may not run, or is of no image classifier.
    """
    folder = folder_of(name)
    with _quiet():
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
        except Exception as error:  # transformers raises OSError, ValueError, KeyError and more
            raise _config_error(folder, error) from None


def _config_error(folder: Path, error: Exception) -> ConfigError:
    told = " ".join(str(error).split())
    if "trust_remote_code" in told:
        return ConfigError(
            f"model.name: {HF}{folder.name} needs code that comes with it; it was not run",
            "If you trust that code, set model.trust_remote_code to true.",
        )
    return ConfigError(f"model.name: {HF}{folder.name} cannot be used: {told[:300]}")


def identity(name: str, trust_remote_code: bool) -> Any:
    """What determines the architecture, as plain data without paths."""
    from megu_cli.run.artifacts import file_digest

    folder = folder_of(name)
    raw = {key: value for key, value in _json(folder / _CONFIG).items() if key not in _INCIDENTAL}
    code = sorted(folder.glob("*.py")) if trust_remote_code else []
    return [raw, *([path.name, file_digest(path)] for path in code)]


def fresh(name: str, classes: int, trust_remote_code: bool = False) -> nn.Module:
    """A freshly initialised model with so many classes, in float32.

    Raises:
        ConfigError: The config is of no image classifier.
    """
    config = config_of(name, trust_remote_code)
    if config.num_labels != classes:
        if has_weights(folder_of(name)):
            raise ConfigError(
                f"model.name: {HF}{folder_of(name).name} predicts {config.num_labels} classes, and the data have "
                f"{classes}",
                "Check data.name and data.superclasses. To train one of these classes anew, give a directory with the "
                "config alone.",
            )
        config.num_labels = classes
    with _quiet():
        from transformers import AutoModelForImageClassification

        try:
            return AutoModelForImageClassification.from_config(  # type: ignore[no-any-return]
                config, dtype=torch.float32, trust_remote_code=trust_remote_code
            )
        except Exception as error:  # of whatever kind the architecture raises
            raise _config_error(folder_of(name), error) from None


def channels(name: str, trust_remote_code: bool = False) -> int:
    """Channels of the images that a model takes."""
    return int(getattr(config_of(name, trust_remote_code), "num_channels", 3))


def class_names(name: str, trust_remote_code: bool = False) -> list[str] | None:
    """Names of the classes in the order of the outputs; ``None`` where they have none of their own."""
    labels = config_of(name, trust_remote_code).id2label or {}
    names = [str(labels[i]) for i in sorted(labels)]
    return None if all(re.fullmatch(r"LABEL_\d+", n) for n in names) else names


def preprocessing(name: str, trust_remote_code: bool = False) -> Preprocessing:
    """Size, interpolation and normalisation by the model's own image processor, where it comes with one.

    Raises:
        ConfigError: The processor cannot be read.
    """
    folder = folder_of(name)
    if not (folder / _PREPROCESSOR).is_file():
        size = getattr(config_of(name, trust_remote_code), "image_size", None)
        return Preprocessing(image_size=size if isinstance(size, int) else None)
    with _quiet():
        from transformers import AutoImageProcessor

        try:
            own = AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
        except Exception as error:  # transformers raises OSError, ValueError, KeyError and more
            raise _config_error(folder, error) from None
    return _read_processor(own, folder)


def _read_processor(own: Any, folder: Path) -> Preprocessing:
    try:
        found = _as_processor(own, folder)
        if not (found.image_size is None or (isinstance(found.image_size, int) and found.image_size > 0)):
            raise ValueError(f"images of {brief(found.image_size)} pixels")
        if not all(map(math.isfinite, (*(found.mean or ()), *(found.std or ())))) or min(found.std or (1,)) <= 0:
            raise ValueError("a mean or a standard deviation that no images have")
        return found
    except (ArithmeticError, AttributeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{folder.name}/{_PREPROCESSOR} holds a value that cannot be used: {error}",
            "Write it anew with the image processor's save_pretrained().",
        ) from None


def _as_processor(own: Any, folder: Path) -> Preprocessing:
    def setting(key: str, default: Any = None) -> Any:
        value = getattr(own, key, None)
        return default if value is None else value

    size, crop, stretch = dict(setting("size", {})), 1.0, False
    side = size.get("height") or size.get("shortest_edge")
    if size.get("height") and size.get("height") != size.get("width"):
        raise ConfigError(f"{folder.name}/{_PREPROCESSOR}: images of {size} are not square; megu makes square ones")
    if not setting("do_resize", True):
        side = None
    elif setting("do_center_crop", False):
        cut = dict(setting("crop_size", {}))
        if side and (target := cut.get("height") or cut.get("shortest_edge")):
            side, crop = target, min(1.0, target / side)
    elif (share := setting("crop_pct")) is not None:
        # ConvNeXt: below 384 pixels the shorter side becomes size / crop_pct and the centre is cut out.
        stretch = bool(side and side >= 384)
        crop = 1.0 if stretch else float(share)
    else:
        stretch = "height" in size  # both sides are resized, as ViT does
    resample = setting("resample", 2)
    if resample not in _INTERPOLATION:
        known = ", ".join(f"{number} ({name})" for number, name in _INTERPOLATION.items())
        raise ConfigError(f"{folder.name}/{_PREPROCESSOR}: resample: {brief(resample)} is none of {known}")
    # Pixels p of 0 to 255 become (p * factor - mean) / std; megu normalises p / 255.
    mean, std = [0.0], [1.0]
    if setting("do_normalize", False):
        mean, std = list(setting("image_mean", [0.5])), list(setting("image_std", [0.5]))
    scale = 255 * (setting("rescale_factor", 1 / 255) if setting("do_rescale", True) else 1.0)
    offset = 1.0 if setting("rescale_offset", False) else 0.0
    return Preprocessing(
        mean=tuple((m + offset) / scale for m in mean),
        std=tuple(s / scale for s in std),
        image_size=side,
        interpolation=_INTERPOLATION[resample],
        crop=crop,
        stretch=stretch,
        bgr=bool(setting("do_flip_channel_order", False)),  # MobileViT
    )


def read(folder: Path, classes: int, trust_remote_code: bool = False) -> State:
    """The weights of a directory by the model's own names, in the file's dtypes.

    Raises:
        CheckpointError: They are missing, damaged, need code to be run, or are not those of the config's model.
    """
    model = _loaded(folder, trust_remote_code)
    if model.config.num_labels != classes:
        raise CheckpointError(
            f"{folder} predicts {model.config.num_labels} classes, and the data have {classes}",
            "Check data.name and data.superclasses.",
        )
    return dict(model.state_dict())


def _loaded(folder: Path, trust_remote_code: bool) -> Any:
    with _quiet():
        from transformers import AutoModelForImageClassification

        try:
            model, found = AutoModelForImageClassification.from_pretrained(
                folder,
                dtype="auto",
                local_files_only=True,
                weights_only=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
            )
        except Exception as error:  # transformers raises OSError, ValueError, RuntimeError, UnpicklingError and more
            told = " ".join(str(error).split())[:300]
            pickled = "weights_only" in told or "Weights only" in told or type(error).__name__ == "UnpicklingError"
            more = "it holds more than tensors, and was not loaded" if pickled else told
            raise CheckpointError(
                f"{folder} cannot be loaded: {more}",
                "Write it anew with save_pretrained(), which makes safetensors.",
            ) from None
    faults = [f"{kind.removesuffix('_keys')}: {key}" for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
              for key in sorted(map(str, found[kind]))]  # fmt: skip
    if faults:
        shown = "\n".join(f"  {fault}" for fault in faults[:8])
        more = f"\n  and {len(faults) - 8} more" if len(faults) > 8 else ""
        raise CheckpointError(
            f"the weights in {folder} are not those of its {_CONFIG} ({len(faults)} differences)\n{shown}{more}",
            "A model whose classifier was not trained, such as a backbone alone, cannot be unlearned.",
        )
    return model


def names_in_file(folder: Path) -> dict[str, Any]:
    """What a directory holds beside its weights and is written beside the unlearned ones: name -> content digest."""
    from megu_cli.run.artifacts import file_digest

    return {path.name: file_digest(path) for path in _beside(folder)}


def names_written(folder: Path) -> list[str]:
    """Names of the files that `directory` may write for the model of a directory."""
    return sorted({path.name for path in _beside(folder)} | {_CONFIG, _PREPROCESSOR, "model.safetensors"})


def _beside(folder: Path) -> list[Path]:
    known = {_CONFIG, _PREPROCESSOR, "processor_config.json"}
    return sorted(path for path in folder.iterdir() if path.name in known or path.suffix == ".py")


def directory(
    name: str,
    source: Path | None,
    state: State,
    classes: list[str],
    used: Preprocessing,
    trust_remote_code: bool = False,
) -> tuple[dict[str, bytes], State]:
    """The files of a directory with other weights, and these weights by the names of its weight file.

    Args:
        name: The model that the config is of.
        source: The directory that the original weights came from; ``None``: `megu train` made them.
        state: The weights by the model's own names, in the dtypes to write.
        classes: Names of the classes, for a config without.
        used: How images are prepared, for a directory without a processor.
        trust_remote_code: Whether code in the directory may run.

    Returns:
        File name -> bytes, and the tensors of its model.safetensors.
    """
    import safetensors.torch

    folder = folder_of(name)
    model: Any = _loaded(source, trust_remote_code) if source else fresh(name, len(classes), trust_remote_code)
    with _quiet(), tempfile.TemporaryDirectory() as temporary:
        # It may be large: one file whatever its size, as the input's shards were only for transport.
        model.save_pretrained(temporary, state_dict=state, max_shard_size="1000GB")
        weights = (Path(temporary) / _WEIGHTS).read_bytes()
    files = {path.name: path.read_bytes() for path in _beside(folder)}
    config = _json(folder / _CONFIG)
    labels = config.get("id2label") or {}
    if len(labels) != len(classes) or all(re.fullmatch(r"LABEL_\d+", str(label)) for label in labels.values()):
        config.pop("num_labels", None)
        config["id2label"] = {str(i): label for i, label in enumerate(classes)}
        config["label2id"] = {label: i for i, label in enumerate(classes)}
        config["architectures"] = [type(model).__name__]
        files[_CONFIG] = _pretty(config)
    # The usual processor has no setting for the order of channels.
    if _PREPROCESSOR not in files and used.image_size and used.mean and used.std and not used.bgr:
        files[_PREPROCESSOR] = _pretty(
            {
                "image_processor_type": "ViTImageProcessor",
                "do_resize": True,
                "size": {"height": used.image_size, "width": used.image_size},
                "resample": {value: key for key, value in _INTERPOLATION.items()}[used.interpolation],
                "do_rescale": True,
                "rescale_factor": 1 / 255,
                "do_normalize": True,
                "image_mean": list(used.mean),
                "image_std": list(used.std),
            }
        )
    return {**files, _WEIGHTS: weights}, safetensors.torch.load(weights)


def marked(files: dict[str, bytes], provenance: dict[str, Any]) -> dict[str, bytes]:
    """The files of a `directory` that say what was forgotten: config.json under the key ``megu``, and the weights."""
    import safetensors.torch

    from megu_cli.run.artifacts import canonical, save_tensors

    config = {**json.loads(files[_CONFIG]), MARK_IN_CONFIG: provenance}
    mark = {"format": "pt", MARK: canonical(provenance).decode()}
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / _WEIGHTS
        save_tensors(file, safetensors.torch.load(files[_WEIGHTS]), mark)
        return {**files, _CONFIG: _pretty(config), _WEIGHTS: file.read_bytes()}


def _json(path: Path) -> dict[str, Any]:
    from megu_cli.run import reading
    from megu_cli.run.artifacts import strict_json

    try:
        content = strict_json(reading.content(path))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds no settings")
    return content


def _pretty(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and warnings of transformers': what matters is told as an error."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
