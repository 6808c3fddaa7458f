"""What weights are stored in: safetensors, .bin and their indices, and JSON. The files may be hostile.

{name: tensor} is memory-mapped, so that only what is used is read. A bad file: ValueError, one line.
"""

import contextlib
import json
import math
import mmap
import os
import re
import zipfile

import torch

from plumbing.flags import replace

WEIGHTS = ["model.safetensors", "model.safetensors.index.json",
           "pytorch_model.bin", "pytorch_model.bin.index.json"]  # looked for in this order
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
          "U8": torch.uint8, "BOOL": torch.bool}
JSON_LIMIT = 20_000_000  # bytes; real headers have less than one million, tokenizers up to 17

# -----------------------------------------------------------------------------
# a folder, or one file of it


def read_weights(path):
    """{name: tensor} of a folder that holds one of WEIGHTS, or of one such file."""
    path = os.fspath(path)
    if os.path.isdir(path):
        found = [file for file in WEIGHTS if os.path.exists(os.path.join(path, file))]
        if not found:
            raise ValueError(f"{path} holds no weights: looked for {', '.join(WEIGHTS)}")
        path = os.path.join(path, found[0])
    if path.endswith(".index.json"):
        return read_shards(path)
    if path.endswith(".safetensors"):
        return read_safetensors(path)
    content = read_pickle(path)
    if not isinstance(content, dict) or not all(map(torch.is_tensor, content.values())):
        raise ValueError(f"{path} is not a table of named tensors")
    return dict(content)


def read_json(path):
    """The content of a JSON file; ValueError if it is damaged, or larger or deeper than real ones."""
    with open(path, "rb") as f:
        text = f.read(JSON_LIMIT + 1)
    try:
        if len(text) > JSON_LIMIT:
            raise ValueError
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"{path} is not valid JSON, or too large or too deep: get it again") from None


def read_index(path):
    """{tensor name: file name in the same folder} of a *.index.json."""
    with contextlib.suppress(ValueError, TypeError, KeyError):
        files = dict(read_json(path)["weight_map"])
        if all(re.fullmatch(r"[\w.-]+\.(safetensors|bin)", file) for file in files.values()):
            return files
    raise ValueError(f"{path} is damaged: its weight_map names no files beside it")


def shards(path):
    """The files that hold the tensors, if path is a *.index.json."""
    return sorted(set(read_index(path).values())) if path.endswith(".json") else []


def read_shards(path):
    files, tensors = read_index(path), {}
    for shard in shards(path):
        file = os.path.join(os.path.dirname(path), shard)
        if not os.path.exists(file):
            raise ValueError(f"{path} names the file {shard}, which is not beside it")
        content = read_weights(file)
        names = [name for name in files if files[name] == shard]
        if lost := [name for name in names if name not in content]:
            raise ValueError(f"{file} lacks {lost[0]}, which the index says it holds")
        tensors |= {name: content[name] for name in names}
    return tensors


# -----------------------------------------------------------------------------
# .bin and .pt: what torch.save writes


def read_pickle(path):
    """What torch.save wrote, if it is tensors and plain containers: nothing in it is executed."""
    with open(path, "rb") as f:
        mapped = f.read(4) == b"PK\3\4"  # files from before torch 1.6 can not be mapped
    try:
        refuse_bomb(path, mapped)
        content = torch.load(path, weights_only=True, mmap=mapped, map_location="cpu")
        parts = [content, content.get("model")] if isinstance(content, dict) else []
        for t in (t for part in parts if isinstance(part, dict) for t in part.values() if torch.is_tensor(t)):
            if t.numel() * t.element_size() > os.path.getsize(path):
                raise ValueError("a tensor that repeats a few numbers")
        return content
    except MemoryError:
        raise
    except Exception:  # damaged bytes make torch and pickle raise nearly anything
        raise ValueError(f"{path} can not be read: cut, damaged, more than tensors and plain "
                         "containers, or larger in memory than as a file") from None


def refuse_bomb(path, zipped):
    """ValueError if a pickle would take far more memory than its file: packed, or by bytearray(n)."""
    with contextlib.ExitStack() as stack:
        if zipped:
            z = stack.enter_context(zipfile.ZipFile(path))
            if sum(entry.file_size for entry in z.infolist()) > os.path.getsize(path):
                raise ValueError("packed")
            pickles = [z.read(entry) for entry in z.infolist() if entry.filename.endswith(".pkl")]
        else:
            f = stack.enter_context(open(path, "rb"))
            pickles = [stack.enter_context(mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ))]
        if any(content.find(b"bytearray") >= 0 for content in pickles):
            raise ValueError("bytearray")


