"""Pictures as they are shown to a model: downsized, and made anew from pixels, so that no metadata goes along."""

from __future__ import annotations

import base64
import hashlib
import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor


def picture(pixels: Tensor, size: int) -> Image.Image:
    """An RGB picture of (C, H, W) uint8 pixels, its longer side at most ``size`` pixels."""
    from PIL import Image

    array = pixels.expand(3, -1, -1).permute(1, 2, 0).contiguous().cpu().numpy()
    image = Image.fromarray(array, "RGB")
    image.thumbnail((size, size), Image.Resampling.LANCZOS)  # never enlarges
    return image


def digest(image: Image.Image) -> str:
    """sha256 of size and pixels: what a model sees, however it is packed."""
    return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()


def data_url(image: Image.Image) -> str:
    """The picture as a base64 data URL of a PNG without metadata."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
