#!/usr/bin/env bash
# The set-up and the whole test suite: CPU only, no key, no network beyond the packages.
#   bash tests/run.sh [PYTEST ARGUMENTS]
set -euo pipefail
cd "$(dirname "$0")/.."
. tests/setup.sh
"$python" -m pip install -q --disable-pip-version-check -r tests/requirements-trl.txt
export CUDA_VISIBLE_DEVICES= HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 OMP_NUM_THREADS=1
exec "$python" -m pytest --doctest-modules exprl.py judge_prompts.py tests "$@"
