"""Drawing measurement files with matplotlib: one function per kind (`draw.py` has the table), one style (`style.py`).

Nothing is measured here, and matplotlib is imported nowhere else.
"""

from __future__ import annotations
