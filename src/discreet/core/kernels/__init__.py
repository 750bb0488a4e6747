"""Kernels: in Triton for an accelerator, in compiled C for a processor. No Gram matrix is written to memory whole."""
