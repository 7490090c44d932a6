#!/usr/bin/env bash
# Wheels of what the CUDA machine lacks, into .whl/ (which git ignores): for Python 3.12 on x86-64, each without its needs,
# in the versions of constraints.txt, or those named here; never torch. Of platforms pip takes exactly those it is told.
set -euo pipefail
cd "$(dirname "$0")/../.."

PACKAGES=(trl peft datasets optuna sqlalchemy cmaes moocore rapidfuzz pydantic httpx2
  dill==0.4.1 multiprocess==0.70.19 alembic==1.20.1 mako==1.4.3 colorlog==6.12.0 cffi==2.1.1 pycparser==3.12 platformdirs==4.14.8
  pydantic_core==2.50.4 annotated-types==0.8.0 typing-extensions==4.16.0 typing-inspection==0.4.4 httpcore2==2.16.2 truststore==0.10.5)
PLATFORMS=(manylinux_2_28 manylinux_2_27 manylinux_2_26 manylinux_2_24 manylinux_2_17 manylinux_2_5 manylinux2014 manylinux1)

rm -rf .whl
python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
  $(printf -- '--platform %s_x86_64 ' "${PLATFORMS[@]}") -c constraints.txt -d .whl "${PACKAGES[@]}"
python3 -m pip wheel -q --no-deps -w .whl .  # for its metadata: the code that runs is the working tree's
kilobytes=$(($(git ls-files -z | du -ck --files0-from=- | tail -n 1 | cut -f 1) + $(du -sk .whl | cut -f 1)))
echo "$(ls .whl | wc -l) wheels; they and the project take $((kilobytes / 1024)) MiB of the 64 that travel"
test "$kilobytes" -lt 65536
