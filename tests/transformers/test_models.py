"""Every architecture on the list: logits, loss and every parameter's gradient against eager attention."""

import pytest
from tiny_models import TINY

import hf_flash
from hf_flash.report import calls_of


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("padding", ["none", "right", "left", "holes"])
@pytest.mark.parametrize("name", sorted(TINY))
def test_step_equals_eager(tiny, name, padding, mode):
    eager = tiny.make(name).train(mode == "train")
    ours = tiny.twin(eager)
    tiny.assert_same_step(eager, ours, tiny.batch(name, padding))
    assert hf_flash.explain(ours).share == 1.0


@pytest.mark.parametrize("name", sorted(TINY))
def test_parts_attend_at_all(tiny, name):
    """The comparison above can fail: hiding one key changes the logits by far more than its tolerance."""
    model = tiny.twin(tiny.make(name))
    inputs = tiny.batch(name, "right")
    before = tiny.step(model, inputs)[0]
    inputs["attention_mask"] = inputs["attention_mask"].clone()
    inputs["attention_mask"][:, 2] = 0
    assert (tiny.step(model, inputs)[0] - before).abs().max() > 1e-3 * before.abs().max()


@pytest.mark.parametrize("name", sorted(TINY))
def test_every_module_is_served(tiny, name):
    model = tiny.twin(tiny.make(name))
    model(**tiny.batch(name))
    report = hf_flash.explain(model)
    assert report.rows and {row.status for row in report.rows} == {"patched"}
    assert all(row.served >= 1 for row in report.rows)
    assert all(calls_of(module).served == 0 for module in tiny.twin(tiny.make(name)).modules())
