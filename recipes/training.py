"""The compiled part of training: the state, its step, its layout on disk, and loading for use."""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import sharding
import zoo
from recipes import workdir
from recipes.feed import check_divides
from recipes.lora import Lora
from recipes.optimizer import Optimizer
from recipes.tasks import Workload, lm, segment
from recipes.tokenizer import Bytes, Tokenizer
from recipes.tokenizer import load as load_tokenizer
from zoo import checkpoint
from zoo.convert import directory as directories
from zoo.registry import check_kind

# (model, batch, key, train) -> (sum, weight, statistics, running statistics), as a task's `loss`.
Loss = Callable[..., tuple[jax.Array, jax.Array, dict[str, jax.Array], Mapping[str, Any]]]
State = dict[str, Any]
# Of the state's layout on disk and of what `describe_run` gives.
FORMAT_VERSION = 1
BASE = "base"  # The directory in a workdir that holds what adapters stand on.
_BASE_RECORD = ("model", "init_from")  # What of a run's record must be the base's too.


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
      lora: adapters to train in place of the parameters, or None.
      batch_axes: logical axes of a batch's arrays, the first ones; others are whole.

    What is trained, a state's "params", are the model's parameters or adapters; these stand on
    parameters that no step changes, a state's "base", which is {} otherwise. With either are the
    model's running statistics, which a step sets and no gradient reaches.
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
    lora: Lora | None = None
    batch_axes: tuple[str | None, ...] = ("batch", "seq")

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
        """Of arrays whose first dimensions are the `batch_axes`, such as [batch, time]."""
        return NamedSharding(self.mesh, self.rules.spec(*self.batch_axes, mesh=self.mesh,
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
        trained, base = params, {}
        if self.lora is not None:
            base, statistics = zoo.protocol.divide(params)
            trained = zoo.protocol.join(
                self.lora.abstract(params, axes, self.mesh, self.rules), statistics)
        shapes = jax.eval_shape(functools.partial(self._state, self.trained_axes(axes)), trained)
        return {**_place(shapes, trained, self.replicated), "base": base}

    def trained_axes(self, axes: Any) -> Any:
        """Logical axes of what is trained, of the model's `axes` (see `zoo.protocol.axes`)."""
        if self.lora is None:
            return axes
        return zoo.protocol.join(self.lora.axes(axes), zoo.protocol.divide(axes)[1])

    def weights(self, params: Any, base: Any) -> Any:
        """The model's parameters, to compute with, of a state's "params" (or "ema") and "base"."""
        if self.lora is None:
            return zoo.protocol.cast(params, self.compute_dtype)
        adapters, statistics = zoo.protocol.divide(params)
        return zoo.protocol.join(self.lora.adapt(base, adapters, self.compute_dtype), statistics)

    def begin(self, params: Any) -> tuple[Any, Any]:
        """What is trained, to begin with, and the base, of a model with `params`."""
        if self.lora is None:
            return params, {}
        model = self.model(stacked=True)
        shapes, axes = zoo.protocol.split(model)[1], zoo.protocol.axes(model)

        def make():
            adapters = self.lora.init(self.seed, shapes, axes)
            return adapters if self.stacked else zoo.protocol.to_list(adapters)

        layout, _ = zoo.protocol.divide(_layout(self.abstract_state()["params"]))
        base, statistics = zoo.protocol.divide(params)
        return zoo.protocol.join(jax.jit(make, out_shardings=layout)(), statistics), base

    def _state(self, axes, trained) -> State:
        full = zoo.protocol.cast(trained, jnp.float32)
        learned, axes = (zoo.protocol.divide(tree)[0] for tree in (full, axes))
        state = {"params": trained, "optimizer": self.optimizer.build(axes).init(learned),
                 "step": jnp.zeros((), jnp.int32)}
        if self.ema is not None:
            state["ema"] = jax.tree.map(jnp.copy, full)
        return state

    def init(self, params: Any = None) -> State:
        """The state before the first step, each shard made where it lives.

        `params`, which are given away, are the model's parameters to begin with; None: fresh ones.
        """
        if params is None:
            _, params = zoo.protocol.split(self.model(abstract=False))
        layout = _layout(_divide(self.abstract_state())[0])
        with sharding.use(self.mesh, self.rules):
            trained, base = self.begin(params)
            axes = self.trained_axes(zoo.protocol.axes(self.model()))
            make = functools.partial(self._state, axes)
            state = jax.jit(make, out_shardings=layout, donate_argnums=0)(trained)
        return {**state, "base": base}


def _layout(abstract: Any) -> Any:
    return jax.tree.map(lambda x: x.sharding, abstract)


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
    """What the flags in the metrics' "finite" stand for: loss, gradients, running statistics."""
    gradients, statistics = zoo.protocol.divide(program.abstract_state()["params"])
    return ["the loss", *(f"the gradient of {path}" for path in zoo.protocol.flat(gradients)),
            *(f"the running statistic {path}" for path in zoo.protocol.flat(statistics))]


def not_finite(state: State) -> list[str]:
    """The paths of what a state begins with, adapters' base included, that is inf or nan."""
    check = jax.jit(lambda arrays: jax.tree.map(lambda x: jnp.all(jnp.isfinite(x)), arrays))
    return [path for part in ("params", "base")
            for path, good in check(zoo.protocol.flat(state[part])).items() if not good]


def _divide(state: State) -> tuple[State, Any]:
    """What a step changes of a state, and the base."""
    return {name: part for name, part in state.items() if name != "base"}, state["base"]


def make_step(program: Program) -> Callable:
    """The jitted ``step(state, batch, signals) -> (state, metrics)``; call it within the mesh.

    The state is donated. `batch` is a dict of arrays [batch, ...]. `signals` is int32
    [devices, 2]: the index of the step the batch is of, and whether the device's process was asked
    to stop. metrics, all replicated:
      loss and the task's statistics: means over the batch's weight.
      weight: their divisor, such as the number of labels.
      grad_norm: before clipping.
      learning_rate.
      finite: bool [1 + gradients + statistics], see `finite_names`. If any is False the state is
        left as it was, running statistics too, and because its step then lags behind the batches',
        so do all later steps. What an `Optimizer` makes of finite gradients and a finite state is
        finite.
      stop: whether any process was asked to.
    """
    model = program.model()
    definition, _ = zoo.protocol.split(model)
    rates = program.optimizer.learning_rates()
    differentiate = make_gradients(program, definition)
    update = make_update(program, zoo.protocol.axes(model))

    def step(state, batch, signals):
        state, base = _divide(state)
        index, stop = jnp.max(signals[:, 0]), jnp.max(signals[:, 1])
        loss, weight, stats, gradients, statistics = differentiate(
            state["params"], batch, step_key(program, index), base)
        squares = squared_norms(gradients)
        # Small enough to be added up, too.
        largest = jnp.finfo(jnp.float32).max / len(squares)
        finite = jnp.stack([jnp.isfinite(loss), *(x <= largest for x in squares), *(
            jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(statistics))])
        metrics = {
            "loss": loss, **stats, "weight": weight, "grad_norm": jnp.sqrt(sum(squares)),
            "learning_rate": jnp.asarray(rates(index), jnp.float32),
            "finite": finite, "stop": stop,
        }
        new = jax.lax.cond(jnp.all(finite) & (index == state["step"]), update,
                           lambda *old: old[-1], gradients, statistics, state)
        return {**new, "base": base}, metrics

    layout = _layout(program.abstract_state())
    return jax.jit(
        step, donate_argnums=0,
        in_shardings=(layout, program.batch_sharding, signal_sharding(program.mesh)),
        out_shardings=(layout, program.replicated))


def squared_norms(gradients: Any) -> list[jax.Array]:
    """Each one's: finite where the gradient is, unless it is too large to be clipped."""
    return [jnp.sum(jnp.square(g.astype(jnp.float32))) for g in jax.tree.leaves(gradients)]


def make_update(program: Program, axes: Any) -> Callable:
    """``(gradients, statistics, state) -> state``, without the base: the end of a step.

    `axes` are the model's logical axes, as of `zoo.protocol.axes`. `statistics` are the running
    ones' next values, {} where the model has none; the average of parameters covers them.
    """
    optimizer = program.optimizer.build(zoo.protocol.divide(program.trained_axes(axes))[0])

    def update(gradients, statistics, state):
        params, _ = zoo.protocol.divide(zoo.protocol.cast(state["params"], jnp.float32))
        updates, memory = optimizer.update(gradients, state["optimizer"], params)
        params = zoo.protocol.join(jax.tree.map(jnp.add, params, updates), statistics)
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
    """``(params, batch, key, base) -> (loss, weight, stats, gradients, statistics)``, batch means.

    `params` and `base` are those of a state; the gradients are of what is learned in `params`.
    Microbatches add sums of losses, of weights and of gradients, which are divided once: padding
    may lie in them as unequally as it likes. The running statistics' next values are the mean over
    microbatches, each of which starts from the old ones.
    """
    # Of adapters it is the kernels made with them that are cast.
    kept = jnp.dtype(program.compute_dtype if program.lora is None else jnp.float32)

    def sums(params, base, batch, key):
        learned, old = zoo.protocol.divide(params)

        def total(learned):
            params = zoo.protocol.join(learned, old)
            model = zoo.protocol.merge(definition, program.weights(params, base))
            loss, weight, stats, new = program.loss(model, batch, key, True)
            return loss, (weight, stats, new)

        (loss, (weight, stats, new)), gradients = jax.value_and_grad(total, has_aux=True)(learned)
        return loss, weight, stats, zoo.protocol.cast(gradients, jnp.float32), new

    def differentiate(params, batch, key, base=None):
        params = zoo.protocol.cast(params, kept)
        if program.accumulate == 1:
            loss, weight, stats, gradients, statistics = sums(
                params, base, batch, jax.random.fold_in(key, 0))
        else:
            def add(carry, item):
                index, part = item
                more = sums(params, base, part, jax.random.fold_in(key, index))
                return jax.tree.map(jnp.add, carry, more), None

            pieces = jax.tree.map(functools.partial(_split, program), batch)
            first = jax.tree.map(lambda x: x[0], pieces)
            shapes = jax.eval_shape(sums, params, base, first, key)
            learned, statistics = (
                jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), tree)
                for tree in zoo.protocol.divide(params))
            zeros = (*jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes[:3]), learned,
                     statistics)
            (loss, weight, stats, gradients, statistics), _ = jax.lax.scan(
                add, zeros, (jnp.arange(program.accumulate), pieces))
            statistics = jax.tree.map(lambda x: x / program.accumulate, statistics)
        # A batch without a single label has nothing to say, and says so without a NaN.
        scale = 1.0 / jnp.maximum(weight, 1e-30)
        means = jax.tree.map(lambda x: x * scale, (loss, stats, gradients))
        return means[0], weight, means[1], means[2], statistics

    return differentiate


