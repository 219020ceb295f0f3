"""Checkpoints: `store.py` keeps them, `state.py` says what is in them, `save.py` and `load.py` move them."""
