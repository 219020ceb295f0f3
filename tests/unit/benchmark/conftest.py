"""What the tests of this folder share."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def quick_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure the ceiling of MFU with small products for a short time: its figures are of no interest here."""
    monkeypatch.setattr("megatron_itt.benchmark.machine.PRODUCTS", {"cpu": ((256, 256, 256),)})
    monkeypatch.setattr("megatron_itt.benchmark.machine.MEASURED_S", 0.01)
