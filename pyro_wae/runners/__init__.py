"""How a step is run: as it is, in micro-batches, over ranks."""
