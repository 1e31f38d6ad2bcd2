#!/usr/bin/env bash
# Trains on several machines: the same command on each of them, with the same folder for `outputs`.
#
#     HEAD=node0 NODES=4 train/launch/several_nodes.sh --config train/configs/stage2.yaml ... --outputs /shared/stage2
#
# HEAD: name or address of one of them, where they find each other; PORT (29500).
# NODES: how many, or MIN:MAX. With a range the run goes on, from its newest checkpoint, with those that are left when a
#     machine is lost, and with more when one joins; every number of processes has to suit `sequence_parallel`.
# GPUS: on each machine (all that are visible); RESTARTS: how often at most (10); PYTHON: the interpreter (python3).
# RUN: a name, where HEAD serves several runs.
set -euo pipefail

: "${HEAD:?name one of the machines}" "${NODES:?say how many machines there are}"
gpus=${GPUS:-$(nvidia-smi --list-gpus 2> /dev/null | wc -l)} || { echo "error: nvidia-smi finds no GPUs: set GPUS" >&2; exit 2; }

# A configuration that cannot be is told once, and not by every start of every process.
"${PYTHON:-python3}" -c 'import sys
from stdit_fast.errors import run_command
from stdit_fast.train.config import parse
sys.exit(run_command(lambda: parse(checked=False) and 0))' "$@"

# A store of its own for each start: in the one that all starts share by default, a restarted process finds the addresses
# of those before it.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec "${PYTHON:-python3}" -m torch.distributed.run --nnodes "$NODES" --nproc_per_node "$gpus" --max_restarts "${RESTARTS:-10}" \
    --rdzv_backend c10d --rdzv_endpoint "$HEAD:${PORT:-29500}" --rdzv_id "${RUN:-stdit-fast}" \
    -m stdit_fast.train "$@"
