"""FSDP on two gloo ranks: the same training as in one process, and the same after an accident."""

import contextlib
import io
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
from hub_server import COMMIT, Hub
from train_in_float64 import prepare

import train
from model import Config, Transformer
from plumbing import flags as plumbing_flags
from plumbing import fsdp

PROGRAM = os.path.join(os.path.dirname(os.path.abspath(__file__)), "train_in_float64.py")
ENV = os.environ | {"OMP_NUM_THREADS": "1"}
RANKS = multiprocessing.get_context("forkserver")  # ranks in a second, not in the ten of two more imports
RANKS.set_forkserver_preload(["torch.distributed.fsdp", "torch.distributed.checkpoint",
                              "matplotlib.figure"])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a random LLaMA (grouped queries, tied head) as model/, and flags to train it."""
    folder = tmp_path_factory.mktemp("fsdp")
    torch.manual_seed(0)
    Transformer(Config(block_size=32, vocab_size=257, n_layer=2, n_head=4, n_kv_head=2, n_embd=32,
                       n_inner=48, norm="rmsnorm", position="rope", mlp="swiglu", attention_bias=False,
                       mlp_bias=False, init_std=0.1)).save_pretrained(str(folder / "model"))
    words = "".join(f"{n} times {n} is {n * n}; " for n in range(3000))
    (folder / "text.txt").write_text(words)
    data = ["--data", str(folder / "text.txt"), "--batch-size", "4", "--context", "24",
            "--eval-every", "2",
            "--device", "cpu"]
    return folder, [*data, "--init", str(folder / "model"), "--steps", "6", "--accumulate", "2",
                    "--lr", "0.01"]


def alone(folder, *flags, dtype=torch.float64, impl="auto"):
    """train.py in this process, to its end or the end of its sitting."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        prepare(patch.setattr, dtype, impl)
        try:
            train.main(plumbing_flags.parse(train.Flags, flags))
        except SystemExit as stop:
            assert stop.code == 0
        finally:
            torch.set_default_dtype(torch.float32)


def on_rank(rank, port, folder, flags, dtype, impl, machines, environment):
    """What torchrun starts, with its output in a file."""
    os.chdir(folder)
    names = {"RANK": rank, "LOCAL_RANK": rank // machines, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2 // machines,
             "MASTER_PORT": port}
    os.environ.update(environment | {name: str(value) for name, value in names.items()}, MASTER_ADDR="localhost")
    sys.argv, sys.stdout = ["train.py", "--fsdp", *flags], open(f"rank{rank}.txt", "w")
    sys.stderr = sys.stdout
    torch.set_num_threads(1)
    prepare(dtype=dtype, impl=impl)
    plumbing_flags.run(train.main, train.Flags)


