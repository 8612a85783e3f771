"""What `megu init` writes: what the user says, and what the model and the images tell by themselves."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

from megu_cli.config.model_sources import source_of
from megu_cli.config.templates import beside, data_at, template
from megu_cli.errors import ConfigError, MeguError

if TYPE_CHECKING:
    from megu_cli.cli.commands.start import InitOptions
    from megu_cli.pipeline.context import RunContext

# A size to begin with where nothing tells one: it takes no time, and the preflight tries the others.
_FIRST = 64
# Images that are all of one size up to this are probably shown as they are.
_NATIVE = 256


class FirstConfig:
    """A config in the making.

    Args:
        given: What the user says.
    """

    def __init__(self, given: InitOptions) -> None:
        self.given = given
        folder = given.config.parent
        if given.data:
            self.data: dict[str, Any] = {"name": given.data}
        elif given.images:
            self.data = data_at(given.images, folder)
        else:
            self.data = {"name": "imagefolder", "root": "images"}
        named: dict[str, Any] = {
            "data.image_size": given.image_size,
            "model.classes": beside(given.model_classes, folder) if given.model_classes else None,
            "forget.already": [beside(path, folder) for path in given.already] or None,
            "mllm.ratings": beside(given.ratings, folder) if given.ratings else None,
            "out": beside(given.out, folder) if given.out else None,
        }
        self.more = {key: value for key, value in named.items() if value is not None}

    def write(self) -> None:
        """Write the file.

        Raises:
            ConfigError: It would not be valid; nothing is written.
        """
        from megu_cli.config import load_config
        from megu_cli.run.writing import replacing

        given, folder = self.given, self.given.config.parent
        text = template(
            self.data,
            given.model,
            beside(given.checkpoint, folder) if given.checkpoint else None,
            list(given.classes) or None,
            beside(given.samples, folder) if given.samples else None,
            list(given.subjects) or None,
            given.fraction,
            self.more,
        )
        with replacing(given.config) as temporary:
            temporary.write_text(text, encoding="utf-8")
            try:
                load_config(temporary)
            except ConfigError as error:
                raise ConfigError(
                    error.message.replace(str(temporary), str(given.config)),
                    f"{given.config} was not written: give other options.",
                ) from None

    def complete(self) -> list[str]:
        """Find out what the model and the images tell, and write the file again; what was found, in lines.

        The size comes from the option, from a Hugging Face model itself, from trying the checkpoint, or from images
        that are all of one size. Otherwise it is left to the user.
        """
        known = self.given.image_size or self._of_model()
        size = known or self._native
        said: list[str] = []
        if self.given.check and self._context(size or _FIRST).inputs.original.path.exists():
            found, said = self._tried(size or _FIRST)
            if found == _FIRST and size is None:
                said.append(f"data.image_size: {_FIRST} works; see that the model was trained with it")
            size = size if found is None else found
        if size is None:
            said.append("data.image_size is for you to say: the side in pixels of the images that the model takes")
        elif self.given.image_size is None:
            self.more["data.image_size"] = size
        self.write()
        return said

    def _context(self, size: int) -> RunContext:
        from megu_cli.config import load_config
        from megu_cli.pipeline.context import RunContext

        # The request is not looked at: a list that is still to be written is no reason not to check the model.
        flags = {"forget": {"random": {"count": 1}, "already": []}, "data": {"image_size": size}}
        config = load_config(self.given.config, None, flags)
        from megu_cli.cli.progress import tracker

        return RunContext.open(config, tracker(quiet=False))

    def _of_model(self) -> int | None:
        """The size that a Hugging Face model says itself; other models say none that one could rely on."""
        if not source_of(self.given.model)[0].directory:
            return None
        return self._context(_FIRST).inputs.user_model.advised.image_size

    @cached_property
    def _native(self) -> int | None:
        """The side of the images, where they are square, all of one size, and not large."""
        from PIL import Image

        root = self.given.images
        if root is None or not root.is_dir():
            return None
        from megu_cli.data.decode import IMAGE_SUFFIXES

        sides: set[tuple[int, int]] = set()
        files = (path for path in sorted(root.rglob("*")) if path.suffix.lower() in IMAGE_SUFFIXES)
        for _, file in zip(range(100), files, strict=False):
            try:
                with Image.open(file) as image:
                    sides.add(image.size)
            except (OSError, SyntaxError):
                return None
        if len(sides) != 1:
            return None
        width, height = next(iter(sides))
        return width if width == height <= _NATIVE else None

    def _tried(self, size: int) -> tuple[int | None, list[str]]:
        """The size with which the checkpoint is right, if one was found, and what the preflight says."""
        from megu_cli.pipeline.checks import preflight

        try:
            found = preflight(self._context(size))
        except MeguError as error:
            lines = [f"the checkpoint was not checked: {error.message.splitlines()[0]}"]
            return None, [*lines, error.hint] if error.hint else lines
        if found.settings:
            self.more |= {key: value for key, value in found.settings.items() if key != "data.image_size"}
            told = ", ".join(f"{key}: {value}" for key, value in found.settings.items() if key != "model.classes")
            order = ["model.classes, the order of the outputs"] if "model.classes" in found.settings else []
            written = " and ".join([*filter(None, [told]), *order])
            lines = [f"preflight: {found.cause}; written: {written}"]
            if told:
                lines.append("found by trying: where your training script has other values, write those")
            return found.settings.get("data.image_size", size), lines
        if found.fault:
            return None, [found.fault.message, found.hint] if found.hint else [found.fault.message]
        return size, [f"preflight: {found.line}"]

    def earlier(self) -> list[str]:
        """What a checkpoint that megu unlearned says of itself: it stays forgotten without being named."""
        if not self.given.checkpoint or not self.given.checkpoint.exists():
            return []
        from megu_cli.request.earlier import EarlierRequests

        own = EarlierRequests(None, self.given.checkpoint).of_checkpoint
        if not (own.concepts or own.contents):
            return []
        return [f"the checkpoint was unlearned before; these stay forgotten: {own.words}"]
