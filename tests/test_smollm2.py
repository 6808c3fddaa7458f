"""A real pretrained LLaMA, opt-in: SPARSE_ASSETS, the folder that `python -m plumbing.assets smollm2 news bbc` wrote."""

import json
import os
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM

from model import Transformer, generate
from plumbing.tokens import Blocks, load_data, name_for, tokenizer
from train import EVAL_SEQUENCES, Flags, build, evaluate, starting_point

ASSETS = os.environ.get("SPARSE_ASSETS", "")
pytestmark = pytest.mark.skipif(not ASSETS, reason="SPARSE_ASSETS: a folder with smollm2-135m")
FOLDER = os.path.join(ASSETS, "smollm2-135m")


@pytest.fixture(scope="module")
def model():
    return Transformer.from_pretrained(FOLDER).eval()


def test_it_knows_the_capital_of_france(model):
    tok = tokenizer(name_for(model.config.vocab_size, model=FOLDER))
    prompt = "The capital of France is"
    idx, _ = generate(model, torch.tensor([tok.encode(prompt)]), 3, temperature=0)
    assert tok.decode(idx[0].tolist()).startswith(prompt + " Paris")


def test_its_loss_is_that_of_transformers(model):
    tok = tokenizer(FOLDER)
    text = open(os.path.join(ASSETS, "news.val.txt")).read()[:40_000]
    idx, targets = Blocks(torch.tensor(tok.encode(text)).numpy(), 256).evenly(8)
    theirs = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    with torch.no_grad():
        ours, want = model(idx, targets)[1], theirs(idx).logits
        want = torch.nn.functional.cross_entropy(want.flatten(0, 1), targets.flatten())
    assert abs(ours - want) < 1e-4
    assert 2 < ours < 4.5


@pytest.mark.parametrize("results", ["smollm2", "smollm2-ce"])
def test_the_committed_adapter_has_the_numbers_of_its_run(results, model, tmp_path, monkeypatch):
    """Loss, divergence and open gates on the run's test text: in the run's dtype, and in float32, as the other
    scripts compute. There the KL is up to .002 nats less, because bfloat16's rounding of the two models is counted in it."""
    here = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "results", results)
    run = json.load(open(os.path.join(here, "results.json")))
    texts = ",".join(os.path.abspath(os.path.join(ASSETS, os.path.basename(file))) for file in run["flags"]["data"].split(","))
    tok = name_for(model.config.vocab_size, model=FOLDER)
    adapter = os.path.join(here, "adapter.safetensors")
    flags = Flags(**run["flags"] | {"init": FOLDER, "adapter": adapter})
    half = flags.dtype == "bfloat16"
    as_trained = build(flags, *starting_point(flags), "cpu", half)
    monkeypatch.chdir(tmp_path)  # for data/
    text = Blocks(load_data(texts, tok, run["tokens"])["test"], run["context_length"]).evenly(EVAL_SEQUENCES)
    autocast = partial(torch.autocast, "cpu", dtype=torch.bfloat16, enabled=half)
    for sparse, amp, rounding in ((as_trained, autocast, 0.0),
                                  (Transformer.from_pretrained(FOLDER, adapter).eval(), nullcontext, 0.002)):
        found = evaluate(sparse, text, 4, amp, teacher=model)
        assert found["ce"] == pytest.approx(run["ce_sparse"], rel=0.01)
        assert found["kl"] == pytest.approx(run["kl_sparse"], rel=0.01, abs=rounding)
        assert found["open"] == pytest.approx(run["open_frac"], rel=0.01)
