"""When a compiled kernel on disk is too old: as soon as anything that it is made of has changed.

Numba looks at the time stamp of the file in which the kernel itself is written, and at no other. But its files on disk
bear the kernels' qualified names; so kernels are named after a digest of all that goes into them.
"""

import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import TypeVar

_Function = TypeVar("_Function", bound=Callable[..., object])


def digest_of(folder: Path, modules: Iterable[ModuleType], constants: Iterable[ModuleType]) -> str:
    """A short text that changes with what kernels are made of.

    Args:
        folder: whose Python files hold code of the kernels.
        modules: further ones that do.
        constants: modules whose scalars in capitals go into the kernels by their values; where those come from, other
            things may change.
    """
    files = [*sorted(folder.glob("*.py")), *(Path(str(module.__file__)) for module in modules)]
    values = [(name, value) for module in constants for name, value in vars(module).items() if name.isupper()]
    text = zlib.crc32(b"".join(file.read_bytes() for file in files))
    return f"{zlib.crc32(repr(values).encode(), text):08x}"


def named_after(digest: str, function: _Function) -> _Function:
    """The function, under a qualified name that tells of the digest."""
    function.__qualname__ += f"_{digest}"
    return function
