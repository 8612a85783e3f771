"""The names of all files in a run directory; no other module spells one."""

from __future__ import annotations

# Artifacts of the stages: see `megu_cli.pipeline.stages`.
ORIGINAL = "original.safetensors"
ORACLE = "oracle.safetensors"
SIMILARITY = "similarity.json"
TRANSITION = "transition.safetensors"
LABELS = "labels.safetensors"
NOISE = "noise.safetensors"
FINETUNE = "finetune.json"
EVALUATION = "eval.json"
# The unlearned model: weights, and a file or directory in the form of the user's checkpoint.
UNLEARNED = "model"
WEIGHTS = f"{UNLEARNED}.safetensors"
# Files beside the artifacts.
ANSWERS = "similarity.answers.jsonl"
HEAT_MAP = "similarity.png"
LOG = "runs.jsonl"
FILE_DIGESTS = ".digests.npy"
INPUT_DIGESTS = ".digests.inputs"
LOCK = ".lock"
# The deletion record: see `megu_cli.record`.
FINGERPRINTS = "forgotten.json"
RECORD = "record.json"
SALT = "record.salt"
# The list that stands for several requests of a ledger.
REQUESTS = "requests.csv"
REPORT = "report"
COMPARISON = "compare.json"
COMPARE_FOLDER = "compare"
# The folder of the tracker that writes files.
TENSORBOARD = "tensorboard"


def resume_file(stage: str) -> str:
    """Name of the state of a stage that is under way; the file is deleted when the stage is done."""
    return f"{stage}.checkpoint"