def together(folder, *flags, dtype=torch.float64, impl="auto", machines=1):
    """train.py on two ranks; what each of them printed. machines: 2 of one rank, or 1 of two."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    ranks = [RANKS.Process(target=on_rank, args=(rank, port, folder, flags, dtype, impl, machines,
                                                 dict(os.environ))) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
    printed = [(folder / f"rank{rank}.txt").read_text() for rank in range(2)]
    codes = [rank.exitcode for rank in ranks]
    for rank in ranks:
        rank.kill()
    assert codes == [0, 0], "\n".join(printed)
    return printed


def torchrun(*flags):
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            PROGRAM,
            "--fsdp", *flags]


def told(folder, rank):
    """(step, ce, gradient norm, held-out loss, lambda, share of open gates) of each step on one rank."""
    return [json.loads(line) for line in open(folder / f"rank{rank}.jsonl")]


def parameters(folder, file="last.pt"):
    return torch.load(folder / file, weights_only=True)["model"]


def numbers(folder):
    results = json.loads((folder / "results.json").read_text())
    names = ("ce_dense", "tau", "ce_last", "ce_sparse", "ce_sparse_sampled", "open_frac",
             "open_frac_last")
    return torch.tensor([results[name] for name in names])


def assert_same_training(one, two, tolerance=1e-9):
    a, b = parameters(one), parameters(two)
    assert a.keys() == b.keys() and a["wte.weight"].dtype == torch.float64
    assert max((a[name] - b[name]).abs().max() for name in a) < tolerance
    torch.testing.assert_close(torch.tensor(told(one, 0)), torch.tensor(told(two, 0)),
                               rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(numbers(one), numbers(two), rtol=0, atol=tolerance)


@pytest.fixture(scope="module")
def one_process(base):
    folder, flags = base
    alone(folder, *flags, "--out", "one")
    return folder / "one"


def test_two_ranks_stop_and_one_process_goes_on(base, one_process):
    """Steps 1 to 3 on two ranks, 4 to 6 in one process: the run of one process alone."""
    folder, flags = base
    printed = together(folder, *flags, "--out", "two", "--sitting", "3")
    assert [text.count("saved step 3 of 6") for text in printed] == [1, 0], "only rank 0 prints"
    assert told(folder / "two", 0) == told(folder / "two", 1), "lambda and losses are the same on all ranks"
    assert os.path.isdir(folder / "two" / "last")
    alone(folder, "--resume", "two")
    assert_same_training(one_process, folder / "two")


def test_one_process_stops_and_two_ranks_go_on(base, one_process):
    """And the reverse, with activations recomputed in the backward pass."""
    folder, flags = base
    alone(folder, *flags, "--out", "reverse", "--sitting", "3")
    together(folder, "--resume", "reverse", "--recompute")
    assert_same_training(one_process, folder / "reverse")
    last = Transformer.from_pretrained(str(folder / "reverse" / "last.pt"))
    assert last.config.sparse and last.lm_head.weight is last.wte.weight


def test_from_scratch_with_a_bound_on_the_divergence(base):
    """The dense base, and then the dense model beside the sparse one: two ranks are one process."""
    folder, flags = base
    flags = [*flags[:8], "--n-layer", "2", "--n-head", "2", "--n-embd", "16", "--dense-steps", "3",
             "--steps", "3",
             "--repeat", "0", "--bound", "kl", "--slack", "1"]
    alone(folder, *flags, "--out", "s1")
    together(folder, *flags, "--out", "s2")
    assert_same_training(folder / "s1", folder / "s2")
    a, b = (parameters(folder / out / "dense") for out in ("s1", "s2"))
    assert max((a[name] - b[name]).abs().max() for name in a) < 1e-9


def test_a_killed_rank_ends_the_run_and_leaves_a_checkpoint(base):
    folder, flags = base
    flags = [*flags, "--lora", "2", "--steps", "100000", "--out", "killed"]
    with open(folder / "output", "w") as output:
        run = subprocess.Popen(torchrun(*flags), cwd=folder, env=ENV, stdout=output, stderr=output)
        try:
            log = folder / "killed" / "rank1.jsonl"
            deadline = time.time() + 120
            while not log.exists() or len(log.read_text().splitlines()) < 4:
                assert run.poll() is None and time.time() < deadline, (folder / "output").read_text()
                time.sleep(0.1)
            ranks = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True,
                                   text=True).stdout
            began = time.time()
            os.kill(int(ranks.split()[-1]), signal.SIGKILL)
            assert run.wait(60) != 0 and time.time() - began < 60
        finally:
            run.kill()
    text = (folder / "output").read_text()
    assert "another one has failed or it was told to; the last checkpoint is in killed" in text, text
    alone(folder, "--resume", "killed", "--sitting", "1")


def test_bad_input_is_one_line(base):
    folder, flags = base
    with pytest.raises(ValueError, match="start it as torchrun"):
        alone(folder, *flags, "--fsdp", "--out", "x")
    run = subprocess.run(torchrun(*flags, "--batch-size", "3", "--out", "x"), cwd=folder, env=ENV,
                         capture_output=True, text=True)
    assert run.stderr.count("error: --batch-size 3 is over all ranks and must be a multiple") == 1, run.stderr


def test_two_ranks_with_the_gpu_kernel_are_one_process_without_it(base):
    """In Triton's interpreter, with activations recomputed in the backward pass."""
    folder, flags = base
    flags = [*flags, "--steps", "1", "--batch-size", "2", "--accumulate", "1", "--context", "16", "--recompute", "--slack", "1"]
    together(folder, *flags, "--out", "kernel", dtype=torch.float32, impl="triton")
    alone(folder, *flags, "--out", "chunked", dtype=torch.float32, impl="chunked")
    torch.testing.assert_close(numbers(folder / "kernel"), numbers(folder / "chunked"), rtol=1e-4, atol=0)


