"""ParaTransCNN's weights in and out: its authors' names, and torchvision's for the CNN branch."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import zoo
from tests.tiny import assert_same, flat, jitted
from tests.tolerances import assert_close
from tests.zoo.test_paratranscnn import drawn
from zoo import convert
from zoo.convert.paratranscnn import from_torchvision, to_torchvision
from zoo.convert.source import choose_family, parameter_shapes, period
from zoo.convert.table import Table

COUNTER = "num_batches_tracked"


def uneven(shape, j):
    """Numbers in [-0.5, 0.5) that any language computes alike, of the j-th array."""
    i = np.arange(int(np.prod(shape)), dtype=np.float64)
    values = np.abs(np.sin(12.9898 * (i + 1) + 78.233 * (j + 1))) * 43758.5453
    return (values - np.floor(values) - 0.5).reshape(shape)


def reference(config) -> dict[str, np.ndarray]:
    """A checkpoint under its authors' names: each tensor from its place among the sorted keys."""
    shapes = parameter_shapes(config)
    table = Table(choose_family(config).rules, shapes, period(shapes))
    sizes = {key: shape for key, (shape, _) in table.tensors.items()}
    sizes |= {key.replace("running_mean", COUNTER): None for key in sizes
              if key.endswith("running_mean")}
    found = {}
    for j, key in enumerate(sorted(sizes)):
        if (shape := sizes[key]) is None:
            found[key] = np.zeros((), np.int64)
            continue
        h = uneven(shape, j)
        if key.endswith("running_var") or (len(shape) == 1 and key.endswith("weight")):
            h = 1 + 0.2 * h
        elif len(shape) == 1:
            h = 0.2 * h
        else:
            h = h * np.sqrt(12) / np.sqrt(h.size / shape[0])
        found[key] = h.astype(np.float32)
    return found


