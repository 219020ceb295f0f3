"""A cluster job before it starts: plan, checks, claim on the run folder, snapshot of code and recipe. No torch."""
