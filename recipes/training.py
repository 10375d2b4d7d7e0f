"""The compiled part of training: the state, its step, its layout on disk, and loading for use."""

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import sharding
import zoo
from recipes.optimizer import Optimizer
from recipes.tasks import lm
from recipes.tokenizer import Tokenizer
from recipes.tokenizer import load as load_tokenizer
from zoo import checkpoint

# (model, batch, key, train) -> (sum, weight, statistics), as a task's `loss`.
Loss = Callable[..., tuple[jax.Array, jax.Array, dict[str, jax.Array]]]
State = dict[str, Any]
UPDATE = "the update of "  # What `finite_names` says before a parameter's path.
# Of the state's layout on disk and of what `describe_run` gives.
FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Program:
    """Everything that the compiled step depends on, besides the shapes of the batch.

    Attributes:
      config: of the model.
      mesh, rules: where and how the state and the batch are laid out.
      loss: of the task.
      optimizer: see `recipes.optimizer`.
      seed: of the parameters and of dropout.
      accumulate: microbatches per step, whose gradients are added before the update.
      dtype: of the parameters that are kept.
      compute_dtype: to which the step casts them.
      ema: decay of the parameters' moving average, or None for none.
      remat: what the backward pass keeps; see `zoo.build`.
      stacked: the form of the layers in memory; None: what suits the mesh's devices.
    """

    config: Any
    mesh: Mesh
    rules: sharding.Rules
    loss: Loss
    optimizer: Optimizer
    seed: int = 0
    accumulate: int = 1
    dtype: str = "float32"
    compute_dtype: str = "float32"
    ema: float | None = None
    remat: str = "none"
    stacked: bool | None = None

    def __post_init__(self):
        if self.accumulate < 1:
            raise ValueError(f"accumulate {self.accumulate}: it must be at least 1")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"ema {self.ema}: it must lie between 0 and 1, as 0.999 does")
        if self.stacked is None:
            on_cpu = self.mesh.devices.flat[0].platform == "cpu"
            object.__setattr__(self, "stacked", not on_cpu)

    @property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, P())

    @property
    def batch_sharding(self) -> NamedSharding:
        """Of arrays [batch, time]."""
        return NamedSharding(self.mesh, self.rules.spec("batch", "seq", mesh=self.mesh,
                                                        shared=True))

    def check_batch(self, batch_size: int) -> None:
        """Raises ValueError where the batch does not divide by microbatches and devices."""
        names = self.rules.mesh_axes("batch", self.mesh)
        parts = self.accumulate * int(np.prod([self.mesh.shape[n] for n in names]))
        if batch_size < 1:
            raise ValueError(f"batch_size {batch_size}: it must be at least 1")
        if batch_size % parts:
            over = " x ".join([f"accumulate {self.accumulate}",
                               *(f"{n}:{self.mesh.shape[n]}" for n in names)])
            raise ValueError(
                f"batch_size {batch_size} does not divide by {parts} ({over}); use a multiple of "
                f"{parts}, such as {max(parts, batch_size // parts * parts)}")

    def model(self, *, stacked: bool | None = None, abstract: bool = True):
        """The model, by default with ShapeDtypeStructs for parameters."""
        return zoo.build(self.config, self.seed, self.mesh, self.rules, jnp.dtype(self.dtype),
                         abstract=abstract, remat=self.remat,
                         stacked=self.stacked if stacked is None else stacked)

    def abstract_state(self, *, stacked: bool | None = None) -> State:
        """ShapeDtypeStructs with shardings, of the state that `init` makes."""
        model = self.model(stacked=stacked)
        _, params = zoo.protocol.split(model)
        axes = zoo.protocol.axes(model)
        shapes = jax.eval_shape(functools.partial(self._state, axes), params)
        return _place(shapes, params, self.replicated)

    def _state(self, axes, params) -> State:
        full = zoo.protocol.cast(params, jnp.float32)
        state = {"params": params, "optimizer": self.optimizer.build(axes).init(full),
                 "step": jnp.zeros((), jnp.int32)}
        if self.ema is not None:
            state["ema"] = jax.tree.map(jnp.copy, full)
        return state

    def init(self) -> State:
        """The state before the first step, each shard made where it lives."""
        model = self.model(abstract=False)
        _, params = zoo.protocol.split(model)
        layout = jax.tree.map(lambda x: x.sharding, self.abstract_state())
        with sharding.use(self.mesh, self.rules):
            make = functools.partial(self._state, zoo.protocol.axes(model))
            return jax.jit(make, out_shardings=layout, donate_argnums=0)(params)


