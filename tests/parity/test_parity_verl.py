"""verl's critic side, executed from its wheel, beside fused_critic.integrations.verl; its differences at length are in tests/test_verl.py."""

from __future__ import annotations

import sys
import types
from enum import Enum
from types import SimpleNamespace

import numpy
import peers
import pytest
import torch
import verl_wheel
import wheel_source
from fused_critic.integrations import verl as fused_verl
from verl_wheel import Batch, jagged

MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean")
GAMMA, LAM, CLIP = 0.97, 0.9, 0.3
GENERATOR = torch.Generator()


@pytest.fixture(scope="module")
def core_algos():
    return wheel_source.or_skip(verl_wheel.functions)


@pytest.fixture(scope="module")
def worker(core_algos):
    """The worker's loss and what it calls. What that uses of other packages is ours: Batch, NonTensorData."""
    numbers = (int, float, torch.Tensor, numpy.ndarray)
    scope = {
        "torch": torch,
        "np": numpy,
        "Enum": Enum,
        "NumericType": numbers,
        "F": torch.nn.functional,
        "NonTensorData": type("Absent", (), {}),
    }
    metric = peers.functions("verl", "verl/utils/metric/utils.py", ["AggregationType", "Metric"], **scope)
    dictionaries = peers.functions("verl", "verl/utils/tensordict_utils.py", ["unwrap_non_tensor_data", "get_non_tensor_data"], **scope)
    padding = peers.functions("verl", "verl/workers/utils/padding.py", ["no_padding_2_padding"], tu=dictionaries, **scope)
    losses = peers.functions("verl", "verl/workers/utils/losses.py", ["value_loss"], **vars(core_algos), **vars(metric), **vars(padding))
    return SimpleNamespace(value_loss=losses.value_loss, **vars(metric))


@pytest.fixture
def verl(core_algos, worker, monkeypatch):
    """verl's functions, and modules of verl's names around them."""
    metric = {"Metric": worker.Metric, "AggregationType": worker.AggregationType}
    registry = {"gae": core_algos.compute_gae_advantage_return, "grpo": max}
    contents = {
        **{name: {} for name in ("verl", "verl.trainer", "verl.trainer.ppo", "verl.workers", "verl.workers.utils", "verl.utils")},
        "verl.trainer.ppo.core_algos": {**vars(core_algos), "ADV_ESTIMATOR_REGISTRY": registry},
        "verl.workers.utils.losses": {"value_loss": worker.value_loss, "compute_value_loss": core_algos.compute_value_loss},
        "verl.utils.metric": metric,
    }
    for name, content in contents.items():
        module = types.ModuleType(name)
        vars(module).update(content, __path__=[])
        monkeypatch.setitem(sys.modules, name, module)
    yield SimpleNamespace(**vars(core_algos), **vars(worker))
    fused_verl.uninstall()


