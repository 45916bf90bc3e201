"""Metrics, figures, report."""
