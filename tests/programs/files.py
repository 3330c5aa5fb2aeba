"""Programs that save, load, copy and read raw memory."""

import copy
import hashlib
import io
import pickle
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from tests.programs.checkpoints import IDS, load


def _output(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits[:, -1, :8]  # type: ignore[no-any-return]


def _sums(tensors: dict[str, Tensor]) -> Any:
    return {name: (str(tensor.dtype), tensor.float().sum(), tensor.float().norm()) for name, tensor in tensors.items()}


def save_file_of_parameters(folder: Path) -> Any:
    from safetensors.torch import load_file, save_file

    model = load(folder)
    save_file(dict(model.named_parameters()), folder / "parameters.safetensors")
    return _sums(load_file(folder / "parameters.safetensors"))


def save_file_of_pieces(folder: Path) -> Any:
    from safetensors.torch import load_file, save_file

    layer = load(folder).model.layers[0].mlp.up_proj
    save_file({"detached": layer.weight.detach()}, folder / "detached.safetensors")
    save_file({"data": layer.weight.data}, folder / "data.safetensors")
    save_file({"rows": layer.weight[8:16]}, folder / "rows.safetensors")
    pieces = {
        "columns": layer.weight[:, 3:9].contiguous(),
        "turned": layer.weight.t().contiguous(),
        "copy": layer.weight.clone(),
        "half": layer.weight.half(),
    }
    save_file(pieces, folder / "pieces.safetensors")
    files = ("detached", "data", "rows", "pieces")
    return [load_file(folder / f"{file}.safetensors") for file in files]


def save_model_and_load_model(folder: Path) -> Any:
    from safetensors.torch import load_model, save_model

    model, again = load(folder, "tied"), load(folder, "tied")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0] = 0.25
    save_model(model, str(folder / "model.safetensors"))
    load_model(again, str(folder / "model.safetensors"))
    return _output(model), _output(again)


def hub_save(folder: Path) -> Any:
    from huggingface_hub import load_torch_model, save_torch_model, save_torch_state_dict

    model, again = load(folder), load(folder)
    nn.init.constant_(model.lm_head.weight, 0.125)
    for name in ("hub", "hub_state"):
        (folder / name).mkdir(exist_ok=True)
    save_torch_model(model, folder / "hub")
    save_torch_state_dict(model.state_dict(), folder / "hub_state")
    load_torch_model(again, folder / "hub")
    return _output(again), sorted(path.name for path in (folder / "hub_state").iterdir())


def torch_save_of_a_parameter(folder: Path) -> Any:
    weight = load(folder).lm_head.weight
    torch.save(weight, folder / "weight.pt")
    again = torch.load(folder / "weight.pt", weights_only=True)
    return type(again).__name__, again.requires_grad, again[:2]


def torch_save_of_a_state_dict(folder: Path) -> Any:
    model, again = load(folder), load(folder)
    with torch.no_grad():
        model.lm_head.weight *= 0.5
    torch.save(model.state_dict(), folder / "state.pt")
    again.load_state_dict(torch.load(folder / "state.pt", weights_only=True))
    return _output(again), list(model.state_dict())


def torch_save_of_a_model(folder: Path) -> Any:
    model = load(folder, "gpt2")
    torch.save(model, folder / "whole.pt")
    again = torch.load(folder / "whole.pt", weights_only=False)
    return _output(again), again.lm_head.weight is again.transformer.wte.weight


def pickled(folder: Path) -> Any:
    model = load(folder)
    return _output(pickle.loads(pickle.dumps(model))), pickle.loads(pickle.dumps(model.lm_head.weight[:2]))


def save_pretrained(folder: Path) -> Any:
    model = load(folder, "mixtral")
    model.lm_head.weight.data.mul_(0.5)
    model.save_pretrained(folder / "saved")
    again = load(folder, "saved")
    return _output(model), _output(again), model.config.dtype, again.config.dtype


def save_pretrained_of_a_cast_model(folder: Path) -> Any:
    model = load(folder).to(torch.bfloat16)
    model.save_pretrained(folder / "bfloat16")
    return str(model.dtype), model.config.dtype, _output(load(folder, "bfloat16"))


def copies(folder: Path) -> Any:
    model = load(folder, "tied")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.zero_()
    layer = copy.deepcopy(model.model.layers[0])
    layer.mlp.up_proj.weight.data.fill_(1)
    return _output(model), _output(twin), twin.lm_head.weight is twin.model.embed_tokens.weight


