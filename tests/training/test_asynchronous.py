"""What a step asks of a GPU, without one: the host runs ahead of it, and its labels lie where copies need nobody.

`support.fake_gpu` notes what would make the host wait.
"""

from contextlib import suppress
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.fake_gpu import CUDA, fake_gpu

from cache import Plane
from cache import codec as codecs
from pipeline.config import PrecomputeTeacher, TrainStudent
from pipeline.labels import epochs
from pipeline.networks.models import Network
from pipeline.networks.placed import Normalise, Placed
from pipeline.networks.teacher import Teacher
from pipeline.replay import ReplayBatch
from pipeline.system import device as devices
from pipeline.training import objectives
from pipeline.training.meter import Clock
from pipeline.training.objectives import CrossEntropy, Distillation
from pipeline.training.trainee import prepare, take_step
from pipeline.views.batch import Batch
from pipeline.views.policy import POLICIES

ROWS, CLASSES, SIZE = 24, 10, 8
POLICY = POLICIES["cifar10"]


def plane() -> Plane:
    logits = np.random.default_rng(0).normal(size=(ROWS, 2, CLASSES)).astype(np.float32)
    encoded = codec().encode(logits, np.arange(ROWS, dtype=np.uint64))
    weight = np.where(np.arange(ROWS) % 5 == 2, np.nan, 1.5).astype(np.float32)  # every fifth sample was skipped
    return Plane(0, encoded, weight, np.zeros(ROWS, np.uint32), np.ones(ROWS, bool))


def codec():
    return codecs.make("int8", classes=CLASSES)


def labels(placement: str, monkeypatch) -> epochs.Labels:
    """As an epoch gets them, from a store of one view."""
    store = SimpleNamespace(
        codec=codec(), manifest=SimpleNamespace(blocks=1), dither_keys=lambda view, rows: rows.astype(np.uint64)
    )
    monkeypatch.setattr(epochs, "place", lambda *_: placement)
    monkeypatch.setattr(epochs.cache, "planes", lambda *_, **__: iter([plane()]))
    return next(epochs.epochs(store, iter([0]), CUDA, placement, None))


def batch(rows: np.ndarray, on_gpu: bool) -> Batch:
    """As the loader hands it out: by the GPU's engine, or by the CPU's, in page-locked memory."""
    shape = 2, len(rows), SIZE, SIZE, 3
    images = torch.empty(shape, dtype=torch.uint8, **({"device": CUDA} if on_gpu else {"pin_memory": True}))
    return Batch(rows, torch.from_numpy(rows % CLASSES), images, None)


def network() -> Placed:
    with torch.device(CUDA):
        module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(144, CLASSES))
        normalise = Normalise(POLICY.mean, POLICY.std, CUDA)
    return Placed(
        Network(module, "tiny", CLASSES, None, None, ""), module, normalise, POLICY.mean, POLICY.std, CUDA, "fp32"
    )


def loss_of(student_o, student_a, *teacher, **_):
    """In place of `ccd_loss`, whose kernels want a GPU that is there."""
    assert student_o.is_cuda
    return student_o.sum() + student_a.sum()


class Undone:
    """A GradScaler without backward pass and step: autograd's threads want a GPU that is there."""

    def scale(self, loss: torch.Tensor) -> SimpleNamespace:
        assert loss.is_cuda and loss.requires_grad
        return SimpleNamespace(backward=lambda: None)

    def is_enabled(self) -> bool:
        return False

    def step(self, optimizer) -> None:
        pass

    def update(self) -> None:
        pass


