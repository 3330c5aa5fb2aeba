"""What every layer stands on: errors, environment, messages, modules, forwards, extensions; it names no library."""