def _split(program: Program, x: jax.Array) -> jax.Array:
    """[batch, ...] -> [microbatches, batch / microbatches, ...].

    Microbatch i takes rows i, i + n, i + 2n, ...: each device splits the rows it holds.
    """
    pieces = jnp.swapaxes(x.reshape(-1, program.accumulate, *x.shape[1:]), 0, 1)
    names = program.batch_axes[:x.ndim]
    return sharding.constrain(pieces, None, *names, *(None for _ in x.shape[len(names):]))


def signal_sharding(mesh: Mesh) -> NamedSharding:
    """Of the step's `signals`: a row on each device."""
    return NamedSharding(mesh, P(mesh.axis_names))


def make_evaluation(program: Program) -> Callable:
    """The jitted ``evaluate(params, base, batch, signals) -> (sum, weight, statistics, stop)``.

    It is without dropout, and by the running statistics. `params` is a state's, or its "ema", and
    `base` is its "base"; `signals` and `stop` are those of `make_step`.
    """
    definition, _ = zoo.protocol.split(program.model())

    def evaluate(params, base, batch, signals):
        model = zoo.protocol.merge(definition, program.weights(params, base))
        total, weight, stats, _ = program.loss(model, batch, None, False)
        return total, weight, stats, jnp.max(signals[:, 1])

    layout = _layout(program.abstract_state())
    return jax.jit(
        evaluate,
        in_shardings=(layout["params"], layout["base"], program.batch_sharding,
                      signal_sharding(program.mesh)),
        out_shardings=program.replicated)


