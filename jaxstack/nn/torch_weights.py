"""Weights of PyTorch without PyTorch: state dicts in .safetensors, .npz, .pt and .pth as names and arrays.

A .pt file is a pickle, and a pickle may run any code. The reader here knows ordered dictionaries, tensors and storages
alone and refuses all else, so a file can hold nothing but arrays. Both formats are read: the zip archive (torch >= 1.6)
and a chain of pickles that raw storages follow (before).

Convolutions are [out, in, height, width] there and [height, width, in, out] here, linear layers [out, in] and [in,
out].
"""

import collections
import io
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxstack.core.errors import UserError

Weights = dict[str, np.ndarray]

MAGIC = 0x1950A86A20F9469CFC6C
TYPES = {
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
NESTED = ("state_dict", "model_state_dict", "model", "net", "ema", "module")
"""Entries under which a checkpoint keeps its state dict."""


class _Storage(NamedTuple):
    dtype: Any
    key: str
    size: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Foreign(Exception):
    """The file names something that is neither a tensor nor a dictionary."""


def _rebuild(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> _Tensor:
    return _Tensor(storage, int(offset), tuple(map(int, size)), tuple(map(int, stride)))


class _Reader(pickle.Unpickler):
    """Tensors become `_Tensor`; whatever is no part of one, or of a dictionary, is refused."""

    def __init__(self, file: Any):
        super().__init__(file)
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str, /) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_tensor"):
            return _rebuild
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_: tensor
        if module in ("torch", "torch.storage") and name in TYPES:
            return np.dtype(TYPES[name])
        raise _Foreign(f"{module}.{name}")

    def persistent_load(self, pid: Any, /) -> _Storage:
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage" or not isinstance(pid[1], np.dtype):
            raise _Foreign("a storage of unknown kind")
        storage = _Storage(pid[1], str(pid[2]), int(pid[4]))
        self.storages[storage.key] = storage
        return storage


def _array(tensor: _Tensor, storages: Mapping[str, bytes], big: bool) -> np.ndarray:
    """A tensor's values. Raises `ValueError` where the storage is too small."""
    raw = storages[tensor.storage.key]
    dtype = tensor.storage.dtype
    flat = np.frombuffer(raw, dtype.newbyteorder(">") if big and dtype.itemsize > 1 else dtype)
    last = tensor.offset + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.strides))
    if min(tensor.shape, default=1) > 0 and not (tensor.offset >= 0 and min(tensor.strides, default=0) >= 0):
        raise ValueError("a negative offset or stride")
    if min(tensor.shape, default=1) > 0 and last >= len(flat):
        raise ValueError(f"a storage of {len(flat)} values, which a tensor reads up to {last}")
    steps = [s * flat.itemsize for s in tensor.strides]
    view = np.lib.stride_tricks.as_strided(flat[tensor.offset :], tensor.shape, steps, writeable=False)
    out = np.array(view)
    return out.astype(np.float32) if out.dtype in (np.float16, np.float64, ml_dtypes.bfloat16) else out


def _zip(file: io.BufferedReader) -> tuple[Any, Mapping[str, bytes], bool]:
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        heads = [n for n in names if n.endswith("/data.pkl") or n == "data.pkl"]
        if len(heads) != 1:
            raise ValueError("an archive without data.pkl")
        if any("/code/" in n or n.endswith("constants.pkl") for n in names):
            raise _Foreign("a TorchScript program")
        root = heads[0].removesuffix("data.pkl")
        found = _Reader(io.BytesIO(archive.read(heads[0]))).load()
        storages = {n.removeprefix(f"{root}data/"): archive.read(n) for n in names if n.startswith(f"{root}data/")}
        order = archive.read(f"{root}byteorder") if f"{root}byteorder" in names else b"little"
    return found, storages, order == b"big"


def _chain(file: io.BufferedReader) -> tuple[Any, Mapping[str, bytes], bool]:
    if _Reader(file).load() != MAGIC:
        raise ValueError("no magic number")
    _Reader(file).load()
    system = _Reader(file).load()
    reader = _Reader(file)
    found = reader.load()
    storages = {}
    big = not system.get("little_endian", True)
    for key in map(str, _Reader(file).load()):
        count = int.from_bytes(file.read(8), "big" if big else "little", signed=True)
        dtype, size = reader.storages[key].dtype, reader.storages[key].size
        if count != size:
            raise ValueError(f"storage {key} of {count} values, expected {size}")
        storages[key] = file.read(count * dtype.itemsize)
        if len(storages[key]) != count * dtype.itemsize:
            raise ValueError(f"the file ends within storage {key}")
    return found, storages, big


def _state_dict(found: Any) -> Mapping[str, _Tensor]:
    """The dictionary of tensors in what a file holds. Raises `_Foreign`."""
    if isinstance(found, Mapping):
        if found and all(isinstance(v, _Tensor) for v in found.values()):
            return found
        for name in NESTED:
            if isinstance(found.get(name), Mapping):
                return _state_dict(found[name])
    raise _Foreign("no state dict, a mapping from names to tensors")


