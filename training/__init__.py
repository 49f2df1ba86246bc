"""Configuration, clock, checkpoints, logs, signals, and the loop. Handed networks and a loader; never imports data."""
