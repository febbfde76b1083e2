"""Two momenta, for methods that take the gradients of the hard and of the soft loss apart."""

import torch
from torch import Tensor, nn

from cache import UserError
from pipeline.config import Training
from pipeline.system import ranks


def require(config: Training, delta: float) -> None:
    """Raise UserError for options that do not go with two momenta, delta above and below --momentum."""
    if not delta <= config.momentum < 1 - delta:
        expected = f"at least {delta:g}, below {1 - delta:g}"
        raise UserError("--momentum does not suit two momenta", found=config.momentum, expected=expected)
    for option, given in (
        ("--precision fp16", config.precision == "fp16"),
        ("--clip", config.clip),
        ("--compile", config.compile),
    ):
        if given:
            raise UserError(f"{option} does not go with two momenta", fix="leave it out")


class Momenta:
    """Beside an SGD that has the hard gradient: the soft one's, with its own momentum and the same rate.

    θ ← θ − rate · (v_hard + v_soft), v_soft ← (μ + delta) · v_soft + ∇soft, and likewise v_hard with μ − delta.
    """

    def __init__(self, module: nn.Module, optimizer: torch.optim.SGD, config: Training, delta: float):
        """Takes delta off the optimiser's momentum. Raises UserError as `require` does."""
        require(config, delta)
        self._weights, self._momentum, self._nesterov = (
            list(module.parameters()),
            config.momentum + delta,
            config.nesterov,
        )
        for group in optimizer.param_groups:
            group["momentum"] = config.momentum - delta
        self.velocity = [torch.zeros_like(weights) for weights in self._weights]
        self._gradient = [torch.zeros_like(weights) for weights in self._weights]

    def backward(self, losses: Tensor) -> None:
        """Of the hard and the soft loss, (2,): the first into `.grad`, as ever, the second to itself."""
        soft = torch.autograd.grad(losses[1], self._weights, retain_graph=True, allow_unused=True)
        for own, more in zip(self._gradient, soft, strict=True):
            if more is not None:
                own.add_(more)
        losses[0].backward()

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Move the weights by the soft gradient of all processes."""
        for weights, velocity, own in zip(self._weights, self.velocity, self._gradient, strict=True):
            if ranks.world() > 1:
                own = ranks.total(own).div_(ranks.world())
            velocity.mul_(self._momentum).add_(own)
            weights.sub_(own + self._momentum * velocity if self._nesterov else velocity, alpha=rate)
            own.zero_()
