"""What privacy costs: one private update over one ordinary update. See ``python -m bench.engine --help``."""
