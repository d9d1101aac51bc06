# Sourced by train_small.sh and tests/run.sh from the top folder: sets $python to an interpreter that
# has the packages of requirements.txt. An active virtual or conda environment is used as it is, and
# only what it lacks is installed there; otherwise .venv is made.
if [ -n "${VIRTUAL_ENV:-}" ] || { [ -n "${CONDA_PREFIX:-}" ] && [ "${CONDA_DEFAULT_ENV:-base}" != base ]; }; then
  python=$(command -v python) || { echo "set-up: the active environment has no python: deactivate it" >&2; exit 1; }
  wanted=$("$python" -c '
import importlib.metadata, re
for line in open("requirements.txt"):
    try:
        importlib.metadata.version(re.match(r"[\w-]+", line)[0])
    except importlib.metadata.PackageNotFoundError:
        print(line, end="")')
  [ -z "$wanted" ] || echo "set-up: installing into the active environment:" $wanted
  [ -z "$wanted" ] || echo "$wanted" | "$python" -m pip install -q -r /dev/stdin
else
  python=$PWD/.venv/bin/python
  if command -v flock >/dev/null; then
    exec 9>.venv.lock
    flock -w 1800 9  # another set-up may be under way
  fi
  if ! cmp -s requirements.txt .venv/installed.txt; then
    base=$(command -v python3 || command -v python) || { echo "set-up: install Python 3.10 or later" >&2; exit 1; }
    "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
      || { echo "set-up: $base is older than Python 3.10" >&2; exit 1; }
    echo "set-up: installing the packages of requirements.txt into .venv (some minutes, once)"
    "$base" -m venv .venv
    "$python" -m pip install -q --disable-pip-version-check -r requirements.txt
    cp requirements.txt .venv/installed.txt
  fi
  exec 9>&-
fi
