"""NeMo-RL's methods, as ours are, against formulas in float64 written here from a description of them.

NeMo-RL's own code is not executed: the project of its name on PyPI is a placeholder. Signatures, defaults and formulas are those of
https://github.com/NVIDIA-NeMo/RL as of 2026-08-22, commit 00925dd. So nothing of this file is in the table of docs/parity.md, whose rows
were executed by both sides.
"""

from __future__ import annotations

import sys
import types
from types import SimpleNamespace
from typing import Any

import fused_critic
import peers
import pytest
import torch
from fused_critic.integrations import _adapter
from fused_critic.integrations import nemo_rl as fused_nemo_rl

SHAPES = [(6, 40), (1, 9), (5, 1), (16, 64)]
DTYPES = [torch.float32, torch.float64]
GAMMA, LAM, CLIP, SCALE = 0.99, 0.95, 0.2, 0.7
NAN = float("nan")


# --- the formulas -----------------------------------------------------------------------------------------------------------------------


def plain_gae(rewards, values, mask, gamma, lam):
    """Row by row over the valid tokens alone, as numbers; masked ones keep the advantage of the next valid one, 0 behind the last."""
    advantages = torch.zeros(rewards.shape, dtype=torch.float64)
    for b, row in enumerate(mask):
        advantage = next_value = 0.0
        lam_b = lam[b].item() if isinstance(lam, torch.Tensor) else lam
        for t in reversed(range(len(row))):
            if row[t]:
                value = values[b, t].item()
                advantage = rewards[b, t].item() + gamma * next_value - value + gamma * lam_b * advantage
                next_value = value
            advantages[b, t] = advantage
    return advantages, advantages + values.double()


def plain_value_loss(values, old_values, returns, weights, clip, count):
    """Loss (without scale) and metrics, by moments of the valid tokens, over `count`."""
    v, r, w = (x.double().flatten() for x in (values, returns, weights))
    chosen = w != 0
    v, r, w = v[chosen], r[chosen], w[chosen]
    losses, clipped = (v - r).square(), torch.zeros_like(v)
    if clip:
        o = old_values.double().flatten()[chosen]
        of_clipped = (torch.minimum(torch.maximum(v, o - clip), o + clip) - r).square()
        clipped, losses = (of_clipped > losses).double(), torch.maximum(losses, of_clipped)
    mean = {name: (w * x).sum() / count for name, x in {"clip": clipped, "v": v, "r": r, "r2": r**2, "e2": (r - v) ** 2}.items()}
    metrics = {
        "vf_clipfrac": mean["clip"], "values_mean": mean["v"], "returns_mean": mean["r"], "returns_sq_mean": mean["r2"],
        "residual_sq_mean": mean["e2"], "values_min": v.min(), "values_max": v.max(), "num_valid_samples": len(values),
    }  # fmt: skip
    return 0.5 * (w * losses).sum() / count, metrics


# --- data -------------------------------------------------------------------------------------------------------------------------------


def batch(shape, dtype=torch.float32, seed=0) -> dict[str, torch.Tensor]:
    """Values, and the trainer's dictionary: turns with gaps, padding, an empty row, a full one, and a sample that does not count."""
    generator = torch.Generator().manual_seed(seed)
    logits, returns, noise, rewards = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(4))
    token_mask = torch.rand(shape, generator=generator) < 0.6
    token_mask[-1] = True
    sample_mask = torch.ones(shape[0])
    if shape[0] > 2:
        token_mask[0], sample_mask[2] = False, 0
    return {
        "logits": logits.to(dtype), "values": (logits + 0.4 * noise).to(dtype), "returns": returns.to(dtype), "rewards": rewards.to(dtype),
        "token_mask": token_mask.float(), "sample_mask": sample_mask,
    }  # fmt: skip


def estimator(gamma=GAMMA, lam=LAM) -> SimpleNamespace:
    return SimpleNamespace(gae_gamma=gamma, gae_lambda=lam)


def loss_fn(cliprange: float | None = CLIP) -> SimpleNamespace:
    return SimpleNamespace(scale=SCALE, cliprange=cliprange)


def our_loss(data, count, cliprange: float | None = CLIP, logits=None):
    logits = (data["logits"] if logits is None else logits).detach().requires_grad_()
    loss, metrics = fused_nemo_rl.mse_value_loss(loss_fn(cliprange), logits, data, torch.tensor(6.0), count)
    return loss, metrics, torch.autograd.grad(loss, logits)[0]


