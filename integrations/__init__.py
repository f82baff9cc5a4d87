"""One module per host trainer, each imported by its own name; this package imports none of them."""
