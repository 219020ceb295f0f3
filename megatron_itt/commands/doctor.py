"""Report packages, GPUs, folders and links of this machine, and what it costs to go without the missing ones.

Exit code 0: training can work here, possibly with warnings. 1: something required is missing or broken.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass

from megatron_itt.commands.arguments import Flag, Repeated
from megatron_itt.config import load_config
from megatron_itt.doctor.machine import diagnose, format_diagnosis

EXAMPLES = """
  itt doctor --json
  itt doctor --folder runs --recipe recipes/466m/itt_x4.yaml
  torchrun --nproc-per-node=8 tools/doctor.py --speed
"""


@dataclass(frozen=True, kw_only=True)
class Doctor:
    json: Flag = False  # print JSON
    folder: Repeated = ()  # measure the speed and clock of this folder
    recipe: str | None = None  # measure the folders that this recipe writes and reads
    speed: Flag = False  # measure GPUs, and the links between the ranks of this job

    def execute(self) -> int:
        recipe = load_config(self.recipe) if self.recipe else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # megatron-core warns about the same packages
            diagnosis = diagnose(self.folder, recipe=recipe, speed=self.speed)
        print(json.dumps(diagnosis, indent=2) if self.json else format_diagnosis(diagnosis))
        return 0 if diagnosis["is_healthy"] else 1


COMMAND = Doctor