def read_weights(path: str | Path) -> Weights:
    """All arrays of a file by name; floating point as float32, integers as they are.

    Args:
        path: .safetensors, .npz (without objects), .pt, .pth or .bin.

    Raises:
        UserError: for a missing, truncated or other file, or one that holds more than arrays: a pickled module or a
            TorchScript program, which scripts/torch_to_safetensors.py converts.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    kind = path.suffix
    if kind == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.flax import load_file

        try:
            return {name: _float32(np.asarray(x)) for name, x in load_file(path).items()}
        except SafetensorError as e:
            raise UserError(f"{path}: not a safetensors file: {e}") from e
    if kind == ".npz":
        try:
            with np.load(path, allow_pickle=False) as file:
                return {name: _float32(file[name]) for name in file.files}
        except (OSError, ValueError, zipfile.BadZipFile) as e:
            raise UserError(f"{path}: not an NPZ file of arrays: {e}") from e
    if kind not in (".pt", ".pth", ".bin"):
        raise UserError(f"{path}: expected a name ending in .safetensors, .npz, .pt, .pth or .bin")
    try:
        with open(path, "rb") as file:
            zipped = file.read(4) == b"PK\x03\x04"
            file.seek(0)
            found, storages, big = (_zip if zipped else _chain)(file)
        return {str(name): _array(t, storages, big) for name, t in _state_dict(found).items()}
    except _Foreign as e:
        raise UserError(
            f"{path}: holds {e}, expected tensors alone; convert it with scripts/torch_to_safetensors.py"
        ) from e
    except (pickle.UnpicklingError, zipfile.BadZipFile, EOFError, OSError, ValueError, KeyError) as e:
        raise UserError(f"{path}: broken or no file of PyTorch's: {e}") from e
    except (AttributeError, IndexError, TypeError, MemoryError, OverflowError) as e:  # of a malformed pickle
        raise UserError(f"{path}: broken or no file of PyTorch's: {e}") from e


def _float32(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float32) if x.dtype.kind not in "iub" else x


_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}


def _names(network: Any, variables: Any) -> dict[str, tuple[tuple[str, ...], Any]]:
    """Names in the state dict -> (path in the variables, the leaf)."""
    flat, name = flatten_dict(variables), getattr(network, "torch_name", ".".join)
    leaf = lambda last: _LEAVES.get(last, last)
    return {f"{name(path[1:-1])}.{leaf(path[-1])}": (path, x) for path, x in flat.items()}


def _shapes(network: Any, weights: Mapping[str, np.ndarray]) -> Any:
    """Shapes of a network's variables for images of 32x32 pixels and the channels that the weights are of."""
    of = lambda channels: jax.eval_shape(network.init, jax.random.key(0), np.zeros((1, 32, 32, channels), np.float32))
    found = of(3)
    first = [k for k, (_, x) in _names(network, found).items() if len(x.shape) == 4 and x.shape[2] == 3]
    given = [np.shape(weights[k])[1] for k in first if np.ndim(weights.get(k, 0)) == 4]
    return of(given[0]) if given and given[0] != 3 else found


def from_torch(network: Any, arrays: Mapping[str, np.ndarray], variables: Any = None, source: str = "weights") -> Any:
    """Variables of a network from a state dict.

    Args:
        network: a flax module; its `torch_name` says what its layers are called, default: as in flax, with dots.
        arrays: the state dict, from `read_weights` or from memory; `num_batches_tracked` is left out.
        variables: of the network, arrays or their shapes (`jax.eval_shape` of its `init`); default: those for images of
            32x32 pixels, with as many channels as the arrays have. A network whose weights depend on the size, or that
            takes no images, needs them.
        source: what errors call the arrays.

    Raises:
        UserError: listing the names that are missing, unknown, or of another shape.
    """
    given = {k: np.asarray(v) for k, v in arrays.items() if not k.endswith("num_batches_tracked")}
    expected = _names(network, _shapes(network, given) if variables is None else variables)
    shape = lambda x: _turned_back(np.broadcast_to(np.float32(0.0), x.shape)).shape
    faults = [f"{k} is missing" for k in expected if k not in given]
    faults += [f"{k} is unknown" for k in given if k not in expected]
    faults += [
        f"{k} has shape {list(given[k].shape)}, expected {list(shape(x))}"
        for k, (_, x) in expected.items()
        if k in given and given[k].shape != shape(x)
    ]
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise UserError(f"{source}: {'; '.join(faults[:5])}{more}")
    return unflatten_dict({path: _turned(given[k].astype(np.float32)) for k, (path, _) in expected.items()})


def to_torch(network: Any, variables: Any) -> Weights:
    """The state dict of a network's variables, or of some of them, float32; the inverse of `from_torch`."""
    return {
        k: np.ascontiguousarray(_turned_back(np.asarray(x, np.float32)))
        for k, (_, x) in _names(network, variables).items()
    }


def _turned(x: np.ndarray) -> np.ndarray:
    return x.transpose({4: (2, 3, 1, 0), 2: (1, 0)}.get(x.ndim, range(x.ndim)))


def _turned_back(x: np.ndarray) -> np.ndarray:
    return x.transpose({4: (3, 2, 0, 1), 2: (1, 0)}.get(x.ndim, range(x.ndim)))
