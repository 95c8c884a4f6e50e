"""torchrun with the status of its processes: 75 after a stop signal, 2 where they refuse.

    python -m scripts.torchrun --nproc_per_node 2 -m matching.train_teacher FLAGS

On its own it ends both with status 1 and a traceback.
"""

import logging
import os
import signal

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from scripts.runtime import EXIT_INTERRUPTED, EXIT_REFUSED, EXIT_STOPPED, STOP_SIGNALS


def main():
    forwarded = (*STOP_SIGNALS, signal.SIGINT, signal.SIGQUIT)
    os.environ.setdefault("PET_SIGNALS_TO_HANDLE", ",".join(number.name for number in forwarded))
    logging.raiseExceptions = False  # a second signal may come while the first one is logged
    try:
        run.main()
    except SignalException as error:  # its processes have said so, and left
        is_ctrl_c = error.sigval == signal.SIGINT
        raise SystemExit(EXIT_INTERRUPTED if is_ctrl_c else EXIT_STOPPED) from None
    except ChildFailedError as error:
        status = error.get_first_failure()[1].exitcode
        if status not in (EXIT_REFUSED, EXIT_STOPPED, EXIT_INTERRUPTED):
            raise
        raise SystemExit(status) from None


if __name__ == "__main__":
    main()
