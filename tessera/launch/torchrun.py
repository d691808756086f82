"""torchrun as a task: `python -m tessera.launch.torchrun OPTIONS -m tessera train RECIPE`.

It ends with the process that started it. So do its ranks, which read the same pipe: see `task.exit_with_parent`.
"""

import os
import threading

from tessera.launch.task import CHILD, wait_for_end

if __name__ == "__main__":
    if CHILD in os.environ:
        threading.Thread(target=wait_for_end, args=(os.dup(0),), daemon=True).start()
    from torch.distributed.run import main

    main()
