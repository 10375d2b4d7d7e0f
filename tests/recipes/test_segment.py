"""Training with running statistics, and the task of segmenting phantoms."""

import functools
import json
import shutil

import jax
import numpy as np
import pytest

import sharding
import zoo
from recipes import command, feed, phantoms, train, training
from recipes import segment as segment_recipe
from recipes.optimizer import Optimizer
from recipes.scores import score
from recipes.tasks import segment
from recipes.tasks.segment import Segment
from recipes.volumes import PREPROCESSING, Preprocessing, read_volume
from tests.recipes.test_resume import restore
from tests.recipes.test_volumes import example, write_nifti, write_pictures
from tests.tolerances import EXACT, assert_close
from zoo.registry import override

nibabel = pytest.importorskip("nibabel")

NARROW = {"cnn.width": 4, "transformer": None}
CONFIG = override(zoo.config("paratranscnn-tiny"), NARROW)
ROWS, SIDE, STEPS, EMA = 4, 32, 4, 0.5
SPLITS = {"train": 2, "validation": 1, "heldout": 2}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Volumes of 5 slices of 32 x 32 in place of the phantoms."""
    def load(split):
        found = []
        for i in range(SPLITS[split]):
            rng = np.random.default_rng([i, *split.encode()])
            labels = np.zeros((5, SIDE, SIDE), np.uint8)
            for label in range(1, 9):
                row, column = divmod(label - 1, 4)
                y, x = 16 * row + rng.integers(16 - label - 2), 8 * column + rng.integers(2)
                labels[:, y:y + label + 2, x:x + 6] = label
            image = 30.0 * labels - 100 + rng.normal(0, 10, labels.shape)
            found.append(phantoms.Phantom(image.astype(np.int16), labels))
        return found

    monkeypatch.setattr(phantoms, "load", load)


def program(mesh="data:1", **changes) -> training.Program:
    """As `run` makes it."""
    fields = {
        "config": CONFIG, "mesh": sharding.mesh(mesh), "rules": sharding.rules("fsdp_tp"),
        "loss": segment.make_loss(1), "optimizer": Optimizer(steps=STEPS), "ema": EMA,
        "batch_axes": Segment.axes,
    }
    return training.Program(**{**fields, **changes})


@functools.cache
def forward():
    """Jitted (params, images, labels) -> (loss, statistics' next values, parts of the loss)."""
    definition, _ = zoo.protocol.split(program().model())

    def run(params, images, labels):
        model = zoo.protocol.merge(definition, params)
        output = model({"images": images}, None, True)
        total, weight, parts = model.loss(output, labels)
        return total / weight, output.statistics, parts

    return jax.jit(run)


def initial():
    return zoo.protocol.split(zoo.build(CONFIG, 0, stacked=False))[1]


def examples(rows):
    return Segment(CONFIG, batch_size=rows).batch(0, np.arange(rows))


def run(*flags):
    text = ",".join(f"{name}={value}" for name, value in NARROW.items())
    return command.execute(train.main, [
        "train", "--model=paratranscnn-tiny", f"--set={text}", f"--batch_size={ROWS}",
        "--mesh=data:1", f"--steps={STEPS}", f"--ema={EMA}", "--log_every=1", "--save_every=1",
        "--eval_every=2", "--keep_last=9", *flags])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("segment")


@pytest.fixture
def finished(folder):
    """A run's workdir; it runs but once."""
    workdir = folder / "run"
    if not workdir.exists():
        assert run(f"--workdir={workdir}") == 0
    return workdir


def records(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "time"} for line in lines]


def test_a_step_sets_the_running_statistics_and_their_average(finished):
    first, state, batch = initial(), restore(finished, 1), examples(ROWS)
    loss, statistics, parts = forward()(first, batch["images"], batch["labels"])
    found = records(finished)[0]["train"]
    assert_close(found["loss"], loss)
    assert_close(found["cross_entropy"], parts["nll"] / batch["labels"].size)
    learned, new = zoo.protocol.divide(state["params"])
    assert_close(new, statistics)
    before = zoo.protocol.divide(first)[1]
    pairs = zip(*map(jax.tree.leaves, (new, before)), strict=True)
    assert min(np.abs(a - b).max() for a, b in pairs) > 1e-4
    # The first step's decay is 1 / 10.
    assert_close(state["ema"], jax.tree.map(lambda a, b: 0.1 * a + 0.9 * b, first,
                                            state["params"]))
    # Adam keeps two moments, of what is learned alone.
    assert sum(x.size for x in jax.tree.leaves(state["optimizer"]) if x.ndim) == 2 * sum(
        x.size for x in jax.tree.leaves(learned))


