"""`megu report --card`: a model card that huggingface_hub loads, with the run's figures and without an image's name."""

from __future__ import annotations

import pytest
from conftest import refused, write_config, write_folder
from huggingface_hub import ModelCard

import megu_cli
from megu_cli.run import artifacts


def test_the_card_of_a_class(megu, finished, tmp_path):
    file = tmp_path / "README.md"
    answer = megu("report", "-c", finished, "--card", file)
    assert answer.code == 0, answer.err
    assert "wrote" in answer.out
    assert not (finished.parent / "run" / "report.html").exists()
    card, body = ModelCard.load(file), artifacts.read_body(finished.parent / "run" / "eval.json")
    assert card.data.pipeline_tag == "image-classification"
    assert card.data.library_name == "pytorch"
    assert "machine-unlearning" in card.data.tags
    results = {result.metric_name: result for result in card.data.eval_results}
    assert results["retain_test_acc"].metric_value == pytest.approx(body["unlearned"]["retain_test_acc"], abs=1e-4)
    assert results["retain_test_acc"].dataset_type == "digits"
    text = card.text
    assert "forget the class 8" in text
    assert f"## Verdict: {body['verdict']['verdict']}" in text
    assert f"| megu | {megu_cli.__version__} |" in text
    assert "| original | masked | unlearned | retrained |" in text
    figure = f"{100 * body['oracle']['retain_test_acc']:.1f}%"
    assert figure in next(line for line in text.splitlines() if "`retain_test_acc`" in line)
    assert artifacts.file_digest(finished.parent / "run" / "model.safetensors") in text
    assert "no formal guarantee" in text
    assert str(finished.parent) not in file.read_text()

    before = file.read_bytes()
    assert megu("report", "-c", finished, "--card", file).code == 0  # a card of ours is written anew
    assert file.read_bytes() == before


def test_a_card_names_no_image_no_list_and_no_person(megu, tmp_path):
    write_folder(tmp_path / "photos", number=12)
    for person in ("jane-roe", "ben-doe"):
        source = tmp_path / "photos" / "train" / "cat" / f"{len(person)}.png"
        source.rename(source.with_name(f"{person}.png"))
    (tmp_path / "erasure-of-jane.csv").write_text("cat/jane-roe.png\ncat/ben-doe.png\n")
    file = write_config(
        tmp_path,
        data={"name": "imagefolder", "root": "photos", "image_size": 16, "limit": None},
        forget={"samples": "erasure-of-jane.csv"},
        labels={"proxy": {"images": 20, "passes": 1, "networks": 1}},
    )
    assert megu("run", "-c", file, "-q").code == 0
    answer = megu("report", "-c", file, "--card", tmp_path / "card.md")
    assert answer.code == 0, answer.err
    text = (tmp_path / "card.md").read_text()
    assert "2 listed images" in text
    for word in ("jane", "ben-doe", "erasure", "photos", str(tmp_path)):
        assert word not in text
    assert "No model was retrained" in text
    assert "| PyTorch |" in text
    results = ModelCard.load(tmp_path / "card.md").data.eval_results
    assert {(result.dataset_name, result.dataset_split) for result in results} == {
        ("own images", "test images of retained classes"),
        ("own images", "forgotten training images"),
    }


def test_a_readme_of_the_user_s_stays(megu, finished, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("# Mine\n")
    refused(megu("report", "-c", finished, "--card", readme), "README.md is there already", "--force")
    assert readme.read_text() == "# Mine\n"
    refused(megu("report", "-c", finished, "--card", tmp_path / "c.md", "--show-forgotten"), "--show-forgotten")
    assert megu("report", "-c", finished, "--card", readme, "--force").code == 0
    assert "Mine" not in readme.read_text()
