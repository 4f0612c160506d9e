"""GPU kernels without a GPU: models of their compiled code, and a count of their lines that the emulator runs."""