def test_eight_devices_average_the_statistics_of_microbatches():
    """The loss and the statistics are those of one device, microbatch by microbatch."""
    p, batch, params = program("data:8", accumulate=2), examples(16), initial()
    halves = [forward()(params, batch["images"][i::2], batch["labels"][i::2]) for i in range(2)]
    definition, _ = zoo.protocol.split(p.model())
    with sharding.use(p.mesh, p.rules):
        placed = feed.place(lambda r: {n: x[r] for n, x in batch.items()}, 16, p.batch_sharding)
        assert placed["images"].sharding.shard_shape((16, SIDE, SIDE, 1)) == (2, SIDE, SIDE, 1)
        loss, weight, _, gradients, statistics = jax.jit(training.make_gradients(p, definition))(
            jax.device_put(params, p.replicated), placed, jax.random.key(0))
    assert weight == batch["labels"].size
    assert gradients.keys() == zoo.protocol.divide(params)[0].keys()
    (one, first, _), (two, second, _) = halves
    assert_close(loss, (one + two) / 2)
    assert_close(statistics, jax.tree.map(lambda a, b: (a + b) / 2, first, second))


def test_a_non_finite_step_leaves_the_statistics_as_they_were():
    p, batch = program(), examples(ROWS)
    batch["images"][1, 4, 5] = np.inf
    with sharding.use(p.mesh, p.rules):
        state = p.init()
        before = jax.device_get(state)
        placed = feed.place(lambda r: {n: x[r] for n, x in batch.items()}, ROWS, p.batch_sharding)
        state, metrics = training.make_step(p)(state, placed, feed.signals(p.mesh, 0, False))
    assert_close(state, before, EXACT)
    wrong = [name for name, good in zip(training.finite_names(p), metrics["finite"], strict=True)
             if not good]
    assert "the loss" in wrong
    assert "the running statistic cnn/stem/norm/mean" in wrong


@pytest.mark.slow
def test_a_run_names_the_images_that_are_not_finite(tmp_path, capsys, monkeypatch):
    whole = Segment.batch

    def poisoned(task, step, rows):
        batch = whole(task, step, rows)
        batch["images"][0, 3, 3] = np.inf
        return batch

    monkeypatch.setattr(Segment, "batch", poisoned)
    assert run(f"--workdir={tmp_path}") == 2
    error = capsys.readouterr().err
    assert "of examples 0 to 3" in error and "first non-finite tensor: inf in batch/images" in error


def test_a_run_that_goes_on_is_the_run_that_never_stopped(finished, tmp_path, capsys):
    again = tmp_path / "again"
    shutil.copytree(finished, again)
    for step in range(3, STEPS + 1):
        shutil.rmtree(again / "checkpoints" / f"step_{step:08d}")
    assert run(f"--workdir={again}") == 0
    output = capsys.readouterr().out
    assert "going on after step 2" in output and "images/s" in output
    assert_close(restore(again, STEPS), restore(finished, STEPS), EXACT)
    assert records(again) == records(finished)
    for name in ("dice.png", "overlay.png", "overlays/heldout_0.png", "overlays/heldout_1.png"):
        assert (finished / name).read_bytes().startswith(b"\x89PNG")
    assert "heldout_1" in (finished / "report.html").read_text("utf-8")
    assert Preprocessing.load(finished / segment.FOLDER) == Preprocessing(
        "phantoms", phantoms.CLASSES, SIDE, (-125.0, 275.0))


def test_a_run_evaluates_by_the_running_averages(finished):
    """Of the final metrics each number is what the model on disk gives."""
    model, tokenizer, meta = training.load_model(finished, kind="segmentation")
    assert tokenizer is None and meta["task"] == {"name": "segment", "augmentation": "mirror"}
    task = Segment(CONFIG, batch_size=ROWS)
    definition, params = zoo.protocol.split(model)
    assert_close(params, restore(finished, STEPS)["ema"], EXACT)
    loss = jax.jit(lambda params, batch: task.loss(
        zoo.protocol.merge(definition, params), batch, None, False)[:3])

    def measure(batch):
        return jax.device_get(loss(params, batch))

    assert_close(task.evaluate(measure, final=True), records(finished)[-1]["final"])
    with pytest.raises(ValueError, match="ParaTransCnn, which is for segmentation; give one for"):
        training.load_model(finished)


