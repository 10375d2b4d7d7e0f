"""parazoo: sequence and dense-prediction models in JAX behind one small door.

>>> import zoo
>>> model = zoo.build("llama-tiny")
>>> logits = model({"tokens": tokens}).logits
>>> zoo.generate(model, [[100, 101, 102]], max_new_tokens=8).tokens
"""

import importlib
from typing import Any

from zoo import protocol
from zoo.decode.loop import Generation, generate, stream
from zoo.registry import build, config, from_dict, override, to_dict
from zoo.registry import list_models as list

# Loaded when asked for.
_LAZY = {**dict.fromkeys(("from_hf", "load", "load_config", "save", "to_hf"), "zoo.convert"),
         "segment": "zoo.segmentation"}

__all__ = [
    "Generation", "build", "config", "from_dict", "from_hf", "generate", "list", "load",
    "load_config", "override", "protocol", "save", "segment", "stream", "to_dict", "to_hf",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'zoo' has no attribute {name!r}")


def __dir__() -> Any:
    return sorted({*globals(), *_LAZY})
