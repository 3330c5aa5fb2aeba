"""Headroom in Transformers' Trainer: a callback that logs it."""

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from upcast.guard.headroom import Headroom


class HeadroomCallback(TrainerCallback):  # type: ignore[misc]
    """Logs the headroom of every block to float16's end, on the first step of a run and every so many after.

    ``Trainer(..., callbacks=[upcast.HeadroomCallback(every=100)])``. The figures are in ``state.log_history``; after
    ``callback.log = trainer.log`` they go to the Trainer's loggers (TensorBoard and the like) as well.

    Args:
        every: measure one of so many steps.
        log: gets the figures as a dict, in place of ``state.log_history``.

    Examples:
        >>> callback = upcast.HeadroomCallback(every=100)  # Trainer(..., callbacks=[callback])
        >>> callback.log = print  # in place of state.log_history
    """

    def __init__(self, every: int = 100, log: Callable[[dict[str, float]], object] | None = None) -> None:
        self.every, self.log = every, log
        self.headroom: Headroom | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """Begin to measure.

        Raises:
            UpcastError: nothing in the model is patched.
        """
        self.headroom = Headroom(model, self.every)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Log what was measured on this step, if it was due."""
        figures = self.headroom.step(state.global_step) if self.headroom is not None else None
        if not figures:
            return
        if self.log is not None:
            self.log(figures)
        else:
            state.log_history.append({**figures, "step": state.global_step})

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Stop measuring."""
        if self.headroom is not None:
            self.headroom.close()
        self.headroom = None
