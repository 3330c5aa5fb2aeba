"""Programs that train."""

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.programs.checkpoints import IDS, load

STEPS = 4


def _loop(model: Any, parameters: Iterable[Any] | None = None, steps: int = STEPS, lr: float = 0.01) -> list[float]:
    """The loop of every tutorial; the losses it saw."""
    optimizer = torch.optim.SGD(model.parameters() if parameters is None else parameters, lr=lr, momentum=0.9)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def _logits(model: Any) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(IDS).logits[:, -1, :8]  # type: ignore[no-any-return]


def plain_loop(folder: Path) -> Any:
    model = load(folder)
    model.train()
    return _loop(model), _logits(model)


def trained_as_it_is_loaded(folder: Path) -> Any:
    model = load(folder).train()
    return _loop(model), _logits(model)


def loop_without_train(folder: Path) -> Any:
    model = load(folder)
    return _loop(model), _logits(model)


def optimizer_before_train(folder: Path) -> Any:
    model = load(folder, "gpt2")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.eval()
    before = _logits(model)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    return before, _logits(model)


def by_hand_without_an_optimizer(folder: Path) -> Any:
    model = load(folder)
    model.train()
    losses = []
    for _ in range(STEPS):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(0.01 * parameter.grad)
                parameter.grad = None
        losses.append(loss.item())
    return losses


def gradients_without_a_step(folder: Path) -> Any:
    """Which weights matter: the squared gradients of a model in eval mode."""
    model = load(folder)
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {name: weight.grad.square().sum() for name, weight in model.named_parameters()}


def gradients_of_one_weight(folder: Path) -> Any:
    model = load(folder)
    weight = model.model.layers[1].mlp.down_proj.weight
    loss = model(input_ids=IDS, labels=IDS).loss
    return torch.autograd.grad(loss, weight)[0].norm()


def trainer(folder: Path) -> Any:
    from transformers import Trainer, TrainingArguments

    model = load(folder)
    settings: dict[str, Any] = {"max_steps": STEPS, "per_device_train_batch_size": 2, "learning_rate": 0.01}
    quiet: dict[str, Any] = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    arguments = TrainingArguments(str(folder / "trainer"), logging_steps=1, seed=0, **settings, **quiet)
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    learner = Trainer(model, arguments, train_dataset=rows)  # type: ignore[arg-type]
    learner.train()
    return [entry["loss"] for entry in learner.state.log_history if "loss" in entry], _logits(learner.model)


def accelerator(folder: Path) -> Any:
    from accelerate import Accelerator

    model = load(folder)
    worker = Accelerator(cpu=True)
    model, optimizer = worker.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    losses = []
    for _ in range(STEPS):
        with worker.accumulate(model):
            loss = model(input_ids=IDS, labels=IDS).loss
            worker.backward(loss)
            worker.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses, worker.unwrap_model(model).num_parameters(only_trainable=True)


def groups_schedule_and_clipping(folder: Path) -> Any:
    model = load(folder, "gpt2")
    model.train()
    plain = [p for name, p in model.named_parameters() if "bias" in name or "ln" in name]
    decayed = [p for name, p in model.named_parameters() if not ("bias" in name or "ln" in name)]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": plain}], lr=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    norms = []
    torch.manual_seed(1)
    for _ in range(STEPS):
        for row in IDS:
            (model(input_ids=row[None], labels=row[None]).loss / 2).backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.5).item())
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=False)
    return norms, _logits(model)


