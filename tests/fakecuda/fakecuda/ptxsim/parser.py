"""The text of a PTX module: variables at module level, and kernels, each of which is parsed when it is first asked for."""

import os
import re

import numpy as np

from .values import TYPES, U8, U32, U64, UINT, Unsupported, align


class Inst:
    """One instruction: opcode, modifiers, operands, guard (register, negated) or None, PTX line, "file:line" of the source or None."""

    __slots__ = ("op", "mods", "ops", "guard", "line", "loc", "text", "pc")

    def __init__(self, op, mods, ops, guard, line, loc, text):
        self.op, self.mods, self.ops, self.guard, self.line, self.loc, self.text = op, mods, ops, guard, line, loc, text
        self.pc = None


NUMBER = re.compile(r"^-?(?:0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}|0[xX][0-9a-fA-F]+U?|0[bB][01]+U?|\d+U?|\d*\.\d+(?:[eE][-+]?\d+)?)$")


def parse_number(t):
    """-> (kind, value); kind 'i', 'f' (float32 bits), 'd' (float64 bits)."""
    s = t.rstrip("U")
    neg = s.startswith("-")
    u = s[1:] if neg else s
    if u[:2] in ("0f", "0F"):
        v = int(u[2:], 16)
        return "f", v ^ 0x80000000 if neg else v
    if u[:2] in ("0d", "0D"):
        v = int(u[2:], 16)
        return "d", v ^ (1 << 63) if neg else v
    if "." in u:
        return "d", int(np.float64(s).view(U64))
    if len(u) > 1 and u[0] == "0" and u.isdigit():
        v = int(u, 8)
    else:
        v = int(u, 0)
    return "i", -v if neg else v


def split_operands(s):
    """Split at the commas that stand outside of all brackets."""
    if "{" not in s and "(" not in s and ("[" not in s or "," not in s[s.index("[") : s.rindex("]")]):
        return [x.strip() for x in s.split(",")] if s.strip() else []
    out, depth, cur = [], 0, ""
    for ch in s:
        if ch in "{[(":
            depth += 1
        elif ch in "}])":
            depth -= 1
        if ch == "," and depth == 0:
            out.append(cur.strip())
            cur = ""
        else:
            cur += ch
    if cur.strip():
        out.append(cur.strip())
    return out


class Entry:
    """One parsed .entry: parameters, registers, shared/local layout, instructions."""

    def __init__(self, name):
        self.name = name
        self.params = {}  # name -> (offset, type or 'b8', bytes)
        self.param_order = []
        self.param_bytes = 0
        self.regs = {}  # name -> (index, dtype)
        self.reg_types = []
        self.shared = {}  # name -> offset
        self.shared_bytes = 0
        self.local = {}
        self.local_bytes = 0
        self.insts = []
        self.labels = {}
        self.tables = {}
        self.maxntid = None  # threads per block: product of .maxntid or .reqntid
        self.minnctapersm = None

    def place_shared(self, name, size, alignment):
        self.shared_bytes = align(self.shared_bytes, alignment)
        self.shared[name] = self.shared_bytes
        self.shared_bytes += size

    def declare(self, key, ptx_type):
        """Make a register ``key`` of a PTX type."""
        dtype = np.bool_ if ptx_type == "pred" else UINT[np.dtype(TYPES[ptx_type]).itemsize]
        self.regs[key] = (len(self.reg_types), dtype)
        self.reg_types.append(dtype)