def _place(shapes: Any, params: Any, replicated: NamedSharding) -> Any:
    """`shapes` with shardings: what has the shape and the last keys of a parameter lies as it."""
    known = dict(jax.tree_util.tree_leaves_with_path(params))

    def place(path, x):
        ends = (known.get(path[i:]) for i in range(len(path)))
        like = next((p.sharding for p in ends if p is not None and p.shape == x.shape), replicated)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=like)

    return jax.tree_util.tree_map_with_path(place, shapes)


# --- the step ------------------------------------------------------------------------------------


def finite_names(program: Program) -> list[str]:
    """What the flags in the metrics' "finite" stand for: loss, gradients, what an update makes."""
    state = program.abstract_state()
    gradients = _by_parameter({"params": state["params"]})
    return ["the loss", *(f"the gradient of {path}" for path in gradients),
            *(UPDATE + path for path in _by_parameter(state))]


def _by_parameter(state: State) -> dict[str, list[Any]]:
    """A state's numbers by the path of the parameter whose shape they share, else by their own."""
    known = dict(jax.tree_util.tree_leaves_with_path(state["params"]))
    found: dict[str, list[Any]] = {}
    for path, x in jax.tree_util.tree_leaves_with_path(state):
        if jnp.issubdtype(x.dtype, jnp.floating):
            ends = (path[i:] for i in range(len(path)))
            name = next((p for p in ends if p in known and known[p].shape == x.shape), path)
            found.setdefault(jax.tree_util.keystr(name, simple=True, separator="/"), []).append(x)
    return found


def all_finite(state: State) -> list[jax.Array]:
    """Whether all of a state's numbers that belong to a parameter are finite, for each of these."""
    # In one pass over what has the same shape.
    return [jnp.all(functools.reduce(jnp.logical_and, map(jnp.isfinite, arrays)))
            for arrays in _by_parameter(state).values()]


def make_step(program: Program) -> Callable:
    """The jitted ``step(state, batch, signals) -> (state, metrics)``; call it within the mesh.

    The state is donated. `batch` is a dict of arrays [batch, ...]. `signals` is int32
    [devices, 2]: the index of the step the batch is of, and whether the device's process was asked
    to stop. metrics, all replicated:
      loss and the task's statistics: means over the batch's weight.
      weight: their divisor, such as the number of labels.
      grad_norm: before clipping.
      learning_rate.
      finite: bool [1 + gradients + updates], see `finite_names`. If any is False the state is left
        as it was, and because its step then lags behind the batches', so do all later steps.
      stop: whether any process was asked to.
    """
    model = program.model()
    definition, _ = zoo.protocol.split(model)
    rates = program.optimizer.learning_rates()
    differentiate = make_gradients(program, definition)
    update = make_update(program, zoo.protocol.axes(model))

    def step(state, batch, signals):
        index, stop = jnp.max(signals[:, 0]), jnp.max(signals[:, 1])
        loss, weight, stats, gradients = differentiate(
            state["params"], batch, step_key(program, index))
        # A sum of squares is finite where the gradient is, unless it is too large to be clipped.
        squares = [jnp.sum(jnp.square(g)) for g in jax.tree.leaves(gradients)]
        new = update(gradients, state)
        finite = jnp.stack([jnp.isfinite(loss), *map(jnp.isfinite, squares), *all_finite(new)])
        metrics = {
            "loss": loss, **stats, "weight": weight, "grad_norm": jnp.sqrt(sum(squares)),
            "learning_rate": jnp.asarray(rates(index), jnp.float32),
            "finite": finite, "stop": stop,
        }
        good = jnp.all(finite) & (index == state["step"])
        if program.optimizer.is_elementwise:
            # Computed twice: to be looked at, and then into the place of the old state. Computed
            # once it would have to be kept in between, and the step took 7% longer.
            return jax.lax.cond(good, update, lambda _, old: old, gradients, state), metrics
        return jax.tree.map(lambda new, old: jnp.where(good, new, old), new, state), metrics

    layout = jax.tree.map(lambda x: x.sharding, program.abstract_state())
    return jax.jit(
        step, donate_argnums=0,
        in_shardings=(layout, program.batch_sharding, signal_sharding(program.mesh)),
        out_shardings=(layout, program.replicated))


