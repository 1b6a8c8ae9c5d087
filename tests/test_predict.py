"""docs/performance.md: its generated tables are those that the generator makes, and no prediction is faster than physics allows."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the benchmarks are not installed
predict = importlib.import_module("benchmarks.predict")


@pytest.fixture(scope="module")
def calls():
    counts = predict.load_counts()
    return counts["table"] + counts["sweep"]


def test_committed_tables_are_up_to_date():
    text = predict.DOCUMENT.read_text()
    assert predict.renewed(text, predict.committed_measured()) == text, "repeat: python -m benchmarks.predict"


def test_a_table_without_its_place_is_an_error():
    with pytest.raises(SystemExit, match="begin: predicted cards"):
        predict.renewed("", measured={})


@pytest.fixture
def simulator():
    if os.environ.get("FAKECUDA") != "1":
        pytest.skip("costs are counted on the simulated device (make test-cuda)")


@pytest.mark.parametrize("operator", predict.TITLES)
@pytest.mark.parametrize("shape, layout", [((64, 512), "rows"), ((64, 4096), "rows"), ((128, 4096), "columns"), ((256000,), "packed")])
def test_counts_are_up_to_date(operator, shape, layout, simulator):
    (committed,) = [
        call for call in predict.load_counts()["table"] if (call.operator, call.shape, call.layout) == (operator, shape, layout)
    ]
    for old, new in zip(committed.launches, predict.call_of(predict.counted(operator, shape, layout)).launches, strict=True):
        assert (old.kernel, old.blocks, old.threads) == (new.kernel, new.blocks, new.threads)
        assert (old.bytes_read, old.bytes_written) == (new.bytes_read, new.bytes_written)
        # What compilers of different releases make of one source differs a little.
        assert new.warp_instructions == pytest.approx(old.warp_instructions, rel=0.05), "repeat the count (docs/performance.md)"


@pytest.mark.parametrize("card", predict.CARDS, ids=lambda card: card.name)
def test_never_faster_than_the_memory(card, calls):
    for call in calls:
        assert predict.predict(call, card).seconds > call.compulsory_bytes / card.bandwidth
        assert all(launch.bytes_moved > 0 for launch in call.launches)


@pytest.mark.parametrize("card", predict.CARDS, ids=lambda card: card.name)
def test_operands_in_the_cache_help_where_they_fit(card, calls):
    for call in calls:
        cold, warm = predict.predict(call, card), predict.predict(call, card, warm=True)
        assert (warm is None) == (call.compulsory_bytes > predict.L2_RESIDENT_SHARE * card.l2_bytes)
        assert warm is None or predict.LAUNCH <= warm.seconds <= cold.seconds


@pytest.mark.parametrize("operator", predict.TITLES)
def test_time_grows_with_tokens(operator):
    times = [
        predict.predict(call, predict.HEADLINE).bounds["bandwidth"] for call in predict.load_counts()["sweep"] if call.operator == operator
    ]
    assert len(times) == len(predict.SWEEP_SHAPES) and times == sorted(times)


def test_counted_bytes_are_at_least_the_compulsory_ones(calls):
    for call in calls:
        assert sum(launch.bytes_moved for launch in call.launches) >= call.compulsory_bytes


def test_measured_times_fill_their_column(tmp_path):
    def result(name, rows):
        return {"name": name, "rows": [{"contender": contender, "cache": cache, "median": median} for contender, cache, median in rows]}

    results = [
        result("gae-64x512", [("fused_critic", "warm", 4e-6), ("fused_critic", "cold", 5e-6), ("copy", "cold", 1e-6)]),
        result("gae-time-major-128x4096", [("fused_critic", "warm", 6e-6)]),
        result("loss-64x4096", [("fused_critic", "cold", 7e-6)]),
        result("call-gae", [("fused_critic", "warm", 9e-6)]),
    ]
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"results": results}))
    text = predict.renewed(predict.DOCUMENT.read_text(), predict.read_measured(path))
    rows = [line for line in text.splitlines() if line.startswith("| [")]
    assert [line.rsplit("|", 2)[1].strip() for line in rows if not line.endswith("| - |")] == ["5.0 / 4.0", "- / 6.0", "7.0 / -"]
