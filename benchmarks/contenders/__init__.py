"""Who is compared with fused_critic. Importing this package registers everyone.

A contender is a function under ``@contender(...)``: it gets a case's inputs and returns what is timed, a function without arguments whose
result is (loss, gradient) or (advantages, returns) in the layout of the inputs. Where it cannot serve it raises ``LeftOut`` with the
reason. What it derives from the inputs before it returns (done flags, next values, NumPy views) is not timed.
"""

from importlib import import_module

from .registry import CONTENDERS, COPY, OURS, Contender, LeftOut, contender

for _module in ("ours", "verl", "openrlhf", "torchrl", "sheeprl", "compiled_loops", "torch_compiled"):
    import_module(f".{_module}", __name__)

__all__ = ["CONTENDERS", "COPY", "OURS", "Contender", "LeftOut", "contender"]
