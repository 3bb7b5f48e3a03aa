"""Neural networks: policies, critics, action distributions, running statistics, optimizers, schedules."""
