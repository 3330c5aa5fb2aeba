"""Generate with one LitGPT model divided between processes: each takes only its part of the weights, in float16.

    python examples/distributed.py CHECKPOINT_DIR                                      # one process
    torchrun --standalone --nproc-per-node 2 examples/distributed.py CHECKPOINT_DIR    # two, on one machine

Two hosts, each with its own --node-rank:

    torchrun --nnodes 2 --node-rank 0 --nproc-per-node 1 --master-addr 10.0.0.1 --master-port 29500 \\
        examples/distributed.py CHECKPOINT_DIR

`python -m upcast generate` does the same without a script. Read docs/distributed.md first: ranks trust each other.
Needs `pip install 'torch-upcast[litgpt]'`.
"""

import argparse
import sys
from pathlib import Path

import torch
from litgpt import Tokenizer

import upcast
from upcast.distributed import RankError, joined


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT_DIR", help="a LitGPT checkpoint folder")
    parser.add_argument("--prompt", default="What do llamas eat?")
    parser.add_argument("--tokens", type=int, default=20, help="how many new tokens")
    options = parser.parse_args()
    try:
        with joined(timeout=60) as mesh:
            divided = mesh.size() > 1
            model = upcast.load_litgpt(options.checkpoint, mesh=mesh if divided else None)
            stored = sum(parameter.nbytes for parameter in model.parameters())
            sys.stderr.write(f"rank {mesh.get_rank()} of {mesh.size()}: {stored / 1e6:,.2f} MB of weights\n")
            text = generate(model, Tokenizer(options.checkpoint), options.prompt, options.tokens)
            if mesh.get_rank() == 0:
                print(text)
    except RankError as error:  # it names the rank that is lost
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


@torch.inference_mode()
def generate(model: torch.nn.Module, tokenizer: Tokenizer, prompt: str, count: int) -> str:
    """Return the likeliest continuation. All ranks compute the same logits, and so choose the same tokens."""
    tokens = tokenizer.encode(prompt).long()
    asked = len(tokens)
    for _ in range(count):
        following = model(tokens[None])[0, -1].argmax()
        if following == tokenizer.eos_id:
            break
        tokens = torch.cat([tokens, following[None]])
    return str(tokenizer.decode(tokens[asked:]))


if __name__ == "__main__":
    sys.exit(main())
