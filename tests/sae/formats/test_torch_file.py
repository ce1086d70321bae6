"""Files of torch.save: what torch wrote comes back exactly, and what is no plain data is refused, not executed."""

from __future__ import annotations

import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fac_jax.errors import UserError
from fac_jax.sae.formats.torch_file import read_torch

torch = pytest.importorskip("torch")


def test_every_type_and_layout_that_torch_writes(tmp_path: Path) -> None:
    rng = torch.Generator().manual_seed(0)
    base = torch.randn(6, 8, generator=rng)
    kinds = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
             torch.int8, torch.uint8, torch.bool]  # fmt: skip
    tensors = {str(kind): (base * 3).to(kind) for kind in kinds}
    tensors |= {
        "transposed": base.T,
        "slice": base[1:5:2, 3:],
        "scalar": torch.tensor(7),
        "empty": torch.zeros(0, 4),
        "parameter": torch.nn.Parameter(base),
    }
    module = torch.nn.Linear(3, 2)
    content = {
        "tensors": tensors,
        "state": module.state_dict(),  # an OrderedDict with _metadata
        "plain": [1, -1, 2**40, 1.5, True, None, "x", (1, (2, "y")), {"a": []}],
    }
    for protocol in (2, 4, 5):
        torch.save(content, tmp_path / "file.pth", pickle_protocol=protocol)
        found = read_torch(tmp_path / "file.pth")
        assert found["plain"] == content["plain"]
        for name, tensor in {**tensors, **module.state_dict()}.items():
            got = {**found["tensors"], **found["state"]}[name]
            assert got.shape == tuple(tensor.shape) and got.flags.c_contiguous
            np.testing.assert_array_equal(got.astype(np.float64), tensor.detach().double().numpy())


