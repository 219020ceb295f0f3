"""Looking at a run and an export: measuring (`collect.py`, `passage.py`) and showing (`svg.py`, `report.py`).

Works on run folders and exported Hugging Face folders only. No megatron in here.
"""

from __future__ import annotations
