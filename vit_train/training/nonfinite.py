"""What happens when the loss, a gradient or a weight is NaN or infinite.

A bad step changes no parameter, no optimizer slot, no average and no running statistic. Then
`trainer.on_nonfinite` decides: abort ends the run, skip goes on with the next batch, rollback goes on with
the next batch and the weights of the last due checkpoint - the batches between are left out, because they
are what led there (as PaLM's authors did with loss spikes, https://arxiv.org/abs/2204.02311, section 5.1).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from vit_train.checkpoint import fits_model
from vit_train.checkpoint.saver import Saver
from vit_train.data import Batch
from vit_train.errors import NonFiniteError
from vit_train.training.ema import Ema
from vit_train.training.optimizers import named_state
from vit_train.training.state import TrainState
from vit_train.training.strategy import SingleDevice

OnNonFinite = Literal["abort", "skip", "rollback"]
MAX_IN_A_ROW = 10  # steps left out by "skip"
MAX_ROLLBACKS = 2
MAX_SCALED_IN_A_ROW = 20  # updates left out by loss scaling, which needs a handful to find its scale
_ADVICE = "Try a lower optimizer.lr, trainer.grad_clip_norm=1 or trainer.precision=fp32"


class NonFinite:
    """The policy of one run.

    Args:
        policy: trainer.on_nonfinite.
        strategy, model, ema, optimizer: what is protected, and put back by a rollback.
        saver: has the checkpoint a rollback goes to, and tells the user.
        source: names a sample of a split.
    """

    def __init__(
        self,
        policy: OnNonFinite,
        strategy: SingleDevice,
        model: nn.Module,
        ema: Ema | None,
        optimizer: Optimizer,
        saver: Saver,
        source: Callable[[Any, int], str],
    ) -> None:
        self.policy, self.saver, self.source = policy, saver, source
        self.goes_back = policy == "rollback"
        self.strategy, self.model, self.ema, self.optimizer = strategy, model, ema, optimizer
        # BatchNorm's buffers are changed by the forward pass itself, before anyone knows the loss
        norms = (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase))
        self.statistics = [buffer for norm in norms for buffer in norm.buffers(recurse=False)]
        self.kept: list[Tensor] = []

    def before_step(self) -> None:
        """Remembers what a forward pass changes."""
        self.kept = [buffer.clone() for buffer in self.statistics]

    def good_step(self, state: TrainState) -> None:
        """An update was made: what is counted in a row starts anew."""
        state.scaled_in_a_row = state.nonfinite_in_a_row = 0

    def bad_step(self, state: TrainState, batch: Batch, loss: float, norm: float, *, scaling: bool) -> None:
        """An update was not made. Puts back what the forward passes changed, and acts.

        Args:
            state: at the steps done before the bad one; its counts are increased.
            batch: whose update was not made.
            loss: mean over the batch.
            norm: total gradient norm.
            scaling: whether it is loss scaling that looks for its scale, which is routine.

        Raises:
            NonFiniteError: the policy is to end the run, or has done all it may.
        """
        for buffer, kept in zip(self.statistics, self.kept):
            buffer.copy_(kept)
        if scaling:
            state.scaled_in_a_row += 1
            if state.scaled_in_a_row <= MAX_SCALED_IN_A_ROW:
                return
        what = f"the gradient norm is {norm}" if math.isfinite(loss) else f"the loss is {loss}"
        files = [self.source("train", index) for index in batch.index.tolist()]
        shown = ", ".join(files[:3]) + (f" and {len(files) - 3} more" if len(files) > 3 else "")
        self._act(
            state, f"{what} at step {state.step + 1}; the update was not made", f" The batch held {shown}"
        )

    def check(self, state: TrainState) -> None:
        """Before an evaluation or a save: finite gradients can carry weights beyond the range.

        Raises:
            NonFiniteError: they did, and the policy is not to go back.
        """
        tensors = [*self.model.state_dict().values(), *named_state(self.model, self.optimizer).values()]
        if self.ema is not None:
            tensors += self.ema.module.state_dict().values()
        filled = [tensor for tensor in tensors if tensor.is_floating_point() and tensor.numel()]
        # the largest magnitude: a Euclidean norm of finite values may itself be infinite
        norms = torch._foreach_norm(filled, float("inf"))
        if torch.stack([norm.float().to(self.strategy.device) for norm in norms]).isfinite().all():
            return
        what = f"a weight, an average or an optimizer slot is not finite after step {state.step}"
        if self.policy == "skip":  # nothing is left that could be skipped
            raise NonFiniteError(f"{what}; it was not saved. {_ADVICE}")
        self._act(state, what)

    def _act(self, state: TrainState, problem: str, batch: str = "") -> None:
        tried = ""
        if self.policy == "skip":
            state.nonfinite_in_a_row += 1
            if state.nonfinite_in_a_row < MAX_IN_A_ROW:
                self.saver.say(f"{problem}; the run goes on with the next step.{batch}")
                return
            tried = f"{state.nonfinite_in_a_row} steps in a row were left out (trainer.on_nonfinite=skip). "
        elif self.policy == "rollback":
            if state.rollbacks < MAX_ROLLBACKS:
                state.rollbacks += 1
                self._go_back(state, problem, batch)
                return
            tried = f"The run has already gone back {MAX_ROLLBACKS} times (trainer.on_nonfinite=rollback). "
        raise NonFiniteError(f"{problem}. {tried}{_ADVICE}.{batch}")

    def _go_back(self, state: TrainState, problem: str, batch: str) -> None:
        assert state.anchor is not None, "a run that may go back saves before its first step"
        back = self.saver.checkpoint_of(state.anchor, fits_model(self.model, ema=self.ema is not None))
        self.strategy.restore(back.tensors, self.model, self.ema, self.optimizer)
        self.saver.say(
            f"{problem}; the run goes on with the next step and the weights of {back.path.name}.{batch}"
        )
