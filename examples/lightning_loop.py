"""Train a head on a frozen base with Lightning's Trainer: the base is stored in float16, the head learns in float32.

    python examples/lightning_loop.py                        # a small base of random weights: some seconds
    python examples/lightning_loop.py --model path/to/model  # any text model of Transformers
    python examples/lightning_loop.py --float32              # the same without upcast: the losses to compare with

The head learns whether a sequence counts upwards. The callback logs how far each block is from float16's end.
Needs `pip install 'torch-upcast[transformers]' lightning`.
"""

import argparse
from typing import Any

import lightning
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoModel, LlamaConfig, LlamaModel

import upcast


class Classifier(lightning.LightningModule):
    """A frozen base and a linear head on the mean of its last hidden states."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base = base
        self.head = torch.nn.Linear(base.config.hidden_size, 2)
        self.losses: list[float] = []

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        ids, labels = batch
        hidden = self.base(input_ids=ids).last_hidden_state.mean(dim=1)
        loss = cross_entropy(self.head(hidden), labels)
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.head.parameters(), lr=1e-2)


def make_base(name: str | None) -> Any:
    """Return the base, frozen."""
    if name is not None:
        base = AutoModel.from_pretrained(name, dtype="float32")
    else:
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
        base = LlamaModel(LlamaConfig(vocab_size=128, initializer_range=0.1, **sizes))
    return base.requires_grad_(False).eval()


def samples(count: int, vocabulary: int) -> TensorDataset:
    """Return sequences of 16 numbers, half of which count upwards, with their labels."""
    numbers = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (count, 16), generator=numbers)
    labels = torch.arange(count) % 2
    upwards = (ids[:, :1] + torch.arange(16)) % vocabulary
    return TensorDataset(torch.where(labels[:, None] == 1, upwards, ids), labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder, or a name that Transformers downloads (default: random weights)")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--float32", action="store_true", help="without upcast")
    options = parser.parse_args()

    lightning.seed_everything(0, verbose=False)
    model = Classifier(make_base(options.model))
    callbacks: list[Any] = []
    if not options.float32:
        upcast.patch(model.base)  # before the Trainer makes the optimizer, which holds the head alone
        callbacks = [upcast.LightningHeadroomCallback(every=50)]
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=options.steps,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    vocabulary = min(128, model.base.config.vocab_size)
    trainer.fit(model, DataLoader(samples(8 * options.steps, vocabulary), batch_size=8))
    for step, loss in enumerate(model.losses, 1):
        print(f"step {step:4d}  loss {loss:.4f}")
    for name, value in sorted(trainer.callback_metrics.items()):
        print(f"{name} {float(value):.1f} bits")


if __name__ == "__main__":
    main()
