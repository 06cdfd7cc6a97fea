"""The machine under a run: device, memory, processes, layers sharded over them."""
