"""ParaTransCNN against the same network from torch.nn, with random weights, both ways.

Run with the extra `parity`: ``python -m pytest tests/parity``.
"""

import functools
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import zoo
from tests.parity.peers import TOLERANCE
from tests.tolerances import assert_close
from zoo import protocol

torch = pytest.importorskip("torch")
from recipes.benchmarks import torch_paratranscnn as peer  # noqa: E402 - needs torch

CLASSES = 5
SETTINGS = {"model_type": "paratranscnn", "num_labels": CLASSES, "num_channels": 3, "dropout": 0.1}
CNN = {"resnet_depth": 18, "resnet_width": 8}
TRANSFORMER = {"hidden_size": 32, "depth": 2, "num_attention_heads": 8, "mlp_ratio": 2}
BRANCHES = {"both": {**CNN, **TRANSFORMER}, "cnn": CNN, "transformer": TRANSFORMER}
SIZES = [(64, 64), (96, 80)]


def draw(height, width):
    """(images [2, H, W, 3], labels [2, H, W])."""
    rng = np.random.default_rng(height)
    return (rng.random((2, height, width, 3), np.float32),
            rng.integers(0, CLASSES, (2, height, width)))


def theirs(branch, **settings):
    """Random everywhere, running statistics too."""
    torch.manual_seed(0)
    model = peer.ParaTransCnn({**SETTINGS, **BRANCHES[branch], **settings})
    with torch.no_grad():
        for key, x in model.state_dict().items():
            if key.endswith(("running_mean", "running_var")) or x.ndim == 1:
                about = 0.0 if key.endswith(("bias", "running_mean")) else 1.0
                x.copy_(about + 0.4 * (torch.rand(x.shape) - 0.5))
    return model.eval()


def tensors(model):
    return {key: x.numpy() for key, x in model.state_dict().items()}


@functools.cache
def both_sides(branch, folder):
    """(theirs, ours from its file), of which both branches together are of bare tensors."""
    model = theirs(branch)
    folder = folder / branch
    folder.mkdir()
    save_file(tensors(model), folder / "model.safetensors")
    if branch != "both":
        (folder / "config.json").write_text(json.dumps({**SETTINGS, **BRANCHES[branch]}))
    return model, zoo.from_hf(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("theirs")


def evaluate(model, images):
    with torch.no_grad():
        logits = model(torch.tensor(images).movedim(-1, 1))
    return logits.movedim(1, -1).numpy()


@pytest.mark.parametrize("branch", BRANCHES)
def test_logits_both_ways(branch, folder, tmp_path):
    """After import, at two sizes; our export loads there and holds the same numbers."""
    model, here = both_sides(branch, folder)
    run = jax.jit(lambda images: here({"images": images}).logits)
    for size in SIZES if branch == "both" else SIZES[1:]:
        images, _ = draw(*size)
        expected = evaluate(model, images)
        assert np.ptp(expected) > 0.1
        assert_close(run(images), expected, tol=TOLERANCE)
    zoo.to_hf(here, tmp_path / "back")
    back = peer.ParaTransCnn(json.loads((tmp_path / "back" / "config.json").read_text())).eval()
    found = load_file(tmp_path / "back" / "model.safetensors")
    missing, unexpected = back.load_state_dict(
        {key: torch.tensor(x) for key, x in found.items()}, strict=False)
    assert not unexpected and all(key.endswith("num_batches_tracked") for key in missing)
    # The same numbers and so the same in training, too.
    assert all(np.array_equal(x, tensors(model)[key]) for key, x in found.items())
    assert np.array_equal(evaluate(back, images), expected)


@pytest.mark.parametrize("size", SIZES, ids=["64x64", "96x80"])
def test_a_training_step(size, folder, tmp_path):
    """Logits, loss, gradients and the running statistics that follow, without dropout."""
    _, here = both_sides("both", folder)
    config = zoo.override(here.config, {"transformer.dropout": 0.0})
    definition, _ = protocol.split(zoo.build(config, abstract=True))
    learned, statistics = protocol.divide(protocol.split(here)[1])
    images, labels = draw(*size)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def step(learned):
        model = protocol.merge(definition, protocol.join(learned, statistics))
        output = model({"images": images}, train=True)
        total, weight, _ = model.loss(output, labels)
        return total / weight, output

    (total, output), gradients = step(learned)
    model = theirs("both", dropout=0.0).train()
    logits = model(torch.tensor(images).movedim(-1, 1))
    expected = peer.loss(logits, torch.tensor(labels))
    expected.backward()
    assert_close(output.logits, logits.detach().movedim(1, -1).numpy(), tol=TOLERANCE)
    assert_close(total, expected.item(), tol=1e-5)
    # Their gradients and statistics in the form of ours, by the conversion that is tested above.
    after = tensors(model) | {key: p.grad.numpy() for key, p in model.named_parameters()}
    save_file(after, tmp_path / "model.safetensors")
    expected, moved = protocol.divide(protocol.split(zoo.from_hf(tmp_path))[1])
    assert_close(output.statistics, moved, tol=TOLERANCE)
    found = protocol.flat(gradients)
    expected = protocol.flat(expected)
    largest = max(map(np.linalg.norm, expected.values()))
    # As vectors: float32 turns some ReLUs over, on either side.
    apart = {path: float(np.linalg.norm(found[path] - x) / max(np.linalg.norm(x), 1e-4 * largest))
             for path, x in expected.items()}
    assert max(apart.values()) < 0.03, apart
