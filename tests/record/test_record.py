"""`megu record` and `megu verify`: what the record says, what it keeps to itself, and that no manipulation passes."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jsonschema
import pytest
import torch
from conftest import Megu, write_config
from safetensors.torch import load_file

from megu_cli.config import load_config
from megu_cli.pipeline.context import RunContext
from megu_cli.pipeline.engine import Pipeline
from megu_cli.record import collect, envelope, fingerprints, statement

pytest.importorskip("securesystemslib", reason="the extra `sign`, which is a part of `test`")
serialization = pytest.importorskip("cryptography.hazmat.primitives.serialization")
ed25519 = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ed25519")

SCHEMA = Path(__file__).parents[2] / "docs" / "schemas" / statement.SCHEMA
REFERENCE = "ticket 4711 of J. Doe"
DATES = ["--received", "2026-11-02", "--due", "2026-12-02", "--done", "2026-11-25"]


def write_key(folder: Path, name: str) -> Path:
    key = ed25519.Ed25519PrivateKey.generate()
    form = serialization.PrivateFormat.PKCS8
    (folder / f"{name}.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
    )
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    (folder / f"{name}.pub").write_bytes(public)
    return folder / f"{name}.pem"


@pytest.fixture(scope="module")
def made_folder(finished_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a `.pth` of the user's that forgets three listed images; not to be changed."""
    folder = tmp_path_factory.mktemp("recorded")
    weights = load_file(finished_folder / "run" / "original.safetensors")
    torch.save({"epoch": 2, "model": dict(weights)}, folder / "photos_of_anna.pth")
    file = write_config(
        folder,
        model={"checkpoint": "photos_of_anna.pth", "preflight": False},
        forget={"samples": "delete.csv"},
        record={"fingerprints": "lookalikes"},
    )
    work = RunContext.open(load_config(file, ["forget={classes: ['8']}"]))
    (folder / "delete.csv").write_text("path\n" + "\n".join(work.inputs.data.train.names[i] for i in (1, 5, 8)) + "\n")
    pipeline = Pipeline(RunContext.open(load_config(file)))
    pipeline.context.directory.out.mkdir()
    pipeline.run()
    fingerprints.keep(pipeline.context)
    write_key(folder, "key")
    write_key(folder, "other")
    return folder


@dataclass(frozen=True)
class Made:
    folder: Path
    megu: Megu

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def file(self) -> Path:
        return self.run / "record.json"

    def record(self, *more: object, key: str | None = "key.pem", request: str = "DSR-17"):
        sign = ["--sign", self.folder / key] if key else []
        config = ["-c", self.folder / "megu.yaml"]
        return self.megu("record", *config, "--request", request, "--reference", REFERENCE, *DATES, *sign, *more)

    def verify(self, *more: object, out: bool = True, key: str | None = "key.pub"):
        checked = ["--key", self.folder / key] if key else []
        return self.megu("verify", self.file, *(["-o", self.run] if out else []), *checked, *more)

    @property
    def plain(self) -> dict:
        return json.loads(envelope.read(self.file).payload)

    def rewrite(self, change: Callable[[dict], object], key: str = "key.pem") -> None:
        """Change the statement, and sign it anew: as the owner of the key could."""
        plain = self.plain
        change(plain)
        self.file.write_bytes(envelope.sealed(plain, self.folder / key).written)


@pytest.fixture
def made(made_folder: Path, tmp_path: Path, megu: Megu) -> Made:
    shutil.copytree(made_folder, tmp_path / "work")
    return Made(tmp_path / "work", megu)


@pytest.fixture
def recorded(made: Made) -> Made:
    assert made.record("-q").code == 0
    return made


def test_a_record_holds_and_the_same_inputs_give_the_same_bytes(made):
    answer = made.record("--json")
    assert answer.code == 0, answer.err
    first = made.file.read_bytes()
    assert made.record().code == 0
    assert made.file.read_bytes() == first
    answer = made.verify("--list", made.folder / "delete.csv", "--json")
    assert answer.code == 0, answer.err
    assert answer.json["not_checked"] == []
    assert {"signature", "form", "list delete.csv", "figures"} <= set(answer.json["held"])


