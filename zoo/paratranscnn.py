"""ParaTransCNN (arXiv:2401.15307): a ResNet and a pyramid of Transformers side by side, fused by a
decoder, for a class of every pixel."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

import sharding
from layers.attention import Attention
from layers.dropout import dropout, fold
from layers.image import Conv, ConvNorm, PatchEmbed, PatchExpand, SqueezeExcite
from layers.linear import Linear
from layers.norm import Norm, Normalize
from layers.segmentation import cross_entropy_and_dice
from layers.stack import REMAT
from zoo.protocol import Output

# Residual blocks of the four stages, by the number of layers (arXiv:1512.03385, table 1; 10 is what
# others call the network with one block a stage).
RESNETS: Mapping[int, tuple[int, ...]] = {10: (1, 1, 1, 1), 18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}
STRIDE = 16  # of the deepest feature maps; sides are padded to multiples of it.
_REDUCTION = 16  # of squeeze-and-excitation
_LAYER_NORM = Norm("layer", 1e-5, bias=True)


@dataclasses.dataclass(frozen=True)
class ResNet:
    """The convolutional branch: a ResNet of basic blocks, without its max-pooling and its head.

    Attributes:
      depth: its layers, a key of `RESNETS`.
      width: channels of the first stage; each further one doubles them.
    """

    depth: int = 34
    width: int = 64

    def __post_init__(self):
        if self.depth not in RESNETS:
            raise ValueError(f"cnn.depth is {self.depth}; it must be one of {sorted(RESNETS)}")
        if self.width < 1:
            raise ValueError(f"cnn.width is {self.width}; it must be at least 1")


@dataclasses.dataclass(frozen=True)
class Pyramid:
    """The Transformer branch: three stages of blocks over patches of 4, 8 and 16 pixels.

    It has no position embedding. Dropout falls on what each map of a block returns, not on the
    attention's weights, which never exist all at once.

    Attributes:
      width: of the first stage's vectors; each further one doubles it.
      depth: blocks of a stage.
      num_heads: of attention.
      mlp_ratio: the MLP's inner width over the stage's.
      dropout: its rate, in training.
    """

    width: int = 320
    depth: int = 3
    num_heads: int = 8
    mlp_ratio: int = 2
    dropout: float = 0.1

    def __post_init__(self):
        for name in ("width", "depth", "num_heads", "mlp_ratio"):
            if getattr(self, name) < 1:
                raise ValueError(f"transformer.{name} is {getattr(self, name)}; it must be at "
                                 "least 1")
        if self.width % self.num_heads:
            raise ValueError(
                f"transformer.width is {self.width}, which does not divide by "
                f"transformer.num_heads = {self.num_heads}; use a multiple of {self.num_heads}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"transformer.dropout is {self.dropout}; it must be in [0, 1)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParaTransCnn:
    """A config of ParaTransCNN.

    Attributes:
      num_classes: of pixels, background included.
      in_channels: of an image.
      cnn, transformer: the branches; one of them may be None.
    """

    kind: ClassVar[str] = "segmentation"

    num_classes: int
    in_channels: int = 3
    cnn: ResNet | None = ResNet()
    transformer: Pyramid | None = Pyramid()

    def __post_init__(self):
        for name in ("num_classes", "in_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.cnn is None and self.transformer is None:
            raise ValueError("cnn and transformer are both none; keep one of the branches")

    def build(self, *, key: jax.Array, dtype=jnp.float32, stacked: bool = True,
              remat: str = "none") -> "Segmenter":
        """The model with fresh parameters; its blocks are a list, `stacked` or not."""
        del stacked
        return Segmenter(self, key=key, dtype=dtype, remat=remat)

    def features(self) -> tuple[int, int, int]:
        """Channels of both branches together at 1/16, 1/8 and 1/4 of the image's sides."""
        cnn = 0 if self.cnn is None else self.cnn.width
        width = 0 if self.transformer is None else self.transformer.width
        return 4 * width + 8 * cnn, 2 * width + 4 * cnn, width + 2 * cnn

    def decoder(self) -> tuple[tuple[int, int, int], ...]:
        """(channels of the features, channels in all, channels handed on) of the three levels."""
        deep, middle, shallow = self.features()
        last = shallow if self.transformer is None else self.transformer.width
        return ((deep, deep, middle), (middle, 2 * middle, middle),
                (shallow, shallow + middle, last))

    def flops_per_image(self, height: int, width: int) -> float:
        """Forward FLOPs of an image of height x width, two a multiply-add.

        Counted are convolutions and matrix products, also where a convolution reads zeros beyond
        the border. Training costs three times as much.
        """
        height, width = (math.ceil(side / STRIDE) * STRIDE for side in (height, width))
        pixels = height * width
        total = 0
        if self.cnn is not None:
            c = self.cnn.width
            total += 49 * self.in_channels * c * pixels / 4
            for stage, blocks in enumerate(RESNETS[self.cnn.depth]):
                area, wide = pixels / 4 ** (stage + 1), c * 2**stage
                total += (2 * blocks - 1) * 9 * wide**2 * area
                # The first convolution of a stage and the shortcut around it.
                total += (9 * wide * wide if stage == 0 else (9 + 1) * wide * wide / 2) * area
        if self.transformer is not None:
            t, inputs, patch = self.transformer, self.in_channels, 4
            for stage in range(3):
                tokens, wide = pixels / 4 ** (stage + 2), t.width * 2**stage
                total += patch**2 * inputs * wide * tokens
                total += t.depth * tokens * ((4 + 2 * t.mlp_ratio) * wide**2 + 2 * tokens * wide)
                inputs, patch = wide, 2
        for level, (features, inputs, outputs) in enumerate(self.decoder()):
            area, patch = pixels / 4 ** (4 - level), 4 if level == 2 else 2
            total += 2 * features * max(1, features // _REDUCTION)
            total += (2 * 9 * inputs**2 + patch**2 * inputs * outputs) * area
        return 2 * (total + self.decoder()[-1][-1] * self.num_classes * pixels)


Statistics = dict[str, Any]


class ResidualBlock(nnx.Module):
    """Two 3x3 convolutions around a shortcut (arXiv:1512.03385, figure 5, left)."""

    def __init__(self, inputs: int, outputs: int, stride: int, *, key: jax.Array, dtype):
        first, second, shortcut = jax.random.split(key, 3)
        self.first = ConvNorm(inputs, outputs, stride=stride, key=first, dtype=dtype)
        self.second = ConvNorm(outputs, outputs, key=second, dtype=dtype)
        self.shortcut = None if (inputs, stride) == (outputs, 1) else ConvNorm(
            inputs, outputs, 1, stride=stride, key=shortcut, dtype=dtype)

    def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, Statistics]:
        """[B, H, W, C] -> ([B, H / stride, W / stride, D], statistics)."""
        y, first = self.first(x, train)
        y, second = self.second(jax.nn.relu(y), train)
        new = {"first": first, "second": second}
        if self.shortcut is not None:
            x, new["shortcut"] = self.shortcut(x, train)
        return jax.nn.relu(x + y), new


