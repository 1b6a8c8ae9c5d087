"""The benchmarks run and tell when a contender is wrong. How fast anything is, no test says."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import fused_critic
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 120  # seconds, on a machine that is busy with something else
CASES = ("call-gae", "loss-4x*", "loss-variants-*", "gae-4x*", "gae-turns-*", "gae-time-major-*", "gae-packed")


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    output = tmp_path_factory.mktemp("smoke")
    path = os.pathsep.join(filter(None, [str(Path(fused_critic.__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    environment = dict(os.environ, PYTHONPATH=path)
    command = [sys.executable, "-m", "benchmarks", "--smoke", *CASES, "--output", str(output)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT), output


def test_tables(smoke):
    done, _ = smoke
    assert done.returncode == 0, done.stderr
    assert "Largest error against float64" in done.stdout
    for case in ("call-gae", "loss-4x32", "loss-variants-4x64", "gae-4x128", "gae-turns-4x64", "gae-time-major-16x32", "gae-packed"):
        assert f"{case} ·" in done.stdout
    assert "left out" in done.stdout and "torch.compile" in done.stdout, "who is left out is named"


def test_json(smoke):
    content = json.loads((smoke[1] / "results.json").read_text())
    assert content["environment"]["effort"] == "smoke"
    assert content["accuracy"] and content["goals"]
    for result in content["results"]:
        first = result["rows"][0]
        assert {row["cache"] for row in result["rows"]} == ({"warm"} if result["is_call"] else {"warm", "cold"})
        assert all(0 < row["best"] <= row["median"] for row in result["rows"]), first


def test_csv(smoke):
    with (smoke[1] / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    contenders = {row["contender"] for row in rows}
    assert {"fused_critic", "torch copy of the same bytes", "associative_scan"} <= contenders
    assert all(float(row["median_s"]) > 0 for row in rows)


def test_plots(smoke):
    plots = sorted(path.name for path in smoke[1].glob("*.png"))
    kinds = [name.rpartition("-")[2] for name in plots]
    assert sorted(kinds) == ["bandwidth.png"] * 2 + ["time.png"] * 2, plots
    assert all((smoke[1] / name).read_bytes().startswith(b"\x89PNG") for name in plots)


def test_publish(smoke, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import publish

    document = tmp_path / "performance.md"
    document.write_text(f"before\n{publish.BEGIN}stale figures\n{publish.END}\nafter\n")
    publish.main(["--results", str(smoke[1]), "--document", str(document)])
    text = document.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "stale figures" not in text
    assert "| GAE, [4, 128] float32, mask: padding |" in text
    assert all((tmp_path / "images" / path.name).exists() and path.name in text for path in smoke[1].glob("*.png"))


@pytest.fixture
def main(monkeypatch):
    """The command line's, in this process."""
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.__main__ import main

    return main


def test_a_wrong_contender_stops_the_run(main, tmp_path):
    from benchmarks.contenders import CONTENDERS, contender

    @contender("wrong", "gae")
    def wrong(inputs):
        def run():
            outputs = torch.ops.fused_critic.gae(inputs.rewards, inputs.values, inputs.mask, gamma=0.99, lam=0.95)
            advantages, returns = (x.clone() for x in outputs)
            advantages[0, 0] += 1e-2
            return advantages, returns

        return run

    try:
        with pytest.raises(SystemExit, match="gae-4x32: wrong disagrees with the float64 formulas"):
            main(["--smoke", "gae-4x32", "--output", str(tmp_path)])
    finally:
        CONTENDERS.pop()
    assert not list(tmp_path.iterdir()), "nothing of a run that stopped is written"


def test_an_unknown_case_is_named(main):
    with pytest.raises(SystemExit, match="no-such-case"):
        main(["--smoke", "no-such-case"])
