"""
The four small models of exercises 3 to 5, from finished runs: weights in float16, without the optimiser.

    python -m exercises.make_models

The runs: `python addition_toy.py --waves 1 --loose 0.2 --enough 7`, because five waves leave no logit between -b
and 0, where forgetting b would show (5.98 edges on a CPU without AVX512; with it 6.73: choose another --seed); and
`python train.py --n-head 4 --dense-steps 3000 --steps 3000 --gate-bias 2`, which bounded the loss on sequences half
of which held copies, when the models here were made.

It says how many gates the rounding changes, and leaves exercises/models/*.pt. Then run the exercises'
test: python -m pytest -q tests/test_exercises.py
"""

import os
from dataclasses import asdict, dataclass

import torch

from addition_toy import evaluate, problems
from model import Transformer
from patching import attention_maps
from plumbing import copying, files, tasks, tokens
from plumbing.flags import open_folder, run


@dataclass
class Flags:
    addition: str = "out/addition"  # folder of addition_toy.py: dense.pt and sparse.pt
    copying: str = "out/scratch"  # folder of train.py: dense/last.pt and best.pt
    out: str = "exercises/models"  # folder to fill


def shrink(source, path):
    """The model of `source`, and as it comes back from the small file at `path`."""
    model = Transformer.from_pretrained(source).eval()
    weights = {name: t.half() for name, t in model.state_dict().items()}
    if model.config.tied_head:
        del weights["lm_head.weight"]  # it is wte.weight
    files.write_pickle(path, {"config": asdict(model.config), "model": weights})
    return model, Transformer.from_pretrained(path).eval()


@torch.no_grad()
def main(flags):
    open_folder(flags.out)
    idx, targets = problems()
    prompts = tasks.make("induction", tokens.Bytes(), 32).clean
    sources = {"addition_dense": f"{flags.addition}/dense.pt", "addition_sparse": f"{flags.addition}/sparse.pt",
               "copying_dense": f"{flags.copying}/dense", "copying_sparse": flags.copying}
    for name, source in sources.items():
        path = f"{flags.out}/{name}.pt"
        models = shrink(source, path)
        if name.startswith("addition"):
            before, after = (evaluate(model, idx, targets) for model in models)
            gates, quality = (before.gates, after.gates), (before.exact, after.exact)
        else:
            gates = [attention_maps(model, prompts) > 0 for model in models]
            found = [copying.accuracy(model, tokens.Bytes(), 128, n=16).values() for model in models]
            quality = [sum(x) / len(x) for x in found]
        print(f"{path}: {os.path.getsize(path) / 1e6:.2f} MB; {int((gates[0] != gates[1]).sum())} of "
              f"{int(gates[0].sum())} open gates change; right answers {quality[0]:.2%}, now {quality[1]:.2%}")


if __name__ == "__main__":
    run(main, Flags, __doc__)
