"""Files that `torch.save` wrote, read without torch and without executing what is in them.

A pickle is a program: `torch.load` and `pickle.load` run it, and it may call any function of any module. Here its
instructions are listed by `pickletools.genops` and carried out by a machine that knows plain values and the few names
that tensors are made of, as data: nothing is ever imported, and any other name is refused.

    data.pkl     the nested values; a tensor is a call of torch._utils._rebuild_tensor_v2 on a storage
    data/KEY     the bytes of a storage, stored uncompressed (zip checks their CRC)
    byteorder    little, the only one that is read

The zip form is that of torch 1.6 and later.
"""

from __future__ import annotations

import math
import pickletools
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import ml_dtypes
import numpy as np

from fac_jax.errors import UserError, first_line

MAX_PICKLE_BYTES = 2**24  # that of an SAE has about a thousand
LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # what a file of torch before 1.6 begins with
RESAVE = "where you trust its origin, load it with torch and save its tensors again with torch.save"
STORAGES = {
    name: np.dtype(kind)
    for name, kind in {
        "DoubleStorage": "<f8", "FloatStorage": "<f4", "HalfStorage": "<f2", "BFloat16Storage": ml_dtypes.bfloat16,
        "LongStorage": "<i8", "IntStorage": "<i4", "ShortStorage": "<i2", "CharStorage": "i1", "ByteStorage": "u1",
        "BoolStorage": "?",
    }.items()
}  # fmt: skip


