import os
import sys

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, by whichever test

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
torch.set_num_threads(1)  # tiny tensors: one thread is far faster than several
