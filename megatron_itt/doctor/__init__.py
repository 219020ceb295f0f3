"""Looks at a machine before it trains: packages, folders and clocks, GPUs, and the links between processes."""
