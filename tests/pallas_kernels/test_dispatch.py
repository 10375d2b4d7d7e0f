"""Which implementation runs: targets, preferences, names, tuned times, explanations, errors."""

import json
import logging
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
import sharding
from pallas_kernels import Target, dispatch, explain, interpret, tuned, using
from pallas_kernels.attention import attention
from tests.pallas_kernels.toy import toy

X, SCALE = jnp.ones((16, 128)), jnp.arange(128.0)


@pytest.mark.parametrize(("platform", "kind", "chip"), [
    ("cpu", "cpu", "cpu"), ("tpu", "TPU v5 lite", "v5e"), ("tpu", "TPU v5", "v5p"),
    ("tpu", "TPU v6 lite", "v6e"), ("tpu", "TPU v99", "TPU v99"), ("cuda", "NVIDIA H200", "h200"),
    ("gpu", "NVIDIA H100 80GB HBM3", "h100"), ("gpu", "NVIDIA GeForce RTX 4090", "rtx 4090"),
])
def test_target_of_a_device(platform, kind, chip):
    target = Target.of(platform, kind)
    assert target.chip == chip or chip == "rtx 4090" and target.chip not in ("h100", "h200")
    assert target.platform == {"cuda": "gpu"}.get(platform, platform)


def test_target_of_the_ambient_mesh():
    assert Target.ambient() == Target("cpu", "cpu")
    with sharding.use(sharding.mesh("data:8")):
        assert Target.ambient() == Target("cpu", "cpu")
    with interpret("v5p"):
        assert Target.ambient() == Target("tpu", "v5p")


@pytest.mark.parametrize("name", ["v5x7y", "v5", "v6", "tpu7", "xyz", ""])
def test_unknown_targets(name):
    """What looks like a TPU of an unknown kind is not taken for a GPU."""
    with pytest.raises(ValueError, match=f"target '{name}' must be cpu, a TPU .v4, v5e, v5p, v6e"):
        Target.parse(name)


def test_preference_and_refusals(caplog):
    dispatch._log_once.cache_clear()
    with caplog.at_level(logging.INFO, "parazoo.kernels"), interpret("v6e"):
        assert toy.choose(Target.ambient(), None, X, SCALE, power=2).name == "tpu"
        for _ in range(2):
            assert toy.choose(Target.ambient(), None, X, SCALE, power=3).name == "xla"
    assert [r.getMessage() for r in caplog.records] == [
        "toy on v6e: tpu (preferred)",
        "toy on v6e: xla (preferred). tpu: power is 3, and it takes 2"]


def test_names_are_strict():
    with pytest.raises(NotImplementedError, match=r"toy: 'tpu' cannot run for float32\[16, 128\], "
                                                  r"float32\[128\] on cpu.*tpu: is for tpu, not "
                                                  r"for cpu"):
        toy(X, SCALE, implementation="tpu")
    with pytest.raises(ValueError, match="no implementation 'tpv', only xla, tpu; did you mean "
                                         "'tpu'"):
        toy(X, SCALE, implementation="tpv")
    with interpret("v5e"), pytest.raises(NotImplementedError, match="xla: can; tpu: x is bfloat16, "
                                                                    "and it takes float32"):
        toy(X.astype(jnp.bfloat16), SCALE, implementation="tpu")
    with pytest.raises(ValueError, match=r"toy: x \(16, 128\) and scale \(7,\)"):
        toy(X, SCALE[:7])
    with pytest.raises(ValueError, match="no op 'atention'.*did you mean 'attention'"):
        dispatch.find("atention")


def test_using_is_part_of_the_compiled_functions_key():
    """One jitted function under two implementations and two rules is compiled for each."""
    @jax.jit
    def run(x, scale):
        return sharding.local(toy, x, scale)

    def text():
        return run.lower(X, SCALE).as_text()

    mesh = sharding.mesh("data:4,tensor:2")
    with interpret("v5p"):
        kernel = text()
        with using(toy="xla"):
            plain = text()
    assert "callback" in kernel and "callback" not in plain
    with sharding.use(mesh, sharding.Rules(batch="data")):
        four = text()
        run(X, SCALE)
    with sharding.use(mesh, sharding.Rules(batch=("data", "tensor"))):
        eight = text()
        np.testing.assert_array_equal(run(X, SCALE), SCALE * X**2)
    assert "tensor<4x128xf32>" in four and "tensor<2x128xf32>" in eight
    with pytest.raises(ValueError, match="attention has no implementation 'cuda'"):
        using(attention="cuda").__enter__()


def test_argument_wins_over_using():
    with interpret("v5p"), using(toy="tpu"):
        # A power that "tpu" refuses: only "xla" can have run.
        with pytest.raises(NotImplementedError):
            toy(X, SCALE, power=3)
        np.testing.assert_array_equal(toy(X, SCALE, power=3, implementation="xla"), SCALE * X)


