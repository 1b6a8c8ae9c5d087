"""python -m fused_critic check: what is right passes, and whatever is wrong with an operator fails."""

import itertools
import json
import subprocess
import sys

import fused_critic
import pytest
import torch
from fused_critic.__main__ import main
from fused_critic.check import bandwidth, gae, torch_features, value_loss
from fused_critic.check.command import DEFAULT_REPORT
from fused_critic.check.runner import CHECKS, QUICK_STEP, SECTIONS, Context, NotApplicable
from torch._inductor import config as inductor_config

COLUMNS = 80
FEW = ["value-loss-shapes/3", "gae-shapes/9", "gae-gradient-shapes/9", "whiten/3", "repeat/0", "views/1"]


class Ran:
    def __init__(self, status, lines, report):
        self.status, self.lines, self.report = status, lines, report

    @property
    def failed(self):
        """Names of the checks, without the cases' numbers."""
        return {failure["name"].partition("/")[0] for failure in self.report["failures"]}


@pytest.fixture
def run(device, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(COLUMNS))
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        capsys.readouterr()
        status = main(["check", "--device", device, *arguments])
        return Ran(status, capsys.readouterr().out.splitlines(), json.loads((tmp_path / DEFAULT_REPORT).read_text()))

    return run


def test_passes(device, run):
    ran = run("--quick", *(["--only", *FEW, "second-device"] if Context(torch.device(device)).simulated else []))
    assert ran.status == 0 and ran.report["verdict"] == "PASS" and ran.report["failed"] == 0 and ran.report["failures"] == []
    assert ran.lines[-1].startswith(f"PASS: {ran.report['checks']} checks")
    assert len(ran.lines[-1]) <= COLUMNS
    assert ran.report["checks"] == sum(c["status"] == "pass" for result in ran.report["results"].values() for c in result["cases"])
    for name, result in ran.report["results"].items():
        assert any(line.startswith(name) for line in ran.lines)
        assert result["status"] in ("pass", "n/a")
    assert 0 < ran.report["results"]["whiten"]["largest_share_of_tolerance"] <= 1


def test_report_tells_the_environment(device, run):
    report = run("--only", "whiten/3").report
    assert list(report)[:2] == ["verdict", "checks"]
    environment = report["environment"]
    assert environment["torch"] == torch.__version__ and environment["checked_device"].startswith(device)
    assert environment["simulated"] == Context(torch.device(device)).simulated
    assert any(line.startswith(environment["checked_device"].partition(":")[0]) for line in environment["devices"])
    assert report["tolerances"]["float32"] == 2e-5 and report["results"]["whiten"]["cases"][0]["title"]


class ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad * 1.01


original_loss, original_gae, original_whiten = fused_critic.value_loss, fused_critic.gae, fused_critic.masked_whiten
calls = itertools.count()


def wrong_loss(*arguments, **options):
    out = original_loss(*arguments, **options)
    return out._replace(loss=out.loss * 1.001)


def wrong_loss_gradient(values, *arguments, **options):
    return original_loss(ScaledGradient.apply(values), *arguments, **options)


def wrong_statistics(*arguments, **options):
    out = original_loss(*arguments, **options)
    return out._replace(stats=fused_critic.ValueLossStats(out.stats.moments * torch.linspace(1, 1.001, 14, device=out.loss.device)))


def loss_without_clamp(*arguments, loss_clamp=None, **options):
    return original_loss(*arguments, **options)


def loss_without_criterion(*arguments, criterion="mse", **options):
    return original_loss(*arguments, **options)


def loss_that_reads_padding(values, old_values, returns, mask=None, **options):
    hidden = 0 if mask is None else torch.where(mask == 0, values.detach(), 0).sum()
    out = original_loss(values, old_values, returns, mask, **options)
    return out._replace(loss=out.loss + 0 * hidden)


def wandering_loss(*arguments, **options):
    out = original_loss(*arguments, **options)
    return out._replace(loss=out.loss * (1 + 2**-22 * (next(calls) % 2)))  # two units in the last place, every other call


