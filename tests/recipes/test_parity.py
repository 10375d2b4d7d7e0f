"""What a model is compared with its peer by."""

import jax
import numpy as np
import pytest

from recipes import parity
from tests import tiny
from tests.tolerances import assert_close


@pytest.mark.parametrize("stacked", [False, True])
def test_the_trace_is_the_model_s_own(stacked):
    """A pattern with a tail, in either form in memory."""
    config = tiny.config("gemma3-1b")
    model = tiny.model(config, stacked)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (2, 9), np.int32)
    streams, logits = model.trace(ids)
    output = model({"tokens": ids})
    assert len(streams) == config.num_layers + 1
    assert_close(streams[-1], output.hidden)
    assert_close(logits, output.logits)
    inner = jax.numpy.stack(streams)
    assert len(np.unique(np.asarray(inner[:, 0, 0, 0]))) == len(streams)


def test_without_the_peer(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(parity.importlib.util, "find_spec", lambda name: None)
    parity.compare(None, tmp_path, 8)
    assert "not both installed" in capsys.readouterr().out