def write_pickle(path, content):
    """torch.save of tensors and plain containers, which read_pickle opens."""
    try:
        replace(path, lambda temporary: torch.save(content, temporary))
    except RuntimeError as error:  # what torch makes of a full disk
        raise OSError(f"can not write {path}, is the disk full? what was there before is as it "
                      f"was ({str(error).splitlines()[0]})") from None


# -----------------------------------------------------------------------------
# safetensors: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}},
# then the bytes of the tensors without gaps


def read_safetensors(path):
    """{name: tensor}, private views of the mapped file: writing to them leaves the file alone.

    A damaged file: ValueError that names file and fault.
    """
    size, tensors = os.path.getsize(path), {}
    base, rows = read_header(path, size)
    data = torch.from_file(os.fspath(path), shared=False, size=size, dtype=torch.uint8)
    for begin, end, shape, kind, name in rows:
        raw, dtype = data[base + begin : base + end], DTYPES[kind]
        if (base + begin) % dtype.itemsize:
            raw = raw.clone()  # a view must begin at a multiple of its number's size
        tensors[name] = raw.view(dtype).view(shape) if len(raw) else torch.empty(shape, dtype=dtype)
    return tensors


def read_metadata(path):
    """{str: str}, the __metadata__ of a safetensors file."""
    read_header(path, os.path.getsize(path))
    with open(path, "rb") as f:
        return json.loads(f.read(int.from_bytes(f.read(8), "little"))).get("__metadata__") or {}


def read_header(path, size):
    """(offset of the first tensor, [(begin, end, shape, dtype, name)] in the file's order)."""
    with open(path, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if length > size - 8:
            raise ValueError(f"{path} is no safetensors file or is cut: {size} bytes, header of "
                             f"{length} (a Git LFS pointer or a web page? download it again)")
        if length > JSON_LIMIT:
            raise ValueError(f"{path} is no safetensors file: a header of {length} "
                             "bytes, real ones are small")
        text = f.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        rows = sorted((*t["data_offsets"], t["shape"], t["dtype"], n) for n, t in header.items())
        whole = all(type(n) is int and 0 <= n < 2**60 for a, b, shape, *_ in rows for n in (a, b, *shape))
        whole = whole and all(len(shape) <= 64 and math.prod(filter(None, shape)) < 2**60
                              for _, _, shape, *_ in rows)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        whole = False
    if not whole:
        raise ValueError(f"{path}: its header is no table of dtype, shape and data_offsets")
    last, fault = 0, None
    for begin, end, shape, dtype, name in rows:
        if str(dtype) not in DTYPES:
            fault = f"has the unknown dtype {dtype}"
        elif end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
            fault = f"has {end - begin} bytes, which {dtype} {shape} does not"
        elif begin != last:
            fault = f"begins at byte {begin}, the one before ends at {last}: overlap or hole"
        if fault:
            raise ValueError(f"{path}: tensor {name!r:.200} {fault:.200}")
        last = end
    if 8 + length + last != size:
        raise ValueError(f"{path} has {size} bytes, its header promises {8 + length + last}: "
                         "download it again")
    return 8 + length, rows


def write_safetensors(path, tensors, metadata=None):
    """{name: tensor} to a file, one tensor at a time, whole or not at all.

    metadata: {str: str}, beside {"format": "pt"}, which transformers asks for.
    """
    kinds = {dtype: kind for kind, dtype in DTYPES.items()}
    header, end = {"__metadata__": {"format": "pt"} | (metadata or {})}, 0
    for name, t in tensors.items():
        if t.dtype not in kinds:
            raise ValueError(f"{path}: tensor {name!r} is {t.dtype}, which can not be stored")
        begin, end = end, end + t.numel() * t.element_size()
        header[name] = {"dtype": kinds[t.dtype], "shape": [*t.shape], "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    def write(temporary):
        with open(temporary, "wb") as f:
            f.write(len(text).to_bytes(8, "little") + text)
            for t in tensors.values():
                t = t.detach().cpu().contiguous()
                f.write(t.reshape(-1).view(torch.uint8).numpy())  # numpy has no bfloat16

    try:
        replace(path, write)
    except OSError as error:
        raise OSError(error.errno, f"can not write {path}: {error.strerror}; what was there before "
                                   "is as it was") from None