class Reduced:
    """Pickles to a call of anything."""

    def __init__(self, called: Callable[..., Any], *arguments: Any) -> None:
        self.call = called, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def zipped(path: Path, pickled: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", pickled)
        archive.writestr("x/byteorder", "little")
    return path


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize(
    ("value", "name"),
    [
        (lambda order: Reduced(os.system, order), f"{os.system.__module__}.system"),
        (lambda order: Reduced(eval, f"__import__('os').system({order!r})"), r"(builtins|__builtin__)\.eval"),
        (lambda order: {"weight": {"W_enc": [(Reduced(os.system, order),)]}}, f"{os.system.__module__}.system"),
        (lambda order: Reduced(getattr, Reduced(__import__, "os"), "system"), r"(builtins|__builtin__)\.getattr"),
        (lambda order: OrderedDict, "OrderedDict"),
        (lambda order: pickle.Unpickler, r"\w*[pP]ickle\.Unpickler"),
        (lambda order: Path("x"), r"pathlib"),
    ],
)
def test_a_pickle_that_loads_anything_is_refused_and_not_executed(
    value: Callable[[str], Any], name: str, protocol: int, tmp_path: Path
) -> None:
    sign = tmp_path / "executed"
    pickled = pickle.dumps({"weight": value(f"touch {sign}")}, protocol)
    path = zipped(tmp_path / "file.pth", pickled)
    if name == "OrderedDict":  # known, and no call of it: harmless data
        assert str(read_torch(path)["weight"]) == "collections.OrderedDict"
        return
    with pytest.raises(UserError, match=f"tries to load {name}.* nothing of it was executed"):
        read_torch(path)
    assert not sign.exists()


def test_names_that_look_known_and_instructions_that_make_objects(tmp_path: Path) -> None:
    cases = {
        b"ctorch\nload\n.": r"tries to load torch\.load,",
        b"ctorch._utils\nimport_module\n.": "import_module",
        b"ctorch.storage\nFloatStorage\n.": "torch.storage.FloatStorage",
        b"(S'ls'\nios\nsystem\n.": "pickle instruction STRING",
        b"(ios\nsystem\n.": "pickle instruction INST",
        b"\x80\x02ctorch\nFloatStorage\n)\x81.": "pickle instruction NEWOBJ",
        b"\x80\x02ctorch\nFloatStorage\n)R.": r"calls 'torch\.FloatStorage'",
        b"\x80\x02X\x01\x00\x00\x00x)R.": "calls 'x'",
        b"\x80\x04\x82\x01.": "pickle instruction EXT1",
        b"\x80\x02Ctorch": "malformed",
        b"\x80\x02K\x01": "malformed",
        b"\x80\x02K\x01K\x02.": "malformed",
        b"\x80\x02R.": "malformed",
        b"\x80\x02K\x01K\x02b.": "an? int is filled as a dict",
        b"\x80\x02}]K\x01s.": "a list is the key",
        b"\x80\x02h\x07.": "malformed",
        b"\x80\x02X\x01\x00\x00\x00xQ.": "which is no tensor storage",
        b"\x80\x02" + b")\x85" + b"\x85" * 100_000 + b"Q.": "cannot be read",
    }
    for pickled, message in cases.items():
        with pytest.raises(UserError, match=message):
            read_torch(zipped(tmp_path / "file.pth", pickled))


def rebuilt(path: Path, change: Callable[[dict[str, bytes]], None], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    change(entries)
    changed = path.with_name("changed.pth")
    with zipfile.ZipFile(changed, "w", method) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return changed


def test_files_that_are_not_whole(tmp_path: Path) -> None:
    path = tmp_path / "file.pth"
    torch.save({"a": torch.zeros(1000)}, path)
    data = path.read_bytes()
    (tmp_path / "cut.pth").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"cut.pth is no whole file of torch.save \(.*\d bytes\): copy it again"):
        read_torch(tmp_path / "cut.pth")
    flipped = bytearray(data)
    flipped[data.index(bytes(4000)) + 2000] ^= 1
    (tmp_path / "flipped.pth").write_bytes(flipped)
    with pytest.raises(UserError, match="Bad CRC-32"):
        read_torch(tmp_path / "flipped.pth")
    torch.save({"a": 1}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match="torch before 1.6, which is not read: where you trust its origin"):
        read_torch(tmp_path / "old.pth")
    with pytest.raises(UserError, match="no such file"):
        read_torch(tmp_path / "gone.pth")
    with pytest.raises(UserError, match="cannot be read"):
        read_torch(tmp_path)
    with pytest.raises(UserError, match="holds 0 data.pkl, not 1"):
        read_torch(rebuilt(path, lambda entries: entries.pop("file/data.pkl")))
    with pytest.raises(UserError, match="data/0 is missing"):
        read_torch(rebuilt(path, lambda entries: entries.pop("file/data/0")))
    with pytest.raises(UserError, match=r"storage 0 holds 3,996 bytes, its pickle says 1000 numbers of 4 bytes"):
        read_torch(rebuilt(path, lambda entries: entries.update({"file/data/0": bytes(3996)})))
    with pytest.raises(UserError, match="byte order b'big'"):
        read_torch(rebuilt(path, lambda entries: entries.update({"file/byteorder": b"big"})))
    with pytest.raises(UserError, match="unpacks to .* torch.save never packs"):
        read_torch(rebuilt(path, lambda entries: None, zipfile.ZIP_DEFLATED))


@pytest.mark.parametrize(
    ("offset", "shape", "stride"),
    [(1, 10, 1), (0, 11, 1), (0, 5, 3), (100, 1, 1), (0, 200, 0), (0, 2**31 - 1, 0)],
)
def test_a_tensor_outside_its_storage(offset: int, shape: int, stride: int, tmp_path: Path) -> None:
    path = tmp_path / "file.pth"
    torch.save({"a": torch.zeros(10)}, path)

    def change(entries: dict[str, bytes]) -> None:
        old = entries["file/data.pkl"]
        arguments = b"K\x00K\n\x85q\x08K\x01\x85"  # offset 0, shape (10,), stride (1,)
        assert old.count(arguments) == 1
        numbers = [b"J" + struct.pack("<i", number) for number in (offset, shape, stride)]
        new = numbers[0] + numbers[1] + b"\x85q\x08" + numbers[2] + b"\x85"
        entries["file/data.pkl"] = old.replace(arguments, new)

    with pytest.raises(UserError, match=rf"shape \({shape},\), strides \({stride},\) and offset {offset} leaves its"):
        read_torch(rebuilt(path, change))
