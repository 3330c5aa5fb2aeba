"""Headroom in Lightning's Trainer: a callback that logs it. In Fabric's loops `upcast.Headroom` does."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from upcast.guard.headroom import Headroom


class LightningHeadroomCallback(Callback):  # type: ignore[misc]
    """Logs the headroom of every block to float16's end with ``log_dict``, on the first batch and every so many after.

    ``Trainer(callbacks=[upcast.LightningHeadroomCallback(every=100)])``; the LightningModule holds a patched model.

    Args:
        every: measure one of so many batches.

    Examples:
        >>> import lightning
        >>> callback = upcast.LightningHeadroomCallback(every=100)
        >>> trainer = lightning.Trainer(accelerator="cpu", callbacks=[callback], logger=False)
    """

    def __init__(self, every: int = 100) -> None:
        self.every = every
        self.headroom: Headroom | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to measure.

        Raises:
            UpcastError: nothing in the module is patched.
        """
        self.headroom = Headroom(pl_module, self.every)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log what was measured on this batch, if it was due."""
        figures = self.headroom.step() if self.headroom is not None else None
        if figures:
            pl_module.log_dict(figures)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop measuring."""
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop measuring."""
        self._stop()

    def _stop(self) -> None:
        if self.headroom is not None:
            self.headroom.close()
        self.headroom = None
