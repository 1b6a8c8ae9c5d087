"""The planted faults fit the sources: each is an edit of one place that exists. Whether the tests notice them, tests/plant_faults.py tells."""

import plant_faults
import pytest


@pytest.mark.parametrize("fault", plant_faults.FAULTS, ids=lambda fault: fault.name)
def test_the_place_exists_once(fault):
    assert (plant_faults.ROOT / "csrc" / fault.file).read_text().count(fault.old) == 1
    assert fault.new != fault.old
