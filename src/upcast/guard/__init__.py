"""guard, heal and headroom: a patched model whose numbers are looked at while it runs."""
