"""Training: `assemble.py` puts the parts together, `loop.py` runs them, `step.py` is one optimizer step."""
