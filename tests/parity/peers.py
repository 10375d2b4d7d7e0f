"""What every comparison with a PyTorch model shares: tokens, logits, files to the bit."""

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

torch = pytest.importorskip("torch")

TOLERANCE = 1e-4
VOCAB = 67
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (2, 40))


def their_logits(model, **options):
    with torch.no_grad():
        return model(torch.tensor(TOKENS), **options).logits.float().numpy()


def our_logits(model):
    return jax.jit(lambda tokens: model({"tokens": tokens}).logits)(TOKENS.astype(np.int32))


def same_tensors(one, other) -> None:
    a, b = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype and a[key].tobytes() == b[key].tobytes(), key
