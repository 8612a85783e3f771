"""The statement of a finished run, from its run directory alone: the same files and salt give the same bytes."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megu_cli.errors import ArtifactError, ConfigError
from megu_cli.pipeline.stages import STAGES
from megu_cli.record import fingerprints
from megu_cli.record.statement import LIMITS, Asked, Statement
from megu_cli.run import artifacts, files, reading, writing

SALT = files.SALT
_SALT_BYTES = 32
# Settings that may name a host, a folder or a person.
_PRIVATE = ("mllm.base_url", "mllm.model")
# Of eval.json: figures of each model, and what is told beside them. Names of classes and seconds are left out.
_MODELS = ("original", "mask", "unlearned", "oracle")
_TOLD = ("retrained_by", "comparison", "intervals", "floor", "verdict")
_WORD = re.compile(r"[a-z][a-z0-9_ -]{0,59}")


def read_salt(path: Path) -> bytes:
    """The salt in a file.

    Raises:
        ConfigError: It cannot be read, or is too short to keep anything secret.
    """
    try:
        salt = reading.content(path)
    except OSError as error:
        raise ConfigError(f"the salt {path} cannot be read: {error.strerror or error}") from None
    if len(salt) < 16:
        raise ConfigError(f"the salt {path} has {len(salt)} bytes", "At least 16 random ones are needed.")
    return salt


def salt_of(out: Path) -> bytes:
    """The salt of a run directory, made where there is none."""
    path = out / SALT
    if not path.exists():
        with writing.replacing(path) as temporary:
            temporary.write_bytes(os.urandom(_SALT_BYTES))
            temporary.chmod(0o600)
        path.chmod(0o600)
    return read_salt(path)


def salted(salt: bytes, text: str) -> str:
    """Digest of a text that only who has the salt can make."""
    return hmac.new(salt, text.encode(), hashlib.sha256).hexdigest()[:32]


def check_of(salt: bytes) -> str:
    """What tells a salt from another one."""
    return hashlib.sha256(b"megu deletion record\0" + salt).hexdigest()


def collect(out: Path, requests: Sequence[Asked], salt: bytes) -> Statement:
    """The statement of a run.

    Args:
        out: The run directory.
        requests: What was asked; their lists are those that the run was made with.
        salt: Of items and images.

    Raises:
        ArtifactError: The run is not finished, damaged, or its files do not belong together.
    """
    told = fingerprints.read(out)
    finetuned, judged = _metas(out)
    digests = written(out, finetuned, judged)
    model = [*finetuned["weights"], *finetuned.get("files", {})]
    found = told["fingerprints"]
    return Statement.model_validate(
        {
            "_type": "https://in-toto.io/Statement/v1",
            "predicateType": "urn:megu:deletion-record:v1",
            "subject": [{"name": name, "digest": {"sha256": digests[name]}} for name in sorted(model)],
            "predicate": {
                "requests": [request.model_dump(mode="json") for request in requests],
                "forgotten": {
                    "kind": told["kind"],
                    "images": told["images"],
                    "copies": told["copies"],
                    "of": found.get("of"),
                    "image_digests": sorted(salted(salt, f"image:{one}") for one in found.get("images", [])),
                    "copy_digests": sorted(salted(salt, f"image:{one}") for one in found.get("copies", [])),
                    "lookalikes": found.get("lookalikes", []),
                },
                "salt": {"algorithm": "HMAC-SHA256, first 16 bytes", "check": check_of(salt)},
                "parent": {
                    "files": told["parent"],
                    "weights": str(artifacts.read_body(out / files.FINETUNE)["provenance"]["parent"]),
                },
                "files": digests,
                "settings": _settings(finetuned, judged, salt),
                "versions": {"megu": str(finetuned.get("megu")), "torch": told["torch"]},
                "figures": figures(artifacts.read_body(out / files.EVALUATION)) if judged else None,
                "does_not_prove": list(LIMITS),
            },
        }
    )


def _metas(out: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The metas of finetune.json and, where it is there, eval.json.

    Raises:
        ArtifactError: They do not fit.
    """
    finetuned = artifacts.read_meta(out / files.FINETUNE, artifacts.STAGE_KEYS)
    try:
        artifacts.check_products(out, finetuned)
    except OSError as error:
        gone = Path(error.filename).name if error.filename else "a file of the model"
        raise ArtifactError(f"{gone} is not there") from None
    if not (out / files.EVALUATION).exists():
        return finetuned, None
    judged = artifacts.read_meta(out / files.EVALUATION, artifacts.STAGE_KEYS)
    if judged["inputs"].get("finetune") != finetuned["content"]:
        raise ArtifactError("eval.json is not the evaluation of this finetune.json", "Run `megu eval`.")
    return finetuned, judged


def written(out: Path, finetuned: Mapping[str, Any], judged: Mapping[str, Any] | None) -> dict[str, str]:
    """sha256 of every file that the run wrote and that no later command changes.

    Raises:
        ArtifactError: An artifact is there that the model was not made from.
    """
    lineage = {**(judged["lineage"] if judged else {}), **finetuned["lineage"]}
    names = [files.FINETUNE, fingerprints.FILE, *finetuned["weights"], *finetuned.get("files", {})]
    names += [files.EVALUATION] if judged else []
    for stage in STAGES.values():
        path = out / stage.file
        if stage.name in ("finetune", "eval") or not path.exists():
            continue
        made = artifacts.read_meta(path, artifacts.STAGE_KEYS)
        if stage.name in lineage and made.get("fingerprint") == lineage[stage.name]["fingerprint"]:
            names.append(stage.file)
        elif stage.name in lineage:
            raise ArtifactError(f"{stage.file} is not what the model was made from", "Run `megu run`.")
    return {name: artifacts.file_digest(out / name) for name in sorted(names)}


def _settings(finetuned: Mapping[str, Any], judged: Mapping[str, Any] | None, salt: bytes) -> dict[str, Any]:
    stages = {name: entry["settings"] for name, entry in finetuned["lineage"].items()}
    stages["finetune"] = finetuned["settings"]
    if judged:
        stages["eval"] = judged["settings"]
    return {
        stage: {
            key: f"salted:{salted(salt, f'setting:{value}')}" if key in _PRIVATE else value
            for key, value in settings.items()
        }
        for stage, settings in stages.items()
    }


def figures(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of an eval.json without what names a class or depends on the moment."""
    request = evaluation.get("request", {})
    numbers = {key: request[key] for key in ("kind", "forget", "retain", "already") if key in request}
    return {
        "request": numbers,
        **{model: _plain(evaluation[model]) for model in _MODELS if model in evaluation},
        **{key: _plain(evaluation[key]) for key in _TOLD if evaluation.get(key)},
    }


def _plain(value: Any) -> Any:
    """The numbers, truth values and words of megu's own in a part of eval.json; sentences are left out."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items() if key != "reason"}
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if isinstance(value, str):
        return value if _WORD.fullmatch(value) else "(left out)"
    return value
