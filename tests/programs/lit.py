"""Programs that use LitGPT and Lightning Fabric."""

import contextlib
import io
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.programs.checkpoints import IDS, note


def _load(folder: Path) -> Any:
    from litgpt import LLM

    llm = LLM.load(str(folder / "lit"), distribute=None)
    llm.distribute(accelerator="cpu", devices=1, precision="32-true")
    note(llm.model)
    return llm


def _logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS)[:, -1, :8]  # type: ignore[no-any-return]


def generate(folder: Path) -> Any:
    llm = _load(folder)
    texts = [llm.generate("What do llamas eat?", max_new_tokens=12, top_k=1)]
    torch.manual_seed(0)
    texts += [llm.generate("Hello", max_new_tokens=12, temperature=0.8, top_p=0.9)]
    texts += ["".join(llm.generate("Hello", max_new_tokens=12, top_k=1, stream=True))]
    return texts, llm.generate("Hi", max_new_tokens=4, top_k=1, return_as_token_ids=True).tolist()


def one_line(folder: Path) -> Any:
    """LitGPT takes bfloat16 by itself, so that only the way is compared."""
    from litgpt import LLM

    llm = LLM.load(str(folder / "lit32"))
    note(llm.model)
    return llm.generate("What do llamas eat?", max_new_tokens=12, top_k=1, return_as_token_ids=True).shape


def generate_script(folder: Path) -> Any:
    from litgpt.generate.base import main

    with contextlib.redirect_stdout(io.StringIO()) as out:
        main(folder / "lit", prompt="Hello", max_new_tokens=8, top_k=1, precision="32-true")
    return out.getvalue()


def chat_script(folder: Path) -> Any:
    from litgpt.chat.base import main

    kept = sys.stdin
    sys.stdin = io.StringIO("What do llamas eat?\n\n")
    try:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            main(folder / "lit", max_new_tokens=8, top_k=1, precision="32-true")
    finally:
        sys.stdin = kept
    return [line for line in out.getvalue().splitlines() if "sec" not in line]


def weights_changed(folder: Path) -> Any:
    """Equal weights of the file, which LitGPT does not tie."""
    model = _load(folder).model
    before = _logits(model)
    model.lm_head.weight.data.mul_(0.5)
    return (
        before,
        _logits(model),
        model.transformer.wte.weight[:2],
        model.lm_head.weight is model.transformer.wte.weight,
    )


def weights_shared(folder: Path) -> Any:
    model = _load(folder).model
    model.lm_head.weight = model.transformer.wte.weight
    model.transformer.wte.weight.data.mul_(0.5)
    return _logits(model), model.lm_head.weight.data_ptr() == model.transformer.wte.weight.data_ptr()


def training_loop(folder: Path) -> Any:
    model = _load(folder).model
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for _ in range(4):
        logits = model(IDS)
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, _logits(model)


def pretraining_with_fabric(folder: Path) -> Any:
    """LitGPT's own way to begin from a checkpoint."""
    from lightning import Fabric
    from litgpt import GPT, Config
    from litgpt.utils import chunked_cross_entropy

    fabric = Fabric(accelerator="cpu", devices=1, precision="32-true")
    fabric.launch()
    with fabric.init_module():
        model = GPT(Config.from_file(folder / "lit" / "model_config.yaml"))
    model = fabric.setup(model)
    optimizer = fabric.setup_optimizers(torch.optim.AdamW(model.parameters(), lr=1e-3))
    fabric.load_raw(folder / "lit" / "lit_model.pth", model)
    losses = []
    for _ in range(3):
        loss = chunked_cross_entropy(model(IDS)[:, :-1], IDS[:, 1:], chunk_size=0)
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    fabric.save(folder / "fabric.pth", {"model": model})
    return losses, sorted(torch.load(folder / "fabric.pth", weights_only=False)["model"])[:3]


def saved(folder: Path) -> Any:
    llm = _load(folder)
    torch.save(llm.model.state_dict(), folder / "lit_state.pth")
    state = torch.load(folder / "lit_state.pth", weights_only=True)
    other = _load(folder).model
    other.load_state_dict({name: 0.5 * tensor for name, tensor in state.items()})
    return _logits(other), sorted(state)


def hooked(folder: Path) -> Any:
    llm = _load(folder)
    for block in llm.model.transformer.h:
        block.mlp.register_forward_hook(lambda module, args, output: 0.5 * output)
    llm.model.transformer.h[0].attn.proj.register_forward_pre_hook(lambda module, args: (args[0] + 0.25,))
    return llm.generate("Hello", max_new_tokens=8, top_k=1), _logits(llm.model)


def forwards_replaced(folder: Path) -> Any:
    from litgpt.model import LLaMAMLP

    llm = _load(folder)
    kept = LLaMAMLP.forward
    try:
        LLaMAMLP.forward = lambda self, x: self.proj(torch.tanh(self.fc_2(x)))  # type: ignore[method-assign]
        return llm.generate("Hello", max_new_tokens=8, top_k=1), _logits(llm.model)
    finally:
        LLaMAMLP.forward = kept  # type: ignore[method-assign]


def manual_decoding(folder: Path) -> Any:
    model = _load(folder).model
    model.max_seq_length = 32
    model.set_kv_cache(batch_size=1)
    ids, positions, found = IDS[:1], torch.arange(8), []
    with torch.inference_mode():
        for _ in range(6):
            ids = model(ids, input_pos=positions)[:, -1:].argmax(-1)
            positions = positions[-1:] + 1
            found.append(int(ids))
    model.clear_kv_cache()
    return found, _logits(model)
