"""Settings of every test: one thread a process, since tiny tensors gain nothing from more and workers share the cores."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, and for the commands that tests start
