"""The report and the purge, on a tiny run of the digits."""

import html
import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import filelock
import html5lib
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from megu_cli import report
from megu_cli.cli.app import app
from megu_cli.config import load_config
from megu_cli.errors import ArtifactError, ConfigError, InputError
from megu_cli.evaluation import aggregates
from megu_cli.pipeline.context import RunContext
from megu_cli.pipeline.engine import Pipeline
from megu_cli.pipeline.run_inputs import RunInputs
from megu_cli.report import drawing, figures, words
from megu_cli.run import artifacts

pytestmark = pytest.mark.slow
CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
CONFIG = """\
out: .
data: {name: digits}
model: {name: small_cnn}
forget: {classes: ["8"]}
train: {epochs: 3, batch: 64}
noise: {use: both, steps: 5}
finetune: {epochs: 1, retain_fraction: 1, batch: 64, forget_batch: 32}
eval: {oracle: true}
"""


def pipeline(folder, **flags):
    return Pipeline(RunContext.open(load_config(folder / "megu.yaml", **flags)))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    (folder / "megu.yaml").write_text(CONFIG)
    pipeline(folder).run()
    return folder


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    return folder


def megu(folder, *arguments, answer=None):
    result = CliRunner().invoke(app, [arguments[0], "-c", str(folder / "megu.yaml"), *arguments[1:]], input=answer)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def page(folder, *arguments):
    megu(folder, "report", *arguments)
    return (folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def whole(finished, tmp_path_factory):
    """A page with its figures, drawn once."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    shutil.copytree(finished, folder)
    return folder, page(folder)


@pytest.fixture
def undrawn(monkeypatch):
    """Pages without figures, where a test is about something else."""
    monkeypatch.setattr(drawing, "drawn", lambda draw, look: drawing.Drawn("data:,", 1, 1))


# -- the page ------------------------------------------------------------------------------------------------------


def test_page_is_one_valid_file_without_requests(whole):
    _, text = whole
    html5lib.HTMLParser(strict=True).parse(text)  # raises at the first fault
    assert len(text) < 5e6
    targets = re.findall(r'(?:src|srcset|href)="([^"]*)"', text)
    assert targets
    assert all(target.startswith(("data:", "#")) for target in targets)
    assert not re.search(r"@import|url\(|<script|<iframe", text)


def test_page_is_the_same_bytes_each_time(whole, undrawn):
    folder, _ = whole
    assert report.write(RunContext.open(load_config(folder / "megu.yaml")), []).read_bytes() == page(folder).encode()


def test_figures_are_the_same_bytes_each_time():
    paths = [("a", "b", "c", 3), ("a", "c", "c", 2)]
    first, second = (drawing.drawn(lambda look: figures.flow(paths, look), drawing.Look()) for _ in range(2))
    assert first == second


def test_page_tells_all_with_images_off(whole):
    run, text = whole
    pictures = re.findall(r'<img [^>]*alt="([^"]*)"', text)
    assert len(pictures) == text.count("<img ") == 2 * 6  # each for the screen and for paper
    assert all(len(alt) > 30 for alt in pictures)
    for section in re.findall(r"<section .*?</section>", text, flags=re.DOTALL):
        assert ("<img " not in section) or ("<table" in section)
    evaluation = artifacts.read_body(run / "eval.json")
    shown = html.unescape(re.sub(r"data:[^\"]*", "", text))
    for name, value in evaluation["unlearned"].items():
        if all(evaluation[model].get(name) is None for model in ("original", "unlearned", "oracle")):
            continue  # too few images for this figure: nothing to show
        assert name in shown
        assert words.shown(name, value) in shown
    for name in ("empirical evidence, no formal guarantee", "8", "rated 6"):
        assert name in shown.lower()


def test_page_names_every_digest(whole):
    run, text = whole
    meta = artifacts.read_meta(run / "eval.json")
    for recorded in (*meta["lineage"].values(), meta):
        for digest in recorded["inputs"].values():
            assert digest in text
    assert meta["content"] in text
    for file in ("model.safetensors", "oracle.safetensors", "original.safetensors", "noise.safetensors", "eval.json"):
        assert artifacts.file_digest(run / file) in text


def test_verdict_follows_the_requirements(run, undrawn):
    assert "No requirement was set" in page(run)
    assert "All requirements met" in page(run, "--require", "retain_test_acc>=0")
    text = page(run, "--require", "retain_test_acc>=0", "--require", "avg_gap<=-1")
    assert "Requirements not met" in text
    assert "1 of 2 requirements" in text
    with pytest.raises(ConfigError, match="no metric"):
        page(run, "--require", "beauty>=1")


def test_markdown_and_json_say_the_same(run):
    result = megu(run, "report", "--format", "json", "--json")
    assert json.loads(result.stdout)["file"] == str(run / "report.json")
    document = json.loads((run / "report.json").read_text())
    evaluation = artifacts.read_body(run / "eval.json")
    assert document["metrics"]["unlearned"] == evaluation["unlearned"]
    assert document["metrics"]["oracle"] == evaluation["oracle"]
    megu(run, "report", "--format", "md")
    text = (run / "report.md").read_text()
    for section in document["sections"]:
        assert f"## {section['title']}" in text
    # Every line of a table has as many cells as its head.
    for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1


def test_forgotten_images_are_shown_only_when_asked_for(run, undrawn, monkeypatch):
    assert report.SHOWS_FORGOTTEN not in page(run)
    text = page(run, "--show-forgotten")
    assert report.SHOWS_FORGOTTEN in text
    assert "This report shows forgotten images" in text
    with pytest.raises(ConfigError, match="html"):
        megu(run, "report", "--show-forgotten", "--format", "md")

    def refuse(self):
        raise AssertionError("the report looked at images")

    monkeypatch.setattr(RunInputs, "data", property(refuse))
    report.write(RunContext.open(load_config(run / "megu.yaml")), [])


def test_report_refuses_what_is_missing_or_stale_and_does_not_wait(run, undrawn):
    with pytest.raises(ArtifactError, match=r"stale .*eval.probe_samples"):
        megu(run, "report", "--set", "eval.probe_samples=77")
    with filelock.FileLock(run / ".lock"):
        assert page(run)
    (run / "eval.json").unlink()
    with pytest.raises(ArtifactError, match="missing") as caught:
        megu(run, "report")
    assert "megu eval" in caught.value.hint


def test_report_leaves_out_what_belongs_to_another_run(run):
    noise = artifacts.read(run / "noise.safetensors")
    work = RunContext.open(load_config(run / "megu.yaml"))
    other = {**noise.tensors, "negative": noise.tensors["negative"] + 1}
    artifacts.write(run / "noise.safetensors", artifacts.seal(artifacts.Artifact(noise.body, other), noise.meta))
    text = report.write(work, [], form="md").read_text()
    assert "not in the run directory any more" in text


def test_comparison_is_shown_where_it_is_of_the_same_request(run):
    request = artifacts.read_body(run / "eval.json")["request"]
    figures_ = {"mean": {"avg_gap": 0.0123, "js_divergence": 0.45}, "interval": {"avg_gap": 0.0048}}
    body = {"request": request, "seeds": [0, 1, 2], "methods": {"megu": figures_}, "noise_floor": 0.004}
    work = RunContext.open(load_config(run / "megu.yaml"))
    for asked, shown in ((request, True), ({**request, "forget": 1}, False)):
        sealed = artifacts.seal(artifacts.Artifact({**body, "request": asked}), {"stage": "compare"})
        artifacts.write(run / "compare.json", sealed)
        text = report.write(work, [], form="md").read_text()
        assert ("| megu | 0.450 | 1.2 ± 0.5 |" in text) is shown
        assert ("differ by 0.4% on average" in text) is shown


def test_figures_survive_many_classes_with_long_names():
    names = [f"a class with a rather long name, number {i}" for i in range(100)]
    paths = [(names[i % 7], names[i % 31], names[i % 13], 1 + i) for i in range(100)]
    grid = np.linspace(0, 10, 144).reshape(12, 12)
    points = {"original": np.random.default_rng(0).normal(size=(300, 2))}
    accuracy = {"original": [0.9] * 32, "unlearned": [None, *[0.8] * 31]}
    for look in (drawing.Look(), drawing.Look(dark=True, narrow=True)):
        for draw in (
            lambda at: figures.per_class(names[:32], accuracy, {0}, {1: "(rated 6)"}, "unlearned", at),
            lambda at: figures.flow(paths, at),
            lambda at: figures.flow([(a, None, c, n) for a, _, c, n in paths], at),
            lambda at: figures.similarity(names[:12], names[:12], grid, grid / 100, at),
            lambda at: figures.planes(points, np.arange(300) % 100, names, [3], [4], words.MODELS, at),
        ):
            picture = drawing.drawn(draw, look)
            assert picture.uri.startswith("data:image/svg+xml;base64,")
            assert len(picture.uri) < 1e6


@pytest.mark.parametrize("look", [drawing.Look(), drawing.Look(dark=True, narrow=True)])
def test_names_with_dollar_signs_are_drawn_as_they_are(look):
    names = ["$$", "$x^{$", r"\\frac"]
    accuracy = {"original": [0.9] * 3, "unlearned": [0.1, None, 0.8]}
    for draw in (
        lambda at: figures.per_class(names, accuracy, {0}, {1: "(rated 6)"}, "unlearned", at),
        lambda at: figures.flow([("$$", "$x^{$", "$$", 3)], at),
        lambda at: figures.similarity(names, names, np.ones((3, 3)), np.ones((3, 3)), at),
    ):
        assert drawing.drawn(draw, look).uri.startswith("data:image/svg+xml;base64,")


# -- what it is drawn from -----------------------------------------------------------------------------------------


def test_log_histogram_counts_every_value_once():
    values = torch.tensor([0.0, 1e-9, 0.5, 5.0, 50.0, 1e9, math.inf])
    assert aggregates.log_histogram(values, -1, 2, bins=3) == [3, 1, 3]


def test_histograms_of_known_outputs():
    told = aggregates.histograms(torch.zeros(5), torch.zeros(5), 4)
    assert told["loss"]["counts"][0] == told["entropy"]["counts"][0] == 5
    even = aggregates.histograms(torch.full((5,), math.log(4)), torch.full((5,), math.log(4)), 4)
    assert even["entropy"]["counts"][-1] == 5  # ln K is the upper end
    low, high = even["loss"]["low"], even["loss"]["high"]
    place = int((math.log10(math.log(4)) - low) / (high - low) * aggregates.BINS)
    assert even["loss"]["counts"][place] == 5


def test_flow_counts_paths():
    true, middle, now = torch.tensor([8, 8, 8, 3]), torch.tensor([3, 3, 9, 5]), torch.tensor([3, 3, 3, 3])
    assert aggregates.flow(true, middle, now) == [[8, 3, 3, 2], [3, 5, 3, 1], [8, 9, 3, 1]]
    assert aggregates.flow(true, None, now) == [[8, None, 3, 3], [3, None, 3, 1]]


def test_plane_finds_the_means_and_turns_onto_another():
    draw = np.random.default_rng(0)
    centres = np.array([[4.0, 0], [-4, 0], [0, 2], [0, -2]])
    labels = np.arange(200) % 4
    flat = centres[labels] + 0.01 * draw.normal(size=(200, 2))
    basis, _ = np.linalg.qr(draw.normal(size=(10, 2)))
    features = torch.tensor(flat @ basis.T)
    found = aggregates.plane(features, torch.tensor(labels))
    wanted = flat - flat.mean(0)
    wanted /= np.sqrt((wanted**2).sum(1).mean())
    assert np.allclose(np.abs(found), np.abs(wanted), atol=1e-3)  # up to the signs of the axes
    assert np.allclose(aggregates.plane(features, torch.tensor(labels), onto=wanted @ [[0, 1], [1, 0]]),
                       wanted @ [[0, 1], [1, 0]], atol=1e-6)  # fmt: skip


def test_evaluation_keeps_nothing_of_a_single_forgotten_image(run):
    body = artifacts.read_body(run / "eval.json")
    number = body["request"]["forget"]
    assert sum(path[3] for path in body["aggregates"]["flow"]) == number
    for groups in body["aggregates"]["histograms"].values():
        assert sum(groups["forgotten"]["loss"]["counts"]) == number

    def lists(value):
        if isinstance(value, list):
            yield value
        for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            yield from lists(part)

    for file in ("eval.json", "finetune.json"):
        assert all(len(found) != number for found in lists(json.loads((run / file).read_text())))


def test_flow_is_short_where_the_labels_were_not_handed_over(run, undrawn):
    (run / "labels.safetensors").unlink()
    line = pipeline(run)
    line.build(["eval"], force=True)
    flow = artifacts.read_body(run / "eval.json")["aggregates"]["flow"]
    assert {path[1] for path in flow} == {None}
    assert "not at hand" in page(run)


# -- purge ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [[], ["--original", "--oracle"]])
def test_purge_deletes_traces_and_all_stays_fresh(run, flags, undrawn):
    page(run, "--show-forgotten")
    (run / "similarity.answers.jsonl").write_text(json.dumps({"key": 64 * "a"}) + "\n")
    (run / "own.txt").write_text("the user's")
    digests = {".digests.npy", ".digests.inputs"}
    for name in digests:
        (run / name).write_text("{}")
    ours = run / "compare" / "1" / "megu"
    ours.mkdir(parents=True)
    for name in ("noise.safetensors", "model.safetensors"):
        shutil.copy(run / name, ours / name)
    for name in ("original.safetensors", "oracle.safetensors"):
        shutil.copy(run / name, ours.parent / name)
    (ours.parent / "megu.json").write_text("{}")
    model = (run / "model.safetensors").read_bytes()
    result = json.loads(megu(run, "purge", "--yes", "--json", *flags).stdout)
    gone = {"labels.safetensors", "noise.safetensors", "similarity.answers.jsonl", "report.html", *digests}
    gone |= {f"{folder}{flag[2:]}.safetensors" for flag in flags for folder in ("", "compare/1/")}
    gone |= {"compare/1/megu/noise.safetensors"}
    assert set(result["deleted"]) == gone
    models = {f"{folder}{name}.safetensors" for folder in ("", "compare/1/") for name in ("original", "oracle")}
    assert {*models, "compare/1/megu/model.safetensors", "compare/1/megu.json", "model.safetensors"} - gone <= {
        *result["kept"]
    }
    assert (ours.parent / "megu.json").exists()
    assert not any((run / name).exists() for name in gone)
    assert (run / "model.safetensors").read_bytes() == model
    assert (run / "own.txt").exists()
    for overrides in ([], ["eval.oracle=false"]):
        states = pipeline(run, overrides=overrides).status()
        assert {state.status for state in states.values()} <= {"fresh", "absent"}, states
        assert states["eval"].status == states["finetune"].status == "fresh"
    text = page(run)
    assert "not in the run directory any more" in text
    assert report.SHOWS_FORGOTTEN not in text
    assert json.loads(megu(run, "purge", "--yes", "--json", *flags).stdout)["deleted"] == {}  # that page stays
    megu(run, "status")
    assert not (run / ".digests.npy").exists()


def test_purge_asks_first(run, undrawn):
    for answer in ("n\n", ""):
        with pytest.raises(InputError, match="nothing was deleted"):
            megu(run, "purge", answer=answer)
    assert (run / "labels.safetensors").exists()
    assert megu(run, "purge", "--dry-run").exit_code == 0
    assert (run / "labels.safetensors").exists()
    megu(run, "purge", answer="y\n")
    assert not (run / "labels.safetensors").exists()


def test_purge_refuses_what_is_unfinished_or_in_use(run):
    with filelock.FileLock(run / ".lock"), pytest.raises(ArtifactError, match="another megu process"):
        megu(run, "purge", "--yes")
    (run / "eval.json").unlink()
    with pytest.raises(ArtifactError, match=r"nothing was deleted: eval\.json is not there"):
        megu(run, "purge", "--yes")
    assert (run / "labels.safetensors").exists()
    megu(run, "purge", "--yes", "--force")
    assert not (run / "labels.safetensors").exists()


def test_purge_needs_neither_data_nor_config_nor_drawing(run, monkeypatch):
    def refuse(*_):
        raise AssertionError("purge looked at data, or drew")

    page(run, "--show-forgotten")
    monkeypatch.setattr(RunInputs, "data", property(refuse))
    monkeypatch.setattr(drawing, "drawn", refuse)
    (run / "megu.yaml").unlink()
    megu(run, "purge", "--yes", "-o", str(run))
    assert not any((run / name).exists() for name in ("labels.safetensors", "noise.safetensors", "report.html"))


def test_purge_deletes_no_file_that_megu_did_not_write(run):
    mine = {"labels.safetensors": b"mine" * 50, "report.html": b"<html>my own</html>", "train.checkpoint": b"weights"}
    for name, content in mine.items():
        (run / name).write_bytes(content)
    megu(run, "purge", "--yes", "--force")
    assert all((run / name).read_bytes() == content for name, content in mine.items())


@pytest.mark.parametrize("form", ["html", "md", "json"])
def test_a_report_of_the_users_is_not_replaced(run, undrawn, form):
    file = run / f"report.{form}"
    file.write_text("mine")
    for more in ([], ["--dry-run"]):
        with pytest.raises(ArtifactError, match="was not written by megu"):
            megu(run, "report", "--format", form, *more)
    assert file.read_text() == "mine"
    file.unlink()
    for _ in range(2):  # one of megu's is
        megu(run, "report", "--format", form)
    file.rename(run / "elsewhere")
    file.symlink_to(run / "elsewhere")
    with pytest.raises(ArtifactError, match="symbolic link"):
        megu(run, "report", "--format", form)


# -- in a browser --------------------------------------------------------------------------------------------------

# The page in a frame of the wanted width (a browser's window has a least width), and what a script sees of it.
_PROBE = """<!DOCTYPE html><body style="margin:0">
<iframe style="border:0;width:{width}px;height:900px" srcdoc="{page}"></iframe>
<script>
const PICTURES = "figure picture img";
addEventListener("load", () => {{
  const view = frames[0], page = view.document;
  const told = {{dark: view.matchMedia("(prefers-color-scheme: dark)").matches, width: view.innerWidth,
                wide: page.documentElement.scrollWidth, images: []}};
  for (const image of page.querySelectorAll(PICTURES)) {{
    const canvas = document.createElement("canvas");
    canvas.width = canvas.height = 300;
    const context = canvas.getContext("2d");
    context.drawImage(image, 0, 0, 300, 300);
    const pixels = context.getImageData(0, 0, 300, 300).data;
    const colours = new Set();
    let inked = 0;
    for (let i = 0; i < pixels.length; i += 4) if (pixels[i + 3] > 40) {{
      inked++; colours.add((pixels[i] >> 4 << 8) | (pixels[i + 1] >> 4 << 4) | pixels[i + 2] >> 4);
    }}
    const box = image.getBoundingClientRect();
    told.images.push({{inked, colours: colours.size, width: box.width, height: box.height,
                      ratio: image.naturalWidth / image.naturalHeight}});
  }}
  document.body.innerHTML = "<pre>@@" + JSON.stringify(told) + "@@</pre>";
}});
</script></body>"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine; CI installs it")
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 390])
def test_browser_draws_every_figure(whole, tmp_path, width, dark):
    _, text = whole
    probed = tmp_path / "probed.html"
    probed.write_text(_PROBE.format(width=width, page=html.escape(text)), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
             "--disable-background-networking", "--disable-component-update", "--disable-sync",
             f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1280,900",
             f"--blink-settings=preferredColorScheme={0 if dark else 1}"]  # fmt: skip
    done = subprocess.run(
        [str(CHROMIUM), *flags, "--dump-dom", Path(probed).as_uri()],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    told = json.loads(html.unescape(done.stdout.split("@@")[1]))
    assert told["dark"] is dark
    assert told["width"] == width
    assert told["wide"] <= width  # nothing sticks out sideways
    assert len(told["images"]) == text.count("<picture>")
    for image in told["images"]:
        assert image["inked"] > 900  # more than one of a hundred pixels is drawn on
        assert image["colours"] > 5
        assert 200 < image["width"] <= width
        assert image["width"] / image["height"] == pytest.approx(image["ratio"], rel=0.02)  # not distorted
    assert (told["images"][0]["ratio"] < 1.5) is (width <= 640)  # a phone has a drawing of its own
