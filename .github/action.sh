#!/usr/bin/env bash
# What action.yml runs. It works in any CI, and by hand:
#
#   MEGU_CONFIG=megu.yaml bash .github/action.sh key     print the cache key of a run directory
#   MEGU_CONFIG=megu.yaml bash .github/action.sh run     megu run, then the report as the summary of the job
#
# Read from the environment:
#   MEGU_CONFIG     the config
#   MEGU_OUT        the run directory; default: the config's `out`
#   MEGU_SET        settings, one KEY=VALUE per line
#   MEGU_REQUIRE    requirements, one NAME<=NUMBER per line; exit code 3 unless all are met
#   GITHUB_OUTPUT, GITHUB_STEP_SUMMARY: files of GitHub Actions; without them the text goes to stdout
set -euo pipefail

config=${MEGU_CONFIG:-megu.yaml}
output=${GITHUB_OUTPUT:-/dev/stdout}
summary=${GITHUB_STEP_SUMMARY:-/dev/stdout}

# One option per line of a text, in the array `options`.
options=()
add() {
  local line
  while IFS= read -r line; do
    line=$(printf '%s' "$line" | sed 's/^[[:space:]]*//; s/[[:space:]]*$//')
    [ -z "$line" ] || options+=("$1" "$line")
  done <<< "$2"
}
add --set "${MEGU_SET:-}"
[ -z "${MEGU_OUT:-}" ] || options+=(-o "$MEGU_OUT")
settings=("${options[@]}")
add --require "${MEGU_REQUIRE:-}"

case ${1:-} in
  key)
    # The versions, the settings and the files that the settings name: the run directory of another key is of no use.
    python - "$config" >> "$output" <<'PYTHON'
import hashlib
import importlib.metadata
import os
import platform
import sys
from pathlib import Path

from megu_cli.config import load_config


def files(value):
    """All files that the settings name."""
    if isinstance(value, dict):
        return [file for item in value.values() for file in files(item)]
    if isinstance(value, list):
        return [file for item in value for file in files(item)]
    return [value] if isinstance(value, Path) and value.is_file() else []


overrides = [line.strip() for line in os.environ.get("MEGU_SET", "").split("\n")]
settings = load_config(Path(sys.argv[1]), [line for line in overrides if line])
total = hashlib.sha256(settings.model_dump_json(exclude={"out"}).replace(str(Path.cwd()), ".").encode())
for file in files(settings.model_dump(exclude={"out"})):
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            total.update(block)
versions = [importlib.metadata.version(name) for name in ("megu-cli", "torch")]
prefix = "-".join(["megu", *versions, platform.system(), platform.machine()]).replace("+", "_")
print(f"prefix={prefix}-")
print(f"key={prefix}-{total.hexdigest()[:32]}")
PYTHON
    ;;
  run)
    code=0
    megu run -c "$config" "${options[@]}" || code=$?
    # 3: measured, but a requirement is not met. The report says by how much.
    if [ "$code" -eq 0 ] || [ "$code" -eq 3 ]; then
      file=$(megu report -c "$config" "${settings[@]}" --format md --json |
        python -c 'import json, sys; print(json.load(sys.stdin)["file"])')
      cat "$file" >> "$summary"
      printf 'directory=%s\n' "$(dirname "$file")" >> "$output"
    fi
    exit "$code"
    ;;
  *)
    echo "usage: action.sh key|run" >&2
    exit 2
    ;;
esac
