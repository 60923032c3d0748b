"""Drop-in sampling layers for PyTorch: swap the gradient estimator by changing one word."""
