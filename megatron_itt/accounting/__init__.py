"""What a recipe costs: parameters (`params.py`), FLOPs (`flops.py`), memory per rank (`memory.py`), all as one report.

Needs neither torch nor a GPU, so that a recipe can be costed on a login node. Nothing here measures;
`itt benchmark` does.
"""

from __future__ import annotations
