"""What upcast is called where it is published, and its version; pyproject.toml reads it from here."""

DISTRIBUTION = "torch-upcast"  # `upcast` on PyPI is another project
VERSION = "0.1.0"
