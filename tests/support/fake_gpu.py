"""A GPU that is not there: tensors on it have shapes and no values, and what makes the host wait for it is noted."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

CUDA = torch.device("cuda", 0)
_OPS = torch.ops.aten
# What they return, a number or a shape, is known when the device has come so far.
_ANSWERS = (_OPS._local_scalar_dense, _OPS.nonzero, _OPS.masked_select, _OPS.equal, _OPS.is_nonzero)


class Waits(TorchDispatchMode):
    """Notes each operation for which the host waits until a CUDA stream has done all that it was given.

    The rules are those of "API synchronization behavior" in CUDA's reference: a copy is asynchronous if its host memory
    is page-locked; PyTorch then waits unless it was told `non_blocking`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._locked: dict[int, torch.Tensor] = {}

    def _lock(self, tensor: torch.Tensor) -> torch.Tensor:
        self._locked[tensor.untyped_storage()._cdata] = tensor  # held, so that no other takes its number
        return tensor

    def _is_locked(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._locked

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        packet = func.overloadpacket
        if packet is _OPS.is_pinned:
            return self._is_locked(args[0])
        if packet is _OPS._pin_memory:
            return self._lock(args[0].clone())
        if packet in _ANSWERS and args[0].is_cuda:
            self.found.append(f"{func} of {tuple(args[0].shape)}")
        if packet is _OPS.index and any(at is not None and at.dtype == torch.bool for at in args[1]):
            self.found.append(f"a mask of {tuple(args[0].shape)}")
        found = func(*args, **kwargs)
        if packet is _OPS.empty and kwargs.get("pin_memory"):
            self._lock(found)
        if packet is _OPS._to_copy:
            self._copied(args[0], found, kwargs.get("non_blocking", False))
        elif packet is _OPS.copy_:
            self._copied(args[1], args[0], kwargs.get("non_blocking", False) or args[2:3] == (True,))
        return found

    def _copied(self, source: torch.Tensor, target: torch.Tensor, non_blocking: bool) -> None:
        if source.device != target.device:
            host = target if source.is_cuda else source
            if not (non_blocking and self._is_locked(host)):
                self.found.append(f"{source.device.type} to {target.device.type}: {tuple(source.shape)} {source.dtype}")


@contextmanager
def fake_gpu() -> Iterator[Waits]:
    with FakeTensorMode(allow_non_fake_inputs=True), Waits() as waits:
        yield waits
