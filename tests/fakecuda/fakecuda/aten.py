"""PyTorch's own CUDA operators on fake CUDA tensors: run the CPU kernel of the same operator on the same bytes.

PyTorch's wheels hold no PTX of their kernels, so ptxsim cannot run them, and they are not under test. Device memory is host
memory at address + SHIFT, so a CPU tensor can alias a CUDA tensor: every aten operator with both a CUDA and a CPU kernel is
overridden under the CUDA key. Views, allocation, streams and plain contiguous copies / zeroing stay PyTorch's own code.
"""

import ctypes
import sys

KEEP = {
    "empty.memory_format",
    "empty_strided",
    "resize_",
    "record_stream",
    "is_pinned",
    "_pin_memory",
    "_has_compatible_shallow_copy_type",
    "_fused_sdp_choice",
    "_nested_tensor_from_mask_left_aligned",
}
MIXED = {
    "copy_",
    "index",
    "index_put",
    "index_put_",
    "_index_put_impl_",
    "_unsafe_index",
    "_unsafe_index_put",
    "_foreach_copy_",
    "_ctc_loss",
    "_ctc_loss_backward",
}
_libs = []


def alias(t):
    """CPU tensor over the memory of a CUDA tensor."""
    import torch

    from . import engine

    st = t.untyped_storage()
    n = st.nbytes()
    if n == 0:
        return torch.empty_strided(t.size(), t.stride(), dtype=t.dtype)
    if not st.data_ptr():
        raise RuntimeError("fakecuda: tensor without storage")
    buf = (ctypes.c_ubyte * n).from_address(st.data_ptr() + engine.SHIFT)
    raw = torch.frombuffer(buf, dtype=torch.uint8).untyped_storage()
    a = torch.empty(0, dtype=t.dtype).set_(raw, t.storage_offset(), t.size(), t.stride())
    a = a.conj() if t.is_conj() else a
    return torch._neg_view(a) if t.is_neg() else a


def run(op, args, kw):
    """Call the CPU kernel of ``op`` on aliases of the CUDA tensors among its arguments; results become CUDA tensors again. Arguments
    count as read and written on the current streams."""
    import torch
    from torch.utils._pytree import tree_leaves, tree_map

    dev, pairs, mixed = [], [], op._schema.name.partition("::")[2] in MIXED
    seen = []

    def down(x):
        if isinstance(x, torch.Tensor) and not mixed and (x.dim() or x.is_cuda):  # CPU scalars may mix with CUDA tensors, nothing else
            seen.append(x.device)
            if x.device != seen[0]:
                raise RuntimeError(f"Expected all tensors to be on the same device, but got {seen[0]} and {x.device} (in {op})")
        if isinstance(x, torch.Tensor) and x.device.type == "cuda":
            dev.append(x.device)
            for o, a in pairs:
                if o is x:
                    return a
            pairs.append((x, alias(x)))
            return pairs[-1][1]
        if isinstance(x, torch.device) and x.type == "cuda":
            dev.append(torch.device("cuda", torch.cuda.current_device() if x.index is None else x.index))
            return torch.device("cpu")
        if isinstance(x, torch.Generator) and x.device.type == "cuda":
            return None
        return x

    def up(x):
        if not isinstance(x, torch.Tensor):
            return x
        for o, a in pairs:
            if a is x:
                return o
        if x.device.type != "cpu" or not dev:
            return x
        out = torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device=dev[0])
        if x.numel():
            alias(out).copy_(x)
        return out

    def ordered(leaves, write):  # note the accesses, for stream-race
        from . import engine

        for x in leaves:
            if isinstance(x, torch.Tensor) and x.is_cuda and x.untyped_storage().data_ptr():
                d = x.device.index
                if d not in ids:
                    ids[d] = engine.op(torch.cuda.current_stream(d).cuda_stream, d)
                engine.access(x.untyped_storage().data_ptr(), ids[d], write, op._schema.name)

    ids = {}
    ordered(tree_leaves((args, kw)), False)
    with torch._C._AutoDispatchBelowAutograd():
        res = _callee(op, args, kw)(*tree_map(down, args), **tree_map(down, kw))
        for o, a in pairs:  # out= that was resized
            if o.size() != a.size():
                o.resize_(a.size())
                if a.numel():
                    alias(o).copy_(a)
        res = tree_map(up, res)
    for s, x in list(zip(op._schema.arguments, args)) + [(s, kw[s.name]) for s in op._schema.arguments if s.name in kw]:
        if s.alias_info is not None and s.alias_info.is_write:
            ordered(tree_leaves(x), True)
    ordered(tree_leaves(res), True)
    if op._schema.name == "aten::_local_scalar_dense":
        from . import engine

        for i in ids.values():
            engine.lib.fc_synced(ctypes.c_uint64(i))
    return res