class Name(NamedTuple):
    """A function or class that the pickle names: never looked up, only compared."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


ORDERED_DICT = Name("collections", "OrderedDict")
TENSOR = Name("torch._utils", "_rebuild_tensor_v2")
PARAMETER = Name("torch._utils", "_rebuild_parameter")
KNOWN = {ORDERED_DICT, TENSOR, PARAMETER} | {Name("torch", storage) for storage in STORAGES}


def read_torch(path: str | Path) -> Any:
    """The values in a file of `torch.save`: dicts, lists, tuples, numbers and strings, and tensors as numpy arrays.

    Raises UserError when the file is none of torch's zip form, is cut short or damaged, names anything but what tensors
    are made of (it is named, and not executed), or holds a tensor that does not lie within its storage.
    """
    path = Path(path)
    try:
        with path.open("rb") as stream:
            head = stream.read(len(LEGACY))
        if head == LEGACY:
            raise UserError(f"{path} has the form of torch before 1.6, which is not read: {RESAVE}")
        with zipfile.ZipFile(path) as archive:
            return _Reader(path, archive).read()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except zipfile.BadZipFile as error:
        raise UserError(
            f"{path} is no whole file of torch.save ({first_line(error)}; {path.stat().st_size:,} bytes): copy it again"
        ) from None
    except (OSError, EOFError, NotImplementedError, RuntimeError) as error:  # what zipfile says of the rest
        raise UserError(f"{path} cannot be read ({first_line(error)}): copy it again") from None


class _Reader:
    """One open archive: its pickle, and its storages, each read once."""

    def __init__(self, path: Path, archive: zipfile.ZipFile) -> None:
        self.path = path
        self._archive = archive
        self._entries = {entry.filename: entry for entry in archive.infolist()}
        self._storages: dict[str, np.ndarray] = {}
        pickles = [name for name in self._entries if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise UserError(f"{path} is a zip file but none of torch.save: it holds {len(pickles)} data.pkl, not 1")
        if (unpacked := sum(entry.file_size for entry in archive.infolist())) > (size := path.stat().st_size):
            self.refuse(f"unpacks to {unpacked:,} bytes from {size:,}, and torch.save never packs")
        self._prefix = pickles[0].removesuffix("data.pkl")

    def read(self) -> Any:
        if f"{self._prefix}byteorder" in self._entries:
            order = self._bytes("byteorder", 16)
            if order != b"little":
                raise UserError(
                    f"{self.path} has byte order {order!r}, only little is read: save it again on such a CPU"
                )
        try:
            return _Machine(self).run(self._bytes("data.pkl", MAX_PICKLE_BYTES))
        except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise UserError(f"{self.path}: its data.pkl is malformed ({first_line(error)}): copy it again") from None

    def refuse(self, what: str) -> NoReturn:
        raise UserError(f"{self.path} {what}; nothing of it was executed, and it is not read: {RESAVE}")

    def storage(self, reference: Any) -> np.ndarray:
        """The numbers of a storage, flat, from its persistent id ("storage", type, key, device, numbers)."""
        if not (isinstance(reference, tuple) and len(reference) == 5 and reference[0] == "storage"):
            self.refuse(f"refers to {str(reference)[:100]!r} outside the pickle, which is no tensor storage")
        _, kind, key, _, count = reference
        if not (isinstance(kind, Name) and kind.module == "torch" and kind.name in STORAGES and isinstance(key, str)):
            self.refuse(f"has a storage of type {kind}")
        dtype = STORAGES[kind.name]
        if key not in self._storages:
            self._storages[key] = np.frombuffer(self._bytes(f"data/{key}"), np.uint8)
        stored = self._storages[key]
        if type(count) is not int or count < 0 or len(stored) != count * dtype.itemsize:
            raise UserError(
                f"{self.path}: storage {key} holds {len(stored):,} bytes, its pickle says {count} numbers of "
                f"{dtype.itemsize} bytes: copy the file again"
            )
        return stored.view(dtype)

    def _bytes(self, name: str, limit: int | None = None) -> bytes:
        entry = self._entries.get(self._prefix + name)
        if entry is None:
            raise UserError(f"{self.path}: {name} is missing from it: copy the file again")
        if entry.compress_type != zipfile.ZIP_STORED or (limit is not None and entry.file_size > limit):
            self.refuse(f"has a {name} of {entry.file_size:,} bytes, packed by method {entry.compress_type}")
        return self._archive.read(entry)


class _Machine:
    """Carries out the instructions of a pickle on a stack of plain values."""

    def __init__(self, reader: _Reader) -> None:
        self._reader = reader
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self._calls: dict[Name, Callable[..., Any]] = {
            ORDERED_DICT: lambda: {},
            TENSOR: self._tensor,
            PARAMETER: lambda data, requires_grad, hooks: data,
        }

    def run(self, pickle: bytes) -> Any:
        for instruction, argument, _ in pickletools.genops(pickle):
            if instruction.name == "STOP":
                (value,) = self._stack
                return value
            self._step(instruction.name, argument)
        raise ValueError("it has no end")

    def _step(self, name: str, argument: Any) -> None:
        stack = self._stack
        match name:
            case "PROTO" | "FRAME":
                pass
            case "BININT" | "BININT1" | "BININT2" | "INT" | "LONG" | "LONG1" | "LONG4" | "FLOAT" | "BINFLOAT":
                stack.append(argument)
            case "BINUNICODE" | "SHORT_BINUNICODE" | "BINUNICODE8" | "UNICODE":
                stack.append(argument)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
            case "MARK":
                self._marks.append(len(stack))
            case "POP":
                stack.pop()
            case "EMPTY_DICT" | "EMPTY_LIST":
                stack.append({} if name == "EMPTY_DICT" else [])
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(self._pop(int(name[-1]))))
            case "TUPLE" | "LIST":
                items = self._since_mark()
                stack.append(tuple(items) if name == "TUPLE" else items)
            case "DICT":
                items = self._since_mark()
                stack.append({})
                self._set(items)
            case "APPEND" | "APPENDS":
                items = self._pop(1) if name == "APPEND" else self._since_mark()
                self._top(list).extend(items)
            case "SETITEM" | "SETITEMS":
                self._set(self._pop(2) if name == "SETITEM" else self._since_mark())
            case "BINPUT" | "LONG_BINPUT" | "PUT":
                self._memo[argument] = stack[-1]
            case "MEMOIZE":
                self._memo[len(self._memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET" | "GET":
                stack.append(self._memo[argument])
            case "GLOBAL":
                self._name(*argument.split(" ", 1))
            case "STACK_GLOBAL":
                self._name(*self._pop(2))
            case "BINPERSID":
                stack.append(self._reader.storage(stack.pop()))
            case "REDUCE":
                called, arguments = self._pop(2)
                if not isinstance(called, Name) or called not in self._calls:
                    self._reader.refuse(f"calls {str(called)[:100]!r}")
                stack.append(self._calls[called](*arguments))
            case "BUILD":  # torch hangs its _metadata on the state dict, which says nothing of the numbers
                stack.pop()
                self._top(dict)
            case _:
                self._reader.refuse(f"has the pickle instruction {name}, which plain values and tensors do not need")

    def _name(self, module: Any, name: Any) -> None:
        found = Name(str(module), str(name))
        if found not in KNOWN:
            self._reader.refuse(f"tries to load {str(found)[:200]}, which no tensor is made of")
        self._stack.append(found)

    def _pop(self, count: int) -> list[Any]:
        if len(self._stack) < count:
            raise ValueError(f"an instruction takes {count} values, the stack holds {len(self._stack)}")
        items = self._stack[-count:]
        del self._stack[-count:]
        return items

    def _since_mark(self) -> list[Any]:
        mark = self._marks.pop()
        items = self._stack[mark:]
        del self._stack[mark:]
        return items

    def _top(self, kind: type) -> Any:
        if type(self._stack[-1]) is not kind:
            raise ValueError(f"a {type(self._stack[-1]).__name__} is filled as a {kind.__name__}")
        return self._stack[-1]

    def _set(self, items: list[Any]) -> None:
        target = self._top(dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, (str, int)):
                raise ValueError(f"a {type(key).__name__} is the key of a dict")
            target[key] = value

    def _tensor(self, storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> np.ndarray:
        """A view of a storage, copied where its rows do not lie one after another."""
        numbers = (offset, *shape, *strides)
        if not isinstance(storage, np.ndarray) or any(type(n) is not int or n < 0 for n in numbers):
            raise ValueError(f"a tensor has offset {offset}, shape {shape} and strides {strides}")
        size = math.prod(shape)
        last = offset + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
        if size > storage.size or (size and last >= storage.size):
            raise ValueError(
                f"a tensor of shape {shape}, strides {strides} and offset {offset} leaves its storage of {storage.size}"
            )
        if size == 0:
            return np.zeros(shape, storage.dtype)
        in_bytes = tuple(stride * storage.itemsize for stride in strides)
        view = np.lib.stride_tricks.as_strided(storage[offset:], shape, in_bytes, writeable=False)
        return np.ascontiguousarray(view).reshape(shape)