def test_adapters_keep_statistics_of_their_own(finished, tmp_path, capsys):
    work = tmp_path / "lora"
    flags = (f"--init_from={finished}", "--lora_rank=2", "--lora_targets=first/conv",
             f"--workdir={work}", f"--batch_size={ROWS}", "--mesh=data:1", "--steps=1")
    assert command.execute(train.main, ["train", *flags]) == 0
    base = restore(finished, STEPS)["ema"]
    params = zoo.protocol.split(training.load_model(work, kind=None)[0])[1]
    name = ("decoder", "0", "first", "norm", "mean")
    moved = [functools.reduce(lambda node, key: node[key], name, tree["statistics"])
             for tree in (params, base)]
    assert np.abs(np.asarray(moved[0]) - np.asarray(moved[1])).max() > 1e-6
    # The head has no adapter.
    assert_close(params["head"], base["head"], EXACT)
    assert "numbers are trained" in capsys.readouterr().out


# --- the task ------------------------------------------------------------------------------------


def scripted(change):
    """A `Measure` whose prediction is the truth after `change`."""
    def measure(batch):
        labels = batch["labels"]
        weight = float(batch["weights"].sum())
        return 0.0, weight, {"cross_entropy": np.float32(0.25 * weight),
                             "prediction": change(labels).astype(np.uint8)}

    return measure


@pytest.mark.parametrize("rows", [3, 4, 16])
def test_perfect_predictions_have_dice_one_whatever_the_batch(rows):
    task = Segment(CONFIG, batch_size=rows)
    for final in (False, True):
        found = task.evaluate(scripted(lambda labels: labels), final)
        assert found.pop("cross_entropy") == 0.25
        for name in ("hd95", "reference_hd95", "hd95_misses"):
            assert found.pop(name) == 0.0
        assert len(found) == 10 and set(found.values()) == {1.0}
    text = task.summarize({**found, "hd95": 0.0})
    assert text.startswith("mean Dice 1.000 of 8 classes in 2 held-out cases, HD95 0.0 mm; Dice of")


def test_wrong_predictions_have_their_dice():
    task = Segment(CONFIG, batch_size=4)
    found = task.evaluate(scripted(lambda labels: np.where(labels == 5, 6, labels)), True)
    assert found["dice_liver"] == 0.0 and found["dice_stomach"] == 1.0
    volumes = phantoms.load("heldout")
    sizes = np.array([[np.sum(v.labels == c) for c in (5, 6)] for v in volumes])
    np.testing.assert_allclose(
        found["dice_pancreas"], np.mean(2 * sizes[:, 1] / (2 * sizes[:, 1] + sizes[:, 0])))
    np.testing.assert_allclose(found["dice"], (6 + found["dice_pancreas"]) / 8)
    # The liver was never found, and the distances are those of the other organs.
    assert found["hd95_misses"] == 2 and found["hd95"] > 0
    np.testing.assert_allclose(found["reference_dice"], found["dice"])
    np.testing.assert_allclose(json.loads(json.dumps(found))["hd95"], found["hd95"])


def test_an_example_depends_on_seed_and_number_alone():
    whole = Segment(CONFIG, batch_size=4)
    rows = np.array([1, 3])
    batch, part = whole.batch(3, np.arange(4)), whole.batch(3, rows)
    for name, x in batch.items():
        np.testing.assert_array_equal(x[rows], part[name])
    assert batch["images"].shape == (4, SIDE, SIDE, 1) and batch["labels"].dtype == np.int32
    # The same ids, whatever the batch they are in.
    wide = Segment(CONFIG, batch_size=12).batch(1, np.arange(4))
    np.testing.assert_array_equal(wide["images"], batch["images"])
    other = Segment(CONFIG, batch_size=4, seed=1).batch(3, np.arange(4))
    assert (other["images"] != batch["images"]).any()


def test_an_epoch_has_each_slice_once(monkeypatch):
    monkeypatch.setattr(segment, "augment", lambda image, labels, *_: (image, labels))
    task = Segment(CONFIG, batch_size=5)
    images = [task._data.slice("train", i)[0][..., 0] for i in range(10)]
    orders = []
    for epoch in range(2):
        found = np.concatenate([task.batch(2 * epoch + i, np.arange(5))["images"][..., 0]
                                for i in range(2)])
        orders.append([int(np.argmax([np.array_equal(x, y) for y in images])) for x in found])
        assert sorted(orders[-1]) == list(range(10))
    assert orders[0] != orders[1]