class TransformerBlock(nnx.Module):
    """A pre-norm block in which all tokens see each other."""

    def __init__(self, config: Pyramid, width: int, *, key: jax.Array, dtype):
        mixer, up, down = jax.random.split(key, 3)
        self.dropout = config.dropout
        attention = Attention(config.num_heads, config.num_heads, width // config.num_heads,
                              out_bias=True)
        self.mixer_norm, self.mlp_norm = (
            Normalize(_LAYER_NORM, width, key=key, dtype=dtype) for _ in range(2))
        self.mixer = attention.build(width, gain=1.0, key=mixer, dtype=dtype)
        hidden = config.mlp_ratio * width
        self.up = Linear("btd,df->btf", (width, hidden), ("embed", "mlp"),
                         ("batch", "seq", "mlp"), bias=True, key=up, dtype=dtype)
        self.down = Linear("btf,fd->btd", (hidden, width), ("mlp", "embed"),
                           ("batch", "seq", "embed"), bias=True, key=down, dtype=dtype)

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        """[B, T, D] -> the same."""
        y = self.mixer_norm(x)
        # Keys and values from a context are those that every query sees.
        mixed = self.mixer(y, None, None, y)
        # The authors drop this branch's elements twice; once at this rate is the same.
        rate = 1.0 - (1.0 - self.dropout) ** 2
        y, x = self.mlp_norm(dropout(mixed, rate, fold(key, 0)), x)
        hidden = dropout(jax.nn.gelu(self.up(y), approximate=False), self.dropout, fold(key, 1))
        x = x + dropout(self.down(hidden), self.dropout, fold(key, 2))
        return sharding.constrain(x, "batch", "seq", "embed")


