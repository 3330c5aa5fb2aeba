"""Which versions are run: the declared ranges of pyproject.toml are from the first to the last of each library."""

from typing import NamedTuple


class Row(NamedTuple):
    """One environment: what is installed into it beside what .venv has, and which check it runs."""

    library: str
    version: str
    beside: tuple[str, ...] = ()  # other packages of a certain version
    alone: bool = False  # without its dependencies, whose pins are of its day

    @property
    def name(self) -> str:
        """Return how the row is called on the command line."""
        return f"{self.library}-{self.version}"

    @property
    def packages(self) -> list[str]:
        """Return what pip is to install."""
        return [f"{self.library}=={self.version}", *self.beside]


LITGPT = (
    *("0.4.11", "0.4.12", "0.4.13", "0.5.0", "0.5.1", "0.5.2", "0.5.3", "0.5.4", "0.5.5", "0.5.6", "0.5.7", "0.5.8"),
    *("0.5.9", "0.5.10", "0.5.11", "0.5.12", "0.5.13"),
)
TRANSFORMERS = (
    *("4.51.3", "4.53.3", "4.54.1", "4.55.4", "4.56.2", "4.57.6"),
    *("5.0.0", "5.3.0", "5.8.1", "5.12.1", "5.16.1", "5.20.2", "5.22.2", "5.24.0"),
)
# The two that lie on every machine that builds upcast come first; builds with CUDA take 6 GB each while they are run.
TORCH = ("2.13.0", "2.8.0", "2.9.1", "2.10.0", "2.11.0", "2.12.1", "2.14.1")

ROWS = (
    *(Row("litgpt", version, alone=True) for version in LITGPT),
    *(Row("transformers", version) for version in TRANSFORMERS),
    *(Row("diffusers", version) for version in ("0.36.0", "0.38.0")),
    Row("diffusers", "0.42.1", ("transformers==5.24.0",)),  # both with today's huggingface-hub
    Row("peft", "0.17.1", ("transformers==4.57.6",)),  # it does not import under Transformers 5
    Row("peft", "0.21.2"),
    *(Row("accelerate", version) for version in ("1.8.1", "1.15.0")),
    *(Row("torch", version) for version in TORCH),
)
