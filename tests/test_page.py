"""circuit.html: what the page shows is what the models do. No browser, no network."""

import json
import os
import re

import pytest
import torch

import patching
from model import Config, Transformer
from plumbing import circuit_report as report
from plumbing import curves
from plumbing import page, tasks

torch.set_num_threads(1)
TOY = dict(block_size=11, vocab_size=13, n_layer=2, n_head=4, n_kv_head=2, n_embd=16, causal=False, init_std=0.3)
AWKWARD = ["</script>", "\"it's\"", "\\n\n\t", "\u00e9\u2028\U0001f600", "<!--<script>", "&lt;", " ", "{{data}}",
           "\ufffd", "]]>", "${1}", "\\u003c", ""]


class Awkward(tasks.Digits):
    """A tokenizer whose tokens try to end the element that holds them."""

    def decode(self, ids):
        return "".join(AWKWARD[i] for i in ids)


def write(path, tok=tasks.Digits(), **config):
    """The page of a random dense and sparse model: (its text, its data, studies, task, maps, scores)."""
    torch.manual_seed(0)
    dense = Transformer(Config(**TOY | config)).requires_grad_(False)
    sparse = Transformer(Config(**TOY | config, sparse=True, gate_bias=-0.2)).requires_grad_(False)
    sparse.load_state_dict(dense.state_dict())
    task, studies, maps, scores = tasks.make("addition", tasks.Digits(), 4), {}, {}, {}
    for name, model in (("dense", dense), ("sparse", sparse)):
        graph, flags = patching.Graph(model.config), patching.Flags(task="addition", device="cpu")
        study = studies[name] = report.Study(name, model, graph, flags, patching)
        study.mean = study.square(study.score_edges(task).mean(0))
        shares = curves.cumulative(study.mean[graph.edges])
        study.by_effect = curves.circuit(graph, study.mean.abs(), curves.holding(shares))
        maps[name] = patching.attention_maps(model, task.clean[:1])[0]
        scores[name] = patching.token_edges(model, task.clean[:1], task.corrupt[:1],
                                            lambda logits: task.metric(logits, slice(0, 1)))[0]
    assert page.write(str(path), studies, task, tok, maps, scores) == str(path)
    text = path.read_text(encoding="ascii")
    return text, read(text), studies, task, maps, scores


def read(text):
    """The page's data as a browser finds it: up to the first end of a script element."""
    element = text.split('<script type="application/json" id="data">')[1]
    return json.loads(re.split("</script", element, flags=re.I)[0])


@pytest.mark.parametrize("causal", [False, True])
def test_a_sparse_model_s_edges_are_exactly_its_open_gates(tmp_path, causal):
    _, data, studies, task, maps, scores = write(tmp_path / "circuit.html", causal=causal)
    model, seen = studies["sparse"].model, patching.record(studies["sparse"].model, task.clean[:1])
    found = {tuple(edge[:4]): edge[4:] for edge in data["models"]["sparse"]["edges"]}
    gates = torch.stack([patching.gate_map(*(seen[f"h{l}.attn.{x}"].transpose(1, 2) for x in "qk"),
                                           model.config.gate_bias, causal=causal)[0] for l in range(2)])
    allowed = 2 * 4 * (66 if causal else 121)
    assert found.keys() == {*map(tuple, gates.nonzero().tolist())} and 20 < len(found) < allowed
    assert len(found) == len(data["models"]["sparse"]["edges"]) == data["models"]["sparse"]["gates"]
    for place, numbers in found.items():
        assert numbers == pytest.approx([maps["sparse"][place].item(), scores["sparse"][place].item()], rel=0.005)
    assert data["models"]["dense"]["gates"] == allowed
    assert (data["n_layer"], data["n_head"]) == (2, 4)


def test_a_dense_model_s_faint_edges_are_left_out_and_the_page_says_so(tmp_path):
    text, data, _, _, maps, scores = write(tmp_path / "circuit.html")
    strong = {*map(tuple, (maps["dense"] >= page.FAINT).nonzero().tolist())}
    edges = data["models"]["dense"]["edges"]
    assert {tuple(edge[:4]) for edge in edges} == strong and 0 < len(strong) < data["models"]["dense"]["gates"]
    for l, h, to, source, weight, score in edges:
        assert weight == pytest.approx(maps["dense"][l, h, to, source].item(), rel=0.005)
        assert score == pytest.approx(scores["dense"][l, h, to, source].item(), rel=0.005)
    assert (data["faint"], data["shown"]) == (page.FAINT, page.SHOWN)
    assert "${count(gates - edges.length)} edges with a weight below ${data.faint} are left out" in text
    assert "Math.log(data.shown)" in text  # where the slider starts


def test_the_head_graph_is_the_circuit_by_effect(tmp_path, monkeypatch):
    _, data, studies, *_ = write(tmp_path / "circuit.html")
    for name, study in studies.items():
        model, graph = data["models"][name], study.graph
        want = {(graph.sources[u], graph.destinations[v]) for u, v in study.by_effect.nonzero().tolist()}
        assert {(u, v) for u, v, _ in model["graph"]} == want and model["circuit"] == len(want) > 3
        for u, v, score in model["graph"]:
            exact = study.mean[graph.sources.index(u), graph.column[v]].item()
            assert score == pytest.approx(exact, rel=0.005)
        readers = {"logits", *(reader for all in data["reads"].values() for reader in all)}
        assert {v for _, v in want} <= readers and {u for u, _ in want} <= data["reads"].keys()
    assert any(".g" in v for v in readers)  # k and v that two heads share
    monkeypatch.setattr(page, "MOST", 3)
    _, few, *_ = write(tmp_path / "circuit.html")
    assert few["models"]["dense"]["graph"] == data["models"]["dense"]["graph"][:3]
    sizes = [abs(score) for _, _, score in data["models"]["dense"]["graph"]]
    assert sizes == sorted(sizes, reverse=True)


def test_tokens_of_any_kind_survive(tmp_path):
    text, data, _, task, *_ = write(tmp_path / "circuit.html", tok=Awkward())
    assert data["tokens"] == [AWKWARD[i] for i in task.clean[0].tolist()]
    assert data["corrupt"] == [AWKWARD[i] for i in task.corrupt[0].tolist()]
    embedded = page.embed(AWKWARD)
    assert json.loads(embedded) == AWKWARD and embedded.isascii() and "<" not in embedded


def test_the_last_layer_s_answer_stands_on_top(tmp_path):
    _, data, studies, task, *_ = write(tmp_path / "circuit.html")
    for name, study in studies.items():
        says = study.model(task.clean[:1])[0][0].argmax(-1)
        assert "".join(data["models"][name]["says"]) == tasks.Digits().decode(says.tolist())


def test_the_page_is_one_file_and_needs_no_network(tmp_path):
    text, *_ = write(tmp_path / "circuit.html")
    assert os.listdir(tmp_path) == ["circuit.html"]  # no temporary file is left
    assert not re.search(r"https?:|//\w|\bsrc\b|\bhref\b|@import|url\(|\bfetch\(|\bimport\b|XMLHttp", text)
    assert text.count("<script") == text.count("</script>") == 2 and "{{" not in text
