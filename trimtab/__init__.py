"""Small surfaces that steer big training runs. Import the part you need, e.g. `trimtab.optim`."""

__version__ = "0.1.0"
