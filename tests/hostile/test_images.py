"""Hostile image files start no program: a run on each is traced, and all that it executes is Python."""

from __future__ import annotations

import io
import os
import re
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import process, subprocess_environment, write_config
from PIL import Image, ImageDraw

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n0 0 9 9 rectfill\nshowpage\n%%EOF\n"
DOS_EPS = struct.pack("<IIIIIIIH", 0xC6D3D0C5, 30, len(EPS), 0, 0, 0, 0, 0xFFFF)[:30] + EPS
WMF = struct.pack("<IHhhhhHIH", 0x9AC6CDD7, 0, 0, 0, 99, 99, 96, 0, 0) + b"\1\0\x09\0\0\3" + bytes(99)
EMF = struct.pack("<II", 1, 108) + struct.pack("<8i", *[0, 0, 99, 99] * 2) + b" EMF" + bytes(80)
PSD = b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, 4, 4, 8, 3) + bytes(12) + struct.pack(">H", 0) + bytes(48)
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/><script>1</script></svg>'
PDF = b"%PDF-1.4\n1 0 obj<</Type/Catalog/OpenAction<</S/Launch/F(sh)>>>>endobj\n%%EOF"
MVG = b"push graphic-context\nviewbox 0 0 9 9\nfill 'url(https://x/\"|touch x\")'\npop graphic-context\n"
FITS = b"SIMPLE  =                    T".ljust(80) + b"BITPIX  =                    8".ljust(80) + b"END".ljust(2720)


def picture(form: str, size: tuple[int, int] = (24, 24), **options: object) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, form, **options)
    return stream.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, *more: bytes, data: bytes = b"") -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def gif(frames: int, cut: int = 0) -> bytes:
    images = [Image.new("P", (9 + 3 * (i % 2), 9), i % 256) for i in range(frames)]
    stream = io.BytesIO()
    images[0].save(stream, "GIF", save_all=True, append_images=images[1:])
    return stream.getvalue()[: -cut or None]


def tiff(*entries: tuple[int, int, int, int]) -> bytes:
    rows = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + rows + bytes(64)


def hostile() -> dict[str, bytes]:
    jpeg, whole = picture("JPEG"), picture("PNG")
    bits = [(tag, 3, 1, value) for tag, value in ((256, 4), (257, 4), (258, 8), (262, 1), (277, 1))]
    return {
        "eps.png": EPS, "eps.jpg": EPS, "eps.tif": EPS, "eps.webp": EPS, "dos-eps.png": DOS_EPS, "wmf.png": WMF,
        "emf.bmp": EMF, "psd.png": PSD, "svg.png": SVG, "pdf.png": PDF, "mvg.png": MVG, "fits.png": FITS,
        "grib.png": b"GRIB" + bytes(99), "hdf.png": b"\x89HDF\r\n\x1a\n" + bytes(99), "bufr.png": b"BUFR" + bytes(99),
        "fpx.png": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600), "icns.png": b"icns" + bytes(60),
        "shell.png": b"#!/bin/sh\ntouch started\n", "zero.png": b"", "zeros.jpg": bytes(1000),
        "cut.jpg": jpeg[:200], "cut.png": whole[:60], "huge.png": png(100_000, 100_000),
        "largest.png": png(2**31 - 1, 2**31 - 1), "nothing.png": png(0, 0),
        "long-text.png": png(4, 4, chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(50_000_000)))),
        "profile.png": png(4, 4, chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(9_000_000)))),
        "png-eps.png": whole[:-12] + EPS, "eps-png.png": EPS + whole, "zip.png": whole[:40] + b"PK\3\4" + bytes(40),
        "frames.gif.png": gif(50, cut=5), "odd-offset.tif": tiff(*bits, (273, 4, 1, 2**31)),
        "many-strips.tif": tiff(*bits, (273, 4, 2**30, 8)), "loop.tif": tiff((330, 4, 1, 8), (34665, 4, 1, 8)),
        "no-size.tif": tiff((258, 3, 1, 8)), "compression.tif": tiff(*bits, (259, 3, 1, 34712), (273, 4, 1, 8)),
        "dims.bmp": b"BM" + bytes(12) + struct.pack("<IiiHHI", 40, 2**31 - 1, -(2**31), 1, 24, 0) + bytes(20),
        "dims.ppm": b"P6 99999999 99999999 255 ", "odd.ppm": b"P6 -4 4 255 " + bytes(48),
        "riff.webp": b"RIFF\xff\xff\xff\xffWEBPVP8L" + bytes(30), "jp2.jpg": b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(40),
    }  # fmt: skip


