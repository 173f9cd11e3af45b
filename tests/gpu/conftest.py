"""What needs a CUDA device, and no reference that a CPU has: collected only where there is one."""

import torch

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]