def test_augmentation_changes_image_and_labels_alike():
    labels = np.zeros((SIDE, SIDE), np.uint8)
    labels[6:14, 9:25] = 3
    labels[20:26, 8:12] = 5
    rng, kinds = np.random.default_rng(0), set()
    for _ in range(60):
        image, found = segment.augment(labels.astype(np.float32), labels, rng)
        assert image.shape == found.shape == labels.shape
        same = np.mean(np.abs(image - found) < 1e-3)
        exact = sorted(np.bincount(found.ravel(), minlength=9)) == sorted(
            np.bincount(labels.ravel(), minlength=9))
        kinds.add("same" if np.array_equal(found, labels) else "right" if exact and same == 1
                  else "any")
        assert same > 0.85 and set(np.unique(found)) == {0, 3, 5}
    assert kinds == {"same", "right", "any"}


def test_rotation_is_about_the_middle():
    rng = np.random.default_rng(0)
    image, labels = rng.random((9, 9)).astype(np.float32), rng.integers(0, 9, (9, 9))
    for turns in range(4):
        turned, found = segment.rotate(image, labels, 90.0 * turns)
        assert_close(turned, np.rot90(image, turns))
        np.testing.assert_array_equal(found, np.rot90(labels, turns))
    turned, found = segment.rotate(np.ones((9, 9), np.float32), np.ones((9, 9), int), 45.0)
    assert turned[4, 4] == 1 and turned[0, 0] == 0 and found[0, 0] == 0 and found[4, 0] == 1


def test_scans_are_segmented_from_file_to_file(tmp_path, capsys, monkeypatch):
    """The held-out predictions lie over their scans; recipes.segment makes the same ones."""
    monkeypatch.setattr(train, "_CACHE", tmp_path / "cache")
    for i in range(4):
        image, labels = example(i, 2, 3)
        for name, array in ((f"x{i}", image), (f"x{i}_seg", labels)):
            write_nifti(tmp_path / f"scans/{name}.nii.gz", array)
    work = tmp_path / "work"
    assert run(f"--workdir={work}", f"--data=nifti:{tmp_path / 'scans'}", "--heldout=0.5",
               f"--image_size={SIDE}", "--class_names=liver,tumour", "--neighbors=1",
               "--set=in_channels=3") == 0
    assert "of 2 classes in 2 held-out cases" in capsys.readouterr().out
    final = records(work)[-1]["final"]
    found = {path.name: path for path in (work / "predictions").iterdir()}
    assert len(found) == 2
    assert command.execute(segment_recipe.main, [
        "segment", f"--checkpoint={work}", f"--out={tmp_path / 'again'}",
        f"--input={','.join(str(tmp_path / 'scans' / name) for name in found)}"]) == 0
    dice = []
    for name, path in found.items():
        scan, written = nibabel.load(tmp_path / "scans" / name), nibabel.load(path)
        np.testing.assert_allclose(written.affine, scan.affine)
        labels = np.asarray(written.dataobj)
        assert labels.shape == scan.shape == (16, 12, 2) and labels.max() <= 2
        np.testing.assert_array_equal(
            np.asarray(nibabel.load(tmp_path / "again" / name).dataobj), labels)
        truth = read_volume(tmp_path / "scans" / name.replace(".nii", "_seg.nii")).image
        dice.append(score(truth, labels.T, 3)["dice"])
    np.testing.assert_allclose([final["dice_liver"], final["dice_tumour"]], np.mean(dice, 0))
    assert Preprocessing.load(work / segment.FOLDER).classes == ("background", "liver", "tumour")


def test_colour_images_fit_models_of_three_channels(tmp_path):
    write_pictures(tmp_path, count=8)
    settings = {"data": f"png:{tmp_path}", "batch_size": 3, "image_size": 24}
    with pytest.raises(ValueError, match="the images have 3 channels; give --set=in_channels=3"):
        Segment(CONFIG, **settings)
    task = Segment(override(CONFIG, {"in_channels": 3, "num_classes": 2}), **settings)
    assert task.batch(0, np.arange(3))["images"].shape == (3, 24, 24, 3)
    # Twice as fine, so that what is nearest comes back: [12, 16] -> [24, 24] -> [12, 16].
    final = task.evaluate(scripted(lambda labels: labels), True)
    assert final["dice"] == 1.0 and "voxels" in task.summarize(final)
    task.draw(tmp_path, {})
    masks = list((tmp_path / "predictions").iterdir())
    assert len(masks) == 2 and (tmp_path / "report.html").is_file()
    for path in masks:
        found = read_volume(tmp_path / "images" / path.name, path).labels
        truth = read_volume(tmp_path / "images" / path.name, tmp_path / "masks" / path.name).labels
        np.testing.assert_array_equal(found, truth)


