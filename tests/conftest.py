import os
import signal
import sys

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, by whichever test

import pytest
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
torch.set_num_threads(1)  # tiny tensors: one thread is far faster than several


@pytest.fixture(autouse=True)
def ctrl_c():
    """A run that failed in an earlier test keeps its frame, and so its handler of Ctrl-C."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
