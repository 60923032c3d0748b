"""A generic VAE on Lightning that trains any stochastic layer."""
