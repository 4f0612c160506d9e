"""Adapters for the trainers of other projects. Nothing here is imported by `import spo_kernels`."""
