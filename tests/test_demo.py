"""What the demo refuses before it loads anything; the demo itself is `make demo`."""

import pytest

from dive_fast import demo
from dive_fast.errors import InputError


@pytest.mark.parametrize("name", ["steps", "eval_reports"])
@pytest.mark.parametrize("value", [0, -3])
def test_a_budget_below_one_is_refused_and_nothing_is_written(name, value, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "_load", lambda budget: pytest.fail("the demo went on"))
    with pytest.raises(InputError, match=f"{name}: expected a whole number >= 1, got {value}"):
        demo.main(tmp_path / "out", **{name: value})
    assert not (tmp_path / "out").exists()
