"""Rules: how each function of a guarded parameter is computed, normed and summed. One file per family.

Importing this package registers them all.
"""

from discreet.core.rules import convolution, elementwise, embedding, linear, normalisation

__all__ = ["convolution", "elementwise", "embedding", "linear", "normalisation"]
