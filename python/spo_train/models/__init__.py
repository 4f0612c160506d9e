"""Models that `spo-train` can load."""
