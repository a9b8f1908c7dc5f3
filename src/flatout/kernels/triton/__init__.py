"""The fast GPU kernels, in Triton. tests/kernels compares each with plain PyTorch, in the interpreter."""
