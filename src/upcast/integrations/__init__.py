"""What upcast knows of other libraries; importing this registers it (see `upcast.core.extensions`)."""

import upcast.integrations.adapters
import upcast.integrations.lightning.wrapper  # noqa: F401
from upcast.core.extensions import expect

# A model is one of the library's only where these modules are imported, so ours need not come before them.
expect("litgpt.model", "upcast.integrations.litgpt.install")
expect("transformers.modeling_utils", "upcast.integrations.transformers.install")