_ENTRY = re.compile(r"((?:\.(?:visible|extern|weak|common)\s+)*)\.(entry|func)\b")
_DIRECTIVE = re.compile(r"\.(version|target|address_size|file|loc)\b[^\n]*")
_SECTION = re.compile(r"\.section\b[^{]*")
_SPACE = re.compile(r"[\s;]*")
_BRACE = re.compile(r"[{}]")
_NAME = re.compile(r"\s*([\w$]+)")
_VARIABLE = re.compile(
    r"^((?:\.(?:visible|extern|weak|common)\s+)*)\.(global|const|shared|local)\s+((?:\.align\s+\d+\s+|\.attribute\([^)]*\)\s*)*)"
    r"(?:\.v([24])\s+)?\.(\w+)\s+([\w$%]+)\s*((?:\[\d*\])*)\s*(?:=\s*(.*))?$",
    re.S,
)
_PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr\s*(?:\.\w+\s+)?(?:\.align\s+\d+\s+)?)?([\w$]+)\s*(?:\[(\d+)\])?$"
)
_BLOCK_SIZE = re.compile(r"\.(?:maxntid|reqntid)\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?")
_BLOCKS_PER_SM = re.compile(r"\.minnctapersm\s+(\d+)")
_LABEL = re.compile(r"([\w$]+):(?!:)")
_TARGETS = re.compile(r"\s*\.branchtargets\s+([^;]*);")
_LOC = re.compile(r"\.loc\s+(\d+)\s+(\d+)[^\n;]*[\n;]")
_REGISTERS = re.compile(r"\.reg\s+(?:\.v\d\s+)?\.(\w+)\s+(.*)$")
_RANGE = re.compile(r"([%\w$]+)<(\d+)>$")
_CALL_ARGUMENT = re.compile(r"\.param\s+\.(\w+)\s+([\w$]+)$")
_GUARD = re.compile(r"@(!?)([%\w$]+)\s+(.*)$")
_INSTRUCTION = re.compile(r"([a-z]\w*)((?:\.\w+|::\w+)*)\s*(.*)$")
_ARGUMENT_ADDRESS = re.compile(r"\[([\w$]+@\d+)(?:\+0)?\]$")
_SHARED = re.compile(r"^\s*(\.shared\b[^;]*);", re.M)
_CODE_LINE = re.compile(r"^[ \t{]*(?:\.loc\s+(\d+)\s+(\d+)|(?:@!?[%\w$]+\s+)?[a-z]\w*[^\n]*;)", re.M)


def _block_end(text, at):
    """Position after the brace that closes the first one at or after ``at``."""
    depth = 0
    for m in _BRACE.finditer(text, at):
        depth += 1 if m.group() == "{" else -1
        if depth == 0:
            return m.end()
    raise Unsupported("braces do not match")


