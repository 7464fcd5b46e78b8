"""What a trainer tells of a run while it lasts.

The trainer calls these methods and knows nothing of what they do; `NullTracker` does nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from vit_train.data import Batch


@dataclass(frozen=True)
class Plan:
    """What the tracker has to know of the run before it starts."""

    first_step: int
    closed_epochs: int
    total_steps: int
    steps_per_epoch: int
    batch_size: int
    eval_images_per_epoch: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    loss_parts: tuple[str, ...] = ()  # names of what the loss is made of, where it says
    draw_attention: Callable[[], NDArray[np.uint8] | None] = lambda: None  # where the model looks just now


class NullTracker:
    """Does nothing: the base class, and the tracker of other ranks and of benchmarks."""

    def start(self, plan: Plan) -> None:
        """Before the first step, once it is known where the run continues."""

    def first_batch(self, model: nn.Module, images: Tensor) -> None:
        """The images of the very first training batch, as the model gets them."""

    def begin_epoch(self, epoch: int, done: int, steps: int, sums: list[float]) -> None:
        """An epoch starts (or continues after `done` of its `steps`) with these running sums."""

    def after_step(self, step: int, optimizer: Optimizer, sums: Tensor, norm: Tensor) -> None:
        """One optimizer step is done. `sums`: loss, top-1 hits, top-5 hits, images of the open epoch."""

    def after_epoch(self, step: int, epoch: int, metrics: Mapping[str, float]) -> None:
        """An epoch was closed with these metrics."""

    def progress(self, batches: Iterable[Batch], label: str) -> Iterable[Batch]:  # noqa: ARG002
        """The same batches, with a bar where someone watches."""
        return batches

    def test(self, step: int, metrics: Mapping[str, float]) -> None:
        """The closing figures."""

    def say(self, text: str) -> None:
        """A line for the user; may come from another thread."""

    def text(self, tag: str, content: str) -> None:
        """A text for TensorBoard."""

    def picture(self, tag: str, draw: Callable[[], NDArray[np.uint8] | None], step: int) -> None:
        """A picture (height, width, 3) for TensorBoard; drawn only where someone logs it."""

    def hparams(self, parameters: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Hyperparameters with the final metrics."""

    def flush(self) -> None:
        """Brings everything logged so far to disk."""

    def close(self) -> None:
        """Ends logging."""
