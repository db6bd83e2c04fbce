"""`encoder.c` as a library: whether it runs here, its structures, and its functions. Nothing is checked behind here.

Calls leave the interpreter's lock to other threads.
"""

import ctypes
from functools import cache

from embedmesh.engine.cpu import cpu_flags
from embedmesh.engine.native.build import LIBRARY, SOURCE, stamp

FLAGS_NEEDED = ("avx2", "fma")


class Linear(ctypes.Structure):
    """Packed weights, and biases [outputs]."""

    _fields_ = [("weight", ctypes.c_void_p), ("bias", ctypes.c_void_p)]


class Norm(ctypes.Structure):
    """Both [hidden]."""

    _fields_ = [("scale", ctypes.c_void_p), ("shift", ctypes.c_void_p)]


class Layer(ctypes.Structure):
    """One layer's weights."""

    _fields_ = [
        *((name, Linear) for name in ("qkv", "mixed", "wide", "narrow")),
        *((name, Norm) for name in ("mixed_norm", "norm")),
    ]


class NativeEncoder(ctypes.Structure):
    """`struct model` of the source, which says what each field is."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("hidden", "heads", "width", "middle", "layers")),
        ("eps", ctypes.c_float),
        ("norm", Norm),
        ("layer", ctypes.POINTER(Layer)),
    ]


def obstacle() -> str:
    """Why the library cannot run here, in words; "" where it can."""
    missing = [flag for flag in FLAGS_NEEDED if flag not in cpu_flags()]
    if missing:
        return f"this CPU has no {missing[0].upper()}, or the system does not say so"
    if not LIBRARY.is_file():
        return "the kernels were not built when embedmesh was installed (no C compiler?)"
    try:
        load()
    except OSError:
        return "the built kernels cannot be loaded: install embedmesh again"
    except ValueError:
        return "the built kernels are not of this version: install embedmesh again"
    return ""


@cache
def load() -> ctypes.CDLL:
    """The library. Raises OSError where it cannot be loaded, ValueError where it was built from another source."""
    library = ctypes.CDLL(str(LIBRARY))
    if SOURCE.is_file() and ctypes.c_char_p.in_dll(library, "embedmesh_stamp").value != stamp().encode():
        raise ValueError("built from another source")
    pointer, number = ctypes.c_void_p, ctypes.c_int
    library.embedmesh_start.argtypes, library.embedmesh_start.restype = [number], pointer
    library.embedmesh_end.argtypes, library.embedmesh_end.restype = [pointer], None
    library.embedmesh_floats.argtypes = [pointer, pointer, number, number]
    library.embedmesh_floats.restype = ctypes.c_long
    library.embedmesh_run.argtypes = [pointer, pointer, pointer, number, number, pointer]
    library.embedmesh_run.restype = None
    return library