def abstract_step(
    config: Any, mesh: Mesh, rules: sharding.Rules, workload: Workload, *,
    optimizer: Optimizer | None = None, accumulate: int = 1, dtype: str = "float32",
    compute_dtype: str = "bfloat16", ema: float | None = None, remat: str = "none",
    stacked: bool | None = None,
) -> tuple[Callable, tuple]:
    """A task's step for machines that are only described, and its abstract arguments.

    Lower it within the mesh::

      step, arguments = abstract_step(config, mesh, rules, lm.workload(config, 8, 4096))
      with sharding.use(mesh, rules):
        compiled = step.lower(*arguments).compile()

    Raises:
      ValueError: sizes that do not divide over the mesh.
    """
    program = Program(config=config, mesh=mesh, rules=rules, loss=workload.loss,
                      optimizer=optimizer or Optimizer(), accumulate=accumulate, dtype=dtype,
                      compute_dtype=compute_dtype, ema=ema, remat=remat, stacked=stacked,
                      batch_axes=workload.axes)
    batch = {}
    for name, (shape, kind) in workload.batch.items():
        program.check_batch(shape[0])
        check_divides(name, shape, program.batch_sharding)
        batch[name] = jax.ShapeDtypeStruct(shape, kind, sharding=program.batch_sharding)
    signals = jax.ShapeDtypeStruct((mesh.size, 2), jnp.int32, sharding=signal_sharding(mesh))
    return make_step(program), (program.abstract_state(), batch, signals)


