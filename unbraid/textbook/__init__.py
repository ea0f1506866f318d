"""Gradient descent on a line and on small surfaces: the experiments and figures of the textbook chapter."""