def make(layout="jagged", rows=6, longest=40, value_dtype=torch.float32, dtype=torch.float32, seed=0, scale=1.0):
    """A micro-batch, and the predictions' tokens, a leaf. Of the responses the first is masked throughout, the second nowhere.

    layout: "jagged" (all of it), "padded" (prompts left, responses right), or "mixed" (jagged prompts and responses, padded old values).
    """
    g = GENERATOR.manual_seed(seed)
    prompts, lengths = torch.randint(1, 9, (rows,), generator=g).tolist(), torch.randint(1, longest + 1, (rows,), generator=g).tolist()
    lengths[-1] = longest
    per_response = {name: [torch.randn(n, generator=g, dtype=torch.float64) for n in lengths] for name in ("values", "returns")}
    masks = [torch.rand(n, generator=g) < 0.7 for n in lengths]
    masks[0][:], masks[1][:] = False, True
    tokens = torch.randn(sum(prompts) + sum(lengths), generator=g, dtype=torch.float64)
    ends = torch.tensor([p + n for p, n in zip(prompts, lengths)]).cumsum(0).tolist()
    for old, n, end in zip(per_response["values"], lengths, ends):  # near the predictions, so that some are clipped and some are not
        old.copy_(scale * tokens[end - n - 1 : end - 1] + 0.5 * old)
    fields = {name: [(x if name == "values" else scale * x).to(dtype) for x in parts] for name, parts in per_response.items()}
    fields["response_mask"] = masks
    data = Batch(dp_size=1, batch_num_tokens=None, global_batch_size=None)
    data.update({name: jagged(parts) if layout == "jagged" else jagged(parts).to_padded_tensor(0.0) for name, parts in fields.items()})
    ids = {name: [torch.ones(n, dtype=torch.int64) for n in parts] for name, parts in (("prompts", prompts), ("responses", lengths))}
    if layout == "padded":
        widest = max(prompts)
        left = torch.stack([torch.arange(widest) >= widest - n for n in prompts])
        right = torch.stack([torch.arange(longest) < n for n in lengths])
        data.update(prompts=left.long(), responses=right.long(), attention_mask=torch.cat([left, right], dim=1).long())
    else:
        data.update({name: jagged(parts) for name, parts in ids.items()})
    offsets = torch.tensor([0, *ends])
    return data, (scale * tokens).to(value_dtype).requires_grad_(), offsets


def run(value_loss, data, tokens, offsets, mode="token-mean", clip=CLIP, scale_factor=None):
    """Loss, gradient of the tokens, metrics."""
    config = SimpleNamespace(cliprange_value=clip, loss_agg_mode=mode, loss_scale_factor=scale_factor)
    predictions = torch.nested.nested_tensor_from_jagged(tokens, offsets)
    loss, metrics = value_loss(config=config, model_output={"values": predictions}, data=data, dp_group=None)
    (gradient,) = torch.autograd.grad(loss, tokens)
    return loss.detach(), gradient, metrics


def check(parity, verl, arguments, keywords, rtol, atol, gradient_rtol=None, suffix=""):
    ours, theirs = run(fused_verl.value_loss, *arguments, **keywords), run(verl.value_loss, *arguments, **keywords)
    parity.same("verl", "value_loss", "loss" + suffix, ours[0], theirs[0], rtol=rtol, atol=atol)
    parity.same("verl", "value_loss", "gradient" + suffix, ours[1], theirs[1], rtol=gradient_rtol or rtol, atol=atol)
    assert ours[1].dtype == theirs[1].dtype and ours[1].any()
    assert list(ours[2]) == list(theirs[2])
    for name, theirs_metric in theirs[2].items():
        ours_metric = ours[2][name]
        assert type(ours_metric) is type(theirs_metric) and getattr(ours_metric, "aggregation", 0) == getattr(
            theirs_metric, "aggregation", 0
        )
        if isinstance(theirs_metric, verl.Metric):
            ours_metric, theirs_metric = ours_metric.aggregate(), theirs_metric.aggregate()
        if not suffix or name != "critic/vpred_mean":
            parity.same("verl", "value_loss", name, ours_metric, theirs_metric, rtol=1e-6, atol=1e-7)


COUNTS = {
    "local": {},
    "global": dict(batch_num_tokens=301, global_batch_size=11),
    "tensors": dict(batch_num_tokens=torch.tensor(301), global_batch_size=torch.tensor(11)),
    "data parallel": dict(batch_num_tokens=301, global_batch_size=11, dp_size=4),
}


