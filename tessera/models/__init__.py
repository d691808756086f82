"""Networks: `network(x, t, condition) -> raw`. They know nothing of noise schedules, devices or sharding."""
