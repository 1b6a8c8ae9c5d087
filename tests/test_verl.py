"""fused_critic against verl 0.9.1, the real one from its wheel.

- verl's own test files run unmodified against our functions, in a process of its own. Of verl's heavy dependencies, those that are not
  installed are replaced by empty stand-ins (verl_session.DEPENDENCIES: ray, tensordict, transformers, ...); all of verl's code is real.
- verl's functions, executed from the wheel's source, and ours on the same data; every difference on purpose is a test of its own.
- install() and uninstall().

Without the wheel (verl_wheel.py says where it comes from) all of it is skipped, in CI it fails.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import fused_critic
import pytest
import torch
import verl_session
import verl_wheel
import wheel_source
from fused_critic.integrations import _adapter
from fused_critic.integrations import verl as fused_verl

SHAPE = (6, 40)
CLIP = 0.3
GAMMA, LAM = 0.97, 0.9
MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean")
MASK_DTYPES = (torch.bool, torch.uint8, torch.int32, torch.int64, torch.float32)
SUBPROCESS_TIMEOUT = 120  # seconds


@pytest.fixture(scope="module")
def verl():
    """verl's own functions."""
    return wheel_source.or_skip(verl_wheel.functions)


@pytest.fixture(scope="module")
def verl_root():
    """The folder with the wheel's content."""
    return wheel_source.or_skip(verl_wheel.unpacked)


def run_beside_verl(arguments, verl_root, **variables):
    """Python in verl's folder, with fused_critic and this folder importable."""
    path = [str(verl_root), str(Path(__file__).parent), str(Path(fused_critic.__file__).parents[1]), os.environ.get("PYTHONPATH")]
    environment = {key: value for key, value in os.environ.items() if key != "PYTEST_ADDOPTS"}
    environment.update(PYTHONPATH=os.pathsep.join(filter(None, path)), PYTEST_DISABLE_PLUGIN_AUTOLOAD="1", **variables)
    return subprocess.run(
        [sys.executable, *arguments], cwd=verl_root, env=environment, capture_output=True, text=True, timeout=SUBPROCESS_TIMEOUT
    )