@pytest.mark.parametrize("scale_factor", [None, 17])
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", ["jagged", "padded", "mixed"])
def test_workers_loss(parity, verl, layout, mode, counts, scale_factor):
    data, *predictions = make(layout)
    data.update(COUNTS[counts])
    check(parity, verl, (data, *predictions), dict(mode=mode, scale_factor=scale_factor), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("rows, longest", [(1, 1), (2, 3), (3, 257), (40, 12)])
@pytest.mark.parametrize("layout", ["jagged", "padded"])
def test_workers_loss_shapes(parity, verl, layout, rows, longest):
    data, *predictions = make(layout, max(rows, 2), longest, seed=rows)
    check(parity, verl, (data, *predictions), dict(clip=2.0), rtol=1e-6, atol=1e-7)  # so wide that the single token is not clipped


@pytest.mark.parametrize("layout", ["jagged", "padded"])
@pytest.mark.parametrize(
    "value_dtype, dtype, rtol, gradient_rtol, atol, suffix",
    [
        (torch.float64, torch.float64, 1e-12, 1e-12, 1e-15, ", float64"),
        # verl adds the two branches' gradients in bf16; ours is rounded once.
        (torch.bfloat16, torch.float32, 1e-6, 2e-2, 1e-7, ", bf16 critic"),
    ],
    ids=["float64", "bf16 critic"],
)
def test_workers_loss_dtypes(parity, verl, layout, value_dtype, dtype, rtol, gradient_rtol, atol, suffix):
    check(parity, verl, make(layout, value_dtype=value_dtype, dtype=dtype), {}, rtol, atol, gradient_rtol, suffix)


def test_workers_loss_of_packed_predictions(verl):
    """Predictions may come as the tokens themselves; old values of jagged tensors with other offsets tensors of the same contents."""
    data, tokens, _ = make()
    config = SimpleNamespace(cliprange_value=CLIP, loss_agg_mode="token-mean", loss_scale_factor=None)
    ours, theirs = (f(config, {"values": tokens}, data)[0] for f in (fused_verl.value_loss, verl.value_loss))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_difference_padding(parity, verl):
    """Padded old values and returns that hold NaN behind the responses."""
    data, *predictions = make("padded")
    clean = run(fused_verl.value_loss, data, *predictions)
    behind = ~data["response_mask"]
    for name in ("values", "returns"):
        data[name] = torch.where(behind, float("nan"), data[name])
    assert run(verl.value_loss, data, *predictions)[1].isnan().any()
    ours = run(fused_verl.value_loss, data, *predictions)
    torch.testing.assert_close(ours[:2], clean[:2], rtol=0, atol=0)
    parity.differs("verl", "value_loss", "NaN at masked tokens", theirs="gradient NaN there", ours="never used; gradient 0")


@pytest.mark.parametrize("layout", ["jagged", "padded"])
def test_difference_nothing_valid(parity, verl, layout):
    data, *predictions = make(layout)
    mask = data["response_mask"]
    data["response_mask"] = jagged([torch.zeros_like(row) for row in mask.unbind()]) if layout == "jagged" else mask & False
    assert run(verl.value_loss, data, *predictions)[0].isnan()
    loss, gradient, metrics = run(fused_verl.value_loss, data, *predictions)
    assert loss == 0 and not gradient.any() and metrics["critic/vf_clipfrac"] == metrics["critic/vpred_mean"] == 0
    parity.differs("verl", "value_loss", "nothing valid", theirs="loss NaN", ours="loss 0, gradient 0")


def test_difference_half_precision_metrics(parity, verl):
    data, *predictions = make(value_dtype=torch.bfloat16)
    exact = run(verl.value_loss, make(value_dtype=torch.float64)[0], predictions[0].detach().double().requires_grad_(), predictions[1])
    (ours, theirs), exact = [
        [run(f, data, *predictions)[2]["critic/vpred_mean"] for f in (fused_verl.value_loss, verl.value_loss)],
        exact[2]["critic/vpred_mean"],
    ]
    assert ours == pytest.approx(exact, rel=1e-6) and theirs != pytest.approx(exact, rel=1e-4)
    parity.differs("verl", "value_loss", "critic/vpred_mean of a bf16 critic", theirs="summed in bf16", ours="summed in float64")


@pytest.mark.parametrize("fault", ["lengths", "predictions", "prompt", "mode", "width"])
def test_workers_loss_rejects(verl, fault):
    """What does not belong together is refused by both, here before anything is computed."""
    data, tokens, offsets = make("padded" if fault == "width" else "jagged")
    keywords = dict(mode="mean" if fault == "mode" else "token-mean")
    if fault == "lengths":
        rows = [torch.ones_like(row) for row in data["values"].unbind()]
        rows[0], rows[-1] = rows[-1], rows[0]
        data["values"] = jagged(rows)
    elif fault == "predictions":
        tokens, offsets = torch.cat([tokens.detach(), torch.ones(1)]).requires_grad_(), torch.cat([offsets[:-1], offsets[-1:] + 1])
    elif fault == "prompt":
        prompts = [torch.ones(row.shape[0] * (i > 0), dtype=torch.int64) for i, row in enumerate(data["prompts"].unbind())]
        first = data["prompts"].offsets()[1].item()
        data["prompts"], tokens, offsets = jagged(prompts), tokens[first:].detach().requires_grad_(), offsets - first
        offsets[0] = 0
    elif fault == "width":
        data.update({name: data[name][:, :-1] for name in ("values", "returns", "response_mask")})
    with pytest.raises(ValueError, match="loss_agg_mode" if fault == "mode" else "lengths"):
        run(fused_verl.value_loss, data, tokens, offsets, **keywords)
    if fault != "lengths":  # verl pads each by itself, and pairs what does not belong together
        with pytest.raises((AssertionError, RuntimeError, ValueError)):
            run(verl.value_loss, data, tokens, offsets, **keywords)


# --- the functions on padded tensors ------------------------------------------------------------------------------------------------


def padded(dtype=torch.float32, value_dtype=None, shape=(6, 40)):
    g = GENERATOR.manual_seed(1)
    values, returns, noise = (torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(3))
    mask = torch.rand(shape, generator=g) < 0.7
    mask[0], mask[1] = False, True
    old_values = (values + 0.5 * noise).to(dtype)
    return values.to(value_dtype or dtype).requires_grad_(), returns.to(dtype), old_values, mask


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "dtype, value_dtype, rtol, gradient_rtol, atol, suffix",
    [
        (torch.float32, None, 1e-6, 1e-6, 1e-7, ""),
        (torch.float64, None, 1e-12, 1e-12, 1e-15, ", float64"),
        (torch.float32, torch.bfloat16, 1e-6, 2e-2, 1e-7, ", bf16 critic"),
    ],
    ids=["float32", "float64", "bf16 critic"],
)
def test_value_loss(parity, core_algos, mode, dtype, value_dtype, rtol, gradient_rtol, atol, suffix):
    arguments = (*padded(dtype, value_dtype), CLIP, mode)
    (loss, clip_fraction), (loss_theirs, clip_fraction_theirs) = (
        f(*arguments) for f in (fused_verl.compute_value_loss, core_algos.compute_value_loss)
    )
    gradients = [torch.autograd.grad(x, arguments[0])[0] for x in (loss, loss_theirs)]
    parity.same("verl", "compute_value_loss", "loss" + suffix, loss, loss_theirs, rtol=rtol, atol=atol)
    parity.same("verl", "compute_value_loss", "gradient" + suffix, *gradients, rtol=gradient_rtol, atol=atol)
    parity.same("verl", "compute_value_loss", "clip fraction", clip_fraction, clip_fraction_theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize("gamma, lam", [(GAMMA, LAM), (1.0, 0.95), (1.0, 1.0)])
@pytest.mark.parametrize(
    "dtype, tolerances, suffix",
    [
        (torch.float32, (1e-5, 1e-5), ""),
        # verl adds 1e-8 to the number of tokens that it whitens over: of some 160, a share of 6e-11.
        (torch.float64, (1e-9, 1e-12), ", float64"),
    ],
    ids=["float32", "float64"],
)
def test_gae(parity, core_algos, dtype, tolerances, suffix, gamma, lam):
    values, rewards, _, mask = padded(dtype)
    values, mask = values.detach(), mask.to(dtype)
    ours, theirs = (
        f(rewards, values, mask, gamma, lam) for f in (fused_verl.compute_gae_advantage_return, core_algos.compute_gae_advantage_return)
    )
    for name, x, y, tolerance in zip(("advantages, whitened", "returns"), ours, theirs, tolerances):
        parity.same("verl", "compute_gae_advantage_return", name + suffix, x, y, rtol=tolerance, atol=tolerance, where=mask)


def test_differences_of_the_functions(parity, core_algos):
    """In short; each at length in tests/test_verl.py."""
    values, returns, old, mask = padded()
    loss, _ = core_algos.compute_value_loss(values, returns, torch.where(mask, old, float("nan")), mask, CLIP)
    assert torch.autograd.grad(loss, values)[0].isnan().any()
    loss, _ = fused_verl.compute_value_loss(values, returns, torch.where(mask, old, float("nan")), mask, CLIP)
    assert torch.autograd.grad(loss, values)[0].isfinite().all()
    parity.differs("verl", "compute_value_loss", "NaN at masked tokens", theirs="gradient NaN there", ours="never used; gradient 0")

    assert core_algos.compute_value_loss(values, returns, old, mask & False, CLIP)[0].isnan()
    assert fused_verl.compute_value_loss(values, returns, old, mask & False, CLIP)[0] == 0
    parity.differs("verl", "compute_value_loss", "nothing valid", theirs="loss NaN", ours="loss 0, gradient 0")

    rewards, values, weights = returns, torch.where(mask, old, float("nan")), mask.float()
    assert core_algos.compute_gae_advantage_return(rewards, values, weights, GAMMA, LAM)[0].isnan().all()
    assert fused_verl.compute_gae_advantage_return(rewards, values, weights, GAMMA, LAM)[0].isfinite().all()
    parity.differs("verl", "compute_gae_advantage_return", "NaN at masked tokens", theirs="all NaN", ours="never used")

    assert (core_algos.compute_gae_advantage_return(rewards, old, weights, GAMMA, LAM)[0][~mask] != 0).all()
    assert not fused_verl.compute_gae_advantage_return(rewards, old, weights, GAMMA, LAM)[0][~mask].any()
    parity.differs("verl", "compute_gae_advantage_return", "masked tokens", theirs="carried values, whitened", ours="0")

    with pytest.raises(ValueError):
        core_algos.compute_gae_advantage_return(rewards, old, weights * 0, GAMMA, LAM)
    assert not fused_verl.compute_gae_advantage_return(rewards, old, weights * 0, GAMMA, LAM)[0].any()
    parity.differs("verl", "compute_gae_advantage_return", "fewer than two valid tokens", theirs="ValueError", ours="advantages 0")


# --- install() and the page ---------------------------------------------------------------------------------------------------------


def test_install(verl):
    losses, core = sys.modules["verl.workers.utils.losses"], sys.modules["verl.trainer.ppo.core_algos"]
    with fused_verl.install():
        assert losses.value_loss is fused_verl.value_loss
        assert core.ADV_ESTIMATOR_REGISTRY["gae"] is core.compute_gae_advantage_return is fused_verl.compute_gae_advantage_return
    assert losses.value_loss is verl.value_loss


def test_page(verl, capsys):
    data = {}
    for block in peers.snippets("verl"):
        exec(block, data)
    assert data["value_loss"] is fused_verl.value_loss
    printed = capsys.readouterr().out.split()
    fused_verl.uninstall()
    theirs, metrics = verl.value_loss(data["config"], {"values": data["predictions"]}, Batch(data["batch"]))
    assert [float(x) for x in printed] == pytest.approx([theirs.item(), metrics["critic/vpred_mean"]], rel=1e-6)
