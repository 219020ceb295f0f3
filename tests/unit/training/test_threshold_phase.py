"""The last part of a run picks by thresholds: as many tokens as lie above them, not a fixed number."""

from __future__ import annotations

from megatron_itt.model.routing import count_selected, select_above, threshold_for
from tests.helpers.one_rank import opened, tiny_recipe
from tests.helpers.steps import microbatches


def test_the_phase_picks_what_lies_above_the_thresholds_of_the_step_before() -> None:
    from megatron_itt.training.step import train_step

    config = tiny_recipe(thinking={"threshold_phase": 0.5}, schedule={"steps": 4, "warmup_steps": 1})
    with opened(config) as trainer:
        free = 0  # choices of another number of tokens than top-k's
        for step in range(1, 5):
            layers = trainer.built.thinking_layers()
            tables = {layer.layer_idx: layer.thinking.logit_quantiles.clone() for layer in layers}
            recorder = train_step(trainer, iter(microbatches(trainer, step)), step, log_routing=True).recorder
            assert recorder is not None and recorder.records
            for (_, layer_idx, routed_step), record in recorder.records.items():
                share = config.thinking.nominal_capacity[routed_step - 1]
                counts = record.selected.sum(dim=0)
                fixed = bool((counts == count_selected(share, config.model.seq_length)).all())
                if step > 2:
                    free += not fixed
                    tau = threshold_for(share, tables[layer_idx][routed_step - 1])
                    assert record.selected.equal(select_above(record.logits, tau))
                else:
                    assert fixed
        assert free > 0
