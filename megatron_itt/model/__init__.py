"""The Inner Thinking Transformer as megatron-core layer specs.

Pure maths in `routing.py` and `thinking.py`; modules in `router.py`, `layer.py`, `loop_layer.py`, `native.py`; assembly in
`specs.py`, `builder.py` and `initialisation.py`; what a forward pass may be told and asked in `trace.py`.
"""
