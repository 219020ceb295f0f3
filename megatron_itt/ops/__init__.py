"""Operations on tensors that PyTorch has no fast form of: pure functions without weights.

Each file `NAME.py` holds the eager PyTorch form, and `NAME_triton.py` beside it the kernels for NVIDIA GPUs.
"""
