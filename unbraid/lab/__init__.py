"""The laboratory: gradient descent on a line, and the same instruments on real separators."""
