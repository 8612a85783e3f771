"""The commands of docs/records.md run as they stand, one after another."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import write_config
from test_returned import draw

pytest.importorskip("securesystemslib", reason="the extra `sign`, which is a part of `test`")
PAGE = Path(__file__).parents[2] / "docs" / "records.md"
CLASSES = ("meadow", "street", "wolf")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
def test_the_commands_of_the_page_run_as_they_stand(megu, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for kind, name in enumerate(CLASSES):
        for i in range(24):
            draw(tmp_path / "photos" / ("train" if i < 18 else "test") / name / f"{name}{i}.png", 100 * kind + i, kind)
            draw(tmp_path / "photos-2027" / f"{name}{i}.png", 1000 + 100 * kind + i, kind)
    (tmp_path / "deletion.csv").write_text("path\ntrain/meadow/meadow1.png\ntrain/street/street2.png\n")
    (tmp_path / "dsr17.csv").write_text("path\ntrain/meadow/meadow7.png\n")
    scores = {name: {other: 5 for other in CLASSES if other != name} for name in CLASSES}
    (tmp_path / "ratings.json").write_text(json.dumps({"rater": "test", "classes": CLASSES, "scores": scores}))
    write_config(
        tmp_path,
        out="megu-run",
        data={"name": "imagefolder", "root": "photos", "image_size": 16, "limit": None},
        forget={"samples": "deletion.csv"},
        mllm={"backend": "recorded", "ratings": "ratings.json"},
        record={"fingerprints": "lookalikes"},
    )
    commands = re.findall(r"^    ((?:megu|openssl) .*)$", PAGE.read_text(), flags=re.MULTILINE)
    assert len(commands) >= 12
    for command in commands:
        program, *arguments = shlex.split(command)
        if program == "openssl":
            subprocess.run([program, *arguments], check=True, capture_output=True)
        else:
            answer = megu(*arguments)
            assert answer.code == 0, f"{command}\n{answer.err}"
