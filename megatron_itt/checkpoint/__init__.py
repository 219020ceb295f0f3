"""Checkpoints: where they lie (`layout.py`), what is in them (`state.py`), writing and reading, and who may load them."""
