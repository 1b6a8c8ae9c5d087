"""Types of PTX values, address windows, thread states, errors."""

import numpy as np

U8, U16, U32, U64 = np.uint8, np.uint16, np.uint32, np.uint64
F16, F32, F64 = np.float16, np.float32, np.float64
GLOBAL_BASE = 0x7F00_0000_0000
SHARED_BASE = 0x0000_7E00_0000_0000  # generic-address windows
LOCAL_BASE = 0x0000_7D00_0000_0000
WINDOW = 1 << 32
TYPES = {
    "b8": U8,
    "u8": U8,
    "s8": np.int8,
    "b16": U16,
    "u16": U16,
    "s16": np.int16,
    "f16": F16,
    "bf16": U16,
    "b32": U32,
    "u32": U32,
    "s32": np.int32,
    "f32": F32,
    "f16x2": U32,
    "bf16x2": U32,
    "tf32": U32,
    "b64": U64,
    "u64": U64,
    "s64": np.int64,
    "f64": F64,
    "pred": np.bool_,
}
UINT = {1: U8, 2: U16, 4: U32, 8: U64}
SINT = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}
WARP = 32
MAX_THREADS = 1024  # of a block
RUN, BAR, WSYNC, DONE = 0, 1, 2, 3  # state of a thread; at a barrier, at a warp-level synchronisation


class PtxError(Exception):
    """Base class."""


class Unsupported(PtxError):
    """The PTX uses something this interpreter does not model."""


class MemoryFault(PtxError):
    """Out-of-bounds or misaligned access."""


class DeadlockError(PtxError):
    """Threads wait for a barrier or warp-sync that can never complete."""


class DeviceAssert(PtxError):
    """A device-side assert failed or the kernel executed trap."""


def align(x, a):
    return (x + a - 1) // a * a
