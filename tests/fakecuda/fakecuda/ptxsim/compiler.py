"""Instructions -> closures. What an opcode means is in arithmetic, bits, compare, convert, access, warp and control."""

import numpy as np

from .access import Access
from .arithmetic import Arithmetic
from .bits import Bits
from .compare import Compare
from .control import Control
from .convert import Convert
from .operands import Operands
from .values import TYPES, Unsupported, align
from .warp import Warp

MIN_DYNAMIC_ALIGNMENT = 16


class Code(Operands, Arithmetic, Bits, Compare, Convert, Access, Warp, Control):
    """The instructions of one kernel as steps ``(kind, function, guard, instruction)``, each made when it is first reached.

    Every ``op_NAME(instruction)`` returns (kind, function). Kinds: "x" computes, "m" touches memory, "w" needs the lanes of a warp
    together, "b" is a barrier, "j" jumps to the function's value, "t" jumps through a table, "e" ends the thread. A function takes
    the wave and the indices of the threads (None: all). ``guard``: (register, negated) or None.
    """

    def __init__(self, module, entry, addresses):
        self.mod, self.E, self.gaddr = module, entry, addresses
        self.dyn_base = align(entry.shared_bytes, max([MIN_DYNAMIC_ALIGNMENT, *module.extern_shared.values()]))
        self.steps = [None] * len(entry.insts)
        widths = [np.dtype(TYPES[i.mods[-1]]).itemsize for i in entry.insts if i.op in ("ld", "st", "atom", "red") and i.mods[-1] in TYPES]
        self.granule = min([4, *widths])  # bytes: no access is narrower
        self.leaders = {0, *entry.labels.values()}  # where a thread may arrive other than from the line above

    def err(self, ins, why="not supported"):
        return Unsupported(f"{self.E.name}: PTX line {ins.line}: '{ins.text}': {why}")

    def step(self, p):
        """Make the step of instruction ``p``. One that is not supported raises only when it runs."""
        ins = self.E.insts[p]
        make = getattr(self, "op_" + ins.op, None)
        try:
            if make is None:
                raise self.err(ins)
            kind, fn = make(ins)
        except Unsupported as e:
            kind, fn = "x", self._raise(e)
        guard = (self.E.regs[ins.guard[0]][0], ins.guard[1]) if ins.guard else None
        self.steps[p] = (kind, fn, guard, ins)
        return self.steps[p]

    @staticmethod
    def _raise(e):
        def run(S, i):
            raise e

        return run