class Source:
    """A PTX module: ``names`` of its kernels, ``entry(name)`` for one of them; module-level variables persist in ``globals``."""

    def __init__(self, text):
        self.globals = {}  # name -> uint8 array
        self.gtypes = {}
        self.extern_shared = {}  # name -> alignment
        self.mod_shared = {}
        self.files = {}
        self._texts = {}  # kernel -> (head, body, PTX line of the body)
        self._entries = {}  # kernel -> Entry, or the Unsupported that parsing it gave
        self._scan(text)

    @classmethod
    def from_file(cls, path):
        with open(path) as f:
            return cls(f.read())

    @property
    def names(self):
        return list(self._texts)

    def entry(self, name):
        """The parsed kernel; KeyError if there is none of this name, Unsupported if it cannot be parsed."""
        if name not in self._entries:
            try:
                self._entries[name] = self._parse_entry(name, *self._texts[name])
            except Unsupported as err:
                self._entries[name] = err
        found = self._entries[name]
        if isinstance(found, Unsupported):
            raise found
        return found

    def limits(self, name):
        """What the kernel's declarations say, without parsing its instructions: bytes of static shared memory, most threads per
        block (__launch_bounds__, None if not given), fewest blocks per SM (likewise)."""
        head, body, _ = self._texts[name]
        E = Entry(name)
        self._head(E, head)
        self._place_module_shared(E, body)
        for m in _SHARED.finditer(body):
            v = self._variable(" ".join(m.group(1).split()))
            E.place_shared(v["name"], v["size"], v["align"])
        return {"static_shared": E.shared_bytes, "max_threads": E.maxntid, "min_blocks_per_sm": E.minnctapersm}

    def code_lines(self):
        """Source lines ("file:line") that any kernel of the module has instructions for."""
        lines = set()
        for _, body, _ in self._texts.values():
            at = None
            for m in _CODE_LINE.finditer(body):
                if m.group(1):
                    at = m.group(1, 2)
                elif at:
                    lines.add(at)
        return {f"{self.files.get(int(f), '?')}:{n}" for f, n in lines}

    def _scan(self, text):
        text = re.sub(r"/\*.*?\*/", lambda m: "\n" * m.group(0).count("\n"), text, flags=re.S)
        text = re.sub(r"//[^\n]*", "", text)
        for m in re.finditer(r'\.file\s+(\d+)\s+"([^"]+)"', text):
            self.files[int(m.group(1))] = os.path.normpath(m.group(2))
        i, n = 0, len(text)
        line, counted = 1, 0  # PTX line at position ``counted``
        while True:
            i = _SPACE.match(text, i).end()
            if i >= n:
                break
            if m := _DIRECTIVE.match(text, i):
                i = m.end()
            elif m := _SECTION.match(text, i):
                i = _block_end(text, m.end())
            elif m := _ENTRY.match(text, i):
                j, k = text.find("{", m.end()), text.find(";", m.end())
                if j < 0 or (0 <= k < j):
                    i = k + 1  # a declaration
                    continue
                i = _block_end(text, j)
                if m.group(2) == "entry":
                    head = text[m.end() : j]
                    line, counted = line + text.count("\n", counted, j), j
                    self._texts[_NAME.match(head).group(1)] = head, text[j + 1 : i - 1], line
            else:
                k = text.find(";", i)
                if k < 0:
                    break
                self._module_variable(text[i:k].strip())
                i = k + 1

    @staticmethod
    def _variable(s):
        m = _VARIABLE.match(s)
        if not m:
            return None
        quals, space, attrs, vec, ty, name, dims, init = m.groups()
        al = re.search(r"\.align\s+(\d+)", attrs or "")
        esz = np.dtype(TYPES[ty]).itemsize * int(vec or 1)
        cnt = 1
        for d in re.findall(r"\[(\d*)\]", dims or ""):
            cnt *= int(d) if d else 0
        return dict(quals=quals, space=space, align=int(al.group(1)) if al else esz, type=ty, name=name, size=esz * cnt, init=init)

    def _module_variable(self, s):
        if not s or s.startswith(".pragma") or s.startswith(".alias"):
            return
        v = self._variable(s)
        if v is None:
            raise Unsupported(f"module-level statement: {s[:80]!r}")
        if v["space"] == "shared":
            if "extern" in v["quals"] or v["size"] == 0:
                self.extern_shared[v["name"]] = v["align"]
            else:
                self.mod_shared[v["name"]] = (v["size"], v["align"])
            return
        buf = np.zeros(max(v["size"], 1), U8)
        if v["init"]:
            dt = TYPES[v["type"]]
            vals = []
            for t in re.findall(r"[-\w.]+", v["init"]):
                if not NUMBER.match(t):
                    raise Unsupported(f"initialiser {t!r} of {v['name']}")
                k, x = parse_number(t)
                if k == "i":
                    vals.append(np.array(x & (1 << 8 * np.dtype(dt).itemsize) - 1, UINT[np.dtype(dt).itemsize]))
                else:
                    vals.append(np.array(x, U32 if k == "f" else U64))
            raw = b"".join(x.tobytes() for x in vals)
            buf[: len(raw)] = np.frombuffer(raw, U8)
        self.globals[v["name"]] = buf
        self.gtypes[v["name"]] = TYPES[v["type"]]

    def global_array(self, name):
        """Typed view of a module-level .global/.const variable (read or set it between launches)."""
        return self.globals[name].view(self.gtypes[name])

    def _head(self, E, head):
        pm = re.search(r"\((.*)\)", head, re.S)
        for p in split_operands(pm.group(1)) if pm and pm.group(1).strip() else []:
            m = _PARAMETER.match(p.strip())
            if not m:
                raise Unsupported(f"parameter {p!r}")
            al, ty, pn, cnt = m.groups()
            sz = np.dtype(TYPES[ty]).itemsize
            off = align(E.param_bytes, int(al or sz))
            size = sz * int(cnt or 1)
            E.params[pn] = (off, ty, size)
            E.param_order.append(pn)
            E.param_bytes = off + size
        if m := _BLOCK_SIZE.search(head):
            E.maxntid = int(m.group(1)) * int(m.group(2) or 1) * int(m.group(3) or 1)
        if m := _BLOCKS_PER_SM.search(head):
            E.minnctapersm = int(m.group(1))

    def _place_module_shared(self, E, body):
        """Give a place to each module-level .shared variable that the kernel mentions."""
        for name, (size, alignment) in self.mod_shared.items():
            if re.search(re.escape(name) + r"\b", body):
                E.place_shared(name, size, alignment)

    def _parse_entry(self, name, head, body, line):
        E = Entry(name)
        self._head(E, head)
        self._place_module_shared(E, body)
        scopes = [{}]  # of register names; those of inner blocks get a suffix
        unique = 0
        arguments = False  # whether a name of the outermost scope is renamed
        i, n, counted, loc = 0, len(body), 0, None

        def rename(tok):
            for sc in reversed(scopes):
                if tok in sc:
                    return sc[tok]
            return tok

        while True:
            i = _SPACE.match(body, i).end()
            if i >= n:
                break
            if body[i] == "{":
                scopes.append({})
                i += 1
                continue
            if body[i] == "}":
                scopes.pop()
                i += 1
                continue
            if m := _LABEL.match(body, i):
                if mt := _TARGETS.match(body, m.end()):
                    E.tables[m.group(1)] = [x.strip() for x in mt.group(1).split(",")]
                    i = mt.end()
                else:
                    E.labels[m.group(1)] = len(E.insts)
                    i = m.end()
                continue
            if m := _LOC.match(body, i):
                loc = f"{self.files.get(int(m.group(1)), '?')}:{m.group(2)}"
                i = m.end()
                continue
            line, counted = line + body.count("\n", counted, i), i
            j = body.index(";", i)
            s = " ".join(body[i:j].split())
            i = j + 1
            if s.startswith(".reg"):
                m = _REGISTERS.match(s)
                if m.group(1) not in TYPES:
                    raise Unsupported(f"register type .{m.group(1)}")
                for r in split_operands(m.group(2)):
                    mm = _RANGE.match(r)
                    for nm in [f"{mm.group(1)}{k}" for k in range(int(mm.group(2)))] if mm else [r]:
                        key = nm
                        if len(scopes) > 1:
                            unique += 1
                            key = f"{nm}@{unique}"
                        scopes[-1][nm] = key
                        E.declare(key, m.group(1))
                continue
            if s.startswith((".pragma", ".file")):
                continue
            if m := _CALL_ARGUMENT.match(s):  # held in a register
                unique += 1
                scopes[-1][m.group(2)] = key = f"{m.group(2)}@{unique}"
                arguments = arguments or len(scopes) == 1
                E.declare(key, m.group(1))
                continue
            if s.startswith(".param"):  # a struct argument: the call will say so
                continue
            if s.startswith("."):
                v = self._variable(s)
                if v is None or v["space"] not in ("shared", "local"):
                    raise Unsupported(f"{name}: line {line}: {s[:80]!r}")
                if v["space"] == "shared":
                    E.place_shared(v["name"], v["size"], v["align"])
                else:
                    E.local_bytes = align(E.local_bytes, v["align"])
                    E.local[v["name"]] = E.local_bytes
                    E.local_bytes += v["size"]
                continue
            guard = None
            if m := _GUARD.match(s):
                guard, s = (rename(m.group(2)), bool(m.group(1))), m.group(3)
            m = _INSTRUCTION.match(s)
            if not m:
                raise Unsupported(f"{name}: line {line}: {s[:80]!r}")
            ops = split_operands(m.group(3))
            if len(scopes) > 1 or arguments:
                ops = [re.sub(r"[%$\w]+", lambda q: rename(q.group(0)), o) for o in ops]
            op, mods = m.group(1), [x for x in m.group(2).split(".") if x]
            if op in ("st", "ld") and "param" in mods:
                k = 0 if op == "st" else 1
                q = _ARGUMENT_ADDRESS.match(ops[k])
                if q and q.group(1) in E.regs:
                    op, mods, ops = "mov", [mods[-1]], [q.group(1) if j == k else o for j, o in enumerate(ops)]
            E.insts.append(Inst(op, mods, ops, guard, line, loc, s))
        for k, ins in enumerate(E.insts):
            ins.pc = k
        return E