def make_update(program: Program, axes: Any) -> Callable:
    """``(gradients, state) -> state``: the optimizer's part of a step.

    `axes` are the parameters' logical axes, as of `zoo.protocol.axes`.
    """
    optimizer = program.optimizer.build(axes)

    def update(gradients, state):
        params = zoo.protocol.cast(state["params"], jnp.float32)
        updates, memory = optimizer.update(gradients, state["optimizer"], params)
        params = jax.tree.map(jnp.add, params, updates)
        new = {
            "params": jax.tree.map(lambda new, old: new.astype(old.dtype), params,
                                   state["params"]),
            "optimizer": memory,
            "step": state["step"] + 1,
        }
        if program.ema is not None:
            # Short at first, so that the initial parameters do not linger in the average.
            decay = jnp.minimum(program.ema, (1.0 + state["step"]) / (10.0 + state["step"]))
            new["ema"] = jax.tree.map(lambda mean, x: decay * mean + (1.0 - decay) * x,
                                      state["ema"], params)
        return new

    return update


def step_key(program: Program, step: int | jax.Array) -> jax.Array:
    """The key from which a step's microbatches and layers fold theirs."""
    return jax.random.fold_in(jax.random.key(program.seed), step)


def make_gradients(program: Program, definition) -> Callable:
    """``(params, batch, key) -> (loss, weight, statistics, gradients)``, means over the batch.

    Microbatches add sums of losses, of weights and of gradients, which are divided once: padding
    may lie in them as unequally as it likes.
    """
    compute = jnp.dtype(program.compute_dtype)

    def sums(params, batch, key):
        def total(params):
            model = zoo.protocol.merge(definition, params)
            loss, weight, stats = program.loss(model, batch, key, True)
            return loss, (weight, stats)

        (loss, (weight, stats)), gradients = jax.value_and_grad(total, has_aux=True)(params)
        return loss, weight, stats, zoo.protocol.cast(gradients, jnp.float32)

    def differentiate(params, batch, key):
        params = zoo.protocol.cast(params, compute)
        if program.accumulate == 1:
            loss, weight, stats, gradients = sums(params, batch, jax.random.fold_in(key, 0))
        else:
            def add(carry, item):
                index, part = item
                more = sums(params, part, jax.random.fold_in(key, index))
                return jax.tree.map(jnp.add, carry, more), None

            pieces = jax.tree.map(functools.partial(_split, program), batch)
            first = jax.tree.map(lambda x: x[0], pieces)
            shapes = jax.eval_shape(sums, params, first, key)
            zeros = (*jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes[:3]),
                     jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), params))
            (loss, weight, stats, gradients), _ = jax.lax.scan(
                add, zeros, (jnp.arange(program.accumulate), pieces))
        # A batch without a single label has nothing to say, and says so without a NaN.
        scale = 1.0 / jnp.maximum(weight, 1e-30)
        means = jax.tree.map(lambda x: x * scale, (loss, stats, gradients))
        return means[0], weight, means[1], means[2]

    return differentiate