def folder(root: Path) -> None:
    """Three classes that a run takes, with 30 images each."""
    for name, colour in (("ant", "red"), ("bee", "green"), ("cat", "blue")):
        (root / name).mkdir(parents=True)
        for i in range(30):
            image = Image.new("RGB", (16, 16), colour)
            ImageDraw.Draw(image).point((i % 16, i // 16), "white")
            image.save(root / name / f"{i}.png")


# `import torch` starts it, through ctypes.util.find_library, before any image is looked at.
IMPORTED = {"ldconfig"}


def executed(log: Path) -> set[str]:
    """Names of the programs that strace saw started."""
    found = re.finditer(r'execve(?:at)?\((?:\w+, )?"([^"]*)".* = 0$', log.read_text(), re.M)
    return {Path(match[1]).name for match in found}


def traced(log: Path, *arguments: object) -> tuple[subprocess.CompletedProcess[str], set[str]]:
    """megu under strace; what was executed successfully in it, by any of its processes."""
    answer = subprocess.run(
        ["strace", "-f", "-qq", "-e", "trace=execve,execveat", "-o", str(log), sys.executable, "-m", "megu_cli",
         *map(str, arguments)],
        env=subprocess_environment(), capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    return answer, executed(log)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed (apt-get install strace)")
def test_a_run_on_hostile_images_starts_no_program(tmp_path):
    files = hostile()
    root = tmp_path / "images"
    folder(root)
    config = write_config(
        tmp_path, data={"name": "imagefolder", "root": str(root), "image_size": 16, "limit": None, "test_fraction": 0.2,
              "follow_links": True},
        forget={"classes": ["cat"]},
    )  # fmt: skip
    for name, content in files.items():
        (root / "ant" / name).write_bytes(content)
    (root / "ant" / "directory.png").mkdir()
    os.mkfifo(root / "ant" / "pipe.png")
    (root / "ant" / "device.png").symlink_to("/dev/zero")
    assert len(files) >= 40
    answer, started = traced(tmp_path / "trace", "run", "-c", config)
    assert answer.returncode == 2, answer.stderr
    assert "files cannot be used" in answer.stderr
    assert started - IMPORTED == {Path(sys.executable).name}, started
    assert not (tmp_path / "started").exists()


_DECODED = """
import sys
from pathlib import Path
from megu_cli.data.decode import Decode, Resizing, inspect
from megu_cli.errors import DataError
for path in sorted(Path(sys.argv[1]).iterdir()):
    for look in (inspect, Decode(Resizing(16), 3)):
        try:
            look(path.name, path.read_bytes())
        except DataError as error:
            assert path.name in error.message, error
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed (apt-get install strace)")
def test_each_hostile_image_is_read_or_refused_by_name_and_starts_no_program(tmp_path):
    (tmp_path / "images").mkdir()
    for name, content in hostile().items():
        (tmp_path / "images" / name).write_bytes(content)
    log = tmp_path / "trace"
    command = ["strace", "-f", "-qq", "-e", "trace=execve,execveat", "-o", log, sys.executable, "-c", _DECODED]
    answer = subprocess.run(
        [*map(str, command), str(tmp_path / "images")], env=subprocess_environment(), capture_output=True, text=True,
        check=False, timeout=300,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    assert executed(log) - IMPORTED == {Path(sys.executable).name}


def test_an_eps_file_with_an_images_suffix_asks_for_no_ghostscript(tmp_path):
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    (tmp_path / "gs").chmod(0o755)
    (tmp_path / "images").mkdir()
    for name in ("eps.png", "eps.jpg", "dos-eps.png"):
        (tmp_path / "images" / name).write_bytes(hostile()[name])
    path = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    answer = process("-c", _DECODED, tmp_path / "images", environment=path)
    assert answer.returncode == 0, answer.stderr
    assert not (tmp_path / "started").exists()
