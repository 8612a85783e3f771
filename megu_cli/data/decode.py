"""From an image file to pixels: as a viewer shows it, in one size."""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from megu_cli.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

# What torchvision's ImageFolder takes for an image.
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}
# What an image file may hold, whatever its suffix. Pillow reads these itself: for others, such as EPS, it starts a
# program, and a data set must not be able to start one. The reader of JPEG reads MPO as well.
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "PPM", "TIFF", "GIF")


@dataclass(frozen=True)
class Resizing:
    """How an image becomes square.

    Attributes:
        size: Pixels a side.
        interpolation: ``nearest``, ``bilinear``, ``bicubic``, ``lanczos``, ``box`` or ``hamming``.
        crop: The image is resized to ``size / crop``, and the centre is cut out.
        stretch: Both sides are resized, rather than the shorter one and the longer one cut.
    """

    size: int
    interpolation: str = "bilinear"
    crop: float = 1.0
    stretch: bool = False

    @property
    def before(self) -> int:
        """Side before the centre is cut out."""
        return int(self.size / self.crop + 1e-6)  # cut off, as libraries do; but not for an error of rounding

    @property
    def key(self) -> Any:
        """Of the digests: the size alone, unless something is unusual."""
        usual = (self.interpolation, self.crop, self.stretch) == ("bilinear", 1.0, False)
        return self.size if usual else (self.size, self.interpolation, self.crop, self.stretch)

    def of_picture(self, image: Image.Image) -> Image.Image:
        """A square image of any image."""
        from PIL import Image, ImageOps

        method = Image.Resampling[self.interpolation.upper()]
        side = (self.before, self.before)
        square = image.resize(side, method) if self.stretch else ImageOps.fit(image, side, method)
        first = (self.before - self.size) // 2
        return square if not first else square.crop((first, first, first + self.size, first + self.size))

    def of_tensor(self, pixels: Tensor) -> Tensor:
        """Square uint8 images (N, C, S, S) of images that are about square (N, C, H, W)."""
        # Of the methods, torch knows these; the others are near bilinear.
        mode = self.interpolation if self.interpolation in ("nearest", "bicubic") else "bilinear"
        side = (self.before, self.before)
        first = (self.before - self.size) // 2
        blocks = [
            torch.nn.functional.interpolate(block.float(), side, mode=mode, antialias=mode != "nearest")
            .round_()
            .clamp_(0, 255)
            .byte()[:, :, first : first + self.size, first : first + self.size]
            for block in pixels.split(4096)
        ]
        return torch.cat(blocks)


@dataclass(frozen=True)
class Decode:
    """Decodes image files to square uint8 (C, S, S).

    The first picture of several, turned as its EXIF orientation says, transparency over white, 16 bits scaled to 8.

    Attributes:
        resizing: To which size, and how.
        channels: 1 for grey, 3 for RGB.
    """

    resizing: Resizing
    channels: int

    def __call__(self, name: str, content: bytes) -> Tensor:
        """The pixels of a file.

        Raises:
            DataError: It is no image that can be decoded whole.
        """
        from PIL import ImageOps

        try:
            with _opened(content) as file:
                # A JPEG much larger than needed is decoded at a half, a quarter or an eighth: several times faster.
                file.draft(None, (2 * self.resizing.before, 2 * self.resizing.before))
                upright = ImageOps.exif_transpose(file)
                image = _flat(upright).convert("L" if self.channels == 1 else "RGB")
                square = self.resizing.of_picture(image)
        except DataError as error:
            raise DataError(f"{name} cannot be decoded: {error.message}") from None
        except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error and more
            raise _undecodable(name, error) from None
        array = np.asarray(square, dtype=np.uint8).reshape(self.resizing.size, self.resizing.size, -1)
        return torch.from_numpy(array.transpose(2, 0, 1).copy())  # torch takes twice as long to move the axes


