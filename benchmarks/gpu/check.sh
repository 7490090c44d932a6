#!/usr/bin/env bash
# The device check on a CUDA machine without a network: wheels of .whl/ where there are any, then every part (check.py).
# Results go to $OUT (runs/gpu without it): check.md, check.json, check.log. On a CPU: bash benchmarks/gpu/check.sh --dry-run
set -euo pipefail
cd "$(dirname "$0")/../.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
case " $* " in *" --dry-run "*) ;; *)
  if [ -d .whl ]; then
    python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/emorl-site .whl/*.whl
    PYTHONPATH=$PYTHONPATH:/tmp/emorl-site
  fi ;;
esac
python3 -m benchmarks.gpu.check --output "${OUT:-runs/gpu}" "$@"
