"""Hardware of a run: device, memory, processes, sharded layers."""
