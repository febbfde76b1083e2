"""DALI and CUDA as the GPU loader meets them, where there is no GPU: they refuse what DALI refuses, and note calls."""

import contextlib
import sys
import threading
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support import engine

from pipeline.data import dali
from pipeline.data.decode import decode
from pipeline.data.index import Index
from pipeline.views import on_gpu


class Memory:
    """A DALI TensorList."""

    def __init__(self, arrays: list[np.ndarray]):
        self.arrays = arrays

    def shape(self) -> list[tuple]:
        return [array.shape for array in self.arrays]

    def __iter__(self):
        return iter([SimpleNamespace(data_ptr=lambda array=array: array.ctypes.data) for array in self.arrays])

    def __len__(self) -> int:
        return len(self.arrays)


class Bytes(bytearray):
    """An encoded image that a weak reference can point to."""


class Pipeline:
    """What DALI 2.4's does with the arguments that the loader gives it, read in its source."""

    made: list = []  # noqa: RUF012
    taken: list = []  # noqa: RUF012

    def __init__(self, batch_size, num_threads, device_id, *, exec_dynamic, prefetch_queue_depth, set_affinity):
        self.settings = dict(device_id=device_id, depth=prefetch_queue_depth, affinity=set_affinity)
        self.dynamic, self.depth, self.first = exec_dynamic, prefetch_queue_depth, True
        self.fed: list[list[tuple]] = []
        self.running: list[list[tuple]] = []
        self.streams: list = []
        self.reused: list[np.ndarray] = []
        self.made.append(self)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def set_outputs(self, _) -> None:
        pass

    def build(self) -> None:
        pass

    def feed_input(self, name, data) -> None:
        assert name == "encoded"
        # With no_copy it reads them as late as when their batch is taken: it holds none.
        owners = [getattr(array.base, "obj", None) for array in data]
        held = [weakref.ref(owner) if isinstance(owner, Bytes) else bytes for owner in owners]
        self.fed.append([(bytes(array), alive) for array, alive in zip(data, held, strict=True)])

    def schedule_run(self) -> None:
        for _ in range(self.depth if self.first else 1):
            assert self.fed, "nothing was fed to run on"
            assert len(self.running) < self.depth, "more is under way than the queue holds"
            self.running.append(self.fed.pop(0))
        self.first = False

    def outputs(self, cuda_stream=None):
        if cuda_stream is not None and not self.dynamic:
            raise RuntimeError("Asynchronous outputs require `exec_dynamic`")
        assert cuda_stream is None or isinstance(cuda_stream, int)
        self.streams.append(cuda_stream)
        work = self.running.pop(0)
        assert all(alive() is not None for _, alive in work), "the bytes of a batch were given up before it was taken"
        arrays = [decode(data).copy() for data, _ in work]
        if not self.dynamic:
            self.reused[:] = self.reused or [np.zeros(1 << 16, np.uint8) for _ in range(99)]
            for to, array in zip(self.reused, arrays, strict=False):
                to[: array.size] = array.ravel()
            arrays = [to[: a.size].reshape(a.shape) for to, a in zip(self.reused, arrays, strict=False)]
        memory = Memory(arrays)
        self.taken.append(weakref.ref(memory))
        return (memory,)

    def run(self, cuda_stream=None, /, **inputs):
        if inputs and self.depth > 1:
            raise RuntimeError(f"When using pipeline_inputs named arguments, {self.depth=}")
        for name, data in inputs.items():
            self.feed_input(name, data)
        self.schedule_run()
        return self.outputs(cuda_stream)


class Torch:
    """torch with a GPU whose memory is the host's; it writes down what is asked of it."""

    def __init__(self):
        self.calls: list[str] = []
        self.cuda = SimpleNamespace(
            is_available=lambda: True,
            current_device=lambda: 3,
            Stream=lambda device: SimpleNamespace(cuda_stream=77, record_event=self._event),
            stream=self._on,
        )

    def __getattr__(self, name):
        return getattr(torch, name)

    def device(self, kind, number=None):
        assert (kind, number) == ("cuda", 3)
        return "cpu"

    def empty(self, *arguments, pin_memory=False, **options):
        self.calls.append(f"empty, pinned {pin_memory}")
        return torch.empty(*arguments, **options)

    @contextlib.contextmanager
    def _on(self, stream):
        assert stream.cuda_stream == 77
        self.calls.append("launch")
        yield
        self.calls.append("launched")

    def _event(self):
        self.calls.append("event")
        read = [reference for reference in Pipeline.taken if reference()]  # since the last event
        Pipeline.taken.clear()

        def waited() -> None:
            if not threading.current_thread().name.startswith("work"):  # these digest
                self.calls.append("waited")
            assert all(reference() for reference in read), "kernels may still read what was given up"

        return SimpleNamespace(synchronize=waited)


def with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Torch:
    """From now on the loader meets a GPU, number 3, and DALI there; both are stand-ins."""
    fake, options, read = Torch(), [], Index.read
    monkeypatch.setattr(Pipeline, "made", [])
    monkeypatch.setattr(Pipeline, "taken", [])
    monkeypatch.setattr(Index, "read", lambda self, row: Bytes(read(self, row)))
    module = SimpleNamespace(
        fn=SimpleNamespace(
            external_source=lambda **how: options.append(how),
            decoders=SimpleNamespace(image=lambda _, **how: options.append(how)),
        ),
        types=SimpleNamespace(DALIDataType=SimpleNamespace(UINT8=0), DALIImageType=SimpleNamespace(RGB=0)),
    )
    real = dali._build

    def build(decoder, no_copy=False, **how):
        if how["device_id"] is None:  # the CPU's, which decode what the stand-ins hand out
            return real(decoder, no_copy, **how)
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, "nvidia.dali", module)
            patch.setitem(sys.modules, "nvidia.dali.pipeline", SimpleNamespace(Pipeline=Pipeline))
            return real(decoder, no_copy, **how)

    monkeypatch.setattr(dali, "_build", build)
    monkeypatch.setattr(on_gpu, "torch", fake)
    monkeypatch.setattr(on_gpu.jda_gpu, "pairs", engine.pairs)
    fake.options = options
    return fake
