"""Windows has none of what is hidden here: simulated, in a process of its own that runs on the portable kernels."""

from pathlib import Path

import pytest
import torch

from tests.conftest import Run
from tests.litgpt_checkpoints import small_config, write_checkpoint

pytest.importorskip("litgpt")

HIDE = """
import importlib.abc, mmap, os, sys, types
import litgpt, torch, transformers  # these know where they are
import torch.distributed
if hasattr(torch.distributed, "HashStore"):
    del torch.distributed.HashStore, torch._C._distributed_c10d.HashStore

class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name in ("fcntl", "resource", "upcast.kernels._native"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

for name in ("fcntl", "resource"):
    sys.modules.pop(name, None)
sys.meta_path.insert(0, Hidden())
for name in ("posix_fallocate", "posix_fadvise", "register_at_fork", "sysconf", "memfd_create", "pread", "pwrite",
             "fork", "O_DIRECTORY", "O_NOFOLLOW", "O_CLOEXEC", "getuid", "sched_getaffinity"):
    delattr(os, name)
for name in [name for name in vars(mmap) if name.startswith(("MADV_", "MAP_", "PROT_"))]:
    delattr(mmap, name)
sys.modules["msvcrt"] = types.SimpleNamespace(LK_NBLCK=2, locking=lambda *_: None)
from pathlib import Path
exists = Path.exists
Path.exists = lambda self, **how: not str(self).startswith("/proc") and exists(self, **how)
import upcast
from upcast import kernels
assert kernels.name() == "portable"
"""

USES = {
    "patching": """
model = torch.nn.Linear(8, 4)
upcast.patch(model)
assert type(model.weight) is upcast.HalfWeight and model(torch.randn(2, 8)).dtype == torch.float32
upcast.unpatch(model)
""",
    "loading a checkpoint": """
model = upcast.load_litgpt("checkpoint")
assert type(model.lm_head.weight) is upcast.HalfWeight
model(torch.arange(5).view(1, 5))
model = upcast.load_litgpt("experts")
with torch.inference_mode():
    model(torch.arange(5).view(1, 5))
llm = litgpt.LLM.load("checkpoint")
upcast.patch(llm.model)
for _ in range(2):
    llm.generate("What do Llamas eat?", max_new_tokens=3)
""",
    "convert": """
from upcast.cli.main import main
assert main(["convert", "checkpoint", "--output", "half"]) == 0
assert main(["convert", "checkpoint", "--output", "half"]) == 0  # it is there
assert type(upcast.load_litgpt("half").lm_head.weight) is upcast.HalfWeight
""",
    "Transformers": """
config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=50)
transformers.GPT2LMHeadModel(config).save_pretrained("gpt2")
model = upcast.from_pretrained(transformers.GPT2LMHeadModel, "gpt2")
assert type(model.transformer.wte.weight) is upcast.HalfWeight
model.generate(torch.arange(4).view(1, 4), max_new_tokens=3, do_sample=False)
""",
    "status": """
from upcast.cli.main import main
assert main(["status"]) == 0
""",
}


@pytest.mark.parametrize("use", USES)
def test_nothing_of_posix_is_needed(python_with_libraries: Run, tmp_path: Path, use: str) -> None:
    write_checkpoint(tmp_path / "checkpoint", small_config("pythia-160m"), torch.float32)
    write_checkpoint(tmp_path / "experts", small_config("Mixtral-8x7B-v0.1"))
    result = python_with_libraries("-c", HIDE + USES[use] + "print('finished')")
    assert result.stdout.endswith("finished\n"), result.stderr
