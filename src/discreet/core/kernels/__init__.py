"""Norms and sums on an accelerator, in Triton: no Gram matrix and no wide copy of an operand is written to memory."""