def test_a_record_tells_digests_of_every_file_and_nothing_of_the_person(recorded):
    plain, payload = recorded.plain, envelope.read(recorded.file).payload.decode()
    predicate = plain["predicate"]
    # The file that is deployed, and all that stages wrote.
    assert {one["name"] for one in plain["subject"]} == {"model.safetensors", "model.pth"}
    left = {"runs.jsonl", ".digests.npy", ".digests.inputs", "record.json", "record.salt"}
    assert set(predicate["files"]) == {p.name for p in recorded.run.iterdir()} - left
    assert predicate["figures"]["unlearned"]["retain_test_acc"] >= 0
    assert predicate["figures"]["request"] == {"forget": 3, "kind": "samples", "retain": 397}
    assert predicate["forgotten"]["images"] == len(predicate["forgotten"]["lookalikes"]) == 3
    assert predicate["versions"]["torch"] == torch.__version__
    names = (recorded.folder / "delete.csv").read_text().split()[1:]
    for secret in (str(recorded.folder), "anna", "4711", "J. Doe", "delete.csv", *names):
        assert secret not in payload
    jsonschema.validate(plain, json.loads(SCHEMA.read_text()))


def test_the_schema_in_the_docs_is_that_of_the_code():
    assert json.loads(SCHEMA.read_text()) == json.loads(json.dumps(statement.schema())), "see tests/test_record.py"


def test_figures_have_the_floor_and_the_verdict_and_name_no_class():
    own = {"js_divergence": 0.1, "agreement": None}
    evaluation = {
        "unlearned": {"forget_train_acc": 0.5},
        "comparison": {"unlearned": own, "mask": own},
        "intervals": {"unlearned": {"mia_loss_auc": [0.4, 0.6]}},
        "floor": {"js_divergence": 0.05},
        "verdict": {"verdict": "not forgotten", "reason": "Anna is known.", "checks": [{"name": "depth", "ok": False}]},
        "request": {"kind": "classes", "classes": ["Anna"], "forget": 3},
        "per_class": {"unlearned": {"train": {"Anna": 1.0}}},
        "time": {"finetune_s": 1.5},
    }
    assert collect.figures(evaluation) == {
        "request": {"kind": "classes", "forget": 3},
        "unlearned": {"forget_train_acc": 0.5},
        "comparison": {"unlearned": own, "mask": own},
        "intervals": {"unlearned": {"mia_loss_auc": [0.4, 0.6]}},
        "floor": {"js_divergence": 0.05},
        "verdict": {"verdict": "not forgotten", "checks": [{"name": "depth", "ok": False}]},
    }


def predicate(change: Callable[[dict], object]) -> Callable[[Made], None]:
    return lambda made: made.rewrite(lambda plain: change(plain["predicate"]))


def edited(name: str, old: bytes, new: bytes) -> Callable[[Made], None]:
    def change(made: Made) -> None:
        path = made.run / name
        content = path.read_bytes()
        assert old in content
        path.write_bytes(content.replace(old, new, 1))

    return change


def flipped(name: str) -> Callable[[Made], None]:
    def change(made: Made) -> None:
        path = made.run / name
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)

    return change


def in_envelope(change: Callable[[dict], object]) -> Callable[[Made], None]:
    def written(made: Made) -> None:
        plain = json.loads(made.file.read_text())
        change(plain)
        made.file.write_text(json.dumps(plain))

    return written


def forged(plain: dict) -> None:
    payload = base64.b64decode(plain["payload"]).replace(b'"done":"2026-11-25"', b'"done":"2026-11-05"')
    plain["payload"] = base64.b64encode(payload).decode()


MANIPULATIONS: dict[str, tuple[Callable[[Made], object], str]] = {
    "a date, after the signature": (in_envelope(forged), "the signature does not fit the content"),
    "the signature taken off": (in_envelope(lambda e: e["signatures"].clear()), "it is not signed"),
    "signed by another": (lambda m: m.rewrite(lambda p: None, "other.pem"), "signed with another key than key.pub"),
    "another payload type": (in_envelope(lambda e: e.update(payloadType="text/plain")), "payloadType is 'text/plain'"),
    "another predicate": (lambda m: m.rewrite(lambda p: p.update(predicateType="urn:x")), "predicateType: input"),
    "a key that is unknown": (predicate(lambda p: p.update(approved=True)), "predicate.approved: extra inputs"),
    "done before received": (predicate(lambda p: p["requests"][0].update(done="2026-01-01")), "done lies before"),
    "limits taken out": (predicate(lambda p: p["does_not_prove"].pop()), "does_not_prove is not the text"),
    "a better figure": (
        predicate(lambda p: p["figures"]["unlearned"].update(retain_test_acc=1.0)),
        "figures.unlearned.retain_test_acc: the record says 1.0, the run directory",
    ),
    "another setting": (
        predicate(lambda p: p["settings"]["finetune"]["finetune"].update(lr=0.5)),
        "settings.finetune.finetune.lr: the record says 0.5, the run directory 'auto'",
    ),
    "another version": (
        predicate(lambda p: p["versions"].update(torch="9.9")), "versions.torch: the record says '9.9'"
    ),
    "another parent": (
        predicate(lambda p: p["parent"]["files"].update({"checkpoint.pth": "0" * 64})), "parent.files.checkpoint.pth"
    ),
    "an image less": (
        predicate(lambda p: (p["forgotten"]["image_digests"].pop(), p["forgotten"].update(images=2))),
        "forgotten.images: the record says 2, the run directory 3",
    ),
    "another list": (
        predicate(lambda p: p["requests"][0].update(deletion_list="0" * 64)), "requests.DSR-17: its list or names"
    ),
    "an item less": (predicate(lambda p: p["requests"][0]["items"].pop()), "requests.DSR-17.items: the record has 2"),
    "a file left out": (predicate(lambda p: p["files"].pop("labels.safetensors")), "the record leaves out labels"),
    "a file outside": (
        predicate(lambda p: p["files"].update({"../megu.yaml": "0" * 64})), "files.'../megu.yaml': it is no file of"
    ),
    "a subject of its own": (
        lambda m: m.rewrite(lambda p: p["subject"][0]["digest"].update(sha256="0" * 64)),
        "subject model.pth and files give different digests",
    ),
    "the deployed model": (flipped("model.pth"), "model.pth is not the file of the record"),
    "the weights": (flipped("model.safetensors"), "model.safetensors is not the file of the record"),
    "the evaluation": (edited("eval.json", b'"retain"', b'"Retain"'), "eval.json is not the file of the record"),
    "the model deleted": (lambda m: (m.run / "model.pth").unlink(), "model.pth is not there"),
}  # fmt: skip