class _Runs:
    """Calls a block so that the backward pass keeps of it what `remat` says."""

    def __init__(self, remat: str):
        if remat not in REMAT:
            raise ValueError(f"remat is {remat!r}; it must be one of {sorted(REMAT)}")
        self.policy = REMAT[remat]

    def __call__(self, block: Callable, x: jax.Array, *rest: Any) -> Any:
        def run(x):
            return block(x, *rest)

        return run(x) if self.policy is None else jax.checkpoint(run, policy=self.policy)(x)


class CnnBranch(nnx.Module):
    """A ResNet's feature maps."""

    def __init__(self, config: ResNet, inputs: int, *, key: jax.Array, dtype):
        stem, key = jax.random.split(key)
        self.stem = ConvNorm(inputs, config.width, 7, stride=2, axes=(None, "channels"), key=stem,
                             dtype=dtype)
        self.stages, inputs = nnx.List(), config.width
        for stage, count in enumerate(RESNETS[config.depth]):
            outputs, made = config.width * 2**stage, nnx.List()
            for i in range(count):
                key, now = jax.random.split(key)
                stride = 2 if i == 0 and stage else 1
                made.append(ResidualBlock(inputs, outputs, stride, key=now, dtype=dtype))
                inputs = outputs
            self.stages.append(made)

    def __call__(self, x: jax.Array, run: _Runs, train: bool) -> tuple[list[jax.Array], Statistics]:
        """[B, H, W, C] -> (maps at 1/16, 1/8 and 1/4 of the sides, statistics)."""
        x, stem = self.stem(x, train)
        x, maps, stages = jax.nn.relu(x), [], {}
        for i, stage in enumerate(self.stages):
            stages[str(i)] = {}
            for j, block in enumerate(stage):
                x, stages[str(i)][str(j)] = run(block, x, train)
            maps.append(x)
        return maps[:0:-1], {"stem": stem, "stages": stages}


class TransformerStage(nnx.Module):
    """Patches of the feature map before, and blocks over all of them."""

    def __init__(self, config: Pyramid, inputs: int, width: int, size: int, *, key: jax.Array,
                 dtype):
        patch, *keys = jax.random.split(key, 1 + config.depth)
        self.embed = PatchEmbed(inputs, width, size, key=patch, dtype=dtype)
        self.units = nnx.List([TransformerBlock(config, width, key=k, dtype=dtype) for k in keys])

    def __call__(self, x: jax.Array, run: _Runs, key: jax.Array | None) -> jax.Array:
        """[B, H, W, C] -> [B, H / size, W / size, width]."""
        x = self.embed(x)
        b, h, w, d = x.shape
        x = sharding.constrain(x.reshape(b, h * w, d), "batch", "seq", "embed")
        for i, block in enumerate(self.units):
            x = run(block, x, fold(key, i))
        return sharding.constrain(x.reshape(b, h, w, d), "batch", "height", None, "embed")


class DecoderLevel(nnx.Module):
    """Weighs the features of a level, joins what comes from below, and makes it larger."""

    def __init__(self, features: int, inputs: int, outputs: int, size: int, *, key: jax.Array,
                 dtype):
        excite, first, second, up = jax.random.split(key, 4)
        self.excite = SqueezeExcite(features, _REDUCTION, key=excite, dtype=dtype)
        self.first = ConvNorm(inputs, inputs, bias=True, key=first, dtype=dtype)
        self.second = ConvNorm(inputs, inputs, bias=True, key=second, dtype=dtype)
        self.up = PatchExpand(inputs, outputs, size, key=up, dtype=dtype)

    def __call__(self, features: list[jax.Array], below: jax.Array | None, train: bool
                 ) -> tuple[jax.Array, Statistics]:
        """Maps [B, H, W, C], one of the level below -> ([B, H size, W size, D], statistics)."""
        x = self.excite(jnp.concatenate(features, axis=-1))
        x = x if below is None else jnp.concatenate([x, below], axis=-1)
        x, first = self.first(x, train)
        x, second = self.second(jax.nn.relu(x), train)
        return self.up(jax.nn.relu(x)), {"first": first, "second": second}