# -----------------------------------------------------------------------------
# files of anybody: a sharded checkpoint, and downloads of several machines


class Evil:
    def __reduce__(self):
        return os.mkdir, ("owned",)


def metadata(folder):
    (folder / ".metadata").write_bytes(pickle.dumps(Evil()))


def metadata_of_protocol_2(folder):
    (folder / ".metadata").write_bytes(b"\x80\x02cbuiltins\nexec\nX\x1b\0\0\0import os;os.mkdir('owned')\x85R.")


def cut_metadata(folder):
    os.truncate(folder / ".metadata", 300)


def files_elsewhere(folder):
    with open(folder / ".metadata", "rb") as f:
        content = pickle.load(f)
    for part in content.storage_data.values():
        part.relative_path = "../../" + part.relative_path
    (folder / ".metadata").write_bytes(pickle.dumps(content))


def bytes_entry(folder):
    """What is no tensor, as the betas of the optimizer, is a pickle inside of the shard."""
    with open(folder / ".metadata", "rb") as f:
        content = pickle.load(f)
    shard, evil = folder / "__0_0.distcp", io.BytesIO()
    torch.save(Evil(), evil)
    for name, kind in content.state_dict_metadata.items():
        if type(kind).__name__ == "BytesStorageMetadata":
            part = next(part for index, part in content.storage_data.items() if index.fqn == name)
            part.offset, part.length, part.relative_path = os.path.getsize(shard), len(evil.getvalue()), shard.name
            with open(shard, "ab") as f:
                f.write(evil.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(content))


@pytest.fixture(scope="module")
def sharded(base):
    """A sharded run that was stopped after two steps, by one rank of one."""
    folder, flags = base
    with one_rank(), pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(train.fsdp, "process_group", lambda *_: contextlib.nullcontext())
        prepare(patch.setattr, torch.float32)
        with pytest.raises(SystemExit):
            train.main(plumbing_flags.parse(train.Flags, [*flags, "--fsdp", "--sitting", "2", "--out", "sharded"]))
    torch.set_default_dtype(torch.float32)
    return folder


@pytest.mark.parametrize("crafted, message", [
    (metadata, "mkdir"), (metadata_of_protocol_2, "builtins.exec"), (cut_metadata, "is damaged"),
    (files_elsewhere, "files elsewhere"), (bytes_entry, "is more than plain values")])
def test_a_crafted_sharded_run_does_not_run_code_on_resume(sharded, tmp_path, crafted, message):
    shutil.copytree(sharded, tmp_path / "copy")
    crafted(tmp_path / "copy" / "sharded" / "last")
    with pytest.raises(ValueError, match=message) as error:
        alone(tmp_path / "copy", "--resume", "sharded", dtype=torch.float32)
    assert "\n" not in str(error.value) and not (tmp_path / "copy" / "owned").exists()


def test_metadata_may_name_a_member_of_an_enum_but_no_attribute():
    """As Python 3.11.2 pickles them: getattr(the class, "name")."""
    def asks_for(cls, name):
        return io.BytesIO(b"cbuiltins\ngetattr\n(ctorch.distributed.checkpoint.metadata\n%s\nV%s\ntR." % (cls, name))

    assert fsdp.Names(asks_for(b"_MEM_FORMAT_ENCODING", b"TORCH_PRESERVE_FORMAT")).load().name == "TORCH_PRESERVE_FORMAT"
    for cls, name in ((b"_MEM_FORMAT_ENCODING", b"mro"), (b"Metadata", b"__init__")):
        with pytest.raises((KeyError, TypeError)):
            fsdp.Names(asks_for(cls, name)).load()