def wandering_loss_gradient(values, *arguments, **options):
    leaf = values.clone()
    leaf.register_hook(lambda grad: grad * (1 + 2**-6 * (next(calls) % 2)))
    return original_loss(leaf, *arguments, **options)


def wrong_advantages(rewards, *arguments, **options):
    out = original_gae(rewards, *arguments, **options)
    return out._replace(advantages=out.advantages * 1.001)


def wrong_returns(rewards, values, *arguments, gamma, **options):
    return original_gae(rewards, values, *arguments, gamma=gamma, **options)._replace(
        returns=original_gae(rewards, values, *arguments, gamma=0.999 * gamma, **options).returns
    )


def gae_without_mode(*arguments, mask_mode="skip", **options):
    return original_gae(*arguments, **options)


def gae_without_returns_lam(*arguments, returns_lam=None, **options):
    return original_gae(*arguments, **options)


def gae_with_one_lambda(*arguments, lam, **options):
    return original_gae(*arguments, lam=lam[:1].expand_as(lam), **options)


def wrong_gae_gradient(rewards, *arguments, **options):
    return original_gae(ScaledGradient.apply(rewards), *arguments, **options)


def wandering_gae(rewards, *arguments, **options):
    out = original_gae(rewards, *arguments, **options)
    return out._replace(advantages=out.advantages * (1 + 2**-22 * (next(calls) % 2)))


def wrong_whiten(x, *arguments, **options):
    return original_whiten(x, *arguments, **options) * 1.001


def wrong_whiten_gradient(x, *arguments, **options):
    return original_whiten(ScaledGradient.apply(x), *arguments, **options)


CORRUPTIONS = {
    "loss": ("value_loss", wrong_loss, "value-loss-shapes/3"),
    "loss gradient": ("value_loss", wrong_loss_gradient, "value-loss-shapes/3"),
    "statistics": ("value_loss", wrong_statistics, "value-loss-shapes/3"),
    "criterion": ("value_loss", loss_without_criterion, "value-loss-options/40"),
    "loss clamp": ("value_loss", loss_without_clamp, "value-loss-options/164"),
    "padding": ("value_loss", loss_that_reads_padding, "value-loss-edges/0"),
    "wandering loss": ("value_loss", wandering_loss, "repeat/0"),
    "wandering loss gradient": ("value_loss", wandering_loss_gradient, "repeat/0"),
    "advantages": ("gae", wrong_advantages, "gae-shapes/9"),
    "returns": ("gae", wrong_returns, "gae-shapes/9"),
    "mask_mode": ("gae", gae_without_mode, "gae/257"),
    "returns_lam": ("gae", gae_without_returns_lam, "gae-edges/1"),
    "lambda per sequence": ("gae", gae_with_one_lambda, "gae/326"),
    "gae gradient": ("gae", wrong_gae_gradient, "gae-gradient-shapes/9"),
    "wandering gae": ("gae", wandering_gae, "repeat/18"),
    "whiten": ("masked_whiten", wrong_whiten, "whiten/3"),
    "whiten gradient": ("masked_whiten", wrong_whiten_gradient, "whiten/146"),
}


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_a_corrupt_operator_fails(device, run, monkeypatch, corruption):
    operator, replacement, case = CORRUPTIONS[corruption]
    assert run("--only", case).status == 0
    monkeypatch.setattr(fused_critic, operator, replacement)
    ran = run("--only", case)
    assert ran.status == 1 and ran.report["verdict"] == "FAIL" and ran.report["failed"] == 1
    (failure,) = ran.report["failures"]
    assert failure["name"] == case and "AssertionError" in failure["traceback"]
    assert failure["repeat"] == f"python -m fused_critic check --device {ran.report['environment']['checked_device']} --only {case}"
    assert ran.lines[-1].startswith("FAIL: 1 of 1 checks failed")
    assert any(case in line and "--only" not in line for line in ran.lines)


