"""The main job at toy size, end to end, and what it promises: the same numbers twice, fair students, clean ends."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from torch import nn

from debiaskd.cli import quickstart
from debiaskd.cli import quickstart_loop as train
from debiaskd.cli import quickstart_methods as methods
from debiaskd.cli.quickstart_loop import Schedule, fit
from debiaskd.cli.quickstart_methods import METHODS, Context, Settings
from debiaskd.models import SmallNet
from debiaskd.models.heads import count_parameters
from debiaskd.reports import quickstart_table as report
from debiaskd.reweight import ErrorSetWarning

pytestmark = [
    pytest.mark.filterwarnings("ignore::debiaskd.reweight.ErrorSetWarning"),
    pytest.mark.xdist_group("quickstart"),
]
TOY = Settings(
    train=80,
    validation=16,
    test=24,
    size=24,
    teacher_widths=(8, 12),
    student_widths=(4, 6),
    strides=(2, 2),
    teacher_schedule=Schedule(epochs=2, batch=20),
    student_schedule=Schedule(epochs=2, batch=20),
    identification_schedule=Schedule(epochs=1, batch=20),
    intervention_epoch=1,
)
NAMES = ["teacher", "erm", "kd", "simkd", "dett", "guided", "cid", "dett+guided+cid"]


def numbers(rows):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """(directory, results, what the progress was told) of one run."""
    told = []
    out = tmp_path_factory.mktemp("run") / "out"
    results = quickstart.run(out, 2, settings=TOY, progress=lambda task, done: told.append((task, done)))
    return out, results, told


def test_results_have_the_promised_keys(outcome):
    out, results, _ = outcome
    document = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert set(document) == {"rows", "environment", "settings"}
    assert [(row["method"], row["seed"]) for row in document["rows"]] == [(n, s) for s in (0, 1) for n in NAMES]
    for row in document["rows"]:
        assert isinstance(row["parameters"], int) and row["parameters"] > 0
        for key in ("average_accuracy", "worst_group_accuracy", "energy_in_box", "unbiased_accuracy"):
            assert isinstance(row[key], float) and 0 <= row[key] <= 100
        assert isinstance(row["seconds"], float) and row["seconds"] > 0
        assert row["worst_group_accuracy"] == min(row["group_accuracies"].values())
        assert 1 <= row["selected_epoch"] <= 2
    assert document["environment"]["torch"] == torch.__version__
    assert document["settings"]["student_schedule"]["epochs"] == 2
    assert list(document["settings"]["methods"]) == NAMES
    assert document == json.loads(json.dumps(results.document()))


def test_the_report_shows_every_method(outcome):
    html = (outcome[0] / "report.html").read_text(encoding="utf-8")
    for name in NAMES:
        assert html.count(f'<td class="method">{name}</td>') == 2 + 2, "table, pictures, and a row for each seed"


def test_nothing_else_is_left_behind(outcome):
    assert sorted(path.name for path in outcome[0].iterdir()) == ["report.html", "results.json"]


def test_progress_rises_to_one(outcome):
    tasks, shares = zip(*outcome[2])
    assert list(dict.fromkeys(tasks)) == [f"seed {seed}: {name}" for seed in (0, 1) for name in NAMES]
    assert list(shares) == sorted(shares) and shares[0] == 0 and shares[-1] == pytest.approx(1)


def test_the_same_seed_gives_the_same_numbers_to_the_last_bit(outcome, tmp_path):
    torch.manual_seed(12345)  # what happens elsewhere in the process does not matter
    again = quickstart.run(tmp_path, [1, 0], settings=TOY)
    before = outcome[1].rows
    assert numbers(again.rows) == numbers(before[len(NAMES) :] + before[: len(NAMES)])
    assert numbers(before[: len(NAMES)]) != [{**row, "seed": 0} for row in numbers(before[len(NAMES) :])]


def test_a_method_does_not_depend_on_the_others(outcome, tmp_path):
    alone = quickstart.run(tmp_path, 1, methods=METHODS[3:4], settings=TOY)
    before = {row["method"]: row for row in numbers(outcome[1].rows) if row["seed"] == 0}
    assert numbers(alone.rows) == [before["teacher"], before["dett"]]


def test_another_method_is_another_entry(tmp_path):
    mine = dataclasses.replace(METHODS[0], name="mine", description="my own")
    results = quickstart.run(tmp_path, 1, methods=[mine], settings=TOY)
    assert [row["method"] for row in results.rows] == ["teacher", "mine"]
    assert "my own" in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_whatever_stops_the_run_leaves_earlier_results(tmp_path, error):
    (tmp_path / "results.json").write_text("earlier")

    def stop(task, done):
        if done > 0.5:
            raise error

    with pytest.raises(error):
        quickstart.run(tmp_path, 1, settings=TOY, progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    assert (tmp_path / "results.json").read_text() == "earlier"


def test_a_bad_directory_is_found_before_anything_is_trained(tmp_path):
    (tmp_path / "taken").write_text("")
    told = []
    with pytest.raises(OSError):
        quickstart.run(tmp_path / "taken", 1, settings=TOY, progress=lambda *step: told.append(step))
    assert not told


@pytest.mark.parametrize("seeds", [0, [], [1, 1]])
def test_bad_seeds(tmp_path, seeds):
    with pytest.raises(ValueError, match="seeds must be at least one, each once"):
        quickstart.run(tmp_path, seeds, settings=TOY)


@pytest.fixture(scope="module")
def context():
    return Context(TOY, 0)


def test_students_start_alike(context):
    plain, again, transplanted = context.student(), context.student(), context.transplanted()
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), again.state_dict().values()))
    body = dict(transplanted.named_parameters())
    shared = [tensor for name, tensor in body.items() if name.endswith("conv1.weight") and "projector" not in name]
    assert len(shared) == 1 and torch.equal(shared[0], plain.body.conv1.weight)


def test_weights_are_made_without_groups(context, monkeypatch):
    """Wrong groups change nothing about DeTT's weights, so that they cannot have been used."""
    scrambled = Context(TOY, 0)
    train_split = dataclasses.replace(scrambled.data.train, groups=torch.zeros_like(context.data.train.groups))
    monkeypatch.setattr(scrambled, "data", dataclasses.replace(scrambled.data, train=train_split))
    assert torch.equal(context.correct, scrambled.correct)


