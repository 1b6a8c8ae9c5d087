"""Merging and summing reports."""

import json

import pytest
from fakecuda import report
from fakecuda.__main__ import main

EMPTY = {"card": 90, "launches": [], "issues": [], "calls": {}, "bytes": {}, "peak_bytes": 0, "images": {}, "lines": {}}


def row(kernel, status="ok", **counts):
    return {"kernel": kernel, "status": status, "registers": 40, **counts}


A = {
    **EMPTY,
    "launches": [row("f", gld_bytes=96, gld_sectors=4), row("g", "out-of-bounds")],
    "issues": [{"kind": "out-of-bounds", "text": "t", "kernel": "g", "test": None}],
    "calls": {"cudaMalloc": 2},
    "peak_bytes": 10,
    "images": {"f": {}, "g": {}, "h": {}, "never": {}},
    "lines": {"/p/a.cu:2": 0, "/p/a.cu:10": 3, "/p/a.cu:3": 0, "/p/.venv/site-packages/b.h:1": 0, "/q/c.h:1": 0},
}
B = {
    **EMPTY,
    "launches": [row("f", gld_bytes=32, gld_sectors=2), row("h")],
    "calls": {"cudaMalloc": 1, "cudaFree": 1},
    "peak_bytes": 7,
    "images": {"f": {}, "g": {}, "h": {}, "never": {}},
    "lines": {"/p/a.cu:2": 4, "/p/a.cu:10": 0, "/p/a.cu:3": 0, "/p/.venv/site-packages/b.h:1": 0, "/q/c.h:1": 0},
}


@pytest.mark.parametrize("reports", [[A, B], [B, A], [A, B, EMPTY], [EMPTY, A, B]], ids=["AB", "BA", "AB-", "-AB"])
def test_merge(reports):
    r = report.merge(reports)
    assert sorted(x["kernel"] for x in r["launches"]) == ["f", "f", "g", "h"] and r["issues"] == A["issues"]
    assert r["kernels"]["f"]["launches"] == 2 and r["kernels"]["f"]["gld_bytes"] == 128 and r["kernels"]["f"]["gld_eff"] == 0.667
    assert r["kernels"]["g"]["failed"] == 1 and r["never_launched"] == ["never"]
    assert r["calls"] == {"cudaMalloc": 3, "cudaFree": 1} and r["peak_bytes"] == 10
    assert r["lines_never_run"] == ["/p/.venv/site-packages/b.h:1", "/p/a.cu:3", "/q/c.h:1"]


def test_merging_in_steps_is_the_same():
    assert report.merge([report.merge([A]), report.merge([B])]) == report.merge([A, B])


def test_own_lines():
    own, never = report.own_lines(report.merge([A]), ["/p"])
    assert own == ["/p/a.cu:2", "/p/a.cu:3", "/p/a.cu:10"] and never == ["/p/a.cu:2", "/p/a.cu:3"]
    assert report.ranges([1, 2, 3, 7, 9, 10]) == "1-3, 7, 9-10"


def test_command(tmp_path, capsys):
    for name, r in (("a", A), ("b", B)):
        (tmp_path / name).write_text(json.dumps(r))
    assert main(["merge", str(tmp_path / "out"), str(tmp_path / "a"), str(tmp_path / "b"), "--source", "/p"]) == 0
    assert json.loads((tmp_path / "out").read_text()) == report.merge([A, B])
    shown = capsys.readouterr().out
    assert "kernels never launched: 1 of 4\n  never\n" in shown and "ran: 2 of 3; not:" in shown and "a.cu: 3\n" in shown
