"""Release of megatron-core's list of process groups, which `destroy_model_parallel` keeps.

A gloo group keeps its threads for as long as anything refers to it. Undo: none is needed, `initialize_model_parallel`
starts a new list.
"""

from __future__ import annotations

VERSIONS = {"megatron-core": ">=0.16,<0.20"}


def release_process_groups() -> None:
    """Drop the list after the groups have been destroyed."""
    from megatron.core import parallel_state

    parallel_state._global_process_group_list = None
