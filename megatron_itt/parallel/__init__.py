"""Process groups, sequence sharding, seeding, and all patches of torch and megatron-core."""