def small(**overrides):
    return zoo.config("paratranscnn-tiny", num_classes=3, **{
        "cnn.width": 8, "transformer.width": 16, **overrides})


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A directory of bare tensors, as its authors write them."""
    folder = tmp_path_factory.mktemp("theirs")
    tensors = reference(small(**{"transformer.num_heads": 8}))
    save_file(tensors, folder / "model.safetensors")
    return folder, tensors


def test_pinned_numbers(tmp_path):
    """What its authors' code gives for these weights and this image, at width 32."""
    config = zoo.config("paratranscnn", **{"transformer.width": 32})
    tensors = reference(config)
    assert len(tensors) == 377
    save_file(tensors, tmp_path / "model.safetensors")
    model = zoo.from_hf(tmp_path)
    assert model.config == config
    image = np.moveaxis(uneven((1, 3, 64, 64), 999), 1, -1).astype(np.float32)
    labels = (np.arange(64 * 64) // 455 % 9).reshape(1, 64, 64)

    def run(model, image):
        output = model({"images": image})
        return output.logits, model.loss(output, labels)

    logits, (total, weight, parts) = jitted(run, model)(image)
    values = np.moveaxis(np.asarray(logits), -1, 1).ravel()
    assert_close(np.array([values.mean(), np.abs(values).mean(), *values[:3], values[-1]]),
                 np.array([0.024406, 0.133791, 0.021865, 0.094592, 0.214893, 0.054279]), tol=2e-6)
    assert np.bincount(np.asarray(logits).argmax(-1).ravel(), minlength=9).tolist() == [
        638, 582, 350, 524, 152, 615, 1000, 222, 13]
    assert_close(np.array([parts["nll"], parts["dice_loss"]]) / weight,
                 np.array([2.206257, 0.800014]), tol=1e-6)
    assert_close(total / weight, (2.206257 + 0.800014) / 2, tol=1e-6)


@pytest.mark.parametrize("missing", [None, "cnn", "transformer"])
def test_round_trips_are_bitwise(missing, tmp_path):
    config = small() if missing is None else zoo.override(small(), {missing: None})
    model = drawn(config)
    zoo.to_hf(model, tmp_path / "theirs")
    zoo.save(model, tmp_path / "ours")
    assert_same(model, zoo.from_hf(tmp_path / "theirs"))
    assert_same(model, zoo.load(tmp_path / "ours"))
    assert zoo.load_config(tmp_path / "ours") == zoo.load_config(tmp_path / "theirs") == config


def test_bare_tensors_and_back(theirs, tmp_path):
    """Shapes tell the config; all but the counters of batches comes out again."""
    folder, tensors = theirs
    model = zoo.from_hf(folder)
    assert model.config == small(**{"transformer.num_heads": 8})
    zoo.to_hf(model, tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert {key for key in tensors if not key.endswith(COUNTER)} == back.keys()
    assert all(np.array_equal(tensors[key], back[key]) for key in back)
    values = json.loads((tmp_path / "back" / "config.json").read_text())
    assert values["model_type"] == "paratranscnn" and values["hidden_size"] == 16


def test_bfloat16_keeps_statistics(theirs, tmp_path):
    model = zoo.from_hf(theirs[0], dtype="bfloat16")
    zoo.save(model, tmp_path / "half")
    assert_same(model, zoo.load(tmp_path / "half"))
    kinds = {path.startswith("statistics/"): x.dtype.name for path, x in flat(model).items()}
    assert kinds == {True: "float32", False: "bfloat16"}


def test_tensors_of_another_model(theirs, tmp_path):
    def refused(change, message):
        tensors = dict(theirs[1])
        change(tensors)
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors")
        with pytest.raises(ValueError, match=message):
            convert.load(folder)

    refused(lambda t: t.pop("encoder2.0.conv2.weight"),
            "'encoder2.0.conv2.weight' .* is missing .for cnn/stages/1/0/second/conv/kernel")
    refused(lambda t: t.update({"encoder2.1.conv1.weight": np.zeros((16, 16, 3, 3), np.float32)}),
            r"have \(1, 2, 1, 1\) blocks; what can be converted has one of")
    refused(lambda t: t.pop("up1_1.weight"), "has no config.json")
    refused(lambda t: t.pop("out.weight"), "there is no 'out.weight', the head of a ParaTransCNN")
    up = "vit_1.net.1.fn.fn.net.0.weight"
    refused(lambda t: t.update({up: np.zeros((5, 0), np.float32)}), "without inputs")
    for index in ("34", "9999999", "9" * 5000):  # A stage has names for 16 blocks of two layers.
        name = f"vit_1.net.{index}.fn.norm.weight"
        refused(lambda t, name=name: t.update({name: np.zeros(16, np.float32)}),
                "depth is 17: it must be from 1 to 16" if index == "34" else "vit_1.net.9")


def test_torchvision(tmp_path):
    """A ResNet alone into a model, whose other parameters stay, and out of it."""
    source, target = (drawn(small(), seed) for seed in (1, 2))
    to_torchvision(source, tmp_path / "resnet")
    tensors = load_file(tmp_path / "resnet" / "model.safetensors")
    assert tensors["conv1.weight"].shape == (8, 1, 7, 7)
    assert tensors["layer4.0.downsample.1.running_var"].shape == (64,)
    assert {key.split(".")[0] for key in tensors} == {
        "conv1", "bn1", "layer1", "layer2", "layer3", "layer4"}
    tensors |= {"fc.weight": np.zeros((10, 64), np.float32), "fc.bias": np.zeros(10, np.float32),
                f"bn1.{COUNTER}": np.zeros((), np.int64),
                "layer2.0.bn2.running_mean": np.full(16, 3, np.float32)}
    save_file(tensors, tmp_path / "resnet34.safetensors")
    found = flat(from_torchvision(target, tmp_path / "resnet34.safetensors"))
    one, other = flat(source), flat(target)
    mean = "statistics/cnn/stages/1/0/second/norm/mean"
    assert (found.pop(mean) == 3).all()
    for path, x in found.items():
        of_branch = path.removeprefix("statistics/").startswith("cnn/")
        assert np.array_equal(x, (one if of_branch else other)[path]), path
    tensors.pop("layer3.0.conv1.weight")
    tensors["conv1.weight"] = np.zeros((8, 3, 7, 7), np.float32)
    save_file(tensors, tmp_path / "damaged.safetensors")
    with pytest.raises(ValueError, match=r"(?s)2 problems.*'conv1.weight' is \[8, 3, 7, 7\]; the "
                                         r"config makes it \[8, 1, 7, 7\].*layer3.0.conv1"):
        from_torchvision(target, tmp_path / "damaged.safetensors")
    with pytest.raises(ValueError, match="the model has no CNN branch"):
        from_torchvision(zoo.build(
            zoo.override(small(), {"cnn": None}), abstract=True), tmp_path)
