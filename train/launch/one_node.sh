#!/usr/bin/env bash
# Trains on the GPUs of this machine; begins anew from the newest checkpoint where a process is lost.
#
#     train/launch/one_node.sh --config train/configs/stage1.yaml --dataset.data_path TABLE.csv --outputs outputs/stage1
#
# GPUS: how many (all that are visible); RESTARTS: how often at most (3); PYTHON: the interpreter (python3).
set -euo pipefail

gpus=${GPUS:-$(nvidia-smi --list-gpus 2> /dev/null | wc -l)} || { echo "error: nvidia-smi finds no GPUs: set GPUS" >&2; exit 2; }

# A configuration that cannot be is told once, and not by every start of every process.
"${PYTHON:-python3}" -c 'import sys
from stdit_fast.errors import run_command
from stdit_fast.train.config import parse
sys.exit(run_command(lambda: parse(checked=False) and 0))' "$@"

# A store of its own for each start: in the one that all starts share by default, a restarted process finds the addresses
# of those before it.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec "${PYTHON:-python3}" -m torch.distributed.run --standalone --nproc_per_node "$gpus" --max_restarts "${RESTARTS:-3}" -m stdit_fast.train "$@"
