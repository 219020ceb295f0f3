"""Checkpoints: where they lie (`layout.py`), what is in them (`state.py`), saving, loading, who may load them."""
