"""Models of torchvision and timm, by their names there."""

from __future__ import annotations

import difflib
from typing import Any

from torch import nn

from megu_cli.data.decode import Preprocessing
from megu_cli.errors import ConfigError, brief
from megu_cli.models.architecture import Architecture


class TorchvisionModel(Architecture):
    """A classifier of torchvision; it takes colour images."""

    def check(self) -> None:
        """See `Architecture.check`."""
        import torchvision

        known = torchvision.models.list_models(module=torchvision.models)
        if self.name not in known:
            raise ConfigError(
                f"model.name: torchvision has no classifier {brief(self.name)}", f"It has: {', '.join(known)}."
            )

    def build(self, classes: int, channels: int) -> nn.Module:
        """See `Architecture.build`."""
        import torchvision

        model: nn.Module = torchvision.models.get_model(self.name, weights=None, num_classes=classes)
        return model

    def channels(self) -> int | None:
        """See `Architecture.channels`."""
        return 3

    def preprocessing(self, folder_like: bool) -> Preprocessing:
        """See `Architecture.preprocessing`."""
        if not folder_like:
            return Preprocessing()
        import torchvision

        weights = getattr(torchvision.models.get_model_weights(self.name), "DEFAULT", None)
        published = weights.transforms() if weights else None
        if published is None or not hasattr(published, "crop_size"):
            return Preprocessing()
        side, shorter = published.crop_size[0], published.resize_size[0]
        crop = min(1.0, side / shorter)
        mean, std = tuple(published.mean), tuple(published.std)
        return Preprocessing(mean, std, side, published.interpolation.value, crop=crop)


class TimmModel(Architecture):
    """A model of timm."""

    def check(self) -> None:
        """See `Architecture.check`."""
        timm = _timm()
        if not timm.is_model(self.name):
            near = difflib.get_close_matches(self.name, timm.list_models(), n=3)
            raise ConfigError(
                f"model.name: timm has no model {brief(self.name)}", f"Near it: {', '.join(near)}." if near else ""
            )

    def build(self, classes: int, channels: int) -> nn.Module:
        """See `Architecture.build`."""
        model: nn.Module = _timm().create_model(self.name, pretrained=False, num_classes=classes, in_chans=channels)
        return model

    def preprocessing(self, folder_like: bool) -> Preprocessing:
        """See `Architecture.preprocessing`."""
        if not folder_like:
            return Preprocessing()
        from timm.data.config import resolve_data_config

        known = _timm().get_pretrained_cfg(self.name)
        if known is None:
            return Preprocessing()
        published = resolve_data_config({}, pretrained_cfg=known.to_dict())
        mean, std, side = tuple(published["mean"]), tuple(published["std"]), published["input_size"][1]
        return Preprocessing(mean, std, side, published["interpolation"], crop=published["crop_pct"])


def _timm() -> Any:
    try:
        import timm
    except ImportError:
        raise ConfigError("model.name: timm is not installed", "pip install 'megu-cli[timm]'") from None
    return timm
