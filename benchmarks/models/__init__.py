"""Models of the kernels without a GPU: what compilers made of them, and which of their lines the emulator runs."""