def test_identification_is_judged_after_training(context):
    """In eval mode and in the order of the pictures: predicting them one by one gives the same."""
    model = context.network(TOY.student_widths, "identification")
    loss = methods.label_loss(context.labels)
    fit(model, context.images, loss, TOY.identification_schedule, generator=context.generator("identification"))
    assert not model.training
    with torch.no_grad():
        one_by_one = torch.cat([model(image[None]).argmax(1) for image in context.images])
    assert torch.equal(context.correct, one_by_one == context.labels)


def test_losses_against_their_formulas(context):
    feature, pooled, logits = context.teacher_outputs
    torch.testing.assert_close(pooled, feature.mean((2, 3)))
    index, model = torch.tensor([3, 0, 7]), context.transplanted().eval()
    images, own = context.images[index], context.transplanted().eval().forward_features(context.images[index])
    distance = ((own - feature[index]) ** 2).mean((1, 2, 3))
    weight = torch.linspace(1, 5, len(context.images))
    terms = {"match": methods.MatchOptions()}
    torch.testing.assert_close(methods.Taught(context, model, terms).loss(images, index), distance.mean())
    expected = (weight[index] * distance).sum() / weight[index].sum()
    torch.testing.assert_close(methods.Taught(context, model, terms, weight).loss(images, index), expected)
    student = context.student().eval()
    soft, log_own = (logits[index] / 4).softmax(1), (student(images) / 4).log_softmax(1)
    expected = 16 * (soft * (soft.log() - log_own)).sum(1).mean()
    taught = methods.Taught(context, student, {"kd": methods.KdOptions(temperature=4.0)})
    torch.testing.assert_close(taught.loss(images, index), expected)


def test_parameters_count_the_transplanted_head(context):
    model = context.transplanted()
    head = sum(tensor.numel() for tensor in context.teacher.get_classifier().parameters())
    trained = sum(parameter.numel() for parameter in model.parameters())
    assert count_parameters(model) == trained + head
    student = context.student()
    assert count_parameters(student) == sum(p.numel() for p in student.parameters())


def test_contexts_are_part_of_what_is_deployed(context):
    """One epoch without the intervention, which builds the contexts; then logits that are adjusted by them."""
    (method,) = [m for m in METHODS if m.name == "cid"]
    model, loss = method.build(context)
    assert model.deployed() is model.extractor.model
    options = {"generator": torch.Generator().manual_seed(0), "epoch_ended": model.epoch_ended}
    fit(model, context.images, loss, Schedule(epochs=1, batch=20), **options)
    deployed = model.deployed().eval()
    assert deployed.intervention.context.any() and not deployed.intervention.context.requires_grad
    assert not torch.allclose(deployed(context.images[:8]), model.extractor.model(context.images[:8]))
    learned = count_parameters(model.extractor.model) + sum(t.numel() for t in deployed.intervention.parameters())
    assert count_parameters(deployed) == learned + deployed.intervention.context.numel()


