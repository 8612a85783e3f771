"""The intended end: the run is finished, the traces are purged and the images are deleted."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from conftest import write_config


def photos(root: Path) -> None:
    """Three classes of 40 images, bright in another corner each."""
    from PIL import Image

    draw = torch.Generator().manual_seed(0)
    for label, name in enumerate(("ant", "bee", "cat")):
        for split, number in (("train", 40), ("test", 12)):
            (root / split / name).mkdir(parents=True)
            for i in range(number):
                pixels = torch.randint(0, 60, (8, 8, 3), generator=draw)
                pixels[4 * (label // 2) : 4 * (label // 2) + 4, 4 * (label % 2) : 4 * (label % 2) + 4] += 150
                Image.fromarray(pixels.byte().numpy()).save(root / split / name / f"{i}.png")


FORGET = {"classes": ["bee"]}, {"samples": "delete.csv"}
LISTED = [f"cat/{i}.png" for i in range(5)]


@pytest.mark.parametrize("forget", FORGET, ids=["classes", "samples"])
def test_status_is_done_once_the_images_are_deleted(megu, tmp_path, forget):
    photos(tmp_path / "photos")
    (tmp_path / "delete.csv").write_text("".join(f"{name}\n" for name in LISTED))
    file = write_config(
        tmp_path, data={"name": "imagefolder", "root": "photos", "image_size": 8, "limit": None}, forget=forget
    )
    assert megu("run", "-c", file, "-q").code == 0
    assert megu("purge", "-c", file, "--yes", "-q").code == 0
    assert megu("status", "-c", file).code == 0
    gone = [tmp_path / "photos" / "train" / name for name in (LISTED if "samples" in forget else ["bee"])]
    if "samples" in forget:
        gone[0].unlink()
        assert megu("status", "-c", file).code == 1  # four are still there
        for image in gone[1:]:
            image.unlink()
        (tmp_path / "delete.csv").unlink()
    else:
        shutil.rmtree(gone[0])
        shutil.rmtree(tmp_path / "photos" / "test" / "bee")
    answer = megu("status", "-c", file)
    assert answer.code == 0, answer.out + answer.err
    assert "done; images deleted: " in answer.out
    rows = megu("status", "-c", file, "--json").json["stages"]
    assert {rows[name]["status"] for name in ("finetune", "eval")} == {"done"}
    assert rows["labels"]["status"] == "absent"
    shutil.rmtree(tmp_path / "photos")
    answer = megu("status", "-c", file)
    assert (answer.code, "photos is not there" in answer.out) == (0, True)


def test_a_run_that_is_not_finished_is_not_done(megu, tmp_path):
    photos(tmp_path / "photos")
    file = write_config(
        tmp_path, data={"name": "imagefolder", "root": "photos", "image_size": 8, "limit": None}, forget=FORGET[0]
    )
    assert megu("train", "-c", file, "-q").code == 0
    shutil.rmtree(tmp_path / "photos")
    assert megu("status", "-c", file).code == 1