def test_a_sharded_run_is_resumed_where_it_was_copied_to(sharded, tmp_path):
    shutil.copytree(sharded, tmp_path / "copy")
    alone(tmp_path / "copy", "--resume", "sharded", "--sitting", "1", dtype=torch.float32)
    assert fsdp.read(fsdp.newest(str(tmp_path / "copy" / "sharded" / "last")))["step"] == 3
    assert fsdp.read(fsdp.newest(str(sharded / "sharded" / "last")))["step"] == 2


def test_a_file_takes_the_place_of_what_a_killed_sharded_save_left(tmp_path):
    model = torch.nn.Linear(2, 2)
    for folder in ("last", "last.old"):
        (tmp_path / folder).mkdir()
    fsdp.save(str(tmp_path / "last"), model, torch.optim.AdamW(model.parameters()), False, False, step=5)
    assert os.listdir(tmp_path) == ["last.pt"] and fsdp.read(fsdp.newest(str(tmp_path / "last")))["step"] == 5


def test_two_machines_with_one_cache_fetch_the_model_once(base, monkeypatch):
    """Rank 0 of each machine asks for it: the one downloads, the other waits, both train."""
    folder, flags = base
    model = {path.name: path.read_bytes() for path in (folder / "model").iterdir()}
    hub = Hub({"some/llama": model})
    hub.pace = lambda request, body: [request.send(body[:1000], promise=len(body), commit=None), time.sleep(1),
                                      request.wfile.write(body[1000:])]
    for name, value in {"HF_ENDPOINT": hub.home.url, "HF_HOME": str(folder / "huggingface"), "no_proxy": "*",
                        "SPARSE_CACHE": str(folder / "cache")}.items():
        monkeypatch.setenv(name, value)
    names = [name for name in flags if name not in ("--init", str(folder / "model"))]
    try:
        together(folder, *names, "--init", "some/llama", "--steps", "1", "--out", "fetched", machines=2)
    finally:
        hub.close()
    assert len(hub.storage.requests) == 1
    results = json.loads((folder / "fetched" / "results.json").read_text())
    assert results["downloads"] == {"some/llama": COMMIT}


# -----------------------------------------------------------------------------
# bfloat16


@contextlib.contextmanager
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_bfloat16_is_that_of_autocast(norm):
    """Blocks gathered in bfloat16: the same losses and gradients, and a residual stream in float32."""
    torch.manual_seed(0)
    config = Config(block_size=16, vocab_size=97, n_layer=2, n_head=2, n_embd=32, norm=norm,
                    init_std=0.1,
                    sparse=True, gate_bias=1.0)
    plain = Transformer(config)
    weights = {name: t.clone() for name, t in plain.state_dict().items()}
    idx, found = torch.randint(97, (3, 16)), []

    def passed(model):
        kinds = {}

        def tap(name, t):
            kinds[name] = t.dtype
            return t

        with torch.autocast("cpu", torch.bfloat16):
            logits, loss, edges = model(idx, idx, seed=1, tap=tap)
        (loss + edges.prob.mean()).backward()
        stream = {kinds[name] for name in kinds if name in ("embed", "final") or name.endswith(".in")}
        assert stream == {torch.float32} and kinds["h0.attn.q"] == torch.bfloat16
        found.append([logits, loss, edges.prob,
                      *(getattr(p.grad, "full_tensor", lambda p=p: p.grad)()
                                                  for p in model.parameters())])

    passed(plain)
    with one_rank():
        with torch.device("meta"):
            sharded = Transformer(config)
        passed(fsdp.shard(sharded, weights, "cpu", half=True))
    for one, two in zip(*found):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-7)  # bit for bit on most machines


def test_two_ranks_in_bfloat16_are_one_process_in_bfloat16(base):
    folder, flags = base
    flags = [*flags, "--dtype", "bfloat16", "--slack", "1"]
    alone(folder, *flags, "--out", "half1", dtype=torch.float32)
    together(folder, *flags, "--out", "half2", dtype=torch.float32)
    torch.testing.assert_close(numbers(folder / "half1"), numbers(folder / "half2"), rtol=0,
                               atol=1e-3)
    first = [torch.tensor(told(folder / out, 0)[0]) for out in ("half1", "half2")]
    torch.testing.assert_close(*first, rtol=1e-4, atol=0)
