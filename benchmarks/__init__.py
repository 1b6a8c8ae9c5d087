"""How fast the operators are, beside what trainers run today: ``python -m benchmarks --help``.

- cases.py: what is measured. A case is a function with the decorator ``@case``; it returns a ``Case`` with its contenders, of which the
  first is ours, and the goals ("at least 5 times as fast as ...").
- peers.py: the contenders' formulas. verl's own functions are taken from its wheel where that is at hand.
- harness.py: agreement first, then interleaved rounds of torch.utils.benchmark; medians.
"""
