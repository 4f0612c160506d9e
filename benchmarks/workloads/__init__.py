"""What is measured, one module a workload: its row, inputs, truth, and the entries that are timed."""