def test_explain(capsys):
    q = jax.ShapeDtypeStruct((1, 256, 4, 64), jnp.bfloat16)
    explain("attention", q, q, q, scale=0.125, target="v5p")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("attention(bfloat16[1, 256, 4, 64]") and "on v5p" in lines[0]
    verdicts = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines[1:]}
    assert set(verdicts) == set(attention.names)
    assert [v for v in verdicts.values() if v.startswith("chosen")] == ["chosen (preferred)"]
    assert verdicts["gpu"] == "is for gpu, not for tpu"


def test_explain_says_what_using_names(capsys):
    with using(toy="xla"):
        explain(toy, X, SCALE, target="v5p")
    assert "xla        chosen (named by using)\n" in (out := capsys.readouterr().out)
    assert "tpu        can\n" in out
    with using(toy="tpu"):
        explain(toy, X, SCALE, power=3, target="v5p")
    out = capsys.readouterr().out
    assert "chosen" not in out and "'tpu', named by using, cannot run" in out


@pytest.mark.parametrize(("op", "shapes", "options"), [
    ("attention", [(1, 4, 2, 64)] * 3, {"scale": 0.1}),
    ("cross_entropy", [(1, 4, 64), (64, 8), (1, 4), (1, 4)], {}),
    ("rms_norm", [(1, 4, 128), (128,)], {"eps": 1e-6}),
    ("layer_norm", [(1, 4, 128), (128,)], {"eps": 1e-6}),
])
@pytest.mark.parametrize("chip", ["cpu", "v5e", "h200"])
def test_a_dtype_that_no_implementation_takes(op, shapes, options, chip):
    op = dispatch.find(op)
    operands, options = op.bind(*(jax.ShapeDtypeStruct(s, jnp.int32) for s in shapes), **options)
    with pytest.raises(NotImplementedError) as error:
        op.choose(Target.parse(chip), None, *operands, **options)
    assert "no implementation runs for int32[" in str(error.value)
    assert "is int32" in str(error.value) and "it takes floating dtypes" in str(error.value)
    for name in op.names:
        assert f"{name}: " in str(error.value)


def test_tuned_times_decide(tmp_path, monkeypatch):
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    target = Target.parse("v5p")
    entry = {"op": "toy", "bucket": tuned.bucket((X, SCALE), {"power": 2}), "dtype": "float32",
             "jax": jax.__version__}
    tuned.write("v5p", [{**entry, "implementation": "tpu", "milliseconds": 2.0,
                         "parameters": {"rows": 16}},
                        {**entry, "implementation": "xla", "milliseconds": 3.0, "parameters": {}}])
    chosen = toy.choose(target, None, X, SCALE, power=2)
    assert (chosen.name, chosen.milliseconds, chosen.parameters) == ("tpu", 2.0, {"rows": 16})
    with interpret("v5p"):
        np.testing.assert_array_equal(toy(X, SCALE), SCALE * X)
    # A faster one takes its place, and what was measured again is replaced.
    tuned.write("v5p", [{**entry, "implementation": "xla", "milliseconds": 1.0, "parameters": {}}])
    assert toy.choose(target, None, X, SCALE, power=2).name == "xla"
    assert toy.choose(target, None, X[:8], SCALE, power=2).name == "tpu"  # another bucket
    assert toy.choose(Target.parse("v6e"), None, X, SCALE, power=2).name == "tpu"
    assert len(json.loads((tmp_path / "v5p.json").read_text())["entries"]) == 2


def test_buckets_hold_what_takes_the_same_time():
    def bucket(*shapes, **options):
        return tuned.bucket([jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes], options)

    assert bucket((1000, 128), eps=1e-5, offset=1.0) == bucket((1024, 128), eps=1e-6, offset=1.0)
    assert bucket((8, 8), vocab_axis="tensor") == bucket((8, 8), vocab_axis=None)
    assert bucket((8, 8), window=1000) == bucket((8, 8), window=1024)
    different = [bucket((8, 8)), bucket((8, 9)), bucket((8, 8), window=1024),
                 bucket((8, 8), window=2048), bucket((8, 8), softcap=30.0),
                 bucket((8, 8), causal=True)]
    assert len(set(different)) == len(different)


def test_ops_lists_every_folder():
    assert {"attention", "cross_entropy", "toy"} <= set(pallas_kernels.ops())


def test_using_an_op_on_a_cpu_loads_no_pallas():
    code = ("import sys, jax.numpy as jnp, pallas_kernels\n"
            "from pallas_kernels.attention import attention\n"
            "x = jnp.ones((1, 8, 2, 4)); attention(x, x, x, scale=0.5)\n"
            "print([m for m in sys.modules if m.startswith('jax.experimental.pallas')])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