@pytest.mark.parametrize(("on_gpu", "placement"), [(True, "gpu"), (False, "pinned")])
@pytest.mark.parametrize(
    "options",
    [{"loss": "ce"}, {"loss": "kd"}, {"loss": "ccd"}, {"loss": "ccd", "augmented_fraction": 0.25}, {"loss": "dist"}],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_no_step_waits_for_the_gpu(options, on_gpu, placement, monkeypatch):
    """Neither for the one before it, nor for its own forward pass, whatever is learned and wherever labels lie."""
    monkeypatch.setattr(objectives, "ccd_loss", loss_of)
    config = TrainStudent(data=None, out=None, store=None, student="tiny", lr=0.1, **options)  # type: ignore[arg-type]
    with fake_gpu() as waits:
        placed, stored = network(), labels(placement, monkeypatch)
        objective = CrossEntropy() if options["loss"] == "ce" else Distillation(config, 0, labels=stored)
        trainee, forward = prepare(config, placed)
        trainee.scaler = Undone()  # type: ignore[assignment]
        waits.found.clear()  # what a run waits for before its first step
        for start in (0, 12):
            made, clock = batch(np.arange(start, start + 12), on_gpu), Clock(CUDA, False)
            take_step(config, trainee, forward, objective, made, False, clock)
            assert not clock.times
    assert waits.found == []


def test_a_loop_of_ones_own_waits_for_nothing_either(monkeypatch):
    with fake_gpu() as waits:
        stored, normalise = labels("pinned", monkeypatch), network().normalise
        waits.found.clear()
        made = ReplayBatch(0, 0, batch(np.arange(6), False), stored, normalise)
        on_it = made.images, made.target, made.valid, made.teacher.codes, made.teacher.weight, made.teacher.dither_keys
        assert all(tensor.is_cuda for tensor in on_it)
    assert waits.found == []


@pytest.mark.parametrize("placement", ["gpu", "pinned"])
def test_a_plane_is_page_locked_before_it_is_copied_from(placement, monkeypatch):
    with fake_gpu() as waits:
        codes = labels(placement, monkeypatch).codes
        assert codes.is_cuda if placement == "gpu" else codes.is_pinned()
    assert waits.found == []


def test_what_would_wait_is_noted():
    """The stand-in refuses what CUDA makes the host wait for."""
    with fake_gpu() as waits:
        x, host = torch.empty(4, device=CUDA), torch.zeros(4)
        for call, what in (
            (lambda: host.to(CUDA, non_blocking=True), "cpu to cuda"),  # pageable
            (lambda: host.pin_memory().to(CUDA), "cpu to cuda"),
            (lambda: x.cpu(), "cuda to cpu"),
            (lambda: x[host.pin_memory().to(CUDA, non_blocking=True) > 0], "a mask of"),
        ):
            waits.found.clear()
            with suppress(RuntimeError):  # a shape that depends on values
                call()
            assert len(waits.found) == 1 and waits.found[0].startswith(what)


def test_a_lap_waits_for_the_stream_in_use_alone(monkeypatch):
    """The loader's and DALI's go on; a step that is not timed waits for none."""
    waited = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda of: SimpleNamespace(synchronize=lambda: waited.append(of)))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: pytest.fail("the whole device was waited for"))
    clock = Clock(CUDA, True)
    clock.lap("forward")
    assert waited == [CUDA] and list(clock.times) == ["forward"]
    Clock(CUDA, False).lap("forward")
    assert waited == [CUDA]


# --- what a GPU is asked for unless the user says otherwise


@pytest.mark.parametrize(
    ("capability", "decoder"),
    [((8, 0), "gpu-hw"), ((9, 0), "gpu-hw"), ((10, 0), "gpu-hw"), ((7, 5), "gpu"), ((8, 6), "gpu"), ((12, 0), "gpu")],
)
def test_the_hardware_engine_decodes_where_there_is_one(capability, decoder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert devices.decoder("auto", CUDA) == decoder
    assert devices.decoder("auto", torch.device("cpu")) == devices.decoder("cpu", CUDA) == "cpu"


@pytest.mark.parametrize("has_bf16", [True, False])
def test_a_gpu_computes_in_bf16_where_it_can(has_bf16, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: has_bf16)
    for config in (
        PrecomputeTeacher(data=None, teacher="t", store=None, views=1),  # type: ignore[arg-type]
        TrainStudent(data=None, out=None, store=None, student="s"),  # type: ignore[arg-type]
    ):
        assert devices.arithmetic(config.precision, CUDA) == ("bf16" if has_bf16 else "fp32")
        assert devices.arithmetic(config.precision, torch.device("cpu")) == "fp32"
    assert devices.arithmetic("fp32", CUDA) == "fp32"


# --- torch.compile


class Compiled(torch.nn.Module):
    """In place of what torch.compile returns: it says that it was called."""

    def __init__(self, module: torch.nn.Module):
        super().__init__()
        self.inner, self.calls = module, 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.inner(images)


@pytest.mark.parametrize("compile", [True, False])
def test_the_teacher_answers_by_the_compiled_network(compile, monkeypatch):
    """With the answers of the plain one, in its evaluation mode."""
    made = []
    monkeypatch.setattr(torch, "compile", lambda module: made.append(Compiled(module)) or made[-1])
    torch.manual_seed(0)
    size = POLICY.base.size
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(), torch.nn.Linear(3 * size * size, CLASSES))
    network = Network(module, "tiny", CLASSES, None, None, "")
    plain = Teacher(network, POLICY, torch.device("cpu"), "fp32")
    teacher = Teacher(network, POLICY, torch.device("cpu"), "fp32", compile)
    images = torch.randint(256, (2, 3, size, size, 3), dtype=torch.uint8)
    views = Batch(np.arange(3), torch.zeros(3, dtype=torch.int64), images, None)
    assert torch.equal(teacher(views), plain(views))
    assert [one.calls for one in made] == [2] * compile  # once for each of both views