# --- on disk -------------------------------------------------------------------------------------


def save(checkpointer: checkpoint.Checkpointer, program: Program, state: State, step: int,
         meta: Mapping[str, Any], wait: bool = False) -> None:
    """Saves the state but for its base, in the one layout there is on disk: stacked."""
    state, _ = _divide(state)
    if not program.stacked:
        state = _stack(program)(state)
    checkpointer.save(step, state, {**meta, "step": step}, wait=wait)


@functools.lru_cache(maxsize=1)
def _stack(program: Program) -> Callable[[State], State]:
    state, _ = _divide(program.abstract_state(stacked=True))
    return jax.jit(zoo.protocol.to_stacked, out_shardings=_layout(state))


def restore(checkpointer: checkpoint.Checkpointer, folder: Path, program: Program, step: int
            ) -> tuple[State, dict]:
    """(state, meta) of a saved step, with the base, if any, that the workdir `folder` holds."""
    state, base = _divide(program.abstract_state(stacked=True))
    state, meta, _ = checkpointer.restore(state, step)
    if program.lora is not None:
        base = _restore_base(folder, base, meta)
    state = {**state, "base": base}
    if not program.stacked:
        state = _unstack(state, _layout(program.abstract_state()))
    return state, meta


def _unstack(state: State, layout: State) -> State:
    return jax.jit(zoo.protocol.to_list, out_shardings=layout)(state)


def save_base(folder: Path, program: Program, state: State, record: Mapping[str, Any]) -> None:
    """Saves the base of adapters in the workdir `folder`, once: no checkpoint holds it again."""
    if program.lora is None:
        return
    with checkpoint.Checkpointer(folder / BASE) as checkpointer:
        if checkpointer.latest() is not None:
            _check_base(folder / BASE, checkpoint.read_meta(folder / BASE, 0), record)
            return
        base = state["base"]
        if not program.stacked:
            layout = _layout(program.abstract_state(stacked=True)["base"])
            base = jax.jit(zoo.protocol.to_stacked, out_shardings=layout)(base)
        meta = {name: record[name] for name in _BASE_RECORD}
        checkpointer.save(0, {"params": base}, meta, wait=True)


def _restore_base(folder: Path, params: Any, record: Mapping[str, Any]) -> Any:
    """The base of adapters that a workdir holds; `params` are abstract, in the stacked form."""
    with checkpoint.Checkpointer(folder / BASE) as checkpointer:
        arrays, meta, _ = checkpointer.restore({"params": params}, 0)
    _check_base(folder / BASE, meta, record)
    return arrays["params"]


