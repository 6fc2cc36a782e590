"""Weights of PyTorch without PyTorch: both formats written by hand, what is refused, and names of the networks."""

import collections
import io
import os
import pickle
import struct
import sys
import types
import zipfile

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxstack.core.errors import UserError
from jaxstack.nn.torch_weights import from_torch, read_weights, to_torch
from jaxstack.nn.vision import zoo


class Storage:
    """What stands in a pickle of PyTorch's as a persistent id."""

    def __init__(self, kind, values):
        self.kind, self.values = kind, np.ascontiguousarray(values).reshape(-1)


class Tensor:
    def __init__(self, storage, offset, shape, strides, parameter=False):
        self.parts, self.parameter = (storage, offset, shape, strides, False, collections.OrderedDict()), parameter

    def __reduce__(self):
        utils = sys.modules["torch._utils"]
        if self.parameter:
            bare = Tensor(*self.parts[:4])
            return utils._rebuild_parameter, (bare, True, collections.OrderedDict())
        return utils._rebuild_tensor_v2, self.parts


def tensor(values, kind="FloatStorage", **options):
    x = np.ascontiguousarray(values)
    strides = tuple(s // x.itemsize for s in x.strides)
    return Tensor(Storage(kind, x), 0, x.shape, strides, **options)


@pytest.fixture
def torch_names(monkeypatch):
    """Modules of PyTorch's names, as a pickle refers to globals by name."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    for kind in ("FloatStorage", "BFloat16Storage", "LongStorage", "DoubleStorage"):
        setattr(torch, kind, type(kind, (), {"__module__": "torch", "__qualname__": kind}))
    for name in ("_rebuild_tensor_v2", "_rebuild_parameter"):
        exec(f"def {name}(*args): raise AssertionError('called')", utils.__dict__)
        getattr(utils, name).__module__ = "torch._utils"
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "torch._utils", utils)


class Pickler(pickle.Pickler):
    def __init__(self, file, extra=()):
        super().__init__(file, protocol=2)
        self.stored, self.extra = {}, extra

    def persistent_id(self, obj):
        if not isinstance(obj, Storage):
            return None
        key = (
            str(len(self.stored))
            if obj not in self.stored.values()
            else next(k for k, v in self.stored.items() if v is obj)
        )
        self.stored[key] = obj
        return ("storage", getattr(sys.modules["torch"], obj.kind), key, "cpu", len(obj.values), *self.extra)


def zipped(path, obj):
    buffer = io.BytesIO()
    pickler = Pickler(buffer)
    pickler.dump(obj)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", buffer.getvalue())
        archive.writestr("archive/byteorder", "little")
        for key, storage in pickler.stored.items():
            archive.writestr(f"archive/data/{key}", storage.values.tobytes())


def chained(path, obj):
    with open(path, "wb") as file:
        for head in (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True}):
            pickle.dump(head, file, protocol=2)
        pickler = Pickler(file, (None,))
        pickler.dump(obj)
        pickle.dump(list(pickler.stored), file, protocol=2)
        for storage in pickler.stored.values():
            file.write(struct.pack("<q", len(storage.values)))
            file.write(storage.values.tobytes())


@pytest.mark.parametrize("write", [zipped, chained])
def test_both_formats_give_the_arrays(write, tmp_path, torch_names):
    rng = np.random.default_rng(0)
    x, shared = rng.normal(size=(2, 3)).astype(np.float32), Storage("FloatStorage", np.arange(12, dtype=np.float32))
    state = collections.OrderedDict(
        weight=tensor(x, parameter=True),
        turned=Tensor(shared, 0, (4, 3), (1, 4)),  # a transposed view
        part=Tensor(shared, 5, (2,), (2,)),
        half=tensor(x.astype(ml_dtypes.bfloat16), "BFloat16Storage"),
        double=tensor(x.astype(np.float64), "DoubleStorage"),
        count=tensor(np.int64(7), "LongStorage"),
        empty=tensor(np.zeros((0, 3), np.float32)),
    )
    write(tmp_path / "a.pth", state)
    found = read_weights(tmp_path / "a.pth")
    np.testing.assert_array_equal(found["weight"], x)
    np.testing.assert_array_equal(found["turned"], np.arange(12, dtype=np.float32).reshape(3, 4).T)
    np.testing.assert_array_equal(found["part"], [5, 7])
    np.testing.assert_array_equal(found["half"], x.astype(ml_dtypes.bfloat16).astype(np.float32))
    assert found["double"].dtype == found["half"].dtype == np.float32
    assert found["count"] == 7
    assert found["count"].dtype == np.int64
    assert found["empty"].shape == (0, 3)
    write(tmp_path / "b.pt", {"epoch": 3, "state_dict": state})
    np.testing.assert_array_equal(read_weights(tmp_path / "b.pt")["weight"], x)
    # a storage that is too small for its tensor, and a file that ends early
    write(tmp_path / "small.pt", {"w": Tensor(shared, 8, (5,), (1,))})
    with pytest.raises(UserError, match=r"small.pt: broken .* a storage of 12 values, which a tensor reads up to 12"):
        read_weights(tmp_path / "small.pt")
    whole = (tmp_path / "a.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(UserError, match=r"cut.pth: broken or no file of PyTorch's"):
        read_weights(tmp_path / "cut.pth")


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("write", [zipped, chained])
def test_code_is_refused_and_not_run(write, tmp_path, torch_names):
    write(tmp_path / "evil.pt", {"w": Evil(str(tmp_path / "made"))})
    with pytest.raises(UserError, match=r"evil.pt: holds posix.mkdir, .* scripts/torch_to_safetensors.py"):
        read_weights(tmp_path / "evil.pt")
    assert not (tmp_path / "made").exists()
    write(tmp_path / "other.pt", {"epoch": 3})
    with pytest.raises(UserError, match=r"other.pt: holds no state dict"):
        read_weights(tmp_path / "other.pt")


def test_other_files(tmp_path):
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    np.savez(tmp_path / "a.npz", w=x, n=np.int32(3))
    save_file({"w": x.astype(np.float16)}, tmp_path / "a.safetensors")
    np.testing.assert_array_equal(read_weights(tmp_path / "a.npz")["w"], x)
    np.testing.assert_array_equal(read_weights(tmp_path / "a.safetensors")["w"], x)
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:
        archive.writestr("m/data.pkl", b"")
        archive.writestr("m/code/__torch__.py", b"")
    for name, message in (
        ("none.pt", "no such file"),
        ("a.txt", "expected a name ending in"),
        ("bad.safetensors", "not a safetensors file"),
        ("bad.npz", "not an NPZ file of arrays"),
        ("bad.pt", "broken or no file of PyTorch's"),
        ("script.pt", "holds a TorchScript program"),
    ):
        if name.startswith(("bad", "a.txt")):
            (tmp_path / name).write_bytes(b"nothing")
        with pytest.raises(UserError, match=f"{name}: {message}"):
            read_weights(tmp_path / name)
    np.savez(tmp_path / "object.npz", w=np.array([{}], object))
    with pytest.raises(UserError, match=r"object.npz: not an NPZ file of arrays"):
        read_weights(tmp_path / "object.npz")


NETWORKS = {
    "efficientnet-lite0": (4_652_008, 1281 * 1000),
    "efficientnet-b0": (5_288_548, 1281 * 1000),
    "densenet121": (6_953_856 + 1025 * 1000, 1025 * 1000),
    "mobilenet-v3-large": (5_483_032, 961 * 1280 + 1281 * 1000),
}


@pytest.mark.parametrize("kind", NETWORKS)
def test_networks_have_their_counts_and_names(kind):
    (count, last_layer), network = NETWORKS[kind], zoo.network(kind, 1000)
    size = lambda v: sum(int(np.prod(x.shape)) for x in jax.tree.leaves(v["params"]))
    shapes = lambda net: jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    whole = shapes(network)
    assert size(whole) == count
    assert count - size(shapes(zoo.network(kind, 0))) == last_layer
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), whole)
    state = to_torch(network, variables)
    back = from_torch(network, state | {"x.num_batches_tracked": np.array(1)})
    jax.tree.map(np.testing.assert_array_equal, back, variables)
    key, shape = {
        "efficientnet-lite0": ("_blocks.1._depthwise_conv.weight", (96, 1, 3, 3)),
        "efficientnet-b0": ("blocks.1.0.se.conv_reduce.weight", (4, 96, 1, 1)),
        "densenet121": ("features.conv0.weight", (64, 3, 7, 7)),
        "mobilenet-v3-large": ("blocks.2.0.se.conv_reduce.weight", (24, 72, 1, 1)),
    }[kind]
    assert state[key].shape == shape
    some = "features.denseblock4.denselayer16.norm2.running_var"
    assert kind != "densenet121" or state[some].shape == (128,)
    broken = dict(state)
    broken.pop(key)
    broken["extra"] = np.zeros(3)
    last = {"efficientnet-lite0": "_fc"}.get(kind, "classifier")
    broken[f"{last}.bias"] = np.zeros(7)
    message = rf"w: {key} is missing; extra is unknown; {last}.bias has shape \[7\], expected \[1000\]"
    with pytest.raises(UserError, match=message):
        from_torch(network, broken, whole, "w")
