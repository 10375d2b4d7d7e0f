"""ParaTransCNN (arXiv:2401.15307) from torch.nn, under its authors' names: whom ours is measured
against, in speed and in results."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from zoo.paratranscnn import RESNETS


class _BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None if (inputs, stride) == (outputs, 1) else nn.Sequential(
            nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        y = functional.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return functional.relu(y + (x if self.downsample is None else self.downsample(x)))


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)
        # Dropped twice by its authors; not on the weights, which fused attention never makes.
        self.dropout = nn.Dropout(1 - (1 - dropout) ** 2)

    def forward(self, x):
        b, t, d = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(q, k, v)
        return self.dropout(self.proj(y.transpose(1, 2).reshape(b, t, d)))


class _Mlp(nn.Module):
    def __init__(self, width: int, hidden: int, dropout: float):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Dropout(dropout),
                                 nn.Linear(hidden, width), nn.Dropout(dropout))

    def forward(self, x):
        return self.net(x)


class _PreNorm(nn.Module):
    def __init__(self, width: int, fn: nn.Module):
        super().__init__()
        self.norm, self.fn = nn.LayerNorm(width), fn

    def forward(self, x):
        return self.fn(self.norm(x))


class _Residual(nn.Module):
    def __init__(self, fn: nn.Module):
        super().__init__()
        self.fn = fn

    def forward(self, x):
        return x + self.fn(x)


class _Transformer(nn.Module):
    def __init__(self, width: int, depth: int, heads: int, ratio: int, dropout: float):
        super().__init__()
        self.net = nn.Sequential(*(
            _Residual(_PreNorm(width, make())) for _ in range(depth)
            for make in (lambda: _Attention(width, heads, dropout),
                         lambda: _Mlp(width, ratio * width, dropout))))

    def forward(self, x):
        """[B, D, H, W] -> the same."""
        y = self.net(x.flatten(2).transpose(1, 2))
        return y.transpose(1, 2).reshape(x.shape)


class _SqueezeExcite(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        hidden = max(1, channels // 16)
        self.fc = nn.Sequential(nn.Linear(channels, hidden, bias=False), nn.ReLU(),
                                nn.Linear(hidden, channels, bias=False), nn.Sigmoid())

    def forward(self, x):
        return x * self.fc(x.mean((2, 3)))[:, :, None, None]


class _Decoder(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, 1, 1)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, channels, 3, 1, 1)
        self.norm3 = nn.BatchNorm2d(channels)

    def forward(self, x):
        x = functional.relu(self.norm1(self.conv1(x)))
        return functional.relu(self.norm3(self.conv3(x)))


class ParaTransCnn(nn.Module):
    """The network that a config.json of `zoo.to_hf` describes, one branch or both."""

    def __init__(self, config: Mapping[str, Any]):
        super().__init__()
        inputs, c, d = (config["num_channels"], config.get("resnet_width", 0),
                        config.get("hidden_size", 0))
        self.has_cnn, self.has_transformer = c > 0, d > 0
        if c:
            self.firstconv = nn.Conv2d(inputs, c, 7, 2, 3, bias=False)
            self.firstbn = nn.BatchNorm2d(c)
            before = c
            for i, count in enumerate(RESNETS[config["resnet_depth"]]):
                wide = c * 2**i
                blocks = [_BasicBlock(before if j == 0 else wide, wide, 2 if i and j == 0 else 1)
                          for j in range(count)]
                setattr(self, f"encoder{i + 1}", nn.Sequential(*blocks))
                before = wide
        if d:
            before = inputs
            for i, size in enumerate((4, 2, 2)):
                wide = d * 2**i
                setattr(self, f"patch_embed_{i + 1}", nn.Conv2d(before, wide, size, size))
                setattr(self, f"vit_{i + 1}", _Transformer(
                    wide, config["depth"], config["num_attention_heads"], config["mlp_ratio"],
                    config["dropout"]))
                before = wide
        deep, middle, shallow = (d * 2**i + c * 2**(i + 1) for i in (2, 1, 0))
        last = d or shallow
        self.SE_1, self.SE_2, self.SE_3 = map(_SqueezeExcite, (deep, middle, shallow))
        self.decoder1, self.decoder2, self.decoder3 = map(
            _Decoder, (deep, 2 * middle, shallow + middle))
        self.up3_1 = nn.ConvTranspose2d(deep, middle, 2, 2)
        self.up2_1 = nn.ConvTranspose2d(2 * middle, middle, 2, 2)
        self.up1_1 = nn.ConvTranspose2d(shallow + middle, last, 4, 4)
        self.out = nn.Conv2d(last, config["num_labels"], 1)

    def forward(self, x):
        """[B, C, H, W], sides multiples of 16 -> logits [B, classes, H, W]."""
        levels: list[list] = [[], [], []]
        if self.has_transformer:
            y = x
            for i, level in enumerate(reversed(levels)):
                y = getattr(self, f"patch_embed_{i + 1}")(y)
                y = getattr(self, f"vit_{i + 1}")(y)
                level.append(y)
        if self.has_cnn:
            y = self.encoder1(functional.relu(self.firstbn(self.firstconv(x))))
            for i, level in enumerate(reversed(levels)):
                y = getattr(self, f"encoder{i + 2}")(y)
                level.append(y)
        deep, middle, shallow = (torch.cat(level, 1) for level in levels)
        y = self.up3_1(self.decoder1(self.SE_1(deep)))
        y = self.up2_1(self.decoder2(torch.cat([self.SE_2(middle), y], 1)))
        y = self.up1_1(self.decoder3(torch.cat([self.SE_3(shallow), y], 1)))
        return self.out(y)


def loss(logits, labels):
    """Half cross-entropy, half Dice loss, of logits [B, classes, H, W] and labels [B, H, W]."""
    logits = logits.float()
    p = logits.softmax(1)
    truth = functional.one_hot(labels, logits.shape[1]).movedim(-1, 1).to(p)
    pixels = (0, 2, 3)
    both, sizes = (p * truth).sum(pixels), (p * p).sum(pixels) + truth.sum(pixels)
    dice = 1 - (2 * both + 1e-5) / (sizes + 1e-5)
    return 0.5 * functional.cross_entropy(logits, labels) + 0.5 * dice.mean()
