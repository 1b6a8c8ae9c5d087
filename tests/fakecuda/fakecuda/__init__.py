"""fakecuda: a CUDA build of PyTorch and a CUDA extension on a machine without a GPU. See README.md.

    python -m fakecuda run --ext build/_C.so -- pytest tests

In a test:  fakecuda.launches(), fakecuda.issues(), fakecuda.clear(), fakecuda.name(tensor, "x"), fakecuda.active()
"""


def active():
    """True when this process runs on the shim."""
    import ctypes

    return hasattr(ctypes.CDLL(None), "fc_hooks")


def launches():
    """Launches so far: dicts with kernel, grid, block, shared, stream, device, status and ptxsim's counts."""
    from . import engine

    return engine.LAUNCHES


def issues():
    """Problems so far: dicts with kind, text, kernel, test."""
    from . import engine

    engine.take_host_issues()
    return engine.ISSUES


def clear():
    """Forget launches and issues (after a test that provokes them on purpose)."""
    from . import engine

    engine.take_host_issues()
    del engine.LAUNCHES[:], engine.ISSUES[:]


def name(tensor, label):
    """Give the allocation behind a tensor a name for the messages. -> the tensor"""
    from . import engine

    t = engine.allocations()
    k = int((t["addr"] <= tensor.untyped_storage().data_ptr()).sum()) - 1
    engine.NAMES[int(t["id"][k])] = label
    return tensor


def calls():
    """Runtime API calls so far, by name."""
    from . import engine

    return engine.table("calls")
