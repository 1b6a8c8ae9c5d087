"""Programs and test sessions on the shim, started by the command line. Needs nvcc and the CUDA build of torch; no GPU."""

import json

import pytest
from conftest import SESSION


def session(fakecuda, extension, options, *arguments, **keywords):
    environment = {"SAMPLE": str(extension), **keywords}
    return fakecuda("run", *options, "--ext", extension, "--", "pytest", "-q", "-p", "no:cacheprovider", *arguments, **environment)


def test_extension(fakecuda, extension):
    session(fakecuda, extension, ["--devices", 2], SESSION / "session_extension.py")


@pytest.mark.parametrize("card, seed", [("A100", 7), ("T4", 8)])
def test_extension_on_other_cards_in_another_order_of_warps(fakecuda, extension, card, seed):
    options = ["--card", card, "--seed", seed, "--devices", 2]
    session(fakecuda, extension, options, SESSION / "session_extension.py", "-k", "not opcheck and not dies")


def test_torch(fakecuda, extension):
    files = [SESSION / "session_operators.py", SESSION / "session_torch_api.py"]
    session(fakecuda, extension, ["--devices", 2], *files)


def test_findings(fakecuda, extension, tmp_path):
    report = tmp_path / "report.json"
    done = session(fakecuda, extension, ["--devices", 2, "--report", report], SESSION / "session_findings.py")
    assert "0 issue(s)" in done.stdout  # all were expected
    assert json.loads(report.read_text())["kernels"]["out_of_bounds(float const*, float*, int)"]["failed"] == 3


@pytest.mark.parametrize("card, kind", [("H100", "no-ptx"), ("A100", "no-image")])
def test_library_without_ptx(fakecuda, sass_only, tmp_path, card, kind):
    program = tmp_path / "program.py"
    program.write_text(f"import ctypes; assert ctypes.CDLL({str(sass_only)!r}).launch_fill(None)")
    done = fakecuda("run", "--card", card, "--ext", sass_only, "--", "python", program, check=False)
    assert done.returncode == 3 and f"ISSUE {kind}: fill(float*)" in done.stdout


BOTH = """
import os, sys, torch
torch.ops.load_library(os.environ["SAMPLE"])
def test_right():
    torch.ops.sample.add(torch.ones(300).cuda(), torch.ones(300).cuda(), 1.0)
def test_wrong():
    torch.ops.sample.fault(torch.ones(256).cuda(), "race")
"""


def written(tmp_path, text=BOTH):
    path = tmp_path / "test_both.py"
    path.write_text(text)
    return path


def test_an_issue_fails_its_test(fakecuda, extension, tmp_path):
    done = session(fakecuda, extension, [], written(tmp_path), check=False)
    assert done.returncode == 1 and "1 failed, 1 passed" in done.stdout and "fakecuda found:\nrace: x" in done.stdout
    done = session(fakecuda, extension, ["--allow", "race"], written(tmp_path))
    assert "2 passed" in done.stdout and "ISSUE race" in done.stdout


def test_an_expected_issue_must_occur(fakecuda, extension, tmp_path):
    text = "import pytest\n" + BOTH.replace("def test_right", '@pytest.mark.fakecuda(expect="race")\ndef test_right')
    done = session(fakecuda, extension, [], written(tmp_path, text), "-k", "right", check=False)
    assert done.returncode == 1 and "did not find the expected ['race']" in done.stdout


def test_an_issue_outside_of_pytest_fails_the_run(fakecuda, extension, tmp_path):
    program = written(tmp_path, BOTH + "test_wrong()\n")
    done = fakecuda("run", "--ext", extension, "--", "python", program, check=False, SAMPLE=str(extension))
    assert done.returncode == 3 and "ISSUE race" in done.stdout
    program = written(tmp_path, BOTH + "test_right()\nsys.exit(5)\n")
    assert fakecuda("run", "--ext", extension, "--", "python", program, check=False, SAMPLE=str(extension)).returncode == 5


def test_reports_of_parallel_workers_and_of_runs_are_merged(fakecuda, extension, tmp_path):
    """A line or kernel that one worker or run reached counts as reached in the merged report."""
    pytest.importorskip("xdist")
    kernels = SESSION / "kernels.cu"
    number = {
        text: n
        for n, line in enumerate(kernels.read_text().splitlines(), 1)
        for text in ("p.alpha", "255 - thr", "x[i + 1]")
        if text in line
    }
    line = {text: f"{kernels}:{n}" for text, n in number.items()}
    added, raced = "add_kernel(AddParams)", "race(float const*, float*, int)"

    def run(name, *arguments):
        report = tmp_path / name
        session(fakecuda, extension, ["--allow", "race", "--report", report], written(tmp_path), *arguments)
        return json.loads(report.read_text())

    right, wrong, workers = run("right", "-k", "right"), run("wrong", "-k", "wrong"), run("both", "-n", "2")
    assert line["p.alpha"] not in right["lines_never_run"] and line["255 - thr"] in right["lines_never_run"]
    assert line["p.alpha"] in wrong["lines_never_run"] and line["255 - thr"] not in wrong["lines_never_run"]
    assert raced in right["never_launched"] and added in wrong["never_launched"]
    fakecuda("merge", tmp_path / "merged", tmp_path / "right", tmp_path / "wrong")
    merged = json.loads((tmp_path / "merged").read_text())
    for report in (workers, merged):
        assert report["kernels"][added]["launches"] == report["kernels"][raced]["launches"] == 1
        assert not {added, raced} & set(report["never_launched"])
        assert not {line["p.alpha"], line["255 - thr"]} & set(report["lines_never_run"])
        assert line["x[i + 1]"] in report["lines_never_run"]
        assert [i["kind"] for i in report["issues"]] == [i["kind"] for i in wrong["issues"]]
    assert set(merged["lines_never_run"]) == set(right["lines_never_run"]) & set(wrong["lines_never_run"])
    assert set(merged["never_launched"]) == set(right["never_launched"]) & set(wrong["never_launched"])


def test_environment_is_for_a_shell(fakecuda):
    done = fakecuda("env")
    assert "export FAKECUDA=1" in done.stdout and "export LD_PRELOAD=" in done.stdout and "PYTEST_PLUGINS=fakecuda.plugin" in done.stdout
