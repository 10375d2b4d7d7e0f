"""xLSTM against transformers, and against its authors' package, with random weights, both ways.

Run with the extra `parity`: ``python -m pytest tests/parity``.
"""

import functools
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import zoo
from tests.parity.peers import TOKENS, TOLERANCE, VOCAB, our_logits, same_tensors, their_logits
from tests.tolerances import assert_close

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# Transformers rounds the widths of its cache up to multiples of 64, not those of its weights.
SHAPE = {"vocab_size": VOCAB, "num_heads": 2, "norm_eps": 1e-5, "ffn_proj_factor": 1.3,
         "gate_soft_cap": 9.0, "output_logit_soft_cap": 11.0, "chunk_size": 16,
         "autocast_kernel_dtype": "float32", "inference_state_dtype": "float32"}  # fmt: skip


def randomize(model):
    """Gates are mostly open, as in a trained model."""
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            about = 1.0 if "norm" in key else 3.0 if "fgate_preact.bias" in key else 0.0
            values = about + 0.1 * rng.normal(size=parameter.shape)
            parameter.copy_(torch.tensor(values, dtype=torch.float32))
    return model.eval()


@functools.cache
def peer():
    config = transformers.xLSTMConfig(
        hidden_size=128, num_hidden_layers=3, pad_token_id=None, bos_token_id=None,
        eos_token_id=None, **SHAPE)
    return randomize(transformers.xLSTMForCausalLM(config))


def test_transformers_both_ways(tmp_path):
    """Logits and greedy tokens equal; our export loads there; the round trip is bitwise."""
    model = peer()
    model.save_pretrained(tmp_path / "theirs")
    here = zoo.from_hf(tmp_path / "theirs")
    expected = their_logits(model)
    assert_close(our_logits(here), expected, tol=TOLERANCE)
    with torch.no_grad():
        continued = model.generate(torch.tensor(TOKENS[:, :20]), do_sample=False,
                                   max_new_tokens=32, pad_token_id=0)
    assert zoo.generate(here, TOKENS[:, :20], 32).tokens == continued[:, 20:].tolist()

    zoo.save(here, tmp_path / "native", like=tmp_path / "theirs")
    zoo.to_hf(zoo.load(tmp_path / "native", stacked=True), tmp_path / "back",
              like=tmp_path / "native")
    same_tensors(tmp_path / "theirs", tmp_path / "back")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    assert type(back) is type(model)
    assert np.array_equal(their_logits(back), expected)


def test_states_after_every_token(tmp_path):
    """C, n and m of each layer as transformers' cache has them, token by token."""
    import jax.numpy as jnp

    from zoo.decode import tree as trees

    model = peer()
    model.save_pretrained(tmp_path / "theirs")
    here = zoo.from_hf(tmp_path / "theirs", stacked=True)
    definition, params = zoo.protocol.split(here)

    @jax.jit
    def advance(params, token, state):
        model = zoo.protocol.merge(definition, params)
        step = model.step(token, trees.single(2), state)
        path, count = jnp.zeros((2, 1), jnp.int32), jnp.ones(2, jnp.int32)
        return step.logits, model.commit(state, step.scratch, path, count)

    state, cache = here.init_state(2, 64), None
    for t in range(12):
        with torch.no_grad():
            out = model(torch.tensor(TOKENS[:, t:t + 1]), cache_params=cache, use_cache=True)
        cache = out.cache_params
        logits, state = advance(params, TOKENS[:, t:t + 1].astype(np.int32), state)
        assert_close(logits, out.logits.numpy(), tol=TOLERANCE)
        ours = state.stack["blocks"][0]
        for layer, (cell, normalizer, stabilizer) in cache.rnn_state.items():
            assert_close(ours.cell[layer], cell.numpy(), tol=TOLERANCE)
            assert_close(ours.normalizer[layer], normalizer.numpy(), tol=TOLERANCE)
            assert_close(ours.stabilizer[layer], stabilizer.numpy()[..., 0], tol=TOLERANCE)


@pytest.mark.parametrize("weight_mode", ["single", "fused"])
def test_the_authors_package(weight_mode, tmp_path):
    """Of 2.0.6: a directory under its own names, its projections apart and as one."""
    large = pytest.importorskip("xlstm.xlstm_large.model")
    shape = {**SHAPE, "weight_mode": weight_mode}
    model = randomize(large.xLSTMLarge(large.xLSTMLargeConfig(
        embedding_dim=64, num_blocks=2, mode="inference", return_last_states=True,
        chunkwise_kernel="chunkwise--native_autograd", step_kernel="native",
        sequence_kernel="native_sequence__native", **shape)))
    tensors = {key: x.numpy() for key, x in model.state_dict().items()}
    assert "embedding.weight" in tensors and len(tensors) == (15 if weight_mode == "single"
                                                              else 9) * 2 + 3
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(
        {"model_type": "xlstm", "embedding_dim": 64, "num_blocks": 2, **shape}))
    with torch.no_grad():
        expected, _ = model(torch.tensor(TOKENS))
    assert_close(our_logits(zoo.from_hf(tmp_path)), expected.numpy(), tol=TOLERANCE)