class Segmenter(nnx.Module):
    """The model of a `ParaTransCnn`."""

    def __init__(self, config: ParaTransCnn, *, key: jax.Array, dtype, remat: str):
        self.config, self._run = config, _Runs(remat)
        cnn, transformer, decoder, head = jax.random.split(key, 4)
        c, t = config.cnn, config.transformer
        self.cnn = None if c is None else CnnBranch(c, config.in_channels, key=cnn, dtype=dtype)
        self.transformer = None if t is None else nnx.List([
            TransformerStage(t, inputs, t.width * 2**i, size, key=k, dtype=dtype)
            for i, (k, inputs, size) in enumerate(zip(
                jax.random.split(transformer, 3), (config.in_channels, t.width, 2 * t.width),
                (4, 2, 2), strict=True))])
        self.decoder = nnx.List([
            DecoderLevel(*channels, size, key=k, dtype=dtype)
            for channels, size, k in zip(config.decoder(), (2, 2, 4),
                                         jax.random.split(decoder, 3), strict=True)])
        self.head = Conv(config.decoder()[-1][-1], config.num_classes, 1, bias=True,
                         axes=("embed", None), key=head, dtype=dtype)

    def __call__(self, batch: dict[str, jax.Array], key: jax.Array | None = None,
                 train: bool = False) -> Output:
        """Classes of all pixels.

        Args:
          batch: ``images``, floats [B, H, W, C] of any sides: they are padded with zeros at the
            bottom and on the right to multiples of 16, and the result is cut to their size.
          key: for dropout; None for none.
          train: normalises by the batch's own statistics, returns the running ones' next values,
            and needs a key where the config has dropout.

        Returns:
          Output with logits float32 [B, H, W, classes] and, in training, statistics.
        """
        if not isinstance(batch, Mapping) or "images" not in batch:
            raise ValueError("the batch is no dict with 'images', floats [B, H, W, C]; pass "
                             "{'images': images}")
        x, channels = batch["images"], self.config.in_channels
        if x.ndim != 4 or x.shape[-1] != channels or not x.size:
            raise ValueError(f"images have the shape {x.shape}; they must be [B, H, W, "
                             f"{channels}], the config's in_channels")
        t = self.config.transformer
        if train and key is None and t is not None and t.dropout:
            raise ValueError(f"transformer.dropout is {t.dropout}; training needs a key for it")
        if train and sharding.shards("embed") > 1 and sharding.shards("channels") > 1:
            # Found by comparison with one device. Either alone is right, and so is each layer by
            # itself with both; the cause is not known.
            raise ValueError("the rules lay both embed and channels over the mesh, with which "
                             "gradients of the whole network come out wrong; leave channels whole, "
                             "as in --rules=fsdp_tp,channels=none")
        key = key if train else None
        height, width = x.shape[1:3]
        x = x.astype(self.head.kernel[...].dtype)
        x = jnp.pad(x, ((0, 0), (0, -height % STRIDE), (0, -width % STRIDE), (0, 0)))
        x = sharding.constrain(x, "batch", "height", None, None)
        levels: list[list[jax.Array]] = [[], [], []]
        new: Statistics = {}
        if self.transformer is not None:
            y = x
            for i, stage in enumerate(self.transformer):
                y = stage(y, self._run, fold(key, i))
                levels[2 - i].append(y)
        if self.cnn is not None:
            maps, new["cnn"] = self.cnn(x, self._run, train)
            for level, found in zip(levels, maps, strict=True):
                level.append(found)
        y, new["decoder"] = None, {}
        for i, (level, features) in enumerate(zip(self.decoder, levels, strict=True)):
            y, new["decoder"][str(i)] = self._run(level, features, y, train)
        logits = self.head(y)[:, :height, :width].astype(jnp.float32)
        return Output(logits, statistics=new if train else {})

    def loss(self, output: Output, labels: jax.Array, weights: jax.Array | None = None
             ) -> tuple[jax.Array, jax.Array, dict]:
        """Half cross-entropy, half Dice loss: (mean times weight, weight, its parts).

        labels int32 [B, H, W]; weights float32 [B, H, W], None for all 1; see
        `layers.segmentation.cross_entropy_and_dice`.
        """
        if weights is None:
            weights = jnp.ones(labels.shape, jnp.float32)
        return cross_entropy_and_dice(output.logits, labels, weights)


PRESETS = {
    # For demonstrations and tests.
    "paratranscnn-tiny": lambda: ParaTransCnn(
        num_classes=9, in_channels=1, cnn=ResNet(10, 16), transformer=Pyramid(16, 1, 2)),
    "paratranscnn-small": lambda: ParaTransCnn(
        num_classes=9, cnn=ResNet(18, 32), transformer=Pyramid(96, 2)),
    # The authors', for Synapse.
    "paratranscnn": lambda: ParaTransCnn(num_classes=9),
}
