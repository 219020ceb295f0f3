"""The Inner Thinking Transformer as megatron-core layer specs.

Pure maths in `routing.py` and `thinking.py`; modules in `router.py`, `layer.py`, `routed_attention.py`, `loop_layer.py`
and `native.py`; assembly in `parts.py`, `specs.py`, `builder.py`, `initialisation.py`; what a forward pass is told and
asked in `trace.py`; inference thresholds in `quantiles.py`.
"""
