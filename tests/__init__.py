"""Tests, and the Kaggle of our own that they share."""
