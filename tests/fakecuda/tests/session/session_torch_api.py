"""The Python API of torch.cuda works or raises, and never crashes. Run with two devices by test_sessions.py."""

import io

import pytest
import torch


def test_queries():
    c = torch.cuda
    assert "fakecuda" in c.get_device_name() and c.get_device_capability() in ((9, 0), (8, 0), (7, 5))
    (
        c.mem_get_info(),
        c.memory_stats(),
        c.empty_cache(),
        c.reset_peak_memory_stats(),
        c.memory_summary(),
        c.default_stream().query(),
        c.ipc_collect(),
    )
    assert c.get_device_properties(0).multi_processor_count in (132, 108, 40)


def test_graph_capture_raises():
    g = torch.cuda.CUDAGraph()
    with torch.cuda.stream(torch.cuda.Stream()), pytest.raises(RuntimeError, match="not supported"):
        g.capture_begin()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="--devices 2")
def test_peer_copies():
    x = torch.randn(5, 6)
    a = x.to("cuda:0")
    b = a.to("cuda:1")
    assert b.device.index == 1
    torch.testing.assert_close(b.cpu(), x)
    torch.testing.assert_close(a.t().to("cuda:1", torch.float64).cpu(), x.t().double())
    with torch.cuda.device(1):
        assert torch.zeros(3, device="cuda").device.index == 1
    with pytest.raises(RuntimeError, match="same device"):
        a + b
    with pytest.raises(RuntimeError, match="same device"):
        a + x
    a + torch.tensor(1.0)  # a CPU scalar is fine
    assert a[torch.tensor([0, 1])].is_cuda  # so is a CPU index


def test_save_load_and_deepcopy():
    import copy

    m = torch.nn.Linear(3, 2).cuda()
    f = io.BytesIO()
    torch.save(m.state_dict(), f)
    f.seek(0)
    d = torch.load(f, map_location="cuda")
    torch.testing.assert_close(d["weight"].cpu(), copy.deepcopy(m).weight.detach().cpu())


def test_autocast_and_checkpoint():
    from torch.utils.checkpoint import checkpoint

    x = torch.randn(4, 3, device="cuda", requires_grad=True)
    w = torch.randn(3, 3, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        y = checkpoint(lambda t: t @ w, x, use_reentrant=False)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad.shape == x.shape


def test_dataloader_pin_memory():
    ds = torch.utils.data.TensorDataset(torch.arange(10.0))
    for (x,) in torch.utils.data.DataLoader(ds, batch_size=5, num_workers=2, pin_memory=True):
        assert x.is_pinned() and x.cuda(non_blocking=True).sum().item() in (10.0, 35.0)


def test_compile_aot_eager():
    f = torch.compile(lambda t: t.sin() + 1, backend="aot_eager")
    x = torch.randn(4)
    torch.testing.assert_close(f(x.cuda()).cpu(), x.sin() + 1)


def test_deterministic_and_numpy():
    with pytest.raises(TypeError):
        torch.zeros(2, device="cuda").numpy()
    torch.use_deterministic_algorithms(True)
    try:
        torch.zeros(4, device="cuda").index_add_(0, torch.tensor([1]).cuda(), torch.ones(1).cuda())
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.fakecuda(expect="foreign-kernel")
def test_cuda_only_operator_is_named():
    with pytest.raises(RuntimeError, match="not supported"):
        torch.cuda._sleep(1000)
