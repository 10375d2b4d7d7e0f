"""parazoo: sequence and dense-prediction models in JAX behind one small door.

>>> import zoo
>>> model = zoo.build("llama-tiny")
>>> logits = model({"tokens": tokens}).logits
>>> zoo.generate(model, [[100, 101, 102]], max_new_tokens=8).tokens
"""

from zoo import protocol
from zoo.decode.loop import Generation, generate, stream
from zoo.registry import build, config, from_dict, override, to_dict
from zoo.registry import list_models as list

__all__ = [
    "Generation", "build", "config", "from_dict", "generate", "list", "override", "protocol",
    "stream", "to_dict",
]
