"""ParaTransCNN of its authors as ours, both ways, and ResNets of torchvision as its CNN branch.

Its authors' checkpoints are bare tensors, so the config is read off these; what we write has a
config.json besides, of keys of our own choice.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from zoo import protocol
from zoo.convert import loading, saving
from zoo.convert.family import Family, Settings
from zoo.convert.safetensors import Tensor, Weights
from zoo.convert.table import ConversionError, Rule, Table
from zoo.paratranscnn import RESNETS, ParaTransCnn, Pyramid, ResNet

_MAX_DEPTH = 16  # Transformer blocks of a stage that there are names for.
_COUNTERS = (r".*\.num_batches_tracked",)
# What nobody reads off tensors; those of the authors.
_DEFAULTS = {"num_attention_heads": 8, "dropout": 0.1}


def _conv(theirs: str, ours: str) -> Rule:
    return Rule(f"{theirs}.weight", f"{ours}/kernel", "d c p q -> p q c d")


def _norm(theirs: str, ours: str) -> Iterator[Rule]:
    yield Rule(f"{theirs}.weight", f"{ours}/scale", "c -> c")
    yield Rule(f"{theirs}.bias", f"{ours}/bias", "c -> c")
    for name, statistic in (("mean", "mean"), ("var", "variance")):
        yield Rule(f"{theirs}.running_{name}", f"{protocol.STATISTICS}/{ours}/{statistic}",
                   "c -> c")


def _resnet(stem: tuple[str, str], stage: str) -> Iterator[Rule]:
    """A ResNet whose stem has these names, and whose stages begin with `stage`, from 1."""
    conv, norm = stem
    yield _conv(conv, "cnn/stem/conv")
    yield from _norm(norm, "cnn/stem/norm")
    for i in range(4):
        for j in range(max(blocks[i] for blocks in RESNETS.values())):
            theirs, ours = f"{stage}{i + 1}.{j}.", f"cnn/stages/{i}/{j}/"
            for conv, norm, name in (("conv1", "bn1", "first"), ("conv2", "bn2", "second"),
                                     ("downsample.0", "downsample.1", "shortcut")):
                yield _conv(theirs + conv, f"{ours}{name}/conv")
                yield from _norm(theirs + norm, f"{ours}{name}/norm")


def _transformer() -> Iterator[Rule]:
    for i in range(3):
        patch, ours = f"patch_embed_{i + 1}", f"transformer/{i}/embed/patch"
        yield _conv(patch, ours)
        yield Rule(f"{patch}.bias", f"{ours}/bias", "d -> d")
        for j in range(_MAX_DEPTH):
            ours = f"transformer/{i}/units/{j}/"
            attention, mlp = (f"vit_{i + 1}.net.{2 * j + k}.fn." for k in range(2))
            for theirs, name in ((attention, "mixer_norm"), (mlp, "mlp_norm")):
                yield Rule(f"{theirs}norm.weight", f"{ours}{name}/scale", "d -> d")
                yield Rule(f"{theirs}norm.bias", f"{ours}{name}/bias", "d -> d")
            yield Rule(f"{attention}fn.qkv.weight", tuple(
                f"{ours}mixer/{name}/kernel" for name in ("query", "key", "value")),
                "(h k) d -> d h k")
            yield Rule(f"{attention}fn.proj.weight", f"{ours}mixer/out/kernel", "d (h v) -> h v d")
            yield Rule(f"{attention}fn.proj.bias", f"{ours}mixer/out/bias", "d -> d")
            for index, name in ((0, "up"), (3, "down")):
                yield Rule(f"{mlp}fn.net.{index}.weight", f"{ours}{name}/kernel", "f d -> d f")
                yield Rule(f"{mlp}fn.net.{index}.bias", f"{ours}{name}/bias", "f -> f")


def _decoder() -> Iterator[Rule]:
    for i in range(3):
        ours = f"decoder/{i}/"
        for index, name in ((0, "down"), (2, "up")):
            yield Rule(f"SE_{i + 1}.fc.{index}.weight", f"{ours}excite/{name}/kernel",
                       "f c -> c f")
        for index, name in ((1, "first"), (3, "second")):
            theirs = f"decoder{i + 1}."
            yield _conv(f"{theirs}conv{index}", f"{ours}{name}/conv")
            yield Rule(f"{theirs}conv{index}.bias", f"{ours}{name}/conv/bias", "c -> c")
            yield from _norm(f"{theirs}norm{index}", f"{ours}{name}/norm")
        # Of a transposed convolution the inputs come first.
        yield Rule(f"up{3 - i}_1.weight", f"{ours}up/kernel", "c d p q -> p q c d")
        yield Rule(f"up{3 - i}_1.bias", f"{ours}up/bias", "d -> d")
    yield _conv("out", "head")
    yield Rule("out.bias", "head/bias", "d -> d")


_RULES = (*_resnet(("firstconv", "firstbn"), "encoder"), *_transformer(), *_decoder())
_TORCHVISION = tuple(_resnet(("conv1", "bn1"), "layer"))


def _config(c: Settings) -> ParaTransCnn:
    cnn = transformer = None
    if "resnet_depth" in c:
        cnn = ResNet(c.whole("resnet_depth"), c.whole("resnet_width"))
    if "hidden_size" in c:
        if not 1 <= (depth := c.whole("depth")) <= _MAX_DEPTH:
            raise ConversionError(f"depth is {depth}: it must be from 1 to {_MAX_DEPTH}, the "
                                  "blocks of a stage that tensors have names for")
        transformer = Pyramid(
            c.whole("hidden_size"), depth, c.whole("num_attention_heads"),
            c.whole("mlp_ratio"), c.number("dropout"))
    return ParaTransCnn(num_classes=c.whole("num_labels"), in_channels=c.whole("num_channels"),
                        cnn=cnn, transformer=transformer)


def _dict(config: ParaTransCnn) -> dict[str, Any]:
    found = {"num_labels": config.num_classes, "num_channels": config.in_channels}
    if (cnn := config.cnn) is not None:
        found |= {"resnet_depth": cnn.depth, "resnet_width": cnn.width}
    if (t := config.transformer) is not None:
        found |= {"hidden_size": t.width, "depth": t.depth, "num_attention_heads": t.num_heads,
                  "mlp_ratio": t.mlp_ratio, "dropout": t.dropout}
    return found


def _infer(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The keys of a config.json that the shapes of a checkpoint's tensors tell."""
    def shape(key, rank):
        found = tensors[key].shape if key in tensors else None
        if found is not None and len(found) != rank:
            raise ConversionError(f"{key!r} has the shape {list(found)}, and not {rank} axes; "
                                  "this is another model")
        return found

    if (head := shape("out.weight", 4)) is None:
        raise ConversionError("there is no 'out.weight', the head of a ParaTransCNN; this is "
                              "another model, or a part of one")
    found: dict[str, Any] = {"num_labels": head[0], **_DEFAULTS}
    if stem := shape("firstconv.weight", 4):
        blocks = tuple(_count(tensors, rf"encoder{i}\.(\d{{1,6}})\..*") for i in range(1, 5))
        depth = next((depth for depth, known in RESNETS.items() if known == blocks), None)
        if depth is None:
            raise ConversionError(f"encoder1 to encoder4 have {blocks} blocks; what can be "
                                  f"converted has one of {list(RESNETS.values())}")
        found |= {"num_channels": stem[1], "resnet_depth": depth, "resnet_width": stem[0]}
    if patch := shape("patch_embed_1.weight", 4):
        up = shape("vit_1.net.1.fn.fn.net.0.weight", 2) or (2 * patch[0], patch[0])
        if not up[1]:
            raise ConversionError(f"'vit_1.net.1.fn.fn.net.0.weight' has the shape {list(up)}, "
                                  "without inputs; this is another model")
        found |= {"num_channels": patch[1], "hidden_size": patch[0],
                  "depth": _count(tensors, r"vit_1\.net\.(\d{1,6})\..*") // 2,
                  "mlp_ratio": up[0] // up[1]}
    return found


def _count(tensors: Mapping[str, Tensor], pattern: str) -> int:
    numbers = (re.fullmatch(pattern, key) for key in tensors)
    return 1 + max((int(found[1]) for found in numbers if found), default=-1)


FAMILIES = (
    Family("paratranscnn", "ParaTransCNN", _config, _dict, _RULES, probe="up1_1.weight",
           comparable=lambda config: config, ignored=_COUNTERS, infer=_infer),
)


# --- the CNN branch alone ------------------------------------------------------------------------


def from_torchvision(model, source: str | Path):
    """The model with its CNN branch from a ResNet of torchvision's, such as one of ImageNet.

    Args:
      model: of `zoo.build`, with a CNN branch of that depth and width.
      source: a *.safetensors with torchvision's names, or a directory that holds it. Its head
        is left alone.

    Returns:
      The model; what is not in the branch is the given one's.

    Raises:
      ValueError: tensors that are not those of the branch, all problems at once.
    """
    definition, params = protocol.split(model)
    table, leaves = _branch(params)
    weights = Weights(Path(source).expanduser())
    try:
        table.check(weights, source, (*_COUNTERS, r"fc\.(weight|bias)"))
        for path, pieces in table.parameters.items():
            leaves[path] = loading.place(
                lambda piece, index: piece.read(weights, index), pieces, 0, leaves[path])
    finally:
        weights.close()
    return protocol.merge(definition, jax.tree.unflatten(
        jax.tree.structure(params), leaves.values()))


def to_torchvision(model, folder: str | Path, dtype=None) -> None:
    """Writes a model's CNN branch to a new directory under torchvision's names, without a head.

    ``resnet34().load_state_dict(tensors, strict=False)`` takes the tensors of its model.safetensors
    and misses ``fc`` alone. Args and errors are those of `zoo.save`.
    """
    table, _ = _branch(protocol.split(model)[1])
    saving.write_tensors(model, folder, table, dtype)


def _branch(params: protocol.Params) -> tuple[Table, dict[str, Any]]:
    """The table of a model's CNN branch, and all of its parameters by path."""
    leaves = protocol.flat(params)
    shapes = {path: x.shape for path, x in leaves.items()
              if path.removeprefix(f"{protocol.STATISTICS}/").startswith("cnn/")}
    if not shapes:
        raise ValueError("the model has no CNN branch; build one with cnn=ResNet(...)")
    return Table(_TORCHVISION, shapes, 0), leaves
