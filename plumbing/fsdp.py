"""Training on several processes: torchrun --nproc-per-node N train.py --fsdp (torch's FSDP2).

Every parameter, gradient and optimizer state is cut over the ranks; a block's parameters are
gathered just before it runs. What is here works without a process group too, as one rank of one.
"""

import contextlib
import io
import os
import pathlib
import pickle
import shutil
import signal
import sys
import threading
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (StateDictOptions, get_model_state_dict,
                                                     get_state_dict, set_model_state_dict,
                                                     set_state_dict)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import distribute_tensor

from plumbing.files import read_pickle, write_pickle
from plumbing.weights import check_names


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


@contextlib.contextmanager
def process_group(wanted, device, folder, batch_size):
    """Join the other ranks of torchrun, if that is wanted; only rank 0 prints.

    folder: where the checkpoints are, for the message when another rank has failed. batch_size: of
    all ranks; ValueError if it can not be shared out evenly.
    """
    if not wanted:
        yield
        return
    on_failure = (f"this rank ends because another one has failed or it was told to; the last checkpoint is in {folder}: "
                  f"go on with torchrun ... train.py --fsdp --resume {folder}")
    if "RANK" not in os.environ:
        raise ValueError("--fsdp needs one process a GPU: start it as torchrun --nproc-per-node N "
                         "train.py --fsdp ...")
    local = int(os.environ["LOCAL_RANK"])
    if device == "cuda":
        if local >= torch.cuda.device_count():
            raise ValueError(f"{os.environ['LOCAL_WORLD_SIZE']} processes, but this machine has "
                             f"{torch.cuda.device_count()} GPUs: lower --nproc-per-node")
        torch.cuda.set_device(local)
    leaving = threading.Event()
    watch_for_the_end(on_failure, leaving)
    # ranks wait in a barrier while one downloads, and torch would end them after half an hour
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", timeout=timedelta(hours=12))
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")
    try:
        if batch_size % world():
            raise ValueError(f"--batch-size {batch_size} is over all ranks and must be a multiple of their "
                             f"number, {world()}")
        yield
        leave()
    except SystemExit:  # the end of a sitting, or Ctrl-C: of all ranks at the same step
        leave()
        raise
    except (ValueError, OSError):
        leaving.set()
        raise
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "onnection" in str(error):  # the latter is gloo's
            leaving.set()
            raise OSError(on_failure) from None
        raise


def leave():
    """Together: a rank that ends with the group still open is aborted by its threads."""
    wait()
    dist.destroy_process_group()


