"""What upcast knows of other libraries: how they load models."""
