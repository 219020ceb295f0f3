"""Process groups, seeding, and megatron-core on machines without a GPU."""
