"""Generate text with an exported model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_itt.commands.arguments import Fractions
from megatron_itt.hf.options import GenerationOptions

EXAMPLES = '  itt generate --model runs/quickstart/hf --prompt "def main" --budget 0.5,0.5,0.5'


@dataclass(frozen=True, kw_only=True)
class Generate(GenerationOptions):
    model: Path  # exported folder
    prompt: str  # the text to continue
    budget: Fractions = None

    def execute(self) -> int:
        from megatron_itt.hf.generation import generate_text

        generated = generate_text(self.model, self.prompt, self)
        print(f"{self.prompt}{generated.text}")
        if generated.thinking:
            print("\nrouted steps per thinking layer, and their sum:")
            for token in generated.thinking:
                mark = " " if token.prompt else "+"
                print(f"{mark} {token.text!r:<20} {' '.join(str(count) for count in token.steps)}  {sum(token.steps)}")
        return 0


COMMAND = Generate
