"""Policies: which classes of operations run in float32."""

from upcast.errors import UpcastError

POLICIES = {
    "safe": "every operation runs in float32; only weights at rest are float16",
}


def check(policy: str) -> str:
    """Return ``policy`` when it names a known policy, else raise UpcastError with the valid names."""
    if policy in POLICIES:
        return policy
    valid = "; ".join(f"{name!r}: {meaning}" for name, meaning in POLICIES.items())
    raise UpcastError(f"policy {policy!r}; it must be one of {valid}. Use policy='safe' when in doubt.")
