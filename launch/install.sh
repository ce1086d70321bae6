# Sourced by the other scripts: makes .venv beside this folder's parent and installs what is asked for, once.
#   fac_install EXTRAS FILE...     EXTRAS: pyproject extras ("" for none); FILE: lists of data packages (files only, no dependencies)
# A stamp in .venv holds the digest of everything that was installed from, so that a second call does nothing.
# With a GPU or TPU the matching jax comes along: the same command then uses it.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

source "$ROOT/launch/allocator.sh"
export TOKENIZERS_PARALLELISM=true

fac_accelerator() {
  if [ -n "${FAC_ACCELERATOR+set}" ]; then echo "$FAC_ACCELERATOR"
  elif command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; then echo cuda
  elif compgen -G "/dev/accel*" >/dev/null || compgen -G "/dev/vfio/[0-9]*" >/dev/null; then echo tpu
  fi
}

fac_install() {
  local extras="$1"; shift
  local python="${PYTHON:-python3}" accelerator stamp wanted
  accelerator="$(fac_accelerator)"
  [ -n "$accelerator" ] && extras="${extras:+$extras,}$accelerator"
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "fac_jax needs Python 3.11 or newer, but $python is $("$python" --version 2>&1); set PYTHON=/path/to/python3.11" >&2
    return 1
  fi
  [ -x "$ROOT/.venv/bin/python" ] || "$python" -m venv "$ROOT/.venv"
  stamp="$ROOT/.venv/installed-${extras//,/-}"
  wanted="$(cat "$ROOT/pyproject.toml" "$@" | sha256sum)"
  if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "installing fac_jax${extras:+[$extras]} into .venv" >&2
    "$ROOT/.venv/bin/python" -m pip install --quiet --disable-pip-version-check \
      --constraint "$ROOT/launch/constraints.txt" --editable "$ROOT${extras:+[$extras]}"
    local list
    for list in "$@"; do
      "$ROOT/.venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --requirement "$list"
    done
    echo "$wanted" > "$stamp"
  fi
}

# What the benchmarks measure against, in an environment of its own, .venv/peers; its interpreter is then $PEERS_PYTHON.
fac_install_peers() {
  fac_install_apart peers bench-peers
  PEERS_PYTHON="$ROOT/.venv/peers/bin/python"
}

# The programs that exports are for, in .venv/loaders (1.7 GB); its interpreter is then $LOADERS_PYTHON.
fac_install_loaders() {
  fac_install_apart loaders export-loaders
  LOADERS_PYTHON="$ROOT/.venv/loaders/bin/python"
}

# fac_install_apart NAME LIST: the environment .venv/NAME, once, from this folder's LIST.txt and LIST-bare.txt. Those of the
# second would bring gigabytes that nothing here uses, or do not agree with the first: they come without what they ask for.
fac_install_apart() {
  local apart="$ROOT/.venv/$1" list="$ROOT/launch/$2.txt" bare="$ROOT/launch/$2-bare.txt" wanted
  wanted="$(cat "$list" "$bare" | sha256sum)"
  if [ "$(cat "$apart/installed" 2>/dev/null)" != "$wanted" ]; then
    echo "installing launch/$2.txt into .venv/$1" >&2
    "${PYTHON:-python3}" -m venv --clear "$apart"
    "$apart/bin/python" -m pip install --quiet --disable-pip-version-check --requirement "$list"
    "$apart/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --requirement "$bare"
    # A torchvision that does not belong to this torch breaks every import of transformers; nothing here needs one.
    "$apart/bin/python" -m pip uninstall --quiet --yes torchvision
    echo "$wanted" > "$apart/installed"
  fi
}

# The TPU compiler, which needs no TPU, in a folder of its own, .venv/libtpu: beside jax it would greet every start on a CPU.
fac_install_libtpu() {
  local wanted="libtpu==0.0.42.*"
  LIBTPU_PATH="$ROOT/.venv/libtpu"
  if [ "$(cat "$LIBTPU_PATH/installed" 2>/dev/null)" != "$wanted" ]; then
    echo "installing the TPU compiler into .venv/libtpu" >&2
    rm -rf "$LIBTPU_PATH"
    "$ROOT/.venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --target "$LIBTPU_PATH" "$wanted"
    echo "$wanted" > "$LIBTPU_PATH/installed"
  fi
}
