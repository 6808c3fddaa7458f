"""Adapters: nothing changes at first, only they train, and base + file is the trained model."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file
from test_train import NO_AUTOCAST, command

import train
from model import Config, Transformer
from plumbing import files, lora, tokens
from plumbing.weights import read_model


def base(folder, seed=0, **more):
    torch.manual_seed(seed)
    model = Transformer(Config(**dict(
        block_size=32, vocab_size=257, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, norm="rmsnorm",
        position="rope", mlp="swiglu", attention_bias=False, mlp_bias=False, init_std=0.1) | more))
    model.save_pretrained(str(folder))
    return model


def adapted(folder, sparse=True):
    """The base in `folder` with adapters, as train.py builds it, and the first adapter weights."""
    fields, weights = read_model(str(folder))
    model = Transformer(Config(**fields | {"sparse": sparse, "gate_bias": 0.5}))
    first = lora.add(model, 3)
    return model.load_weights(weights | first), weights, first


def test_adapters_change_nothing_at_first_and_alone_are_trained(tmp_path):
    dense = base(tmp_path)
    model, _, first = adapted(tmp_path, sparse=False)
    idx = torch.randint(257, (2, 20))
    assert torch.equal(model(idx)[0], dense(idx)[0])
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == first.keys() and len(trained) == 2 * 2 * 5
    model(idx, targets=idx)[1].backward()
    assert all((p.grad is not None) == (name in first) for name, p in model.named_parameters())


def test_frozen_matrices_in_bfloat16_are_what_autocast_computes_with(tmp_path):
    """halve: the same loss to the bit; adapters, norms and the embedding of a tied head stay float32.

    Gradients differ by rounding, because those of a matrix and its adapter are added in bfloat16.
    """
    base(tmp_path)
    idx, found = torch.randint(257, (2, 20)), []
    for half in (False, True):
        model, _, first = adapted(tmp_path)
        model.load_state_dict({name: torch.full_like(t, 0.01) for name, t in first.items()}, strict=False)
        model = lora.halve(model) if half else model
        with torch.autocast("cpu", torch.bfloat16):
            logits, loss, edges = model(idx, targets=idx, seed=1)
        (loss + edges.prob.mean()).backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.requires_grad]
        found.append([logits, loss, edges.prob, torch.cat(gradients)])
    assert all(torch.equal(one, two) for one, two in zip(found[0][:3], found[1]))
    one, two = (gradient for *_, gradient in found)
    assert (one - two).norm() < 0.02 * one.norm()
    dtypes = {name: p.dtype for name, p in model.named_parameters(remove_duplicate=False)}
    for name, dtype in dtypes.items():
        frozen = name == "lm_head.weight" or name.endswith(tuple(f"{m}.weight" for m in lora.MATRICES))
        assert dtype == (torch.bfloat16 if frozen else torch.float32), name
    assert {name for name, p in model.named_parameters() if p.requires_grad} == first.keys()


@pytest.mark.parametrize("layers", ["attn", "attn mlp"])
def test_base_and_file_are_the_trained_model(layers, tmp_path):
    """Also a file that holds adapters of the attention alone, as earlier versions wrote."""
    base(tmp_path / "base")
    model, weights, first = adapted(tmp_path / "base")
    trained = {name: torch.randn_like(t) * 0.1 for name, t in first.items() if name.split(".")[2] in layers}
    model.load_state_dict(trained, strict=False)
    path = str(tmp_path / "adapter.safetensors")
    lora.save(path, trained, lora.fingerprint(weights), model.config)
    merged = Transformer.from_pretrained(str(tmp_path / "base"), path)
    idx = torch.randint(257, (2, 20))
    with torch.no_grad():
        model.load_state_dict({name: t.to(torch.bfloat16) for name, t in trained.items()}, strict=False)  # as in the file
        want, got = model(idx)[0], merged(idx)[0]
        assert (got - want).abs().max() < 1e-5 * want.abs().max()
        assert (want - base(tmp_path / "base")(idx)[0]).abs().max() > 0.1 * want.abs().max()
    assert merged.config.sparse and merged.config.gate_bias == 0.5
    merged.save_pretrained(str(tmp_path / "merged"))  # for export
    assert torch.equal(Transformer.from_pretrained(str(tmp_path / "merged"))(idx)[0], got)


def test_the_wrong_base_or_file_is_one_clear_line(tmp_path):
    base(tmp_path / "base")
    _, weights, first = adapted(tmp_path / "base")
    path = str(tmp_path / "adapter.safetensors")
    lora.save(path, first, lora.fingerprint(weights), Config(sparse=True))
    base(tmp_path / "other", seed=1)
    base(tmp_path / "wide", n_embd=64)
    base(tmp_path / "shallow", n_layer=1)
    for folder, message in (("other", "of the same shape but with other weights"),
                            ("wide", "adapts h.0.attn.c_attn, 64 x 32, which this base has not"),
                            ("shallow", "adapts h.1.attn.c_attn")):
        with pytest.raises(ValueError, match=message) as error:
            Transformer.from_pretrained(str(tmp_path / folder), path)
        assert "\n" not in str(error.value)
    files.write_safetensors(path, first)
    with pytest.raises(ValueError, match="is no adapter file"):
        Transformer.from_pretrained(str(tmp_path / "base"), path)
    for gates in ("[" * 10**5, "[]", "{", '{"n_layer": 1000000}'):
        files.write_safetensors(path, first, {"base": lora.fingerprint(weights), "gates": gates})
        with pytest.raises(ValueError, match="is no adapter file"):
            Transformer.from_pretrained(str(tmp_path / "base"), path)
    name, about = "h.0.attn.c_attn.lora_b", {"base": lora.fingerprint(weights), "gates": "{}"}
    without = {other: t for other, t in first.items() if other != name}
    for tensors, message in ((without, "lacks"), (first | {"wte.weight": weights["wte.weight"]}, "or holds others"),
                             (first | {name: first[name][:, :2]}, r"one rank for h.0.attn.c_attn, but \[3, 32\] and \[64, 2\]"),
                             (first | {name: first[name][0]}, r"but \[3, 32\] and \[3\]")):
        files.write_safetensors(path, tensors, about)
        with pytest.raises(ValueError, match=message):
            Transformer.from_pretrained(str(tmp_path / "base"), path)
    with pytest.raises(ValueError, match="there is no such file; a train.py --lora run leaves"):
        Transformer.from_pretrained(str(tmp_path / "base"), str(tmp_path / "gone.safetensors"))


def test_train_writes_an_adapter_that_every_script_reloads(tmp_path, monkeypatch):
    """A run in two sittings is the run in one; base + adapter has its numbers."""
    monkeypatch.chdir(tmp_path)
    base(tmp_path / "base")
    (tmp_path / "text.txt").write_text("".join(f"{n} and {n} is {n + n}; " for n in range(2000)))
    flags = ["--init", "base", "--data", "text.txt", "--batch-size", 4, "--context", 24,
             "--eval-every", 4]
    tuned = [*flags, "--lora", 2, "--steps", 8, "--slack", 0.5, "--lr", 0.01]
    command(*tuned, "--out", "whole")
    with pytest.raises(SystemExit):
        command(*tuned, "--out", "halves", "--sitting", 5)
    weights = tmp_path / "base" / "model.safetensors"
    content = weights.read_bytes()
    base(tmp_path / "base", seed=1)
    with pytest.raises(ValueError, match="base has other weights than when the run began"):
        command("--resume", "halves")
    weights.write_bytes(content)
    command("--resume", "halves")
    one, two = (load_file(tmp_path / out / "adapter.safetensors") for out in ("whole", "halves"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert os.path.getsize("whole/last.pt") < os.path.getsize("base/model.safetensors")

    whole = json.loads((tmp_path / "whole" / "results.json").read_text())
    adapter = ["--adapter", "whole/adapter.safetensors"]
    with pytest.raises(ValueError, match="give the bound itself, --tau"):
        command(*flags, *adapter, "--out", "x")
    command(*flags, *adapter, "--steps", 1, "--tau", whole["tau"], "--out", "again")
    best = torch.load("whole/last.pt", weights_only=True)["best"]
    assert best["step"] == whole["best_step"]
    command(*tuned, "--tau", 1e-6, "--out", "last")
    for out in ("whole", "last"):  # what is reported is what the file gives, also where no state met the bound
        results = json.loads((tmp_path / out / "results.json").read_text())
        test = tokens.Blocks(tokens.load_data("text.txt", "bytes")["test"], 24).evenly(8)
        merged = Transformer.from_pretrained("base", f"{out}/adapter.safetensors")
        found = train.evaluate(merged, test, 4, NO_AUTOCAST)
        sampled = train.evaluate(merged, test, 4, NO_AUTOCAST, sampled=True)["ce"]
        assert (results["best_step"] is None) == (out == "last")
        for key, value in (("ce_sparse", found["ce"]), ("open_frac", found["open"]), ("ce_sparse_sampled", sampled)):
            assert abs(results[key] - value) < 1e-5, (out, key)

    command(*tuned, "--no-sparse", "--out", "control")  # a control of adapters can be opened, too
    found = train.evaluate(Transformer.from_pretrained("base", "control/adapter.safetensors"), test, 4, NO_AUTOCAST)
    assert abs(json.loads((tmp_path / "control" / "results.json").read_text())["ce"] - found["ce"]) < 1e-5

    half = [*flags, "--lora", 2, "--steps", 4, "--slack", 0.5, "--lr", 0.01, "--dtype", "bfloat16", "--repeat", 0.5]
    command(*half, "--out", "half")  # frozen weights in bfloat16 stay out of every file
    assert {t.dtype for t in load_file("half/adapter.safetensors").values()} == {torch.bfloat16}
    assert torch.load("half/last.pt", weights_only=True)["model"].keys() == one.keys()

    with pytest.raises(ValueError, match="holds adapters without their base"):
        command(*flags, "--init", "whole/last.pt", "--out", "x")


def test_without_gates_a_bound_on_the_divergence_has_nothing_to_learn(tmp_path):
    """So the control of such a run is the dense model: KL 0, gradient 0."""
    dense, (model, _, first) = base(tmp_path), adapted(tmp_path, sparse=False)
    idx = torch.randint(257, (2, 20))
    ce, kl, edges = train.losses(model, dense, idx, idx)
    kl.backward()
    assert abs(kl) < 1e-6 < ce and edges is None
    assert all(p.grad.abs().max() < 1e-6 for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        model.h[0].attn.c_attn.lora_b += 0.1
    assert train.losses(model, dense, idx, idx)[1] > 1e-3


def test_an_adapter_is_trained_on_under_a_bound_on_the_divergence_from_its_base(tmp_path, monkeypatch):
    """The new run begins where the old one ended: its loss, divergence, edges and b; dense is the base alone."""
    monkeypatch.chdir(tmp_path)
    dense = base(tmp_path / "base").eval()
    (tmp_path / "text.txt").write_text("".join(f"{n} and {n} is {n + n}; " for n in range(2000)))
    flags = ["--init", "base", "--data", "text.txt", "--batch-size", 4, "--context", 24, "--bound", "kl", "--tau", 9]
    command(*flags, "--lora", 2, "--gate-bias", 1.5, "--lr", 0.1, "--steps", 4, "--out", "first")
    more = [*flags, "--adapter", "first/adapter.safetensors"]
    command(*more, "--lora", 2, "--lr", 0.01, "--steps", 1, "--out", "more")
    sittings = [*more, "--lora", 2, "--lr", 0.01, "--steps", 2, "--seed", 1, "--tau", 1e-6]
    command(*sittings, "--out", "whole")
    with pytest.raises(SystemExit):
        command(*sittings, "--sitting", 1, "--out", "stopped")
    begun = load_file("stopped/adapter.safetensors")  # a stopped run leaves what it has, also outside the bound
    command("--resume", "stopped")
    one, two = (load_file(f"{run}/adapter.safetensors") for run in ("whole", "stopped"))
    assert all(torch.equal(one[name], two[name]) and not torch.equal(two[name], begun[name]) for name in one)
    saved, results = torch.load("more/last.pt"), json.loads((tmp_path / "more/results.json").read_text())
    text, model = tokens.load_data("text.txt", "bytes"), Transformer.from_pretrained("base", "first/adapter.safetensors")
    held_out, test = (tokens.Blocks(text[split], 24).evenly(8) for split in ("val", "test"))
    found = train.evaluate(model, held_out, 4, NO_AUTOCAST, teacher=dense)
    assert found["kl"] > 0.01 and 0 < found["open"] < 1
    assert {name: saved["trace"][0][name] for name in ("ce", "kl", "open")} == pytest.approx(
        {name: found[name] for name in ("ce", "kl", "open")}, rel=1e-4)
    assert results["ce_dense"] == pytest.approx(train.evaluate(dense, test, 4, NO_AUTOCAST)["ce"], rel=1e-5)
    assert saved["config"]["gate_bias"] == 1.5
    one, two = (load_file(f"{run}/adapter.safetensors") for run in ("first", "more"))
    assert one.keys() == two.keys() and all(0 < (one[name] - two[name]).abs().max() < 0.02 for name in one)
    with pytest.raises(ValueError, match="has rank 2: give this to --lora, not 3"):
        command(*more, "--lora", 3, "--out", "x")
    with pytest.raises(ValueError, match="adapter.safetensors is sparse already.* give the bound itself, --tau, of --bound ce"):
        command(*more, "--out", "x")
    with pytest.raises(ValueError, match="--adapter with --lora trains gates on: leave --no-sparse out"):
        command(*more, "--lora", 2, "--no-sparse", "--out", "x")
    dense.config.sparse = True
    dense.save_checkpoint("gated.pt")
    with pytest.raises(ValueError, match="gated.pt has gates of its own"):
        command(*more, "--init", "gated.pt", "--lora", 2, "--out", "x")


def test_an_adapter_is_trained_on_under_a_bound_on_ce_that_follows_the_control_of_its_base(tmp_path, monkeypatch):
    """The dense CE and tau are the base's, whatever the adapter has learnt by then."""
    monkeypatch.chdir(tmp_path)
    dense = base(tmp_path / "base").eval()
    (tmp_path / "text.txt").write_text("".join(f"{n} and {n} is {n + n}; " for n in range(2000)))
    flags = ["--init", "base", "--data", "text.txt", "--batch-size", 4, "--context", 24, "--lora", 2]
    command(*flags, "--tau", 99, "--lr", 0.3, "--steps", 3, "--seed", 7, "--out", "first")
    flags += ["--lr", 0.01, "--steps", 2, "--eval-every", 1]
    command(*flags, "--no-sparse", "--out", "control")
    more = [*flags, "--adapter", "first/adapter.safetensors", "--slack", 0.5]
    with pytest.raises(SystemExit):
        command(*more, "--control", "control", "--sitting", 1, "--out", "more")
    command("--resume", "more")
    command(*more, "--out", "alone")
    control, results, alone = (json.loads((tmp_path / run / "results.json").read_text()) for run in ("control", "more", "alone"))
    text, model = tokens.load_data("text.txt", "bytes"), Transformer.from_pretrained("base", "first/adapter.safetensors")
    held_out = tokens.Blocks(text["val"], 24).evenly(8)
    of_base, of_adapter = (train.evaluate(m, held_out, 4, NO_AUTOCAST)["ce"] for m in (dense, model))
    assert abs(of_adapter - of_base) > 0.1
    assert results["tau"] == pytest.approx(control["ce_val"] + 0.5, rel=1e-6)
    assert alone["tau"] == pytest.approx(of_base + 0.5, rel=1e-5)
    assert results["ce_dense"] == alone["ce_dense"] == pytest.approx(control["ce_dense"], rel=1e-6)
    trace = torch.load("more/last.pt")["trace"]
    assert trace[0]["ce"] == pytest.approx(of_adapter, rel=1e-4)
    kl = train.evaluate(model, held_out, 4, NO_AUTOCAST, teacher=dense)["kl"]
    assert trace[0]["kl"] == pytest.approx(kl, rel=1e-4) and kl > 0.05 and results["kl_sparse"] > 0.05