def _check_base(folder: Path, meta: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    workdir.check_same(folder, meta, {name: record[name] for name in _BASE_RECORD})


def load_model(
    directory: str | os.PathLike, mesh: Mesh | None = None, rules: sharding.Rules | None = None,
    dtype: Any = None, step: int | None = None, stacked: bool | None = None,
    kind: str | None = "language",
) -> tuple[Any, Tokenizer | None, dict]:
    """A model and its tokenizer, from a training run or from a model's directory.

    Args:
      directory: what --workdir named, or the directory "checkpoints" in it: the averaged parameters
        if any, with adapters merged into them. Or a directory that `zoo.load` takes.
      mesh, rules: where and how; default as of `zoo.build`.
      dtype: to cast the parameters to; None: as they were trained, or are stored.
      step: which checkpoint of a run; None: the newest whole one.
      stacked: the form of the layers in memory; see `zoo.build`.
      kind: of the model, see `zoo.list`; None: any.

    Returns:
      (model, its tokenizer, None of models that take no text, and the checkpoint's meta data, {} of
      a model's directory).

    Raises:
      FileNotFoundError: no such directory, step or checkpoint.
      ValueError: a model of another kind, a damaged checkpoint, another tokenizer than the model
        was trained with, or none.
    """
    run = find_run(directory)
    if run is None:
        if step is not None:
            raise ValueError(f"step {step}: {directory} holds a model and not a training run, so "
                             "it has no steps; give none")
        config = zoo.load_config(directory)
        check_kind(config, kind or config.kind)
        # The tokenizer first: without one the weights are not worth the wait.
        tokenizer = (load_tokenizer(_find_tokenizer(Path(directory).expanduser()))
                     if config.kind == "language" else None)
        model = zoo.load(directory, mesh=mesh, rules=rules, dtype=dtype, stacked=stacked)
        return model, tokenizer, {}
    with checkpoint.Checkpointer(run) as checkpointer:
        if step is None:
            step = checkpointer.latest()
        meta = _read_run(run, step)
        check_kind(zoo.from_dict(meta["model"]), kind or zoo.from_dict(meta["model"]).kind)
        name = _run_tokenizer(run, meta)
        tokenizer = None if name is None else load_tokenizer(name)
        if tokenizer is not None and tokenizer.fingerprint != meta["tokenizer"]["fingerprint"]:
            files = str(run.absolute().parent / lm.TOKENIZER)
            raise ValueError(f"the tokenizer {files!r} is not the one that {run} was trained "
                             "with; put that one back in its place")
        model = _load_run(checkpointer, run, step, meta, mesh, rules, dtype, stacked)
    return model, tokenizer, meta


def find_run(directory: str | os.PathLike) -> Path | None:
    """The checkpoints of a training run, whether there are any or not; None: it is a model's."""
    folder = Path(directory).expanduser()
    if (folder / "checkpoints").is_dir():
        return folder / "checkpoints"
    if not (folder / workdir.CONFIG).is_file():  # As "checkpoints" itself has none.
        return None if any(folder.glob("*.safetensors")) else folder
    try:
        record = workdir.read_config(folder)
    except ValueError:  # Whoever loads a model there says what is wrong.
        return None
    return folder / "checkpoints" if "training" in record else None


def model_files(directory: str | os.PathLike) -> Path:
    """Where a run or a model keeps its tokenizer, chat template and settings of generation, or
    says how images are made ready."""
    run = find_run(directory)
    if run is None:
        return Path(directory).expanduser()
    images = run.parent / segment.FOLDER
    return images if images.is_dir() else run.parent / lm.TOKENIZER


def _read_run(run: Path, step: int | None) -> dict:
    """The meta data of a training run's checkpoint."""
    meta = checkpoint.read_meta(run, step)
    if not isinstance(meta, dict) or not meta.keys() >= {"model", "training", "tokenizer"}:
        raise ValueError(f"{run} does not say which model it holds, so it is not of "
                         "recipes.train; give a training run's workdir")
    return meta


def _run_tokenizer(run: Path, record: Mapping[str, Any]) -> str | None:
    """What `recipes.tokenizer.load` takes, of a run: where it lay then may be elsewhere now."""
    if record["tokenizer"] is None:
        return None
    name = record["tokenizer"]["name"]
    return name if name == "bytes" else str(run.absolute().parent / lm.TOKENIZER)


def _find_tokenizer(directory: Path) -> str:
    """What `recipes.tokenizer.load` takes, of a model's directory."""
    if (directory / "tokenizer.json").is_file():
        return str(directory)
    config = zoo.load_config(directory)
    if config.kind == "language" and config.vocab_size == Bytes.vocab_size:
        return "bytes"
    raise ValueError(f"{directory} holds no tokenizer.json; put the model's there (of other files "
                     "transformers' AutoTokenizer makes one: from_pretrained, save_pretrained)")


def _load_run(checkpointer: checkpoint.Checkpointer, run: Path, step: int, meta: Mapping[str, Any],
              mesh: Mesh | None, rules: sharding.Rules | None, dtype: Any, stacked: bool | None):
    """The model of a run's checkpoint; see `load_model`."""
    config = zoo.from_dict(meta["model"])
    trained = jnp.dtype(meta["training"]["dtype"])
    name = "params" if meta["training"]["ema"] is None else "ema"
    lora = None if meta.get("lora") is None else Lora(**meta["lora"])
    kept = jnp.float32 if name == "ema" and lora is None else trained
    build = functools.partial(zoo.build, config, mesh=mesh, rules=rules, dtype=kept, abstract=True)
    model = build(stacked=stacked)
    definition, params = zoo.protocol.split(model)
    whole = build(stacked=True)
    _, stored = zoo.protocol.split(whole)
    if lora is None:
        arrays = checkpointer.restore({name: stored}, step)[0][name]
    else:
        place = jax.tree.leaves(stored)[0].sharding.mesh
        learned, statistics = zoo.protocol.divide(stored)
        adapters = lora.abstract(stored, zoo.protocol.axes(whole), place,
                                 sharding.ambient_rules() if rules is None else rules)
        adapters = checkpointer.restore(
            {name: zoo.protocol.join(adapters, statistics)}, step)[0][name]
        adapters, statistics = zoo.protocol.divide(adapters)
        base = _restore_base(run.absolute().parent, learned, meta)
        merge = functools.partial(lora.merge, dtype=kept if dtype is None else dtype)
        arrays = jax.jit(merge, out_shardings=_layout(learned), donate_argnums=0)(base, adapters)
        arrays = zoo.protocol.join(arrays, statistics)
    if jax.tree.structure(arrays) != jax.tree.structure(params):
        arrays = _unstack(arrays, _layout(params))
    if dtype is not None:
        arrays = jax.jit(functools.partial(zoo.protocol.cast, dtype=dtype), donate_argnums=0)(
            arrays)
    return zoo.protocol.merge(definition, arrays)


# --- starting from given weights -----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Source:
    """Weights to start a run from; `find_source` finds them.

    Attributes:
      directory: a run's checkpoints, or a model's directory.
      config: of the model.
      fingerprint: of the weights' files, wherever they lie: the hex BLAKE2b of the checksums that
        stand beside them, or of their own where none do.
      step: which checkpoint; None of a model's directory.
      tokenizer: what `recipes.tokenizer.load` takes, or None where none is known.
    """

    directory: Path
    config: Any
    fingerprint: str
    step: int | None
    tokenizer: str | None

    def override(self, settings: Mapping[str, Any]) -> Any:
        """The config with fields replaced, as by `zoo.override`.

        Raises:
          ValueError: a parameter would have another shape; it names the first one.
        """
        config = zoo.override(self.config, settings)
        if config == self.config:
            return config
        have, want = ({path: x.shape for path, x in zoo.protocol.flat(zoo.protocol.split(
            zoo.build(c, abstract=True, stacked=True))[1]).items()} for c in (self.config, config))
        for name in sorted(have.keys() | want.keys()):
            if have.get(name) != want.get(name):
                raise ValueError(
                    f"--set would make {name} {want.get(name, 'absent')}, which is "
                    f"{have.get(name, 'absent')} in {self.directory}; with --init_from, set only "
                    "what leaves the parameters' shapes as they are")
        return config

    def load(self, program: Program) -> Any:
        """The parameters, for `Program.init`."""
        place = {"mesh": program.mesh, "rules": program.rules, "dtype": jnp.dtype(program.dtype),
                 "stacked": program.stacked}
        if self.step is None:
            return zoo.protocol.split(zoo.load(self.directory, **place))[1]
        with checkpoint.Checkpointer(self.directory) as checkpointer:
            meta = _read_run(self.directory, self.step)
            model = _load_run(checkpointer, self.directory, self.step, meta, **place)
        return zoo.protocol.split(model)[1]


def find_source(directory: str | os.PathLike, folder: Path) -> Source:
    """The weights in `directory` to start the run in the workdir `folder` from.

    Where nothing is there any more, a run that has begun says what it began from.

    Raises:
      ValueError: there are no weights.
    """
    path, record = Path(directory).expanduser(), workdir.read_config(folder) or {}
    if record.get("init_from") and not (path.is_dir() and any(path.iterdir())):
        return Source(path, zoo.from_dict(record["model"]), record["init_from"], None,
                      _run_tokenizer(folder / "checkpoints", record))
    run = find_run(path)
    if run is None:
        config = zoo.load_config(path)
        try:
            tokenizer = _find_tokenizer(path)
        except ValueError:
            tokenizer = None
        return Source(path, config, _fingerprint_model(path), None, tokenizer)
    with checkpoint.Checkpointer(run) as checkpointer:
        steps = checkpointer.steps()
    if not steps:
        raise ValueError(f"--init_from={directory}: there is no model; give a training run's "
                         "workdir, a directory that zoo.save wrote, or one of Hugging Face, with "
                         "config.json and *.safetensors")
    meta = _read_run(run, steps[-1])
    return Source(run, zoo.from_dict(meta["model"]), _fingerprint_run(run, steps[-1]), steps[-1],
                  _run_tokenizer(run, meta))


def _fingerprint_run(run: Path, step: int) -> str:
    """Of a checkpoint, with the base of its adapters, from the manifests of both."""
    manifests = [path for folder in (run / f"step_{step:08d}", run.absolute().parent / BASE)
                 for path in sorted(folder.rglob("manifest-*.json"))]
    digest = hashlib.blake2b(digest_size=16)
    for path in manifests:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _fingerprint_model(folder: Path) -> str:
    """Of a directory's *.safetensors; on process 0 alone, which tells the others."""
    digest = np.zeros(16, np.uint8)
    if jax.process_index() == 0:
        files = sorted(folder.glob("*.safetensors"))
        listed: dict = {}
        if (folder / directories.MANIFEST).is_file():
            listed = directories.read_json(folder / directories.MANIFEST).get("files", {})
        if any(path.name not in listed for path in files):
            listed = {name: {"blake2b": found}
                      for name, found in directories.checksums(files).items()}
        lines = [f"{path.name} {listed[path.name]['blake2b']}" for path in files]
        found = hashlib.blake2b("\n".join(lines).encode(), digest_size=16).digest()
        digest = np.frombuffer(found, np.uint8)
    if jax.process_count() > 1:
        digest = multihost_utils.broadcast_one_to_all(digest)
    return bytes(np.asarray(digest)).hex()


def describe_run(program: Program, task: Any, batch_size: int, init_from: str | None = None
                 ) -> dict[str, Any]:
    """What a run's result depends on, as JSON: kept in its workdir and in every checkpoint.

    `init_from` is the fingerprint of the weights it starts from.
    """
    optimizer = dataclasses.asdict(program.optimizer)
    training = {"seed": program.seed, "batch_size": batch_size, "accumulate": program.accumulate,
                "dtype": str(program.dtype), "compute_dtype": str(program.compute_dtype),
                "ema": program.ema, "optimizer": optimizer.pop("name"), **optimizer}
    lora = None if program.lora is None else dataclasses.asdict(program.lora)
    record = {"format_version": FORMAT_VERSION, "model": zoo.to_dict(program.config),
              **task.describe(), "training": training, "init_from": init_from, "lora": lora}
    return json.loads(json.dumps(record))