def test_fit_keeps_the_best_epoch():
    model, given, seen = SmallNet((4,), (2,), 2), iter([50.0, 80.0, 80.0, 10.0]), []

    def score(trained):
        assert not trained.training
        seen.append({name: tensor.clone() for name, tensor in trained.state_dict().items()})
        return next(given)

    labels = torch.arange(20) % 2
    images = torch.randn(20, 3, 16, 16)
    schedule = Schedule(epochs=4, batch=8)
    fitted = fit(model, images, methods.label_loss(labels), schedule, generator=torch.Generator(), score=score)
    assert fitted.epoch == 3 and fitted.scores == (50, 80, 80, 10)
    assert all(torch.equal(tensor, seen[2][name]) for name, tensor in model.state_dict().items())
    assert not torch.equal(seen[2]["body.conv1.weight"], seen[3]["body.conv1.weight"])


def test_fit_takes_every_picture_once_an_epoch():
    counts, epochs = torch.zeros(24, dtype=torch.int64), []

    def loss(model, images, index):
        assert torch.equal(images, pictures[index])
        counts[index] += 1
        return model(images).square().mean()

    pictures = torch.randn(24, 3, 8, 8)
    schedule = Schedule(epochs=3, batch=6)
    on_epoch = lambda: epochs.append(counts.tolist())  # noqa: E731
    fit(SmallNet((4,), (2,), 2), pictures, loss, schedule, generator=torch.Generator(), on_epoch=on_epoch)
    assert epochs == [[1] * 24, [2] * 24, [3] * 24]


def test_fit_samples_as_told():
    drawn = []

    def loss(model, images, index):
        drawn.extend(index.tolist())
        return model(images).square().mean()

    sampling = torch.tensor([0.0, 1.0, 0.0, 1.0])
    schedule = Schedule(epochs=5, batch=2)
    net, images = SmallNet((4,), (2,), 2), torch.randn(4, 3, 8, 8)
    fit(net, images, loss, schedule, generator=torch.Generator(), sampling=sampling)
    assert len(drawn) == 20 and set(drawn) == {1, 3}


def test_fit_says_when_it_diverges():
    def loss(model, images, index):
        return model(images).sum() * float("nan")

    with pytest.raises(FloatingPointError, match="the loss became nan in epoch 1"):
        fit(SmallNet((4,), (2,), 2), torch.randn(4, 3, 8, 8), loss, Schedule(1), generator=torch.Generator())


def test_fit_needs_something_to_do():
    net, loss = SmallNet((4,), (2,), 2), methods.label_loss(torch.zeros(4).long())
    for images, epochs in ((torch.zeros(0, 3, 8, 8), 1), (torch.zeros(4, 3, 8, 8), 0)):
        with pytest.raises(ValueError, match="images and epochs must be >= 1"):
            fit(net, images, loss, Schedule(epochs), generator=torch.Generator())


def test_small_net_speaks_the_protocol():
    net = SmallNet((4, 6), (2, 1), 3).eval()
    images = torch.randn(2, 3, 16, 16)
    feature = net.forward_features(images)
    assert feature.shape == (2, 6, 8, 8)
    torch.testing.assert_close(net.forward_head(feature), net(images))
    pooled = net.forward_head(feature, pre_logits=True)
    torch.testing.assert_close(net.get_classifier()(pooled), net(images))
    assert isinstance(net.get_classifier(), nn.Linear)
    with pytest.raises(ValueError, match="widths and strides must be as many"):
        SmallNet((4, 6), (2,), 3)


def test_the_pictures_lie_about_zero():
    images = train.to_float(torch.tensor([0, 128, 255], dtype=torch.uint8)[None, :, None, None].expand(1, 3, 2, 2))
    assert images[0, :, 0, 0].tolist() == [-2.0, 0.0, 127 / 64] and images.dtype == torch.float32


def test_importing_needs_no_extra():
    """What only the command needs is imported when the command runs."""
    code = (
        "import sys; import debiaskd, debiaskd.cli.quickstart; "
        "print([name for name in ('sklearn', 'PIL', 'jinja2', 'matplotlib', 'rich', 'timm') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_missing_extra_is_known_before_training(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ModuleNotFoundError) as caught:
        report.require()
    assert caught.value.name == "jinja2"
    with pytest.raises(ModuleNotFoundError):
        quickstart.run(tmp_path, 1, settings=TOY)
    assert list(tmp_path.iterdir()) == []


def test_an_unusable_error_set_is_told(context, monkeypatch):
    monkeypatch.setitem(context.__dict__, "correct", torch.ones(80, dtype=torch.bool))
    with pytest.warns(ErrorSetWarning, match="the error set is empty"):
        METHODS[3].build(context)
