"""What upcast knows of other libraries; importing this registers it (see `upcast.core.extensions`)."""

import upcast.integrations.adapters
import upcast.integrations.lightning.wrapper
import upcast.integrations.litgpt.install
import upcast.integrations.transformers.install  # noqa: F401
