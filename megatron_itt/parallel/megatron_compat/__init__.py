"""All patches of torch and megatron-core, one module each.

Each module states in `VERSIONS` the releases it is for and in its docstring when it is undone. Remove a patch here when
a new release makes it unnecessary; nothing else in the package replaces an attribute of torch or megatron-core.
"""

from __future__ import annotations

import contextlib
from typing import Any


class Replacements(contextlib.ExitStack):
    """Replaced attributes of modules, classes and objects, which `close` restores."""

    def replace(self, owner: Any, **substitutes: Any) -> None:
        """Set attributes of `owner`; inherited ones are removed again on restoring."""
        for name, substitute in substitutes.items():
            if name in vars(owner):
                self.callback(setattr, owner, name, vars(owner)[name])
            else:
                self.callback(delattr, owner, name)
            setattr(owner, name, substitute)