def head_on_a_frozen_body(folder: Path) -> Any:
    torch.manual_seed(3)
    model = load(folder, "bert", "AutoModelForSequenceClassification", num_labels=3)
    for parameter in model.base_model.parameters():
        parameter.requires_grad = False
    labels = torch.tensor([2, 0])
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(STEPS):
        loss = model(input_ids=IDS, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, [name for name, p in model.named_parameters() if p.requires_grad]


def a_head_of_ones_own(folder: Path) -> Any:
    body = load(folder, "vit", "AutoModel")
    head = nn.Linear(32, 3)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.01)
    pictures = torch.randn(4, 3, 16, 16)
    losses = []
    for _ in range(STEPS):
        with torch.no_grad():
            features = body(pictures).last_hidden_state[:, 0]
        loss = nn.functional.cross_entropy(head(features), torch.tensor([0, 1, 2, 0]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def last_layer_only(folder: Path) -> Any:
    model = load(folder)
    model.requires_grad_(False)
    model.model.layers[-1].requires_grad_(True)
    losses = _loop(model, [p for p in model.parameters() if p.requires_grad])
    return losses, sum(p.numel() for p in model.parameters() if p.requires_grad), _logits(model)


def biases_only(folder: Path) -> Any:
    model = load(folder, "gpt2").eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.endswith("bias")
    return _loop(model, filter(lambda p: p.requires_grad, model.parameters())), _logits(model)


def sentence_embeddings(folder: Path) -> Any:
    """Pull two sentences together, as sentence-transformers does."""
    model = load(folder, "bert", "AutoModel")
    model.eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    similarities = []
    for _ in range(STEPS):
        first, second = nn.functional.normalize(model(IDS).last_hidden_state.mean(1), dim=-1)
        similarity = first @ second
        (1 - similarity).backward()
        optimizer.step()
        optimizer.zero_grad()
        similarities.append(similarity.item())
    return similarities


def soft_prompt(folder: Path) -> Any:
    model = load(folder)
    model.requires_grad_(False)
    embedding = model.get_input_embeddings()
    prompt = nn.Parameter(embedding.weight[:5].clone())
    optimizer = torch.optim.Adam([prompt], lr=0.01)
    losses = []
    for _ in range(STEPS):
        inputs = torch.cat([prompt.expand(2, -1, -1), embedding(IDS)], dim=1)
        labels = torch.cat([torch.full((2, 5), -100), IDS], dim=1)
        loss = model(inputs_embeds=inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, prompt


def lora_and_a_saved_head(folder: Path) -> Any:
    """PEFT with modules_to_save, saved and put on a model loaded anew."""
    from peft import LoraConfig, PeftModel, get_peft_model

    settings = LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"], r=4, lora_dropout=0.0)
    model = get_peft_model(load(folder), settings)
    losses = _loop(model, [p for p in model.parameters() if p.requires_grad])
    model.save_pretrained(folder / "adapter")
    again = PeftModel.from_pretrained(load(folder), str(folder / "adapter"))
    return losses, model.get_nb_trainable_parameters(), _logits(model), _logits(again)


def lora_merged(folder: Path) -> Any:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(load(folder), LoraConfig(target_modules="all-linear", r=4, init_lora_weights=False))
    before = _logits(model)
    with torch.no_grad():
        return before, _logits(model.merge_and_unload())


def prompt_tuning(folder: Path) -> Any:
    from peft import PromptTuningConfig, TaskType, get_peft_model

    settings = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=4)
    model = get_peft_model(load(folder), settings)
    return _loop(model, [p for p in model.parameters() if p.requires_grad])


def mean_of_weights_while_training(folder: Path) -> Any:
    """An exponential moving average beside the model, as diffusion and vision trainings keep it."""
    model = load(folder)
    average = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(STEPS):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for kept, new in zip(average.parameters(), model.parameters(), strict=True):
                kept.mul_(0.5).add_(new, alpha=0.5)
    return _logits(model), _logits(average)


def averaged_model(folder: Path) -> Any:
    """torch's own AveragedModel."""
    model = load(folder)
    average = torch.optim.swa_utils.AveragedModel(model)
    losses = []
    for _ in range(2):
        losses += _loop(model, steps=1)
        average.update_parameters(model)
    return losses, _logits(average.module)


def distillation(folder: Path) -> Any:
    teacher, student = load(folder).eval(), load(folder, "tied")
    student.train()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01)
    losses = []
    for _ in range(STEPS):
        with torch.no_grad():
            wanted = teacher(IDS).logits.softmax(-1)
        loss = nn.functional.kl_div(student(IDS).logits.log_softmax(-1), wanted, reduction="batchmean")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def checkpointed_and_resumed(folder: Path) -> Any:
    model = load(folder)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, folder / "state.pt")
    again = load(folder)
    state = torch.load(folder / "state.pt", weights_only=True)
    again.load_state_dict(state["model"])
    optimizer = torch.optim.Adam(again.parameters(), lr=1e-3)
    optimizer.load_state_dict(state["optimizer"])
    again.train()
    again(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    return _logits(again)


def gradient_checkpointing(folder: Path) -> Any:
    model = load(folder)
    model.gradient_checkpointing_enable()
    model.train()
    return _loop(model), _logits(model)


def training_under_autocast(folder: Path) -> Any:
    model = load(folder)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(input_ids=IDS, labels=IDS)
    output.loss.backward()
    optimizer.step()
    return str(output.logits.dtype), output.loss, _logits(model)


def seq2seq_loop(folder: Path) -> Any:
    model = load(folder, "t5", "AutoModelForSeq2SeqLM")
    return _loop(model)


def mixture_loop(folder: Path) -> Any:
    model = load(folder, "mixtral")
    model.train()
    return _loop(model)


def recurrent_loop(folder: Path) -> Any:
    model = load(folder, "mamba")
    model.train()
    return _loop(model)


def distributed_on_one_rank(folder: Path) -> Any:
    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel

    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = DistributedDataParallel(load(folder))
        return _loop(model), _logits(model.module)
    finally:
        distributed.destroy_process_group()