def picture(name: str, content: bytes, side: int | None = None) -> Image.Image:
    """The whole picture in a file, upright, without transparency, 8 bits a channel.

    Args:
        name: Named in errors.
        content: The file.
        side: Pixels a side that are enough: a larger JPEG is decoded at a fraction of its size. ``None``: all of them.

    Raises:
        DataError: It is no image that can be decoded whole.
    """
    from PIL import ImageOps

    try:
        with _opened(content) as file:
            if side is not None:
                file.draft(None, (side, side))
            return _flat(ImageOps.exif_transpose(file))
    except DataError as error:
        raise DataError(f"{name} cannot be decoded: {error.message}") from None
    except Exception as error:  # as in Decode
        raise _undecodable(name, error) from None


def _opened(content: bytes) -> Image.Image:
    """The picture in a file, not decoded yet; the only place where megu opens one."""
    from PIL import Image

    return Image.open(io.BytesIO(content), formats=FORMATS)


def _flat(image: Image.Image) -> Image.Image:
    """The image without transparency, and with 8 bits a channel.

    Raises:
        DataError: The range of its pixels is not known.
    """
    from PIL import Image

    if image.mode == "F" or image.mode.startswith("I"):
        pixels: np.ndarray[Any, Any] = np.asarray(image)
        if image.mode == "F" or pixels.min() < 0 or pixels.max() > 65535:
            raise DataError("its pixels have no fixed range; save it with 8 or 16 bits")
        clear = pixels == image.info.get("transparency", -1)
        return Image.fromarray(np.where(clear, 255, pixels // 257).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return image


def inspect(name: str, content: bytes) -> None:
    """Find what is wrong with an image file without decoding it: empty, of no known format, or cut short.

    Raises:
        DataError: Something is.
    """
    if not content:
        raise DataError(f"{name} cannot be decoded: it is empty")
    try:
        with _opened(content) as image:
            if image.format == "PNG":
                image.verify()  # the checksum of every chunk
    except Exception as error:  # as in Decode
        raise _undecodable(name, error) from None
    # After the last scan's header a JPEG has one end marker: inside a scan its bytes cannot occur.
    if image.format in ("JPEG", "MPO") and content.find(b"\xff\xd9", content.rfind(b"\xff\xda")) < 0:
        raise DataError(f"{name} cannot be decoded: it is cut short")


def _undecodable(name: str, error: Exception) -> DataError:
    from PIL import UnidentifiedImageError

    known = (
        f"it is no image of a known format ({', '.join(FORMATS)})"
        if isinstance(error, UnidentifiedImageError)
        else str(error)
    )
    return DataError(f"{name} cannot be decoded: {known}", "Repair it or take it out of the data.")


@dataclass(frozen=True)
class Preprocessing:
    """How images are prepared for a model. ``None`` leaves a value to the data set.

    Attributes:
        mean: Mean of each channel (or one for all) of pixels from 0 to 1, in the order in which the model takes them.
        std: Standard deviation of each channel, likewise.
        image_size: Side of the square images in pixels.
        interpolation: Of the resizing: ``nearest``, ``bilinear``, ``bicubic``, ``lanczos``, ``box`` or ``hamming``.
        crop: Side of the centre that is cut out, as a share of the resized image's side.
        stretch: Resize both sides, rather than the shorter one and cut the longer one.
        bgr: The model takes blue, green, red.
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    image_size: int | None = None
    interpolation: str = "bilinear"
    crop: float = 1.0
    stretch: bool = False
    bgr: bool = False

    def ordered(self, bgr: bool) -> Preprocessing:
        """The same with the channels in an order; each colour keeps its mean and standard deviation."""
        if bgr == self.bgr:
            return self
        mean, std = (None if values is None else values[::-1] for values in (self.mean, self.std))
        return replace(self, mean=mean, std=std, bgr=bgr)

    @property
    def resizing(self) -> Resizing | None:
        """The resizing; ``None``: images stay as they are."""
        return Resizing(self.image_size, self.interpolation, self.crop, self.stretch) if self.image_size else None