def make_mask(dtype=torch.bool, shape=SHAPE, seed=0):
    """Multi-turn: tool output masked inside the response, at its start, and padding at its end; one empty row, one full row."""
    batch, length = shape
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(shape, generator=generator) < 0.7
    ends = torch.randint(length // 2, length + 1, (batch, 1), generator=generator)
    mask &= torch.arange(length) < ends
    mask[0], mask[1], mask[2, :3] = False, True, False
    return mask.to(dtype)


def make_batch(dtype=torch.float32, value_dtype=None, shape=SHAPE, seed=0):
    """vpreds (a leaf that requires grad), returns, values."""
    generator = torch.Generator().manual_seed(seed)
    vpreds, returns, noise = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    values = vpreds + 0.5 * noise
    return vpreds.to(value_dtype or dtype).requires_grad_(), returns.to(dtype), values.to(dtype)


def loss_and_gradient(compute_value_loss, vpreds, *arguments, **keywords):
    loss, clip_fraction = compute_value_loss(vpreds, *arguments, **keywords)
    (gradient,) = torch.autograd.grad(loss, vpreds)
    return loss.detach(), clip_fraction, gradient


# --- verl's own tests -------------------------------------------------------------------------------------------------------------


def test_verls_own_tests(verl_root, tmp_path):
    value_loss_tests = "tests/trainer/ppo/test_value_loss_normalization_on_cpu.py"
    gae_test = "tests/trainer/ppo/test_core_algos_on_cpu.py::test_multi_turn_compute_gae_advantage_return"
    calls_file, settings = tmp_path / "calls.json", tmp_path / "pytest.ini"
    settings.write_text("[pytest]\n")
    done = run_beside_verl(
        ["-m", "pytest", "-q", "-p", "verl_session", "-p", "no:cacheprovider", "-c", settings, f"--rootdir={verl_root}"]
        + [value_loss_tests, gae_test],
        verl_root,
        **{verl_session.CALLS_VARIABLE: str(calls_file)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    calls = json.loads(calls_file.read_text())
    assert sum(test.startswith(value_loss_tests) for test in calls) >= 20
    assert calls.pop(gae_test)["fused_critic::gae"] >= 2
    for test, operators in calls.items():
        assert operators.get("fused_critic::value_loss", 0) >= 2, test


# --- the same results at valid tokens ---------------------------------------------------------------------------------------------


COUNTS = {
    "local": {},
    "global": dict(batch_num_tokens=301, global_batch_size=11),
    "tensors": dict(batch_num_tokens=torch.tensor(301), global_batch_size=torch.tensor(11.0)),
    "data parallel": dict(batch_num_tokens=301, global_batch_size=11, dp_size=4),
    "scale factor": dict(loss_scale_factor=17),
}


@pytest.mark.parametrize("mask_dtype", MASK_DTYPES, ids=str)
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("mode", MODES)
def test_value_loss(verl, mode, counts, mask_dtype):
    arguments = (*make_batch(), make_mask(mask_dtype), CLIP, mode)
    theirs = loss_and_gradient(verl.compute_value_loss, *arguments, **COUNTS[counts])
    ours = loss_and_gradient(fused_verl.compute_value_loss, *arguments, **COUNTS[counts])
    assert 0.05 < ours[1] < 0.95
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "dtype, value_dtype, rtol",
    [(torch.float64, torch.float64, 1e-7), (torch.float32, torch.bfloat16, 2e-2), (torch.float32, torch.float16, 2e-3)],
    ids=["float64", "bf16 critic", "fp16 critic"],
)
def test_value_loss_dtypes(verl, mode, dtype, value_dtype, rtol):
    arguments = (*make_batch(dtype, value_dtype), make_mask(), CLIP, mode)
    theirs = loss_and_gradient(verl.compute_value_loss, *arguments)
    ours = loss_and_gradient(fused_verl.compute_value_loss, *arguments)
    assert (ours[0].dtype, ours[2].dtype) == (dtype, value_dtype)
    torch.testing.assert_close(ours[:2], theirs[:2], rtol=min(rtol, 1e-5), atol=1e-7)
    torch.testing.assert_close(ours[2], theirs[2], rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_value_loss_of_fractional_mask(verl, mode):
    weights = make_mask(torch.float32) * torch.rand(SHAPE, generator=torch.Generator().manual_seed(3)).clamp(min=0.1)
    arguments = (*make_batch(), weights, CLIP, mode)
    theirs = loss_and_gradient(verl.compute_value_loss, *arguments)
    ours = loss_and_gradient(fused_verl.compute_value_loss, *arguments)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("compute_value_loss", ["verl", "ours"])
@pytest.mark.parametrize(
    "keywords",
    [dict(loss_agg_mode="none"), dict(loss_agg_mode="mean"), dict(dp_size=2), dict(loss_agg_mode="seq-mean-token-sum", dp_size=2)],
    ids=str,
)
def test_value_loss_rejects(verl, compute_value_loss, keywords):
    function = {"verl": verl, "ours": fused_verl}[compute_value_loss].compute_value_loss
    with pytest.raises(ValueError):
        function(*make_batch(), make_mask(), CLIP, **keywords)


@pytest.mark.parametrize("mask_dtype", MASK_DTYPES, ids=str)
@pytest.mark.parametrize("number", [float, torch.tensor, lambda x: torch.tensor([x])], ids=["float", "0-d tensor", "1 element"])
def test_gae(verl, mask_dtype, number):
    _, rewards, values = make_batch()
    mask, gamma, lam = make_mask(mask_dtype), number(GAMMA), number(LAM)
    verls_mask = mask.float() if mask_dtype == torch.bool else mask
    theirs = verl.compute_gae_advantage_return(rewards, values, verls_mask, gamma, lam)
    ours = fused_verl.compute_gae_advantage_return(rewards, values, mask, gamma, lam)
    valid = mask.bool()
    torch.testing.assert_close([x[valid] for x in ours], [x[valid] for x in theirs], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (1.0, 0.95), (0.9, 0.0), (0.0, 1.0)])
@pytest.mark.parametrize(
    "dtype, value_dtype, tolerance",
    [(torch.float64, torch.float64, 1e-7), (torch.float32, torch.float32, 1e-4), (torch.float32, torch.bfloat16, 1e-4)],
    ids=["float64", "float32", "bf16 critic"],
)
def test_gae_dtypes(verl, dtype, value_dtype, tolerance, gamma, lam):
    values, rewards, _ = make_batch(dtype, value_dtype)
    mask = make_mask(dtype)
    theirs = verl.compute_gae_advantage_return(rewards, values, mask, gamma, lam)
    ours = fused_verl.compute_gae_advantage_return(rewards, values, mask, gamma, lam)
    valid = mask.bool()
    assert all(x.dtype == dtype and not x.requires_grad for x in ours)
    torch.testing.assert_close([x[valid] for x in ours], [x[valid] for x in theirs], rtol=tolerance, atol=tolerance)


# --- the differences on purpose: verl's side first, then ours ---------------------------------------------------------------------


@pytest.mark.parametrize("garbage", [float("nan"), float("inf")])
@pytest.mark.parametrize("mode", MODES)
def test_difference_garbage_under_the_mask_in_the_loss(verl, mode, garbage):
    clean = (vpreds, returns, values) = make_batch()
    mask = make_mask()
    dirty = [torch.where(mask, x.detach(), garbage) for x in clean]
    dirty[0].requires_grad_()
    loss, _, gradient = loss_and_gradient(verl.compute_value_loss, *dirty, mask, CLIP, mode)
    assert loss.isnan() == (mode.startswith("seq-mean"))
    assert gradient[~mask].isnan().all()
    ours = loss_and_gradient(fused_verl.compute_value_loss, *dirty, mask, CLIP, mode)
    expected = loss_and_gradient(fused_verl.compute_value_loss, *clean, mask, CLIP, mode)
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)
    assert (ours[2][~mask] == 0).all()


@pytest.mark.parametrize("garbage", [float("nan"), float("inf")])
def test_difference_garbage_under_the_mask_in_gae(verl, garbage):
    _, rewards, values = make_batch()
    mask = make_mask(torch.float32)
    dirty = [torch.where(mask != 0, x, garbage) for x in (rewards, values)]
    advantages, _ = verl.compute_gae_advantage_return(*dirty, mask, GAMMA, LAM)
    assert advantages.isnan().all()
    ours = fused_verl.compute_gae_advantage_return(*dirty, mask, GAMMA, LAM)
    expected = fused_verl.compute_gae_advantage_return(rewards, values, mask, GAMMA, LAM)
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)