def test_every_check_of_an_operator_notices(run, monkeypatch):
    monkeypatch.setattr(fused_critic, "value_loss", wrong_loss)
    monkeypatch.setattr(fused_critic, "gae", wrong_advantages)
    ran = run("--only", "value-loss/0", "value-loss-edges/0", "gae/150", *FEW)
    assert ran.failed == {"value-loss", "value-loss-shapes", "value-loss-edges", "gae", "gae-shapes", "gae-gradient-shapes"}


def test_a_graph_break_fails(run, monkeypatch):
    def breaking(*arguments, **options):
        torch._dynamo.graph_break()
        return original_gae(*arguments, **options)

    monkeypatch.setattr(fused_critic, "gae", breaking)
    assert run("--only", "compile/0").failed == {"compile"}


def test_a_changed_current_device_fails(device, run, monkeypatch):
    if device != "cuda" or torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")

    def careless(rewards, *arguments, **options):
        if rewards.is_cuda:
            torch.cuda.set_device(rewards.device)
        return original_gae(rewards, *arguments, **options)

    monkeypatch.setattr(fused_critic, "gae", careless)
    before = torch.cuda.current_device()
    try:
        ran = run("--only", "second-device")
    finally:
        torch.cuda.set_device(before)
    assert ran.report["failures"][0]["message"] == "the current device was changed"


