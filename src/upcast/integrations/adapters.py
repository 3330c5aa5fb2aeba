"""What PEFT does with copies of weights, and what accelerate reads of them."""

from upcast.core.extensions import Extension, register


class Peft(Extension):
    """PEFT copies modules to save, and norms to tune: what it copies learns, or takes numbers that have."""

    name = "peft"
    copies_to_train = frozenset({"peft.utils.other", "peft.tuners.ln_tuning.layer"})


class Accelerate(Extension):
    """accelerate adds up memory by dtype, to place modules on devices."""

    name = "accelerate"
    reports_sizes = {"compute_module_sizes": "accelerate.utils.modeling"}  # noqa: RUF012


register(Peft())
register(Accelerate())