@pytest.mark.parametrize("mode", MODES)
def test_difference_nothing_valid(verl, mode):
    arguments = (*make_batch(), torch.zeros(SHAPE), CLIP, mode)
    theirs, _ = verl.compute_value_loss(*arguments)
    assert theirs.isnan() == (mode != "token-sum")
    loss, clip_fraction, gradient = loss_and_gradient(fused_verl.compute_value_loss, *arguments)
    assert loss == 0 and clip_fraction == 0 and (gradient == 0).all()


@pytest.mark.parametrize("valid_tokens", [0, 1])
def test_difference_too_few_tokens_to_whiten(verl, valid_tokens):
    _, rewards, values = make_batch()
    mask = torch.zeros(SHAPE)
    mask[2, 5 : 5 + valid_tokens] = 1
    with pytest.raises(ValueError):
        verl.compute_gae_advantage_return(rewards, values, mask, GAMMA, LAM)
    advantages, returns = fused_verl.compute_gae_advantage_return(rewards, values, mask, GAMMA, LAM)
    assert (advantages == 0).all()
    torch.testing.assert_close(returns, rewards * mask)  # alone in its row, A = r - V


def test_difference_zeros_at_masked_tokens(verl):
    _, rewards, values = make_batch()
    mask = make_mask(torch.float32)
    masked = mask == 0
    assert all((x[masked] != 0).all() for x in verl.compute_gae_advantage_return(rewards, values, mask, GAMMA, LAM))
    assert all((x[masked] == 0).all() for x in fused_verl.compute_gae_advantage_return(rewards, values, mask, GAMMA, LAM))


