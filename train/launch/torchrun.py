"""torchrun, with restarts that work and an exit code that a scheduler can read.

    python train/launch/torchrun.py --nproc-per-node 8 --max-restarts 3 -m grist_train --config ...

It takes torchrun's arguments and does what torchrun does, but

- torchrun keeps one store for all attempts, in which restarted workers find the addresses of dead ones and wait for them; here
  every attempt has its own (https://github.com/pytorch/pytorch/issues/135712; PyTorch 2.13 still does it).
- torchrun ends with 1 whatever its workers ended with. This ends with the code of the first one that failed
  (grist_train.guard.ExitCode; 70 where a signal killed it, as the kernel does when memory runs out), and with 75 when it was
  itself told to stop.
"""

from __future__ import annotations

import os
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from grist_train.guard import ExitCode


def main() -> int:
    """The exit code."""
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    try:
        run.main(sys.argv[1:])
    except ChildFailedError as error:
        print(error, file=sys.stderr)
        _, first = error.get_first_failure()
        return first.exitcode if first.exitcode > 0 else ExitCode.INTERNAL
    except SignalException as signalled:
        print(f"{signalled.sigval.name}: the workers have ended", file=sys.stderr)
        return ExitCode.STOPPED
    return ExitCode.FINISHED


if __name__ == "__main__":
    sys.exit(main())