def _callee(op, args, kw):
    """``op``, or its overloads to choose from where a Python number stands in the place of a tensor: an operator with a scalar
    overload may hand its scalar on to the tensor overload as a wrapped number, which arrives here as a number."""
    given = [*zip(op._schema.arguments, args), *((s, kw[s.name]) for s in op._schema.arguments if s.name in kw)]
    number = any(isinstance(x, (bool, int, float, complex)) and "Tensor" in str(s.type) for s, x in given)
    return op.overloadpacket if number else op


def install():
    """Override the CUDA kernels of aten. -> how many"""
    import torch

    D = torch._C
    has = D._dispatch_has_kernel_for_dispatch_key
    torch.backends.cudnn.enabled = False  # convolutions take the path that has a CPU kernel
    lib = torch.library.Library("aten", "IMPL", "CUDA")
    _libs.append(lib)
    n = 0
    for full in D._dispatch_get_all_op_names():
        ns, _, nm = full.partition("::")
        if ns != "aten" or nm in KEEP or not has(full, "CUDA") or not (has(full, "CPU") or has(full, "CompositeExplicitAutograd")):
            continue
        base, _, ov = nm.partition(".")
        try:
            op = getattr(getattr(torch.ops.aten, base), ov or "default")
        except AttributeError:
            continue
        rets = op._schema.returns
        if any(r.alias_info is not None and not r.alias_info.is_write for r in rets) or base in (
            "set_",
            "zero_",
            "view",
            "_reshape_alias",
            "as_strided",
        ):
            continue
        lib.impl(nm, _wrap(op), allow_override=True)
        n += 1
    copy = torch.ops.aten.copy_.default
    real = torch.library.get_kernel("aten::copy_", "CUDA")
    ks = D.DispatchKeySet(D.DispatchKey.CUDA)

    def copy_(self, src, non_blocking=False):
        if (
            self.dtype == src.dtype
            and self.size() == src.size()
            and self.is_contiguous()
            and src.is_contiguous()
            and not src.is_conj()
            and not src.is_neg()
        ):
            return real.call_boxed(ks, self, src, non_blocking)
        run(copy, (self, src, non_blocking), {})
        return self

    lib.impl("copy_", copy_, allow_override=True)
    zero = torch.library.get_kernel("aten::zero_", "CUDA")

    def zero_(self):
        if self.is_contiguous():
            return zero.call_boxed(ks, self)
        alias(self).zero_()
        return self

    lib.impl("zero_", zero_, allow_override=True)
    return n


def _wrap(op):
    def fn(*args, **kw):
        return run(op, args, kw)

    return fn


class _Hook:
    """sys.meta_path entry: install() right after torch has been imported."""

    def find_spec(self, name, path=None, target=None):
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        import importlib.util

        spec = importlib.util.find_spec("torch")
        if spec and spec.loader:
            exec_module = spec.loader.exec_module

            def wrapped(mod):
                exec_module(mod)
                install()

            spec.loader.exec_module = wrapped
        return spec


def hook():
    if "torch" in sys.modules:
        install()
    else:
        sys.meta_path.insert(0, _Hook())