def watch_for_the_end(message, leaving):
    """When one rank fails torchrun sends SIGTERM to the others, who hang in wait of it: a thread
    answers the signal, with the message if this rank is not `leaving` with one of its own."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait():
        signal.sigwait({signal.SIGTERM})
        if not leaving.is_set():
            print(f"error: {message}", file=sys.stderr, flush=True)
        os._exit(2)

    threading.Thread(target=wait, daemon=True).start()


def wait():
    """For all ranks to come here."""
    if world() > 1:
        dist.barrier()


def first_on_each_machine(work):
    """work() on one rank of each machine, then on the others, who find its downloads in place."""
    first = world() == 1 or os.environ["LOCAL_RANK"] == "0"
    result = work() if first else None
    wait()
    return result if first else work()


def total(values):
    """The sums over the ranks of some numbers, the same floats on every rank."""
    values = torch.tensor([float(value) for value in values], dtype=torch.float64)
    if world() > 1:
        dist.all_reduce(values)  # of a CPU tensor: gloo, also where the model is on GPUs
    return values.tolist()


def mean(values):
    return [value / world() for value in total(values)]


def shard(model, weights, device, half=False):
    """Cut a model on the meta device over the ranks and load it: each reads only its own slices.

    weights {name: tensor}, whole, and the same on all ranks. half: the blocks' matrices are gathered
    in bfloat16, as autocast would cast them in one process. Norms, embeddings and head stay float32,
    and so does the residual stream: one process and many have the same numbers.
    """
    check_names("the model", weights, model.state_dict())
    mesh = dist.init_device_mesh(device, (world(),))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if half else None,
                                  reduce_dtype=torch.float32 if half else None,
                                  cast_forward_inputs=False)
    for block in model.h:
        for norm in (block.ln_1, block.ln_2) if half else ():
            fully_shard(norm, mesh=mesh)
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)  # embeddings, last norm, head
    state = {}
    for name, p in model.named_parameters():  # a tied head comes once
        whole = weights[name].to(p.dtype)
        part = distribute_tensor(whole.to(device), mesh, p.placements, src_data_rank=None)
        state[name] = torch.nn.Parameter(part, requires_grad=p.requires_grad)
    if model.config.tied_head:
        state["lm_head.weight"] = state["wte.weight"]
    model.load_state_dict(state, assign=True)
    return model


# -----------------------------------------------------------------------------
# checkpoints: one file of one process, or a folder with a file of each rank. Both load on any
# number of ranks.


def states(model, optimizer, trained_only, whole):
    """(model's, optimizer's) state dicts; whole: of full tensors, on the CPU of rank 0 alone."""
    weights, moments = get_state_dict(model, optimizer, options=StateDictOptions(
        full_state_dict=whole, cpu_offload=whole, ignore_frozen_params=trained_only))
    return without_frozen(model, weights) if trained_only else weights, moments


def whole_model(model, trained_only=False):
    """{name: whole tensor on the CPU} on rank 0, nothing elsewhere; all ranks must call it."""
    weights = get_model_state_dict(model, options=StateDictOptions(
        full_state_dict=True, cpu_offload=True, ignore_frozen_params=trained_only))
    return without_frozen(model, weights) if trained_only else weights


def without_frozen(model, weights):
    """torch leaves out frozen parameters, but a tied head by its first name only."""
    frozen = {n for n, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    return {name: t for name, t in weights.items() if name not in frozen}


def save(path, model, optimizer, trained_only, sharded, **plain):
    """Model, optimizer and plain data as the folder `path`, if sharded, or else the file path.pt.

    The whole of it is there, or what was there before.
    """
    model, optimizer = states(model, optimizer, trained_only, whole=not sharded)
    parts = {"model": model, "optimizer": optimizer}
    if not sharded:
        write_pickle(path + ".pt", plain | parts)
        for earlier in (path, f"{path}.old"):  # of a sharded part of the run
            shutil.rmtree(earlier, ignore_errors=True)
        return
    fresh, old = f"{path}.new", f"{path}.old"
    dcp.save(parts, checkpoint_id=fresh)
    if rank() == 0:
        write_pickle(os.path.join(fresh, "plain.pt"), plain)
        shutil.rmtree(old, ignore_errors=True)
        if os.path.exists(path):
            os.rename(path, old)
        os.rename(fresh, path)
        shutil.rmtree(old, ignore_errors=True)


def newest(path):
    """What `save` left at `path`: the folder, the one before if it was stopped in between, or the file."""
    return next(filter(os.path.exists, (path, f"{path}.old", f"{path}.pt")), None)


def read(path):
    """The plain data of a folder of `save`, or all that is in a file."""
    if os.path.isdir(path):
        return read_pickle(os.path.join(path, "plain.pt")) | {"folder": path}
    return read_pickle(path)


class Names(pickle.Unpickler):
    """Reads the .metadata of torch's checkpoints, which as a plain pickle could run any code."""

    allowed = {"torch.distributed.checkpoint.metadata": (
                   "Metadata", "MetadataIndex", "TensorStorageMetadata", "TensorProperties", "StorageMeta",
                   "ChunkStorageMetadata", "BytesStorageMetadata", "_MEM_FORMAT_ENCODING"),
               "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
               "torch.serialization": ("_get_layout",), "torch": ("Size",)}

    def find_class(self, module, name):
        if module.startswith("pathlib"):
            return pathlib.PurePath  # where the folder once was, of any system
        if name in self.allowed.get(module, ()) or module == "torch" and (
                isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        if (module, name) == ("builtins", "getattr"):  # how Python 3.11.2 writes a member of an enum
            return lambda enum, member: enum[member]
        raise pickle.UnpicklingError(f"{module}.{name}")


class Reader(dcp.FileSystemReader):
    """Reads a folder of `save` that may be from anybody. A bad .metadata: ValueError."""

    def __init__(self, folder):
        super().__init__(folder)
        path = os.path.join(folder, ".metadata")
        try:
            with open(path, "rb") as f:
                self.content = Names(f).load()
            files = {part.relative_path for part in self.content.storage_data.values()}
            if any(os.path.basename(file) != file for file in files):
                raise ValueError("files elsewhere")
        except OSError:
            raise
        except Exception as error:  # damaged bytes make pickle raise nearly anything
            raise ValueError(f"{path} is damaged, or holds more than a checkpoint ({error!s:.200})") from None

    def read_metadata(self, *_):
        return self.content


class Planner(dcp.DefaultLoadPlanner):
    def load_bytes(self, item, value):
        plain = io.BytesIO()  # in place of what torch would read without restriction
        try:
            torch.save(torch.load(value, weights_only=True), plain)
        except Exception:
            raise ValueError(f"{item.dest_index.fqn} is more than plain values") from None
        plain.seek(0)
        super().load_bytes(item, plain)


def load(saved, model, optimizer, trained_only):
    """Put what `read` returned into the model and its optimizer."""
    if "folder" in saved:
        options = StateDictOptions(ignore_frozen_params=trained_only, strict=not trained_only)
        parts = dict(zip(("model", "optimizer"), states(model, optimizer, trained_only, whole=False)))
        try:
            dcp.load(parts, storage_reader=Reader(saved["folder"]), planner=Planner())
        except dcp.CheckpointException as error:
            why = " ".join(str(next(iter(error.failures.values()))[0]).split())
            raise ValueError(f"{saved['folder']} is damaged or of another model: {why:.300}") from None
    else:
        options = StateDictOptions(full_state_dict=True, ignore_frozen_params=trained_only,
                                   strict=not trained_only)
        parts = saved
    set_state_dict(model, optimizer, model_state_dict=parts["model"],
                   optim_state_dict=parts["optimizer"], options=options)


def put(model, weights):
    """Whole tensors, or some of them, into a model that may be sharded."""
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True, strict=False))