def _split(program: Program, x: jax.Array) -> jax.Array:
    """[batch, ...] -> [microbatches, batch / microbatches, ...].

    Microbatch i takes rows i, i + n, i + 2n, ...: each device splits the rows it holds.
    """
    pieces = jnp.swapaxes(x.reshape(-1, program.accumulate, *x.shape[1:]), 0, 1)
    return sharding.constrain(pieces, None, "batch", *("seq" for _ in x.shape[1:2]),
                              *(None for _ in x.shape[2:]))


def signal_sharding(mesh: Mesh) -> NamedSharding:
    """Of the step's `signals`: a row on each device."""
    return NamedSharding(mesh, P(mesh.axis_names))


def make_evaluation(program: Program) -> Callable:
    """The jitted ``evaluate(params, batch, signals) -> (sum, weight, statistics, stop)``.

    It is without dropout; `signals` and `stop` are those of `make_step`.
    """
    definition, _ = zoo.protocol.split(program.model())
    compute = jnp.dtype(program.compute_dtype)

    def evaluate(params, batch, signals):
        model = zoo.protocol.merge(definition, zoo.protocol.cast(params, compute))
        return *program.loss(model, batch, None, False), jnp.max(signals[:, 1])

    layout = jax.tree.map(lambda x: x.sharding, program.abstract_state()["params"])
    return jax.jit(
        evaluate,
        in_shardings=(layout, program.batch_sharding, signal_sharding(program.mesh)),
        out_shardings=program.replicated)


def abstract_step(
    config: Any, mesh: Mesh, rules: sharding.Rules, *, batch_size: int, seq_len: int,
    optimizer: Optimizer | None = None, accumulate: int = 1, dtype: str = "float32",
    compute_dtype: str = "bfloat16", ema: float | None = None, remat: str = "none",
    stacked: bool | None = None,
) -> tuple[Callable, tuple]:
    """The language-model step for machines that are only described, and its abstract arguments.

    Lower it within the mesh::

      step, arguments = abstract_step(...)
      with sharding.use(mesh, rules):
        compiled = step.lower(*arguments).compile()

    Raises:
      ValueError: sizes that do not divide over the mesh, or a sequence the model cannot take.
    """
    lm.check_length(config, seq_len)
    program = Program(config=config, mesh=mesh, rules=rules, loss=lm.make_loss(0.0),
                optimizer=optimizer or Optimizer(), accumulate=accumulate, dtype=dtype,
                compute_dtype=compute_dtype, ema=ema, remat=remat, stacked=stacked)
    program.check_batch(batch_size)
    batch = {name: jax.ShapeDtypeStruct((batch_size, seq_len), kind,
                                        sharding=program.batch_sharding)
             for name, kind in lm.BATCH.items()}
    signals = jax.ShapeDtypeStruct((mesh.size, 2), jnp.int32, sharding=signal_sharding(mesh))
    return make_step(program), (program.abstract_state(), batch, signals)


# --- on disk -------------------------------------------------------------------------------------


def save(checkpointer: checkpoint.Checkpointer, program: Program, state: State, step: int,
         meta: Mapping[str, Any], wait: bool = False) -> None:
    """Saves the state, in the one layout there is on disk: stacked."""
    if not program.stacked:
        state = _stack(program)(state)
    checkpointer.save(step, state, {**meta, "step": step}, wait=wait)


@functools.lru_cache(maxsize=1)
def _stack(program: Program) -> Callable[[State], State]:
    layout = jax.tree.map(lambda x: x.sharding, program.abstract_state(stacked=True))
    return jax.jit(zoo.protocol.to_stacked, out_shardings=layout)


