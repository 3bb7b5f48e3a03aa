#!/usr/bin/env bash
# Build the wheel, install it beside the dependencies of an environment, and use it from an empty directory:
#   tests/wheel.sh <virtual environment with the dependencies> <directory to work in>
set -euo pipefail
VENV=$(realpath "$1") WORK=$(realpath "$2")
"$VENV/bin/python" -m pip wheel --quiet --no-deps --wheel-dir "$WORK/dist" "$(dirname "$0")/.."
"$VENV/bin/python" -m venv "$WORK/installed"
SITE=$("$WORK/installed/bin/python" -c 'import site; print(site.getsitepackages()[0])')
"$VENV/bin/python" -c 'import site; print(site.getsitepackages()[0])' > "$SITE/dependencies.pth"  # not what is editable there
"$WORK/installed/bin/pip" install --quiet --no-deps "$WORK"/dist/pgsuite-*.whl
mkdir "$WORK/empty" && cd "$WORK/empty"
BIN=$WORK/installed/bin
"$BIN/python" -c "import pgsuite, sys; assert pgsuite.__file__.startswith('$WORK/installed'), pgsuite.__file__"
"$BIN/pgsuite" train algo=ppo env=CartPole total_steps=4096 hydra.run.dir=run
"$BIN/python" -m pgsuite evaluate run=run episodes=2
"$BIN/python" -c "import pgsuite; print(pgsuite.train('ppo', 'CartPole', total_steps=1024, folder='python'))"
"$BIN/pgsuite" export run=run format=torch
"$BIN/pgsuite" report run
"$BIN/pgsuite" envs > /dev/null
! "$BIN/pgsuite" train env=CartPole '~tuned' algo.lr=1e38 recover.attempts=0 total_steps=4096 hydra.run.dir=crash 2> said
grep "pgsuite replay crash=" said
"$BIN/pgsuite" replay crash=crash
"$BIN/pgsuite" pretrain reviews=256 batch=32 held_out=32 size.width=16 size.layers=1 hydra.run.dir=model
"$BIN/pgsuite" reward-model model=model count=128 held_out=64 batch=32 hydra.run.dir=reward
"$BIN/pgsuite" train algo=ppo env=reviews policy.model=model env.rewards=[reward] num_envs=8 algo.minibatches=2 algo.epochs=1 \
    total_steps=400 hydra.run.dir=aligned
"$BIN/pgsuite" train --help > /dev/null
! "$BIN/pgsuite" trian 2> said && grep "did you mean train" said
echo "the wheel works"
