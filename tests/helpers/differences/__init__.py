"""Compare losses and gradients of this package with those of Pyro, program by program."""
