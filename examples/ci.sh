#!/usr/bin/env bash
# The five stages as five CI jobs: each in its own directory, handed nothing but the artifacts it reads.
# The last is a gate: it exits with 3 unless every requirement is met.
#
#   bash examples/ci.sh [CONFIG]     default: scikit-learn's digits, forget the class 8
#
# With ORACLE=1 in the environment it retrains without the forget set as well, and the gate requires the verdict.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
config=$(realpath "${1:-$here/digits/megu.yaml}")
jobs=$(mktemp -d)
trap 'rm -rf "$jobs"' EXIT

# A job: an empty directory, the artifacts of earlier jobs copied in, one command.
job() {
  local stage=$1 takes=$2
  shift 2
  mkdir "$jobs/$stage"
  for artifact in $takes; do cp "$(find "$jobs" -name "$artifact" | head -n 1)" "$jobs/$stage/"; done
  echo "== megu $stage $*"
  megu "$stage" -c "$config" -o "$jobs/$stage" "$@"
}

# What a user already has: a trained checkpoint. (Here it is trained first.)
job train ""

job similarity ""
job labels     "original.safetensors transition.safetensors"
job noise      "original.safetensors labels.safetensors"
job finetune   "original.safetensors transition.safetensors labels.safetensors noise.safetensors"

handed="original.safetensors model.safetensors finetune.json"
gate=(--require 'forget_test_acc<=0.02' --require 'retain_test_acc>=0.95')
if [ -n "${ORACLE:-}" ]; then  # without a retrained model the verdict is undecided
  megu train --retain-only -c "$config" -o "$jobs/train"
  handed+=" oracle.safetensors"
  gate+=(--require verdict=forgotten)
fi
job eval       "$handed" "${gate[@]}"
