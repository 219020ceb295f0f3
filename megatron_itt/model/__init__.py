"""The Inner Thinking Transformer as megatron-core layer specs.

Pure functions: `routing.py` (which tokens) and `step_update.py` (how they change). Modules: `thinking_layer.py`,
`attention.py`, `router.py`, `backends.py`. Assembly: `specs.py`, `builder.py`, `initialisation.py`. Control and
recording of a forward pass: `routing_control.py`; thresholds for inference: `quantiles.py`.
"""
