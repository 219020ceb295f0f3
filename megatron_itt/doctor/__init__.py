"""Health check of a machine: packages, folders and clocks, GPUs, and the links between ranks."""