def test_difference_bool_mask_in_gae(verl):
    _, rewards, values = make_batch()
    mask = make_mask()
    with pytest.raises(RuntimeError, match="bool"):
        verl.compute_gae_advantage_return(rewards, values, mask, GAMMA, LAM)
    ours = fused_verl.compute_gae_advantage_return(rewards, values, mask, GAMMA, LAM)
    torch.testing.assert_close(ours, fused_verl.compute_gae_advantage_return(rewards, values, mask.float(), GAMMA, LAM), rtol=0, atol=0)


def test_difference_fractional_mask_in_gae(verl):
    _, rewards, values = make_batch()
    mask = make_mask(torch.float32)
    halves, valid = mask / 2, mask != 0
    _, returns = verl.compute_gae_advantage_return(rewards, values, mask, GAMMA, LAM)
    _, blended = verl.compute_gae_advantage_return(rewards, values, halves, GAMMA, LAM)
    assert not torch.allclose(blended[valid], returns[valid], rtol=1e-2)
    ours = fused_verl.compute_gae_advantage_return(rewards, values, halves, GAMMA, LAM)
    torch.testing.assert_close(ours, fused_verl.compute_gae_advantage_return(rewards, values, mask, GAMMA, LAM), rtol=0, atol=0)


def test_difference_half_precision_throughout(verl):
    """In bf16, 100 - 0.2 and 100 + 0.2 are both 100: in verl the range is a point, and a step of 0.5 towards the return is clipped."""
    vpreds = torch.full((1, 4), 100.5, dtype=torch.bfloat16, requires_grad=True)
    values, returns = torch.full((1, 4), 100.0, dtype=torch.bfloat16), torch.full((1, 4), 104.0, dtype=torch.bfloat16)
    mask = torch.ones(1, 4)
    theirs, _ = verl.compute_value_loss(vpreds, returns, values, mask.bfloat16(), 0.2)
    ours, _ = fused_verl.compute_value_loss(vpreds, returns, values, mask.bfloat16(), 0.2)
    assert theirs.dtype == torch.bfloat16 and theirs == 0.5 * 4.0**2
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, torch.tensor(0.5 * 3.8**2))

    rewards = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)).bfloat16()
    mask = make_mask(torch.bfloat16)
    theirs = verl.compute_gae_advantage_return(rewards, rewards, mask, GAMMA, LAM)
    ours = fused_verl.compute_gae_advantage_return(rewards, rewards, mask, GAMMA, LAM)
    assert all(x.dtype == torch.bfloat16 for x in theirs)
    assert all(x.dtype == torch.float32 for x in ours)
    exact = verl.compute_gae_advantage_return(rewards.double(), rewards.double(), mask.double(), GAMMA, LAM)
    valid = mask != 0
    torch.testing.assert_close([x[valid].double() for x in ours], [x[valid] for x in exact], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("vpred, value, ret", [(1.5, 0.5, 1.25), (0.5, 0.0, 3.0)], ids=["equal losses", "on the bound"])
def test_difference_gradient_at_ties(verl, vpred, value, ret):
    """Clip range 0.5: the return half way between vpred and its clipped value, and vpred on the bound of the range."""
    vpreds, values, returns = torch.tensor([[vpred]], requires_grad=True), torch.tensor([[value]]), torch.tensor([[ret]])
    arguments = (vpreds, returns, values, torch.ones(1, 1), 0.5)
    loss, _, theirs = loss_and_gradient(verl.compute_value_loss, *arguments)
    ours = loss_and_gradient(fused_verl.compute_value_loss, *arguments)
    assert ours[0] == loss
    assert ours[2] == vpred - ret
    assert 0 < theirs / ours[2] < 1


def test_difference_returns_and_old_values_are_constants(verl):
    vpreds, *constants = make_batch()
    for index in range(len(constants)):
        returns, values = (x.clone().requires_grad_(i == index) for i, x in enumerate(constants))
        theirs, _ = verl.compute_value_loss(vpreds, returns, values, make_mask(), CLIP)
        assert torch.autograd.grad(theirs, (returns, values)[index])[0].any()
        with pytest.raises(ValueError, match="requires_grad"):
            fused_verl.compute_value_loss(vpreds, returns, values, make_mask(), CLIP)


def test_difference_no_broadcasting_and_no_negative_range(verl):
    vpreds, returns, values = make_batch()
    for arguments in [(vpreds, returns[:, :1], values, make_mask(), CLIP), (vpreds, returns, values, make_mask(), -CLIP)]:
        assert verl.compute_value_loss(*arguments)[0].isfinite()
        with pytest.raises((ValueError, RuntimeError), match="value_loss"):
            fused_verl.compute_value_loss(*arguments)


def test_difference_float64_mask(verl):
    vpreds, returns, values = make_batch()
    mask = make_mask(torch.float64)
    theirs = verl.compute_value_loss(vpreds, returns, values, mask, CLIP)
    ours = fused_verl.compute_value_loss(vpreds, returns, values, mask, CLIP)
    assert [x.dtype for x in theirs] == [torch.float64, torch.float64]
    assert [x.dtype for x in ours] == [torch.float32, torch.float64]
    assert verl.compute_gae_advantage_return(returns, values, mask, GAMMA, LAM)[0].dtype == torch.float64
    assert fused_verl.compute_gae_advantage_return(returns, values, mask, GAMMA, LAM)[0].dtype == torch.float32


# --- install and uninstall --------------------------------------------------------------------------------------------------------


@pytest.fixture
def installable(verl_root, monkeypatch):
    """A verl of empty packages around verl's own functions, and a module that has imported one of them."""
    functions = verl_wheel.functions()
    names = ["verl", "verl.trainer", "verl.trainer.ppo", "verl.trainer.ppo.core_algos", "verl.losses", "trainer_script"]
    for name in [*names, "verl.workers", "verl.workers.utils", "verl.workers.utils.losses"]:
        module = types.ModuleType(name)
        module.__path__ = []
        monkeypatch.setitem(sys.modules, name, module)
    core_algos = sys.modules["verl.trainer.ppo.core_algos"]
    core_algos.compute_value_loss = functions.compute_value_loss
    core_algos.compute_gae_advantage_return = functions.compute_gae_advantage_return
    core_algos.ADV_ESTIMATOR_REGISTRY = {"gae": functions.compute_gae_advantage_return, "grpo": max}
    sys.modules["verl.losses"].compute_value_loss = functions.compute_value_loss
    sys.modules["verl.workers.utils.losses"].value_loss = lambda config, model_output, data, dp_group=None: None
    sys.modules["trainer_script"].value_loss = functions.compute_value_loss
    yield core_algos
    fused_verl.uninstall()


def attributes():
    """Everything that install() may touch."""
    core_algos = sys.modules["verl.trainer.ppo.core_algos"]
    state = {name: dict(vars(module)) for name, module in sys.modules.items() if name.startswith(("verl", "trainer_script"))}
    return state, dict(core_algos.ADV_ESTIMATOR_REGISTRY)


def test_signatures_are_verls(verl):
    for ours in (fused_verl.compute_value_loss, fused_verl.compute_gae_advantage_return):
        assert _adapter.signature_of(getattr(verl, ours.__name__)) == _adapter.signature_of(ours)


def test_install_replaces_and_uninstall_restores(installable):
    before = attributes()
    fused_verl.install()
    assert installable.compute_value_loss is fused_verl.compute_value_loss
    assert installable.compute_gae_advantage_return is fused_verl.compute_gae_advantage_return
    assert installable.ADV_ESTIMATOR_REGISTRY == {"gae": fused_verl.compute_gae_advantage_return, "grpo": max}
    assert sys.modules["verl.losses"].compute_value_loss is fused_verl.compute_value_loss
    assert sys.modules["trainer_script"].value_loss is fused_verl.compute_value_loss
    fused_verl.uninstall()
    assert attributes() == before
    fused_verl.uninstall()
    assert attributes() == before


def test_install_twice_is_install_once(installable):
    before = attributes()
    fused_verl.install()
    installed = attributes()
    with fused_verl.install():
        assert attributes() == installed
    assert attributes() == installed, "an install() that found nothing to do undoes nothing"
    fused_verl.uninstall()
    assert attributes() == before


def test_install_for_a_block(installable):
    before = attributes()
    with fused_verl.install():
        assert installable.compute_value_loss is fused_verl.compute_value_loss
    assert attributes() == before


def test_uninstall_reaches_later_imports_of_verl_and_keeps_later_changes(installable, verl):
    theirs = installable.compute_value_loss
    fused_verl.install()
    sys.modules["verl.losses"].later = installable.compute_value_loss
    sys.modules["trainer_script"].own = fused_verl.compute_value_loss
    installable.ADV_ESTIMATOR_REGISTRY["gae"] = min
    fused_verl.uninstall()
    assert sys.modules["verl.losses"].later is theirs
    assert sys.modules["trainer_script"].own is fused_verl.compute_value_loss
    assert installable.ADV_ESTIMATOR_REGISTRY["gae"] is min


@pytest.mark.parametrize("change", ["other signature", "missing"])
def test_install_refuses_another_signature(installable, change):
    if change == "missing":
        del installable.compute_gae_advantage_return
    else:
        installable.compute_gae_advantage_return = lambda token_level_rewards, values, eos_mask, gamma, lam: None
    before = attributes()
    with pytest.raises(RuntimeError) as error:
        fused_verl.install()
    assert "compute_gae_advantage_return" in str(error.value) and "response_mask: " in str(error.value)
    assert ("eos_mask" if change == "other signature" else "missing") in str(error.value)
    assert attributes() == before


REAL_INSTALL = """
import verl_session
verl_session.stub_missing_dependencies()
import verl.trainer.ppo.core_algos as core_algos
import verl.workers.utils.losses as losses
from fused_critic.integrations import verl as fused_verl
theirs = core_algos.compute_value_loss, core_algos.compute_gae_advantage_return
for repetition in range(2):
    with fused_verl.install():
        assert core_algos.compute_value_loss is losses.compute_value_loss is fused_verl.compute_value_loss
        assert core_algos.get_adv_estimator_fn("gae") is fused_verl.compute_gae_advantage_return
    assert (core_algos.compute_value_loss, core_algos.get_adv_estimator_fn("gae")) == theirs
    assert losses.compute_value_loss is theirs[0]
"""

AUTOINSTALL = """
import verl_session
verl_session.stub_missing_dependencies()
import verl
import verl.workers.utils.losses as losses
from fused_critic.integrations import verl as fused_verl
assert losses.compute_value_loss is fused_verl.compute_value_loss
assert verl.trainer.ppo.core_algos.get_adv_estimator_fn("gae") is fused_verl.compute_gae_advantage_return
"""


def test_install_into_the_real_verl(verl_root):
    done = run_beside_verl(["-c", REAL_INSTALL], verl_root)
    assert done.returncode == 0, done.stderr


def test_autoinstall_by_verls_external_modules(verl_root):
    done = run_beside_verl(["-c", AUTOINSTALL], verl_root, VERL_USE_EXTERNAL_MODULES="fused_critic.integrations.verl_autoinstall")
    assert done.returncode == 0, done.stderr
