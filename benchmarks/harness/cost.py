"""A model of what decoding one token costs on several hosts: weights read, and sums between ranks.

Every rank reads its part of the active weights once, and between the halves of each block all ranks add up n_embd
float32 numbers. Short vectors are gathered, in R - 1 steps of a ring of R ranks; longer ones are added up on their way
around, in 2 (R - 1) steps with an R-th of the vector each (Patarasuk and Yuan 2009, doi:10.1016/j.jpdc.2008.09.002).
The logits are gathered. A step of gloo's is two messages one after the other: the receiver says that it is ready, then
the numbers come. The KV cache and computation are left out: a short context, one sequence.
"""

from dataclasses import dataclass

from upcast.distributed.collectives import SHORT

MESSAGES = 2  # in each step


@dataclass(frozen=True)
class Shape:
    """What the cost depends on: active float16 weights in bytes, stored ones, and the sizes of the communication."""

    name: str
    active_bytes: float
    stored_bytes: float
    layers: int
    width: int
    vocabulary: int
    sums_per_layer: int = 2


@dataclass(frozen=True)
class Network:
    """Between ranks: bit/s, seconds for one message, and seconds of work in each collective."""

    rate: float
    latency: float
    overhead: float = 0.0


# Public configurations; weights at two bytes. The last is a mixture of experts of a trillion, 32e9 of them active.
SHAPES = (
    Shape("7B", 13.5e9, 13.5e9, 32, 4096, 32_000),
    Shape("32B", 65e9, 65e9, 64, 5120, 152_064),
    Shape("70B", 141e9, 141e9, 80, 8192, 128_256),
    Shape("1T MoE, 32B active", 64e9, 2000e9, 61, 7168, 163_840),
)
HOSTS = (1, 2, 4, 8, 16)
# Assumed, not measured: the latency of a message through the kernel's TCP, and each host's memory bandwidth.
NETWORKS = {"1 Gbit/s": Network(1e9, 50e-6), "10 Gbit/s": Network(10e9, 30e-6), "100 Gbit/s": Network(100e9, 15e-6)}
MEMORY_RATE = 100e9  # bytes/s


def collectives(shape: Shape) -> int:
    """Sums per token: the embedding, the layers; the gather of the logits is counted apart."""
    return 1 + shape.sums_per_layer * shape.layers


def communication(shape: Shape, ranks: int, network: Network) -> float:
    """Return the seconds that one token spends between ``ranks``."""
    if ranks == 1:
        return 0.0
    steps, vector = ranks - 1, 4 * shape.width
    if ranks == 2 or vector <= SHORT:
        one = steps * _step(vector, network)
    else:
        one = 2 * steps * _step(vector / ranks, network)
    logits = steps * _step(4 * shape.vocabulary / ranks, network)
    return collectives(shape) * (one + network.overhead) + logits + network.overhead


def _step(size: float, network: Network) -> float:
    return MESSAGES * network.latency + 8 * size / network.rate


def seconds_per_token(shape: Shape, ranks: int, network: Network, memory_rate: float = MEMORY_RATE) -> float:
    """Return the predicted seconds per token; ``memory_rate`` in bytes/s of each rank."""
    return shape.active_bytes / ranks / memory_rate + communication(shape, ranks, network)


def table() -> str:
    """Return the predictions as Markdown: tokens/s, the best number of hosts in bold."""
    lines = [
        "| model | weights, GB | network |" + "".join(f" {n} |" for n in HOSTS),
        "| --- " * 2 + "| --- " * 6 + "|",
    ]
    for shape in SHAPES:
        for name, network in NETWORKS.items():
            rates = [1 / seconds_per_token(shape, hosts, network) for hosts in HOSTS]
            cells = [f"**{rate:.1f}**" if rate == max(rates) else f"{rate:.1f}" for rate in rates]
            lines.append(f"| {shape.name} | {shape.stored_bytes / 1e9:,.0f} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