def close(ours, theirs, precision):
    ours, theirs = (torch.as_tensor(x, dtype=torch.float64).detach() for x in (ours, theirs))
    torch.testing.assert_close(ours, theirs, rtol=precision, atol=precision)


# --- the same -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lam", [None, 1.0, 0.0, "per sample"])
@pytest.mark.parametrize("gamma", [GAMMA, 1.0])
def test_compute_gae(shape, dtype, lam, gamma):
    """Per sample: VAPO's length-adaptive lambda, 1 - 1 / (alpha * length), within [0, 1]."""
    data = batch(shape, dtype)
    if lam == "per sample":
        lam = (1 - 1 / (0.5 * data["token_mask"].sum(1)).clamp(min=1)).clamp(0, 1)
    ours = fused_nemo_rl.compute_gae(estimator(gamma), data["rewards"], data["values"], data["token_mask"], gae_lambda=lam)
    theirs = plain_gae(data["rewards"], data["values"], data["token_mask"], gamma, LAM if lam is None else lam)
    valid = data["token_mask"] != 0
    assert all(x.dtype == dtype for x in ours)
    for ours_is, theirs_is in zip(ours, theirs):
        close(ours_is[valid], theirs_is[valid], 2e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
@pytest.mark.parametrize("shift_mean", [True, False])
def test_reward_whiten(shape, shift_mean):
    data = batch(shape, torch.float64)
    valid = data["token_mask"] != 0
    x = data["rewards"][valid]
    expected = (x - x.mean()) / (x.var() + 1e-8).sqrt() + (0 if shift_mean else x.mean())
    ours = fused_nemo_rl.reward_whiten(estimator(), data["rewards"], data["token_mask"], shift_mean=shift_mean)
    close(ours[valid], expected, 1e-9)  # of 1e-8 in the denominators of theirs, and of the square root
    assert not ours[~valid].any()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cliprange", [CLIP, 0.0, None], ids=["clip", "range 0: none", "no clip"])
@pytest.mark.parametrize("count", [torch.tensor(57.0), torch.tensor([57]), 57], ids=["0-d", "1 element", "number"])
def test_value_loss(shape, dtype, cliprange, count):
    data = batch(shape, dtype)
    weights = data["token_mask"] * data["sample_mask"].unsqueeze(-1)
    leaf = data["logits"].double().requires_grad_()
    expected, expected_metrics = plain_value_loss(leaf, data["values"], data["returns"], weights, cliprange, 57)
    expected_metrics["loss"] = expected = SCALE * expected
    (expected_gradient,) = torch.autograd.grad(expected, leaf)
    precision = 1e-5 if dtype == torch.float32 else 1e-12
    for logits in (data["logits"], data["logits"].unsqueeze(-1)):
        loss, metrics, gradient = our_loss(data, count, cliprange, logits)
        assert loss.dtype == dtype and gradient.shape == logits.shape
        close(loss, expected, precision)
        close(gradient.reshape(shape), expected_gradient, precision)
        assert set(metrics) == set(expected_metrics)
        for name, value in metrics.items():
            assert isinstance(value, int if name == "num_valid_samples" else float)
            close(value, expected_metrics[name], precision)


def test_micro_batches_add_up_to_the_batch():
    """Loss and metrics are over the global count: the trainer sums them over micro-batches, and gets explained variance exactly."""
    data = batch((6, 40), torch.float64)
    count = (data["token_mask"] * data["sample_mask"].unsqueeze(-1)).sum()
    loss, metrics, _ = our_loss(data, count)
    parts = [our_loss({name: x[rows] for name, x in data.items()}, count)[:2] for rows in (slice(0, 1), slice(1, 4), slice(4, 6))]
    close(sum(part for part, _ in parts), loss, 1e-12)
    for name in ("loss", "vf_clipfrac", "returns_mean", "values_mean", "returns_sq_mean", "residual_sq_mean"):
        close(sum(part[name] for _, part in parts), metrics[name], 1e-12)
    valid = (data["token_mask"] * data["sample_mask"].unsqueeze(-1)) != 0
    returns, errors = data["returns"][valid], (data["returns"] - data["logits"])[valid]
    of_errors = metrics["residual_sq_mean"] - (metrics["returns_mean"] - metrics["values_mean"]) ** 2
    of_returns = metrics["returns_sq_mean"] - metrics["returns_mean"] ** 2
    close(1 - of_errors / of_returns, 1 - errors.var(correction=0) / returns.var(correction=0), 1e-10)


# --- different on purpose: NeMo-RL's side is in the docstrings, read, not executed --------------------------------------------------------


def test_difference_nan_at_masked_tokens():
    """NeMo-RL multiplies by the mask, and NaN times 0 is NaN: in the loss, and in GAE as r + gamma * V - V of the masked token times 0."""
    data = batch((6, 40))
    masked = (data["token_mask"] * data["sample_mask"].unsqueeze(-1)) == 0
    clean = our_loss(data, 57)
    dirty = {name: x.masked_fill(masked, NAN) if name in ("logits", "values", "returns") else x for name, x in data.items()}
    ours = our_loss(dirty, 57)
    assert torch.equal(ours[0], clean[0]) and ours[1] == clean[1] and torch.equal(ours[2], clean[2]) and not ours[2][masked].any()

    gaps = data["token_mask"] == 0
    filled = ([data[name].masked_fill(gaps, x) for name in ("rewards", "values")] for x in (0.0, NAN))
    clean, dirty = (fused_nemo_rl.compute_gae(estimator(), *tensors, data["token_mask"]) for tensors in filled)
    assert all(torch.equal(a, b) and b.isfinite().all() for a, b in zip(clean, dirty))
    whitened = fused_nemo_rl.reward_whiten(estimator(), data["rewards"].masked_fill(gaps, NAN), data["token_mask"])
    assert torch.equal(whitened, fused_nemo_rl.reward_whiten(estimator(), data["rewards"], data["token_mask"]))


def test_difference_gae_at_masked_tokens():
    """Theirs are carried; the estimator fills masked advantages with 0 after whitening, and leaves masked returns."""
    data = batch((6, 40))
    masked = data["token_mask"] == 0
    theirs = plain_gae(data["rewards"], data["values"], data["token_mask"], GAMMA, LAM)
    ours = fused_nemo_rl.compute_gae(estimator(), data["rewards"], data["values"], data["token_mask"])
    assert theirs[0][masked].any() and theirs[1][masked].all()
    assert not ours[0][masked].any() and not ours[1][masked].any()


def test_difference_bool_mask():
    """NeMo-RL's GAE subtracts the mask from 1, which torch refuses for a bool; its loss multiplies it by the float sample mask."""
    data = batch((6, 40))
    mask = data["token_mask"].bool()
    ours = fused_nemo_rl.compute_gae(estimator(), data["rewards"], data["values"], mask)
    expected = fused_nemo_rl.compute_gae(estimator(), data["rewards"], data["values"], data["token_mask"])
    assert all(torch.equal(a, b) for a, b in zip(ours, expected))
    data["token_mask"] = mask
    assert our_loss(data, 57)[0] == our_loss(batch((6, 40)), 57)[0]


def test_difference_nothing_valid_and_whitening_of_one_token():
    """One token: NeMo-RL's variance is 0 times n / (n - 1), NaN. Nothing: 0 / 1e-8 in its loss, which is 0 in both."""
    data = batch((6, 40))
    one = torch.zeros_like(data["token_mask"])
    one[3, 5] = 1
    assert not fused_nemo_rl.reward_whiten(estimator(), data["rewards"], one).any()
    assert not fused_nemo_rl.reward_whiten(estimator(), data["rewards"], 0 * one).any()
    data["token_mask"] = 0 * one
    for count in (0, 57):
        loss, metrics, gradient = our_loss(data, count)
        assert loss == 0 and not gradient.any()
        assert metrics.pop("num_valid_samples") == 6 and not any(metrics.values())


def test_difference_fractional_weights():
    """The loss takes them as weights, as theirs does; GAE and whitening take what is not 0 as valid, where theirs blend."""
    data = batch((6, 40))
    data["token_mask"] = 0.5 * data["token_mask"]
    expected, _ = plain_value_loss(
        data["logits"], data["values"], data["returns"], data["token_mask"] * data["sample_mask"].unsqueeze(-1), CLIP, 57
    )
    close(our_loss(data, 57)[0], SCALE * expected, 1e-5)
    ours = fused_nemo_rl.compute_gae(estimator(), data["rewards"], data["values"], data["token_mask"])
    expected = fused_nemo_rl.compute_gae(estimator(), data["rewards"], data["values"], 2 * data["token_mask"])
    assert torch.equal(ours[0], expected[0])


def test_difference_half_precision_throughout():
    """NeMo-RL clips in bfloat16, where the bounds of the range around 100 are 100, and the loss is 0.5 * 4 ** 2."""
    old, new, target = (torch.full((1, 4), x, dtype=torch.bfloat16) for x in (100.0, 100.5, 104.0))
    data = {"logits": new, "values": old, "returns": target, "token_mask": torch.ones(1, 4), "sample_mask": torch.ones(1)}
    loss, _, gradient = our_loss(data, 4)
    assert loss.dtype == torch.float32 and gradient.dtype == torch.bfloat16
    close(loss, SCALE * 0.5 * 3.8**2, 1e-5)


def test_difference_constants_and_broadcasting():
    data = batch((6, 40))
    for name in ("values", "returns"):
        with pytest.raises(ValueError, match="requires_grad"):
            our_loss({**data, name: data[name].clone().requires_grad_()}, 57)
    with pytest.raises(ValueError, match="returns"):
        our_loss({**data, "returns": data["returns"][:, :1]}, 57)


# --- install() ----------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def nemo(monkeypatch):
    """Stand-ins with the classes and signatures of the repository; the methods say who they are."""

    class GeneralizedAdvantageEstimator:
        gae_gamma, gae_lambda = GAMMA, LAM

        def _compute_gae(self, token_level_rewards, values, mask, gae_lambda=None):
            return "theirs"

        def _reward_whiten(self, rewards, mask, shift_mean=True):
            return "theirs"

    class MseValueLossFn:
        scale, cliprange = SCALE, CLIP

        def __call__(self, logits, data, global_valid_seqs, global_valid_toks):
            return "theirs"

    def module(name: str, **attributes: Any) -> None:
        stand_in: Any = types.ModuleType(name)
        stand_in.__path__ = []
        vars(stand_in).update(attributes)
        monkeypatch.setitem(sys.modules, name, stand_in)

    for name in ("nemo_rl", "nemo_rl.algorithms", "nemo_rl.algorithms.loss"):
        module(name)
    module("nemo_rl.algorithms.advantage_estimator", GeneralizedAdvantageEstimator=GeneralizedAdvantageEstimator)
    module("nemo_rl.algorithms.loss.loss_functions", MseValueLossFn=MseValueLossFn)
    yield SimpleNamespace(estimator=GeneralizedAdvantageEstimator, loss_fn=MseValueLossFn)
    fused_nemo_rl.uninstall()


def test_install_and_uninstall(nemo):
    """Methods are replaced in their classes, so that what was constructed before has them too."""
    data = batch((6, 40))
    estimator, loss_fn = nemo.estimator(), nemo.loss_fn()
    assert all(finding.fits for finding in fused_nemo_rl.ADAPTER.examine())
    with fused_nemo_rl.install():
        advantages, _ = estimator._compute_gae(data["rewards"], data["values"], data["token_mask"])
        torch.testing.assert_close(
            advantages, fused_critic.gae(data["rewards"], data["values"], data["token_mask"], gamma=GAMMA, lam=LAM).advantages
        )
        assert estimator._reward_whiten(advantages, data["token_mask"]).shape == (6, 40)
        assert torch.equal(loss_fn(data["logits"], data, torch.tensor(6), torch.tensor(57))[0], our_loss(data, 57)[0])
    assert estimator._compute_gae(None, None, None) == estimator._reward_whiten(None, None) == loss_fn(None, None, None, None) == "theirs"


def test_install_refuses_another_signature(nemo):
    theirs = nemo.loss_fn.__call__ = lambda self, logits, data, global_valid_toks: None
    compute_gae = nemo.estimator._compute_gae
    with pytest.raises(RuntimeError) as error:
        fused_nemo_rl.install()
    assert "global_valid_seqs" in str(error.value) and "00925dd" in str(error.value)
    assert nemo.loss_fn.__call__ is theirs and nemo.estimator._compute_gae is compute_gae


def test_replacements_have_a_trainers_signature(nemo):
    for replacement in fused_nemo_rl.ADAPTER.replacements:
        assert _adapter.signature_of(replacement.theirs()) == _adapter.signature_of(replacement.ours)


def test_the_page(nemo):
    (snippet,) = peers.snippets("nemo_rl")
    exec(snippet, {})
    assert nemo.estimator._compute_gae is fused_nemo_rl.compute_gae and nemo.loss_fn.__call__ is fused_nemo_rl.mse_value_loss
