"""What becomes of a model: the plan, the transaction that carries it out, and what is installed beside the weights."""
