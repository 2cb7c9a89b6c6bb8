# Sourced by quickstart.sh, test.sh and .ci/run. Creates the virtual environment and installs this project in it.
#
#   prepare_environment [EXTRAS]    EXTRAS: names from setup.py's extras, e.g. dev or dev,parity
#
# Sets $root (the checkout) and $python (the environment's interpreter). Environment variables:
#   PYTHON          the interpreter of the environment      (default: the first that is 3.11 or newer)
#   MOE_JAX_VENV    the folder of the environment           (default: .venv in the checkout)

root="$(CDPATH="" cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="${MOE_JAX_VENV:-$root/.venv}"
case "$venv" in /*) ;; *) venv="$PWD/$venv" ;; esac
python="$venv/bin/python"

say() { echo "[moe_jax] $*"; }
fail() {
  echo "[moe_jax] error: $*" >&2
  exit 1
}

# A pyenv shim may exist and still fail, so every candidate is run.
is_recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

# Finds the first recent interpreter that can create environments (Debian ships that part as a separate package).
find_python() {
  local candidate without_venv=""
  for candidate in "${PYTHON:-}" python3.13 python3.12 python3.11 python3; do
    if [ -z "$candidate" ] || ! is_recent "$candidate"; then continue; fi
    if "$candidate" -c 'import ensurepip, venv' >/dev/null 2>&1; then
      base_python="$candidate"
      return
    fi
    without_venv="${without_venv:-$candidate}"
  done
  if [ -n "$without_venv" ]; then
    local version
    version="$("$without_venv" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
    fail "Python $version ($without_venv) cannot make virtual environments; on Debian or Ubuntu: apt install python$version-venv"
  fi
  fail "no Python 3.11 or newer found (tried ${PYTHON:+$PYTHON, }python3.13, python3.12, python3.11, python3); install one, or set PYTHON to its path"
}

make_venv() {
  if [ -x "$python" ] && "$python" -m pip --version >/dev/null 2>&1; then
    is_recent "$python" || fail "the environment $venv has a Python older than 3.11; remove it, or set MOE_JAX_VENV to another folder"
    return
  fi
  if [ -n "${PYTHON:-}" ] && ! is_recent "$PYTHON"; then
    say "PYTHON=$PYTHON does not run or is older than 3.11; looking for another"
  fi
  find_python
  say "making the environment $venv with $("$base_python" --version) ($base_python)"
  "$base_python" -m venv "$venv" || fail "$base_python -m venv $venv failed, see above"
}

# There is one stamp per installed extra, and `base` for the package itself. Each records what was installed from where.
is_installed() {
  local part
  for part in base ${1//,/ }; do
    if [ "$(cat "$venv/.moe_jax-$part" 2>/dev/null)" != "$2" ]; then return 1; fi
  done
}

prepare_environment() {
  local extras="${1:-}" wanted part
  make_venv
  wanted="$(cat "$root/setup.py" "$root/pyproject.toml" | cksum) $root"
  if is_installed "$extras" "$wanted"; then return; fi
  say "installing moe_jax${extras:+[$extras]} into $venv (a few minutes the first time)"
  (cd "$root" && "$python" -m pip install --quiet --disable-pip-version-check -e ".${extras:+[$extras]}") ||
    fail "pip could not install moe_jax${extras:+[$extras]}, see above"
  for part in base ${extras//,/ }; do
    echo "$wanted" >"$venv/.moe_jax-$part"
  done
}
