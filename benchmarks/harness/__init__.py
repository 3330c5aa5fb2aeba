"""How it is measured: processes, memory, machines, figures, tables and pictures."""
