"""What upcast knows of other libraries; importing this registers it (see `upcast.extensions`)."""

from upcast.integrations import adapters, fabric_module, litgpt_fused, transformers_fused

__all__ = ["adapters", "fabric_module", "litgpt_fused", "transformers_fused"]
