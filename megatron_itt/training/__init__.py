"""Training: `trainer.py` assembles, `loop.py` runs, `step.py` is one optimizer step."""
