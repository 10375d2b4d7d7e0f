"""The first xLSTM against its authors' package, with random weights, both ways.

Run with the extra `parity`: ``python -m pytest tests/parity``.
"""

import dataclasses
import json
import typing

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import zoo
from tests import tiny
from tests.parity.peers import TOLERANCE, VOCAB, our_logits, same_tensors
from tests.tolerances import assert_close

torch = pytest.importorskip("torch")
xlstm = pytest.importorskip("xlstm")

TOKENS = np.random.default_rng(0).integers(0, VOCAB, (2, 40))


def revive(cls, values):
    """A dataclass of nested dicts, which refuses keys that it does not know."""
    fields = {}
    hints = typing.get_type_hints(cls)
    for key, value in values.items():
        inner = [t for t in (typing.get_args(hints[key]) or (hints[key],))
                 if dataclasses.is_dataclass(t)]
        fields[key] = revive(inner[0], value) if inner and value is not None else value
    return cls(**fields)


def read_config(folder):
    values = json.loads((folder / "config.json").read_text())
    return revive(xlstm.xLSTMLMModelConfig, values)


def randomize(model):
    """Gates mostly open, and every other parameter away from what it starts at."""
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for key, x in model.named_parameters():
            about = 3.0 if key.endswith("mlstm_cell.fgate.bias") else 0.0
            spread = 1.0 if "embedding" in key else 0.3 if x.ndim == 1 else 0.1
            x.copy_(torch.tensor(about + spread * rng.normal(size=x.shape), dtype=torch.float32))
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).numpy()


def theirs(**changes):
    """Of odd sizes: three heads of an inner width of 84, in blocks of 7, four taps or three."""
    mlp = {"proj_factor": 1.4, "act_fn": "relu^2", "round_proj_up_to_multiple_of": 5}
    return revive(xlstm.xLSTMLMModelConfig, {
        "vocab_size": VOCAB, "embedding_dim": 40, "num_blocks": 5, "context_length": 48,
        "slstm_at": [1, 4],
        "mlstm_block": {"mlstm": {"num_heads": 3, "qkv_proj_blocksize": 7, "conv1d_kernel_size": 3,
                                  "round_proj_up_to_multiple_of": 84}},
        "slstm_block": {"slstm": {"backend": "vanilla", "num_heads": 5}, "feedforward": mlp},
        **changes})


@pytest.mark.parametrize("changes", [
    {}, {"num_blocks": 9, "slstm_at": [7], "tie_weights": True},
    {"slstm_at": [], "num_blocks": 2}, {"mlstm_block": None, "num_blocks": 2}],
    ids=["arbitrary", "7:1", "mlstm", "slstm"])
def test_both_ways(changes, tmp_path):
    """Logits equal; what we write loads there, to the bit."""
    config = theirs(**changes)
    model = randomize(xlstm.xLSTMLMModel(config))
    tensors = {key: x.numpy() for key, x in model.state_dict().items()}
    (tmp_path / "theirs").mkdir()
    save_file(tensors, tmp_path / "theirs" / "model.safetensors")
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    expected = logits(model)
    here = zoo.from_hf(tmp_path / "theirs")
    ours = zoo.protocol.split(here)
    assert_close(np.asarray(our_logits(here)), expected, tol=TOLERANCE)
    zoo.to_hf(zoo.protocol.merge(*ours), tmp_path / "back", like=tmp_path / "theirs")
    back = xlstm.xLSTMLMModel(read_config(tmp_path / "back")).eval()
    written = load_file(tmp_path / "back" / "model.safetensors")
    if config.tie_weights:
        written["lm_head.weight"] = written["token_embedding.weight"]
    else:
        same_tensors(tmp_path / "theirs", tmp_path / "back")
    back.load_state_dict({key: torch.tensor(x) for key, x in written.items()})
    assert np.array_equal(logits(back), expected)


def test_one_of_ours_there(tmp_path):
    """A model that was never theirs, without what `like` would bring along."""
    model = tiny.model(tiny.config("xlstm-mixed-tiny", vocab_size=VOCAB, blocks="msm", num_layers=5,
                                   **{"mlstm.norm_eps": 1e-5, "slstm.norm_eps": 1e-5}))
    zoo.to_hf(model, tmp_path / "model")
    there = xlstm.xLSTMLMModel(read_config(tmp_path / "model")).eval()
    there.load_state_dict({key: torch.tensor(x) for key, x in load_file(
        tmp_path / "model" / "model.safetensors").items()})
    assert_close(np.asarray(our_logits(model)), logits(there), tol=TOLERANCE)


def test_the_layout_of_their_cuda_kernels(tmp_path):
    """What their own code makes of one layout for the other, read and written."""
    from xlstm.blocks.slstm.cell import sLSTMCell_cuda

    model = randomize(xlstm.xLSTMLMModel(theirs(num_blocks=2, slstm_at=[1])))
    tensors = dict(model.state_dict())
    cell = model.xlstm_block_stack.blocks[1].xlstm.slstm_cell
    other = sLSTMCell_cuda(dataclasses.replace(cell.config, backend="cuda"),
                           skip_backend_init=True)
    prefix = "xlstm_block_stack.blocks.1.xlstm.slstm_cell."
    tensors[prefix + "_recurrent_kernel_"] = other._recurrent_kernel_ext2int(
        cell._recurrent_kernel_int2ext(cell._recurrent_kernel))
    tensors[prefix + "_bias_"] = other._bias_ext2int(cell._bias_int2ext(cell._bias))
    folder = tmp_path / "theirs"
    folder.mkdir()
    save_file({key: x.detach().contiguous().numpy() for key, x in tensors.items()},
              folder / "model.safetensors")
    values = dataclasses.asdict(model.config)
    values["slstm_block"]["slstm"]["backend"] = "cuda"
    (folder / "config.json").write_text(json.dumps(values))
    here = zoo.from_hf(folder)
    assert_close(np.asarray(our_logits(here)), logits(model), tol=TOLERANCE)
    zoo.to_hf(here, tmp_path / "back", kind="xlstm_lm_cuda")
    same_tensors(folder, tmp_path / "back")
    assert read_config(tmp_path / "back").slstm_block.slstm.backend == "cuda"
