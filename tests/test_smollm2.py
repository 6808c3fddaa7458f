"""A real pretrained LLaMA, opt-in: SPARSE_ASSETS, a folder with smollm2-135m/ (config.json,
model.safetensors, tokenizer.json) and English text in news.val.txt."""

import os

import pytest
import torch
from transformers import AutoModelForCausalLM

from model import Transformer, generate
from plumbing.tokens import Blocks, name_for, tokenizer

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