def test_an_exception_is_a_failure_and_the_rest_goes_on(run, monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("the adjoint\nfell over")

    monkeypatch.setattr(fused_critic, "gae", broken)
    ran = run("--only", "gae-shapes/3", "whiten/3", "value-loss-shapes/3")
    assert ran.status == 1 and ran.failed == {"gae-shapes"} and ran.report["checks"] == 3
    assert ran.report["failures"][0]["message"] == "RuntimeError: the adjoint\nfell over"
    assert "in broken" in ran.report["failures"][0]["traceback"]
    assert ran.report["results"]["value-loss-shapes"]["status"] == "pass"


def test_what_is_not_applicable_neither_passes_nor_fails(device, run):
    simulated = Context(torch.device(device)).simulated
    if device != "cpu" and not simulated:
        pytest.skip("on a GPU everything is applicable")
    ran = run("--only", "cuda-graph", "whiten/3")
    assert (
        ran.status == 0 and ran.report["checks"] == 1 and ran.report["not_applicable"] == len(ran.report["results"]["cuda-graph"]["cases"])
    )
    reason = "simulated device" if simulated else "needs a CUDA device"
    assert {case["message"] for case in ran.report["results"]["cuda-graph"]["cases"]} == {reason}
    ran = run("--only", "cuda-graph")
    assert ran.status == 1 and ran.lines[-1].startswith("FAIL: nothing could be checked")


def test_a_missing_compiler_is_not_applicable():
    cpu = Context(torch.device("cpu"))
    with inductor_config.patch({"cpp.cxx": ("no-such-compiler",)}):
        assert torch_features.compiler_obstacle(cpu.device)
        with pytest.raises(NotApplicable, match="torch.compile does not work here: "):
            torch_features.compare_compiled("inductor", cpu)


def test_the_simulator_is_recognised(monkeypatch):
    monkeypatch.delitem(sys.modules, "fakecuda", raising=False)
    monkeypatch.delenv("FAKECUDA", raising=False)
    cpu, cuda = Context(torch.device("cpu")), Context(torch.device("cuda"))
    assert not cpu.simulated and not cuda.simulated
    monkeypatch.setenv("FAKECUDA", "1")
    assert cuda.simulated and not cpu.simulated
    with pytest.raises(NotApplicable, match="simulated device"):
        cuda.needs_real_device()


def test_bandwidth(device, run, monkeypatch):
    monkeypatch.setattr(bandwidth, "SIZES", {device: [(2, 64), (3, 40)]})
    monkeypatch.setattr(bandwidth, "TIME_MAJOR_SIZES", {device: [(9, 5)]})
    monkeypatch.setattr(bandwidth, "LEAST_FLUSH", 2**20)
    monkeypatch.setattr(bandwidth, "MOST_FLUSH", 2**20)
    monkeypatch.setattr(bandwidth, "LONGEST_LOOP", 64)
    monkeypatch.setattr(bandwidth, "_obstacle", lambda device: "not in this test")
    ran = run("--only", "bandwidth")
    if Context(torch.device(device)).simulated:
        assert ran.status == 1 and {case["message"] for case in ran.report["results"]["bandwidth"]["cases"]} == {"simulated device"}
        return
    assert ran.status == 0
    table = ran.lines[ran.lines.index(bandwidth.HEADER) + 1 :][: ran.report["checks"]]
    assert all(len(line) <= COLUMNS for line in table)
    measured = {case["title"]: case["measured"] for case in ran.report["results"]["bandwidth"]["cases"]}
    masked = measured["GAE, masked, B x T = 2 x 64"]
    assert masked["bytes"] == 2 * 64 * 17 and masked["left_out"] == {"compiled": "not in this test"}
    assert masked["percent_of_copy"] == pytest.approx(100 * masked["seconds"]["copy"] / masked["seconds"]["fused_critic"])
    assert masked["runs"]["fused_critic"] == bandwidth.ROUNDS
    assert "a loop of" in measured["GAE, one row, B x T = 1 x 128"]["left_out"]["eager"]
    monkeypatch.setattr(fused_critic, "gae", wrong_advantages)
    assert run("--only", "bandwidth").failed == {"bandwidth"}


@pytest.mark.parametrize("module", [value_loss, gae], ids=["value_loss", "gae"])
@pytest.mark.parametrize("step", [1, QUICK_STEP], ids=["all", "quick"])
def test_problems_have_every_value_of_every_factor(module, step):
    chosen = list(module.problems())[::step]
    for name, values in module.FACTORS.items():
        if len(values) <= len(chosen) // 5:
            assert {problem[name] for problem in chosen} == set(values), name
    for position, dtype in itertools.product(range(3), module.FACTORS["dtypes"][0]):
        assert any(problem["dtypes"][position] == dtype for problem in chosen)
    assert chosen == list(module.problems())[::step], "a case's number must stand for the same case in every run"


def test_list(device, capsys):
    assert main(["check", "--device", device, "--list"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert set(listed) == set(CHECKS)
    assert list(dict.fromkeys(CHECKS[name].section for name in listed)) == list(SECTIONS)
    assert main(["check", "--device", device, "--list", "--only", "whiten"]) == 0
    assert "whiten/3: torch.float64, mask None, {'eps': 0.1}" in capsys.readouterr().out


BAD_ARGUMENTS = {
    "check": (["--only", "gay"], "no check is called gay; --list names them"),
    "case": (["--only", "whiten/1000000"], "whiten has cases 0 to "),
    "device": (["--device", "meta"], "--device: expected cpu, cuda or cuda:N, got meta"),
    "cuda device": (["--device", "cuda:99"], "--device cuda:99: "),
    "report": (["--device", "cpu", "--report", "no/such/folder/report.json"], "--report: "),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_bad_arguments(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["check", *arguments])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_command_line(tmp_path):
    def command(*arguments):
        return subprocess.run([sys.executable, "-m", "fused_critic", "check", *arguments], capture_output=True, text=True)

    shown = command("--help")
    assert shown.returncode == 0 and all(option in shown.stdout for option in ("--device", "--only", "--quick", "--report", "Exit status"))
    ran = command("--device", "cpu", "--only", "whiten", "--quick", "--report", str(tmp_path / "report.json"))
    assert ran.returncode == 0 and ran.stdout.splitlines()[-1].startswith("PASS: "), ran.stderr
    assert json.loads((tmp_path / "report.json").read_text())["command"].startswith("python -m fused_critic check --device cpu")