def restore(checkpointer: checkpoint.Checkpointer, program: Program, step: int | None = None
            ) -> tuple[State, dict, int]:
    """(state, meta, step) of a saved step, by default the newest whole one; see `Checkpointer`."""
    state, meta, step = checkpointer.restore(program.abstract_state(stacked=True), step)
    if not program.stacked:
        state = _unstack(state, jax.tree.map(lambda x: x.sharding, program.abstract_state()))
    return state, meta, step


def _unstack(state: State, layout: State) -> State:
    return jax.jit(zoo.protocol.to_list, out_shardings=layout)(state)


def load_model(
    directory: str | os.PathLike, mesh: Mesh | None = None, rules: sharding.Rules | None = None,
    dtype: Any = None, step: int | None = None,
) -> tuple[Any, Tokenizer, dict]:
    """A trained model from a workdir, or from its checkpoints: the averaged parameters if any.

    Args:
      directory: what --workdir named, or the directory "checkpoints" in it.
      mesh, rules: where and how; default as of `zoo.build`.
      dtype: to cast the parameters to; None: as they were trained.
      step: which checkpoint; None: the newest whole one.

    Returns:
      (model, tokenizer, the checkpoint's meta data).

    Raises:
      FileNotFoundError: no such directory, step or checkpoint.
      ValueError: a damaged checkpoint, or another tokenizer than the model was trained with.
    """
    folder = Path(directory)
    if (folder / "checkpoints").is_dir():
        folder = folder / "checkpoints"
    with checkpoint.Checkpointer(folder) as checkpointer:
        if step is None:
            step = checkpointer.latest()
        meta = checkpoint.read_meta(folder, step)
        if not isinstance(meta, dict) or not meta.keys() >= {"model", "training", "tokenizer"}:
            raise ValueError(f"{folder} does not say which model it holds, so it is not of "
                             "recipes.train; give a training run's workdir")
        config = zoo.from_dict(meta["model"])
        name = "params" if meta["training"]["ema"] is None else "ema"
        # Where it lay when it was trained with may be on another machine.
        files = str(folder.absolute().parent / lm.TOKENIZER)
        tokenizer = load_tokenizer("bytes" if meta["tokenizer"]["name"] == "bytes" else files)
        if tokenizer.fingerprint != meta["tokenizer"]["fingerprint"]:
            raise ValueError(f"the tokenizer {files!r} is not the one that {folder} was trained "
                             "with; put that one back in its place")
        kept = jnp.float32 if name == "ema" else jnp.dtype(meta["training"]["dtype"])
        build = functools.partial(zoo.build, config, mesh=mesh, rules=rules, dtype=kept,
                                  abstract=True)
        model = build()
        definition, params = zoo.protocol.split(model)
        _, stored = zoo.protocol.split(build(stacked=True))
        arrays, _, _ = checkpointer.restore({name: stored}, step)
    arrays = arrays[name]
    if jax.tree.structure(arrays) != jax.tree.structure(params):
        arrays = _unstack(arrays, jax.tree.map(lambda x: x.sharding, params))
    if dtype is not None:
        arrays = jax.jit(functools.partial(zoo.protocol.cast, dtype=dtype), donate_argnums=0)(
            arrays)
    return zoo.protocol.merge(definition, arrays), tokenizer, meta


def describe_run(program: Program, task: Any, batch_size: int) -> dict[str, Any]:
    """What a run's result depends on, as JSON: kept in its workdir and in every checkpoint."""
    optimizer = dataclasses.asdict(program.optimizer)
    training = {"seed": program.seed, "batch_size": batch_size, "accumulate": program.accumulate,
                "dtype": str(program.dtype), "compute_dtype": str(program.compute_dtype),
                "ema": program.ema, "optimizer": optimizer.pop("name"), **optimizer}
    record = {"format_version": FORMAT_VERSION, "model": zoo.to_dict(program.config),
              **task.describe(), "training": training}
    return json.loads(json.dumps(record))
