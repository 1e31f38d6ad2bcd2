"""`torchrun ... -m stdit_fast.train --config FILE [--any.key value ...]`, or `python -m` for one process."""

import os
import sys

from stdit_fast.arguments import start_log
from stdit_fast.errors import ConfigError


def main() -> int:
    """Runs the training; 0 when done or told to stop, 2 for a configuration that cannot be."""
    is_main = os.environ.get("RANK", "0") == "0"
    speaks = os.environ.get("LOCAL_RANK", "0") == "0"  # one process a node: what is wrong may be wrong there alone
    start_log(is_main)
    try:
        from stdit_fast.train.config import parse

        config = parse()
        from stdit_fast.parallel import watchdog
        from stdit_fast.train.bad_samples import TooManyBadSamples
        from stdit_fast.train.dataset import NoGoodSample
        from stdit_fast.train.trainer import Trainer, TrainingError

        trainer = Trainer(config)
    except ConfigError as error:
        if speaks:
            print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        path = trainer.train()
    except (ConfigError, TrainingError, TooManyBadSamples, NoGoodSample) as error:
        if speaks or isinstance(error, NoGoodSample):  # which only the process with that batch meets
            print(f"error: {error}", file=sys.stderr)
        return 1
    except watchdog.LostRank as error:
        print(f"error: {error}; rank {trainer.processes.rank} ends", file=sys.stderr)
        return watchdog.EXIT_STATUS
    trainer.processes.close()
    if is_main:
        print(f"checkpoint: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
