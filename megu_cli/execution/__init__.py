"""Where and how to compute: device, seeds, progress, the processes that share the work."""
