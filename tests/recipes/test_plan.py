"""The planner: what it counts, and what it refuses before it compiles anything."""

import jax.numpy as jnp
import pytest

import sharding
import zoo
from recipes import command, plan
from recipes.optimizer import Optimizer
from recipes.tasks import lm, segment
from recipes.training import abstract_step
from tests import tiny

BATCH = 3


def reads(config, mesh="data:1", rules="fsdp_tp", batch=BATCH) -> int:
    mesh, rules = sharding.mesh(mesh), sharding.rules(rules)
    model = zoo.build(config, mesh=mesh, rules=rules, dtype=jnp.bfloat16, abstract=True)
    _, params = zoo.protocol.split(model)
    return plan.decode_reads(config, params, zoo.protocol.axes(model), mesh, rules, batch)


@pytest.mark.parametrize(("name", "tables"), [
    ("llama3-8b", ["vocab"]),
    ("qwen3-0.6b", []),  # Its table is the head too.
    ("gpt2", ["max_length"]),
])
def test_decoding_reads_the_rows_of_a_table_that_it_looks_up(name, tables):
    config = tiny.config(name)
    model = zoo.build(config, abstract=True)
    whole = 2 * zoo.protocol.num_params(model)
    sizes = {"vocab": config.vocab_size, "max_length": config.max_length}
    spared = sum(2 * (sizes[kind] - BATCH) * config.width for kind in tables)
    assert reads(config) == whole - spared
    # More requests than rows cannot read more than the table.
    assert reads(config, batch=1000) == whole


def test_decoding_reads_the_rows_of_its_own_requests_and_shards():
    config = tiny.config("llama3-8b", num_layers=1)
    one, more = (reads(config, "data:2,tensor:2", batch=batch) for batch in (2, 4))
    assert more - one == 2 * config.width  # One row more of each of two devices.
    one, more = (reads(config, "fsdp:2,tensor:2", batch=batch) for batch in (2, 4))
    assert more - one == config.width  # Of half the width.


def test_decoding_reads_the_experts_that_its_requests_take():
    config = tiny.config("mixtral-8x7b", num_layers=1, **{"mlp.num_experts": 9})
    one, two, more = (reads(config, batch=batch) for batch in (1, 2, 100))
    expert = 2 * 3 * config.width * config.mlp.hidden
    assert two - one == 2 * expert + 2 * config.width  # And a row of the table.
    assert more - one == 7 * expert + 2 * 39 * config.width


@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "list"])
def test_the_step_of_a_mixture_of_experts_lowers(stacked):
    mesh, rules = sharding.mesh(tiny.MESH), sharding.rules("fsdp_tp")
    config = tiny.config("qwen1.5-moe-a2.7b")
    step, arguments = abstract_step(
        config, mesh, rules, lm.workload(config, 16, 16), accumulate=2, remat="dots",
        stacked=stacked, optimizer=Optimizer("muon"))
    with sharding.use(mesh, rules):
        metrics = step.lower(*arguments).out_info[1]
    assert metrics.keys() >= {"loss", "moe_balance", "moe_z", "moe_max_load", "moe_entropy"}


def test_the_step_of_a_segmentation_lowers():
    """In the shapes and of the FLOPs that the task has for data of that size."""
    mesh, rules = sharding.mesh("fsdp:4,tensor:2"), sharding.rules("fsdp_tp,channels=none")
    config = zoo.config("paratranscnn-tiny", cnn=None)
    work = segment.workload(config, 8, 32)
    step, arguments = abstract_step(config, mesh, rules, work)
    assert arguments[1]["images"].sharding.shard_shape((8, 32, 32, 1)) == (2, 32, 32, 1)
    assert (work.units, work.flops) == (8, 8 * config.flops_per_image(32, 32))
    with sharding.use(mesh, rules):
        metrics = step.lower(*arguments).out_info[1]
    assert metrics.keys() >= {"loss", "cross_entropy", "dice_loss"}


FLAGS = ("--model=llama-tiny", "--topology=v5e:2x2")
ERRORS = [
    (["--rules=fspd"], "did you mean 'fsdp'?"),
    (["--rules=tp,kv_head=none"], "did you mean 'kv_heads'?"),
    (["--mesh=fdsp:2"], "did you mean 'fsdp'?"),
    (["--model=LLAMA-TINY"], "did you mean 'llama-tiny'?"),
    (["--set=norm.eps=inf"], "norm.eps is inf; it must be finite"),
    (["--mode=infer"], "which is for language; give one for segmentation, such as"),
    (["--mode=decode", "--model=paratranscnn-tiny"], "which is for segmentation; give one for"),
    (["--image_size=64"], "--image_size is not of models for language; give --seq_len instead"),
    (["--seq_len=64", "--model=paratranscnn-tiny"], "--seq_len is not of models for segmentation"),
    (["--image_size=0", "--model=paratranscnn-tiny"], "image_size 0: it must be at least 1"),
]


@pytest.mark.parametrize(("flags", "words"), ERRORS, ids=[flags[0] for flags, _ in ERRORS])
def test_an_error_is_one_line(flags, words, capsys):
    assert command.execute(plan.main, ["plan", *FLAGS, *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error and error.count("\n") == 1


def test_help_says_how_rules_are_changed(capsys):
    assert command.execute(plan.main, ["plan", "--help"]) == 0
    assert "fsdp_tp,kv_heads=none" in capsys.readouterr().out
