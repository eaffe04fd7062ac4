"""One torch thread a test process: `make test` runs one process a core, and two pools of threads on one core wait for each other."""

import torch

torch.set_num_threads(1)