def test_neighbors_are_channels():
    config = override(CONFIG, {"in_channels": 3})
    with pytest.raises(ValueError, match="in_channels 1: the images have 3 channels with "
                                         "neighbors=1; give --set=in_channels=3, or fewer"):
        Segment(CONFIG, neighbors=1)
    with pytest.raises(ValueError, match="neighbors -1: it must be at least 0"):
        Segment(config, neighbors=-1)
    task, alone = Segment(config, neighbors=1, augmentation="none"), Segment(CONFIG)
    assert task.batch(0, np.arange(2))["images"].shape == (2, SIDE, SIDE, 3)
    data, plain = task._data, alone._data
    depth = plain.depth(plain.parts["train"][0])
    for z in range(depth):
        image, labels = data.slice("train", z)
        np.testing.assert_array_equal(labels, plain.slice("train", z)[1])
        for channel, other in enumerate((max(z - 1, 0), z, min(z + 1, depth - 1))):
            np.testing.assert_array_equal(image[..., channel],
                                          plain.slice("train", other)[0][..., 0])


def test_neighbors_need_volumes(tmp_path):
    write_pictures(tmp_path, colors=1)
    config = override(CONFIG, {"in_channels": 3, "num_classes": 2})
    with pytest.raises(ValueError, match="neighbors 1: no image .* has more than one slice"):
        Segment(config, data=f"png:{tmp_path}", image_size=16, neighbors=1)


def test_neighbors_are_those_of_the_weights_to_begin_with(tmp_path, capsys):
    (tmp_path / "model").mkdir()
    zoo.save(zoo.build(CONFIG), tmp_path / "model")
    Segment(override(CONFIG, {"in_channels": 3}), neighbors=1).keep(tmp_path)
    shutil.copy(tmp_path / segment.FOLDER / PREPROCESSING, tmp_path / "model")
    begun = ["train", f"--init_from={tmp_path / 'model'}", "--mesh=data:1",
             f"--workdir={tmp_path / 'a'}"]
    assert command.execute(train.main, [*begun, "--neighbors=2"]) == 2
    assert "was trained with 1; leave it out" in capsys.readouterr().err
    # The model has fewer channels than its record says.
    assert command.execute(train.main, begun) == 2
    assert "3 channels with neighbors=1" in capsys.readouterr().err


def test_gray_images_fill_all_channels_of_a_model(tmp_path):
    write_pictures(tmp_path, colors=1)
    config = override(CONFIG, {"in_channels": 3, "num_classes": 2})
    task = Segment(config, data=f"png:{tmp_path}", batch_size=2, image_size=16)
    batch = task.batch(0, np.arange(2))
    assert batch["images"].shape == (2, 16, 16, 1)
    seen = []

    def model(inputs, key, train):
        seen.append(inputs["images"])
        raise StopIteration

    with pytest.raises(StopIteration):
        task.loss(model, batch, None, True)
    np.testing.assert_array_equal(seen[0], np.repeat(batch["images"], 3, -1))


@pytest.mark.parametrize(("flags", "words"), [
    (["--data=png:none"], "none: there is no such folder"),
    (["--data=scans"], "data 'scans': it must be phantoms, or LAYOUT:FOLDER with one of synapse"),
    (["--heldout=0.1"], "heldout: phantoms has a part that is held out already; leave it out"),
    (["--class_names=a"], "data 'phantoms' has names of its own; leave them out"),
    (["--task=lm", "--model=llama-tiny", "--image_size=8"],
     "--image_size is of --task=segment; leave it out"),
    (["--tokenizer=bytes"], "--tokenizer is of --task=lm; leave it out"),
    (["--seq_len=64"], "--seq_len is of tasks of sequences; leave it out"),
    (["--set=num_classes=8"], "num_classes 8: the data has 9 classes"),
    (["--task=lm"], "ParaTransCnn, which is for segmentation; give one for language"),
    (["--task=segment", "--model=llama-tiny"], "give one for segmentation"),
])
def test_flags_that_do_not_fit_are_refused(flags, words, tmp_path, capsys):
    assert command.execute(train.main, [
        "train", "--model=paratranscnn-tiny", f"--workdir={tmp_path / 'a'}", *flags]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def test_a_side_that_does_not_divide_over_devices_is_refused():
    mesh = sharding.mesh("data:2,tensor:4")
    layout = jax.NamedSharding(mesh, jax.P("data", "tensor"))
    with pytest.raises(ValueError, match=r"images of shape \(2, 30, 8\): 30 \(axis 1\) does not "
                                         "divide over tensor:4; use a multiple of 4"):
        feed.place(lambda rows: {"images": np.zeros((len(rows), 30, 8))}, 2, layout)
