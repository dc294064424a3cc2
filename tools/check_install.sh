#!/usr/bin/env bash
# Both ways to install, into empty virtual environments: `pip install .` and the sdist.  Each must
# give an `accel generate` that makes a picture with the model inside, without PyTorch.
#
#     tools/check_install.sh [python]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export ACCEL_CUDA_ARCHS=none PIP_DISABLE_PIP_VERSION_CHECK=1

check() { # name, what to install
    "$python" -m venv "$work/$1"
    "$work/$1/bin/pip" install --quiet "$2"
    (cd "$work" && "$work/$1/bin/accel" generate "a blue house at night" --steps 2 --quiet -o "$1.png")
    "$work/$1/bin/python" - "$work/$1.png" <<'PY'
import importlib.util, sys
from PIL import Image

assert importlib.util.find_spec("torch") is None, "torch is installed in an empty environment"
image = Image.open(sys.argv[1])
low, high = image.convert("L").getextrema()
assert image.size == (256, 256) and high - low > 50, (image.size, low, high)
PY
    echo "install from $1: ok"
}

check tree .
"$python" -m venv "$work/build"
"$work/build/bin/pip" install --quiet build
"$work/build/bin/python" -m build --sdist --outdir "$work/dist" . >/dev/null
check sdist "$work"/dist/*.tar.gz
