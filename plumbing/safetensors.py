"""The safetensors format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape,
data_offsets}}, then the bytes of the tensors without gaps."""

import json
import math
import os

import torch

from plumbing.flags import replace

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
          "U8": torch.uint8, "BOOL": torch.bool}


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
        text = f.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        rows = sorted((*t["data_offsets"], t["shape"], t["dtype"], n) for n, t in header.items())
        whole = all(type(n) is int and n >= 0 for a, b, shape, *_ in rows for n in (a, b, *shape))
        whole &= all(math.prod(filter(None, shape)) < 2**60 for _, _, shape, *_ in rows)
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
            raise ValueError(f"{path}: tensor {name!r} {fault}")
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
