"""From an image file to pixels: as a viewer shows it, in one size."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from megu_cli.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

# What torchvision's ImageFolder takes for an image.
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}


@dataclass(frozen=True)
class Decode:
    """Decodes image files to uint8 (C, size, size): shorter side resized, then the centre cut out.

    The first picture of several, turned as its EXIF orientation says, transparency over white, 16 bits scaled to 8.

    Attributes:
        size: Pixels a side.
        channels: 1 for grey, 3 for RGB.
    """

    size: int
    channels: int

    def __call__(self, name: str, content: bytes) -> Tensor:
        """The pixels of a file.

        Raises:
            DataError: It is no image that can be decoded whole.
        """
        from PIL import Image, ImageOps

        try:
            with Image.open(io.BytesIO(content)) as file:
                # A JPEG much larger than needed is decoded at a half, a quarter or an eighth: several times faster.
                file.draft(None, (2 * self.size, 2 * self.size))
                upright = ImageOps.exif_transpose(file)
                image = _flat(upright).convert("L" if self.channels == 1 else "RGB")
                square = ImageOps.fit(image, (self.size, self.size), Image.Resampling.BILINEAR)
        except DataError as error:
            raise DataError(f"{name} cannot be decoded: {error.message}") from None
        except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error and more
            raise _undecodable(name, error) from None
        array = np.asarray(square, dtype=np.uint8).copy()
        return torch.from_numpy(array.reshape(self.size, self.size, -1)).permute(2, 0, 1)


def _flat(image: Image.Image) -> Image.Image:
    """The image without transparency, and with 8 bits a channel.

    Raises:
        DataError: The range of its pixels is not known.
    """
    from PIL import Image

    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    if image.mode == "F" or image.mode.startswith("I"):
        pixels: np.ndarray[Any, Any] = np.asarray(image)
        if image.mode == "F" or pixels.min() < 0 or pixels.max() > 65535:
            raise DataError("its pixels have no fixed range; save it with 8 or 16 bits")
        return Image.fromarray((pixels // 257).astype(np.uint8))
    return image


def inspect(name: str, content: bytes) -> None:
    """Find what is wrong with an image file without decoding it: empty, of no known format, or cut short.

    Raises:
        DataError: Something is.
    """
    from PIL import Image

    if not content:
        raise DataError(f"{name} cannot be decoded: it is empty")
    try:
        with Image.open(io.BytesIO(content)) as image:
            if image.format == "PNG":
                image.verify()  # the checksum of every chunk
    except Exception as error:  # as in Decode
        raise _undecodable(name, error) from None
    # After the last scan's header a JPEG has one end marker: inside a scan its bytes cannot occur.
    if image.format in ("JPEG", "MPO") and content.find(b"\xff\xd9", content.rfind(b"\xff\xda")) < 0:
        raise DataError(f"{name} cannot be decoded: it is cut short")


def _undecodable(name: str, error: Exception) -> DataError:
    from PIL import UnidentifiedImageError

    known = "it is no image of a known format" if isinstance(error, UnidentifiedImageError) else str(error)
    return DataError(f"{name} cannot be decoded: {known}", "Repair it or take it out of the data.")
