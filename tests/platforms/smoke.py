"""An installed wheel, tried in an environment that has torch and wrapt beside it: run by tools/wheels.py."""

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch

import upcast
from upcast import kernels


def runs(*command: str, **variables: str) -> str:
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=os.environ | variables)
    assert done.returncode == 0, done.stderr
    return done.stdout


def main() -> None:
    assert Path(upcast.__file__).is_relative_to(sys.prefix), f"not the wheel's: {upcast.__file__}"
    assert version("torch-upcast") == upcast.__version__
    assert kernels.describe().startswith("native"), kernels.describe()

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(96, 200), torch.nn.GELU(), torch.nn.Linear(200, 7))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half() if parameter.dim() > 1 else parameter)
    x = torch.randn(5, 96)
    with torch.no_grad():
        wanted = model(x)
        upcast.patch(model)
        assert type(model[0].weight) is upcast.HalfWeight
        for level in kernels.native.info()["available"]:
            kernels.native.set_isa(level)
            torch.testing.assert_close(model(x), wanted)

    scripts = Path(sys.executable).parent
    for command in ("upcast", "torch-upcast"):
        assert f"{upcast.__version__} on Python" in runs(str(scripts / command), "status")
    assert "upcast.pth" in runs(sys.executable, "-m", "upcast", "status")
    started = "import sys; print(sorted({'_upcast_startup', 'torch', 'upcast', 'wrapt'} & sys.modules.keys()))"
    assert runs(sys.executable, "-c", started, UPCAST="1").strip() == "['_upcast_startup', 'wrapt']"
    for off in ("", "0"):  # it waits for Transformers, and costs nothing
        assert runs(sys.executable, "-c", started, UPCAST=off).strip() == "['_upcast_startup']"


if __name__ == "__main__":
    main()
