"""HalfWeight: a float32 tensor stored in float16, and what each torch function does with it."""

import upcast.kernels.custom_ops
import upcast.tensor.attention_ops
import upcast.tensor.composite_ops
import upcast.tensor.export
import upcast.tensor.matmul_ops
import upcast.tensor.memory_ops
import upcast.tensor.rnn_ops
import upcast.tensor.shallow_copy
import upcast.tensor.view_ops  # noqa: F401 - so that HalfWeight and torch.compile know the operations