def numpy_reads(folder: Path) -> Any:
    weight = load(folder).lm_head.weight
    arrays = [weight.detach().numpy(), numpy.asarray(weight.detach()), weight.detach().cpu().numpy().T]
    arrays.append(weight.data[3].numpy())
    return [(str(array.dtype), array.shape, float(array.sum()), array.nbytes) for array in arrays]


def numpy_writes(folder: Path) -> Any:
    model = load(folder)
    model.lm_head.weight.data.numpy()[5] = 1
    model.model.norm.weight.detach().numpy()[:] *= 2
    array = model.model.layers[0].mlp.up_proj.weight.detach().numpy()
    array += 0.25
    return _output(model), model.lm_head.weight[4:7]


def dlpack(folder: Path) -> Any:
    model = load(folder)
    shared = torch.from_dlpack(model.lm_head.weight.detach())
    shared[5] = 1
    array = numpy.from_dlpack(model.model.embed_tokens.weight.detach())
    return str(shared.dtype), float(array.sum()), _output(model)


def checksums(folder: Path) -> Any:
    model = load(folder)
    return {
        name: hashlib.sha256(weight.detach().numpy().tobytes()).hexdigest()
        for name, weight in model.named_parameters()
        if "layers.0" in name
    }


def addresses(folder: Path) -> Any:
    """Which weights are one: as savers find out."""
    model, other = load(folder, "tied"), load(folder)
    pair = (model.lm_head.weight, model.model.embed_tokens.weight)
    apart = (other.lm_head.weight, other.model.embed_tokens.weight)
    return [(a is b, a.data_ptr() == b.data_ptr(), a.untyped_storage().nbytes()) for a, b in (pair, apart)]


def soup(folder: Path) -> Any:
    """The mean of two models' state dicts."""
    model, other = load(folder), load(folder)
    with torch.no_grad():
        other.lm_head.weight.mul_(3)
    first, second = model.state_dict(), other.state_dict()
    model.load_state_dict({name: 0.5 * (first[name] + second[name]) for name in first})
    return _output(model)


def write_through_the_state_dict(folder: Path) -> Any:
    model = load(folder)
    state = model.state_dict()
    state["lm_head.weight"].copy_(torch.full((300, 32), 0.125))
    state["model.layers.0.mlp.up_proj.weight"][:4] = 0
    return _output(model)


def a_buffer_of_bytes(folder: Path) -> Any:
    model = load(folder)
    file = io.BytesIO()
    torch.save([p.detach() for p in model.parameters()], file)
    file.seek(0)
    return [tensor.sum() for tensor in torch.load(file, weights_only=True)]


def numpy_archive(folder: Path) -> Any:
    model = load(folder)
    numpy.savez(folder / "weights.npz", **{name: p.detach().numpy() for name, p in model.named_parameters()})
    stored = numpy.load(folder / "weights.npz")
    return {name: (str(stored[name].dtype), float(stored[name].sum())) for name in stored.files}


def two_processes(folder: Path) -> Any:
    """A model handed to a spawned process, and collectives of the two."""
    from torch import distributed, multiprocessing

    context = multiprocessing.get_context("spawn")
    model = load(folder).eval()
    answers, store = context.SimpleQueue(), str(folder / "store")
    Path(store).unlink(missing_ok=True)
    worker = context.Process(target=_worker, args=(model, store, answers))
    worker.start()
    model = copy.deepcopy(model)  # the worker has the same memory
    with torch.no_grad():
        model.lm_head.weight[:150] = 0.125
    _collectives(model, store, 0)
    distributed.destroy_process_group()
    found = [torch.tensor(each) for each in answers.get()]
    worker.join()
    return found, _output(model)


def _worker(model: Any, store: str, answers: Any) -> None:
    torch.set_num_threads(1)
    model, before = copy.deepcopy(model), _output(model)
    with torch.no_grad():
        model.model.norm.weight.fill_(0.5)
    _collectives(model, store, 1)
    answers.put([before.tolist(), _output(model).tolist()])


def _collectives(model: Any, store: str, rank: int) -> None:
    """Rank 0's weights for both, and the mean of their norms."""
    from torch import distributed

    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    with torch.no_grad():
        distributed.broadcast(model.lm_head.weight, src=0)
        distributed.broadcast(model.model.layers[0].mlp.up_proj.weight.data, src=1)
        for weight in (model.model.norm.weight, model.model.layers[1].mlp.down_proj.weight):
            distributed.all_reduce(weight)
            weight.div_(2)
    distributed.barrier()
