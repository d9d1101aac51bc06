#!/usr/bin/env bash
# Installs the packages and runs the tests. They need neither a GPU nor a key.
#   bash tests/run.sh [PYTEST ARGUMENTS]            everything but the stress tests (5 to 9 minutes)
#   bash tests/run.sh --stress [PYTEST ARGUMENTS]   the stress tests (10 to 30 minutes)
set -euo pipefail
cd "$(dirname "$0")/.."
. tests/setup.sh
"$python" -m pip install -q --disable-pip-version-check -r tests/tools/requirements-trl.txt
export CUDA_VISIBLE_DEVICES= HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 OMP_NUM_THREADS=1
if [ "${1:-}" = --stress ]; then
  shift
  # tests/unit stands last: its conftest.py, which its tests import, must be loaded last.
  exec "$python" -m pytest -m stress tests/stress tests/unit "$@"
fi
exec "$python" -m pytest -m "not stress" --doctest-modules \
  exprl.py judge_prompts.py tests/tools tests/toy tests/unit "$@"
