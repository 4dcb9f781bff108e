"""The whole loop of the paper as stages, sweeps over configs, reports."""