@pytest.mark.parametrize("name", MANIPULATIONS)
def test_a_manipulation_is_refused_with_what_is_wrong(recorded, name):
    manipulate, told = MANIPULATIONS[name]
    manipulate(recorded)
    answer = recorded.verify("--json")
    assert answer.code == 3, answer.err
    assert any(told in fault for fault in answer.json["faults"]), answer.json["faults"]
    assert told in answer.err.replace("\n  ", " ")


def test_another_list_or_salt_is_refused(recorded):
    (recorded.folder / "delete.csv").write_text("path\ntrain/0\n")
    answer = recorded.verify("--list", recorded.folder / "delete.csv")
    assert answer.code == 3
    assert "delete.csv is not a list of this record" in answer.err
    (recorded.run / collect.SALT).write_bytes(b"x" * 32)
    answer = recorded.verify()
    assert answer.code == 3
    assert "it is not the salt of this record" in answer.err


@pytest.mark.parametrize("content", [b"", b"{}", b"\x00\xff", b'{"payload": "?", "payloadType": "", "signatures": []}'])
def test_what_is_no_record_cannot_be_read(recorded, content):
    recorded.file.write_bytes(content)
    answer = recorded.verify()
    assert answer.code == 2
    assert "is no record" in answer.err


def test_an_unsigned_record_says_so(made):
    answer = made.record(key=None)
    assert answer.code == 0
    assert "the record is not signed" in answer.err
    answer = made.verify("--json", key=None)
    assert answer.code == 0
    assert any("not signed" in note for note in answer.json["not_checked"])
    assert made.verify().code == 3


def test_a_record_is_of_the_request_that_the_run_was_made_for(made):
    with (made.folder / "delete.csv").open("a") as stream:
        stream.write("train/0\n")
    answer = made.record()
    assert answer.code == 2
    assert "made for another request" in answer.err
    answer = made.record(request="j.doe@example.org")
    assert answer.code == 2
    assert "not a name or an address" in answer.err


def test_a_record_replaces_no_file_of_the_user(made):
    mine = made.folder / "mine.json"
    mine.write_text("{}")
    answer = made.record("--to", mine)
    assert answer.code == 2
    assert "was not written by megu" in answer.err
    assert mine.read_text() == "{}"


def test_a_purge_leaves_the_record_whole(recorded):
    assert recorded.megu("purge", "-c", recorded.folder / "megu.yaml", "--yes", "-q").code == 0
    answer = recorded.verify("--json")
    assert answer.code == 0, answer.err
    assert "labels.safetensors is not there; `megu purge` deletes it" in answer.json["not_checked"]


@pytest.mark.slow
def test_a_second_computation_gives_the_same_bytes_or_names_the_file(recorded):
    rerun = ["--rerun", "-c", recorded.folder / "megu.yaml", "-q"]
    answer = recorded.verify(*rerun)
    assert answer.code == 0, answer.err
    assert "holds: second computation" in answer.out
    answer = recorded.verify(*rerun, "--set", "finetune.lr=0.01")
    assert answer.code == 3
    assert "model.pth: the second computation gives other bytes" in answer.err
    assert "labels.safetensors: the second" not in answer.err
