import os
import signal
import sys

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, by whichever test

import pytest
import torch
from matplotlib.figure import Figure

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
torch.set_num_threads(1)  # tiny tensors: one thread is far faster than several
savefig = Figure.savefig


def quick(figure, path, **settings):
    """A figure small and not laid out: a tenth of a second where it would take one. Commands in processes of
    their own draw it in full."""
    figure.set_layout_engine(None)
    savefig(figure, path, **settings | {"dpi": 20})


Figure.savefig = quick


@pytest.fixture(autouse=True)
def ctrl_c():
    """A run that failed in an earlier test keeps its frame, and so its handler of Ctrl-C."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
