"""Reports: what a process did with its fake devices, and several of these together.

A report is a dict, written as JSON: ``launches`` (one row each), ``issues``, ``calls`` of the runtime API, ``bytes`` copied by direction,
``peak_bytes`` of device memory, ``images`` (what is known of every kernel of the extension), ``lines`` (warp instructions executed per
source line, for every line that has code in any kernel). From these follow ``kernels`` (sums per launched kernel), ``never_launched``
(kernels) and ``lines_never_run``. Lines are "path:line" with the compiler's absolute path, those of headers included.
"""

import itertools
import json
import os
import re
from pathlib import Path

SUMS = ("warp_insts", "gld_bytes", "gst_bytes", "gld_sectors", "gst_sectors", "shared_bank_replays", "barriers", "sim_s")
SECTOR = 32  # bytes
INSTALLED = re.compile(r"/(site-packages|dist-packages|targets/[^/]+/include|cuda[-.\d]*/include)/")


def line_key(line):
    path, _, number = line.rpartition(":")
    return path, int(number)


def load(paths):
    return [json.loads(Path(p).read_text()) for p in paths]


def merge(reports):
    """One report of several: rows and issues one after the other, counts added. What no report launched or ran was never run."""
    out = {"card": None, "launches": [], "issues": [], "calls": {}, "bytes": {}, "peak_bytes": 0, "images": {}, "lines": {}}
    for r in reports:
        out["card"] = r["card"]
        out["launches"] += r["launches"]
        out["issues"] += r["issues"]
        out["images"].update(r["images"])
        out["peak_bytes"] = max(out["peak_bytes"], r["peak_bytes"])
        for k in ("calls", "bytes", "lines"):
            for n, v in r[k].items():
                out[k][n] = out[k].get(n, 0) + v
    out["kernels"] = kernels(out["launches"])
    out["never_launched"] = sorted(set(out["images"]) - set(out["kernels"]))
    out["lines_never_run"] = sorted((k for k, v in out["lines"].items() if not v), key=line_key)
    return out


def kernels(launches):
    """{kernel: sums over its launches}."""
    per = {}
    for row in launches:
        p = per.setdefault(row["kernel"], {"launches": 0, "failed": 0, "registers": row.get("registers", 0), **dict.fromkeys(SUMS, 0)})
        p["launches"] += 1
        p["failed"] += row["status"] != "ok"
        for k in SUMS:
            p[k] += row.get(k, 0)
    for p in per.values():
        for w in ("gld", "gst"):
            p[w + "_eff"] = round(p[w + "_bytes"] / (SECTOR * p[w + "_sectors"]), 3) if p[w + "_sectors"] else None
        p["sim_s"] = round(p["sim_s"], 2)
    return per


def own_lines(report, sources):
    """-> (lines, those of them that were never run) in files under one of the folders ``sources``, installed headers left out."""
    roots = [os.path.join(os.path.realpath(s), "") for s in sources]
    own = [k for k in report["lines"] if k.startswith(tuple(roots)) and not INSTALLED.search(k)]
    never = set(report["lines_never_run"])
    return sorted(own, key=line_key), sorted(never.intersection(own), key=line_key)


def ranges(numbers):
    """Ascending numbers as text: "1, 4-6"."""
    parts = []
    for n in numbers:
        if parts and parts[-1][1] == n - 1:
            parts[-1][1] = n
        else:
            parts.append([n, n])
    return ", ".join(f"{a}-{b}" if a < b else f"{a}" for a, b in parts)


def show(r, sources):
    """Print a summary."""
    print("\n== fakecuda ==")
    print(f"{'launches':>8} {'failed':>6} {'regs':>4} {'ld MB':>8} {'eff':>5} {'st MB':>8} {'eff':>5} {'bank':>6} {'sim s':>6}  kernel")
    for k, p in sorted(r["kernels"].items()):
        print(
            f"{p['launches']:8d} {p['failed']:6d} {p['registers']:4d} {p['gld_bytes'] / 1e6:8.3f} {p['gld_eff'] or 0:5.2f} "
            f"{p['gst_bytes'] / 1e6:8.3f} {p['gst_eff'] or 0:5.2f} {p['shared_bank_replays']:6d} {p['sim_s']:6.1f}  {k[:110]}"
        )
    print("copies:", " ".join(f"{k}={v}" for k, v in sorted(r["bytes"].items())), " peak device bytes:", r["peak_bytes"])
    if bad := {k.removeprefix("unsupported:"): v for k, v in r["calls"].items() if k.startswith("unsupported:")}:
        print("calls answered 'not supported':", bad)
    own, never = own_lines(r, sources)
    if own:
        print(f"source lines with device code that ran: {len(own) - len(never)} of {len(own)}" + ("; not:" if never else ""))
        for path, group in itertools.groupby(map(line_key, never), key=lambda k: k[0]):
            print(f"  {os.path.relpath(path)}: {ranges([n for _, n in group])}")
    if r["never_launched"]:
        print(f"kernels never launched: {len(r['never_launched'])} of {len(r['images'])}", *r["never_launched"], sep="\n  ")
    for i in r["issues"]:
        print(f"ISSUE {i['kind']}: {i['text']}" + (f"  [{i['test']}]" if i["test"] else ""))
    print(f"{len(r['issues'])} issue(s) in {len(r['launches'])} launch(es)")
