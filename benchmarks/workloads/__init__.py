"""The workloads. Each has its row of results, inputs, truth, and the calls that are timed."""
