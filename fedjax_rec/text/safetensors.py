"""Reading a safetensors file: an 8-byte header length, a JSON header, and the raw numbers behind it."""

import json
import math
from pathlib import Path

import ml_dtypes
import numpy as np

_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": ml_dtypes.bfloat16}
_DTYPES |= {"I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1", "BOOL": "?"}


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Arrays by name, mapped from the file: nothing is read before it is used.

    Raises:
      ValueError: for a file that is cut off or no safetensors file.
    """
    size = Path(path).stat().st_size
    with open(path, "rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(start - 8)) if 10 <= start <= size else None
        except ValueError:
            header = None
    if not isinstance(header, dict):
        raise ValueError(f"{path} ({size} bytes) has no safetensors header; was it downloaded whole?")
    data, arrays = np.memmap(path, np.uint8, "r"), {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        first, last = (start + offset for offset in entry["data_offsets"])
        dtype = np.dtype(_DTYPES.get(entry["dtype"], "V0"))
        if last > size or last - first != math.prod(entry["shape"]) * dtype.itemsize:
            raise ValueError(f"{path} ({size} bytes) does not hold {name} ({entry}); is it cut off or of a new kind?")
        arrays[name] = data[first:last].view(dtype).reshape(entry["shape"])
    return arrays
