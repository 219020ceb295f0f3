"""Operations of the routed step that torch has no fast form of: pure functions of tensors, without weights.

Each has a form in plain torch, and one in Triton for NVIDIA GPUs; tests compare both with the plainest way to say it.
"""

from __future__ import annotations
